"""What the tests of launchers share: files and a model on disk, lines to add read from the docs, scripts run."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import load_round
from mates_hf.round_record import RoundRecord

PAGE = Path(__file__).resolve().parents[2] / "docs" / "launchers.md"
SELECTS = "a run of it selects with what the page adds, by its settings"  # what a row of docs/settings.md proves
REDUCED = "[lines to add](launchers.md); tested with a copy reduced to its structure"
SMALLER = "update_steps=8, num_probes=60, first_round_steps=None, on_weak_signal='select'"  # than what the page says
TRAINER_FLAGS = {
    "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def write_inputs(folder: Path, model: Any, tokenizer: Any) -> None:
    """`MODEL` with its tokenizer, `train.jsonl` of two kinds of text, `passages.jsonl` of the second kind."""
    model.save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(low, low + 12, 16)) for low in (5, 40) for _ in range(300)]
    for name, chosen in (("train", rng.permutation(texts)), ("passages", texts[-20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))


def blocks(language: str, heading: str) -> list[str]:
    """Fenced blocks of a section of the page."""
    _, found, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, heading
    section = section.partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def patched(source: str, diff: str) -> str:
    """The script with a diff of the page applied; what it finds must be there once, line by line."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        assert lines
        assert all(line[:1] in "+- " for line in lines), hunk
        old = [line[1:] for line in lines if not line.startswith("+")]
        new = [line[1:] for line in lines if not line.startswith("-")]
        there = source.splitlines()
        places = [i for i in range(len(there) - len(old) + 1) if there[i : i + len(old)] == old]
        assert len(places) == 1, f"{len(places)} places for {old}"
        source = "\n".join([*there[: places[0]], *new, *there[places[0] + len(old) :]]) + "\n"
    return source


def smaller(source: str) -> str:
    """With rounds of a test's size."""
    assert source.count("update_steps=1_000") == 1
    return source.replace("update_steps=1_000", SMALLER)


def flags(**settings: Any) -> list[str]:
    """Settings as a command line has them."""
    return [part for name, value in {**TRAINER_FLAGS, **settings}.items() for part in (f"--{name}", str(value))]


def run_script(source: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script in this process as from a command line; returns its names."""
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    return runpy.run_path(str(script), run_name="__main__")


def selected_rounds(folder: Path) -> list[RoundRecord]:
    """Records of the rounds of a run, each of which selected."""
    records = [load_round(path) for path in sorted((folder / "_mates").glob("round-*"))]
    assert records
    assert [record.info["guard"]["decision"] for record in records] == ["select"] * len(records)
    return records
