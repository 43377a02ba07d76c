"""Scoring of files that is killed at any moment continues, and leaves the same files byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from mates_hf.selection.file_scoring import score_files
from mates_hf.selection.selector import MatesSelector
from tests.launch import ROOT, start_processes
from tests.selection.files_kit import content_of, kept_ids, text_selector, write_corpus
from tests.training import fit_kit

NUM_KILLS = int(os.environ.get("MATES_NUM_KILLS", "5"))
# What a person runs, with small bundles, and slow enough to be met in the middle of a file.
SCRIPT = """
import sys, time
from mates_hf.cli import main
from mates_hf.selection.files import json_files, lines, parquet_files, plan

def slowly(read):
    def reading(*arguments, **named):
        for item in read(*arguments, **named):
            time.sleep(float(sys.argv[1]))
            yield item
    return reading

plan._BUNDLE_FILES = 2
parquet_files.BATCH_BYTES = 4_000
lines.read_lines.__defaults__ = (2_000,)
parquet_files._batches = slowly(parquet_files._batches)
json_files.read_lines = slowly(lines.read_lines)
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def num_files(folder: Path) -> int:
    """Files that are whole."""
    return sum(path.is_file() and path.suffix != ".tmp" for path in folder.rglob("*"))


def started(script: Path, pause: float, arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), str(pause), *arguments], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments_it_leaves_the_same_bytes(tmp_path: Path):
    selector = text_selector()
    selector.save_pretrained(tmp_path / "selector")
    for name in ("x", "y", "z"):
        write_corpus(tmp_path / "in" / name, 60)
    bounds = {"group_column": "meta.n", "max_group_boost": 1.1, "min_group_boost": 0.9}
    score_files(selector, tmp_path / "in", tmp_path / "whole", ratio=0.3, **bounds)
    expected = content_of(tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    out = tmp_path / "out"
    given = ["score", str(tmp_path / "selector"), str(tmp_path / "in"), "--out", str(out), "--ratio", "0.3"]
    given += ["--group-column", "meta.n", "--max-group-boost", "1.1", "--min-group-boost", "0.9"]
    chance = random.Random(time.time_ns())
    stages: set[int] = set()
    for kill in range(NUM_KILLS):
        process = started(script, 0.04, given)
        begun = time.monotonic()
        until = max(num_files(out), 1) + chance.randrange(8)  # of some thirty
        while process.poll() is None and num_files(out) < until:
            assert time.monotonic() - begun < 120
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        stages.add(num_files(out))
        whole = content_of(out)
        for name in [name for name in whole if ".tmp" not in name]:
            assert whole[name] == expected[name], (kill, name)
    process = started(script, 0.0, given)
    assert process.wait(120) == 0, process.stderr and process.stderr.read().decode()
    found = content_of(out)
    assert {name: content for name, content in found.items() if not name.endswith(".tmp")} == expected
    assert not list(out.rglob("*.tmp"))
    assert len(stages) > 1


@pytest.mark.slow
def test_from_a_checkpoint_to_a_cut_corpus_killed_at_random_moments(tmp_path: Path):
    """`mates-hf fit`, then `mates-hf score`, of 20,000 texts: the rows of `filter`, as many as were asked for."""
    folder, texts = tmp_path / "data", fit_kit.make_texts(20_000)
    folder.mkdir()
    for part in range(8):
        rows = [{"id": i, "text": texts[i]} for i in range(part * 2_500, (part + 1) * 2_500)]
        if part % 2:
            fit_kit.write_jsonl(folder / f"{part}.jsonl.zst", rows)
        else:
            columns = {name: [row[name] for row in rows] for name in ("id", "text")}
            fit_kit.write_parquet(folder / f"{part}.parquet", columns)
    given = fit_kit.write_all(tmp_path / "inputs")
    options = {"model": given["model"], "pool": str(folder), "reference": given["reference"], **fit_kit.QUICK}
    fit = ["fit", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()), "--quiet", "--out"]
    whole = tmp_path / "selector"
    seconds = ended([*fit, str(whole)])
    chance = random.Random(time.time_ns())

    def same_selector(out: Path) -> None:
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    kill_often([*fit, str(tmp_path / "again")], seconds, max(1, NUM_KILLS // 4), chance, same_selector)
    score = ["score", str(tmp_path / "again"), str(folder), "--ratio", "0.2", "--out"]
    seconds = ended([*score, str(tmp_path / "whole")])
    kept = MatesSelector.from_pretrained(whole).filter(
        Dataset.from_dict({"text": texts, "id": range(20_000)}), k=4_000
    )

    def same_rows(out: Path) -> None:
        found = kept_ids(out)
        assert len(found) == len(kept) == 4_000
        assert found == sorted(kept["id"])
        assert content_of(out) == content_of(tmp_path / "whole")

    kill_often([*score, str(tmp_path / "out")], seconds, max(1, NUM_KILLS - NUM_KILLS // 4), chance, same_rows)


COMMAND = "import sys; from mates_hf.cli import main; sys.exit(main(sys.argv[1:]))"


def ended(arguments: list[str]) -> float:
    """Seconds that the command takes."""
    begun = time.monotonic()
    (process,) = start_processes(["-c", COMMAND, *arguments], 1, "")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return time.monotonic() - begun


def kill_often(
    arguments: list[str], seconds: float, kills: int, chance: random.Random, check: Callable[[Path], None]
) -> None:
    """Kill the command at random moments, and end it; it begins anew where it ended before it was killed."""
    out = Path(arguments[-1])
    while kills:
        (process,) = start_processes(["-c", COMMAND, *arguments], 1, "")
        try:
            errors = process.communicate(timeout=chance.uniform(0.1, seconds))[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
            continue
        assert process.returncode == 0, errors
        check(out)
        for folder in left_by(out):
            shutil.rmtree(folder)
    ended(arguments)
    check(out)


def left_by(out: Path) -> list[Path]:
    """What a command left."""
    return [folder for folder in (out, out.with_name(out.name + ".fit")) if folder.exists()]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path):
    text_selector().save_pretrained(tmp_path / "selector")
    for name in ("x", "y"):
        write_corpus(tmp_path / "in" / name, 60)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    given = ["score", str(tmp_path / "selector"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    process = started(script, 0.2, [*given, "--ratio", "0.3", "--workers", "2"])
    begun = time.monotonic()
    children: list[int] = []
    while len(children) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() - begun < 120
        time.sleep(0.2)
        children = children_of(process.pid)
    time.sleep(1)
    process.kill()
    process.wait()
    while any(is_running(child) for child in children):
        assert time.monotonic() - begun < 150
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    """Worker processes; the tracker of shared resources is none."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
