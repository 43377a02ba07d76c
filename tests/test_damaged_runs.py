"""A run whose files were cut short, changed or deleted: each command says so in one line, and ends with 1 or 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import MatesCallback
from mates_hf.cli import main
from mates_hf.cli.damage import find_damage
from tests.training.kit import make_arguments, make_reference, run, small_config
from tests.training.test_groups import collate, grouped

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "round": lambda path: ["round", str(path)],
    "round, as JSON": lambda path: ["round", str(path), "--json"],
    "verify": lambda path: ["verify", str(path)],
    "cost": lambda path: ["cost", str(path)],
    "groups": lambda path: ["groups", str(path)],
    "report": lambda path: ["report", str(path)],
    "report, as JSON": lambda path: ["report", str(path), "--json", "--no-verify"],
    "compare": lambda path: ["compare", str(path), str(path)],
    "where": lambda path: ["where", str(path), "--rows", "0,1,2,3,4,5"],
    "forget": lambda path: ["forget", str(path), "--rows", "1,2"],
    "audit": lambda path: ["audit", str(path)],
}
QUICK = ("round", "cost", "groups", "where")  # the others go through every entry as slow tests
ROUND = "_mates/round-0002"
FILES = [
    *(f"{ROUND}/{name}" for name in ("round.json", "candidates.npy", "scores.npy", "selection.npy", "consumed.npy")),
    *(f"{ROUND}/{name}" for name in ("probes.parquet", "SHA256SUMS", "influence_model/config.json")),
    "trainer_state.json", "_mates/history/own-000000000000.npy", "_mates/history/call-000000000000.json",
]  # fmt: skip
# What takes the place of an entry: nothing at all, and what readers trip over.
NOTHING = object()
WRONG = [NOTHING, [1], None, "text", -3, 1.5, {}, {"x": [None]}, 10**30, float("nan")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with groups, checkpoints and three rounds."""
    path = tmp_path_factory.mktemp("damaged") / "run"
    args = make_arguments(path, remove_unused_columns=False, save_strategy="steps", save_steps=10)
    callback = MatesCallback(make_reference(), small_config(group_column="source", num_probes=20))
    run(args, [callback], grouped(), collator=collate)
    state = json.loads((path / "checkpoint-20" / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 10, "eval_loss": 3.0}, {"step": 20, "eval_loss": 2.5}]  # for `compare`
    (path / "trainer_state.json").write_text(json.dumps(state))
    for folder in path.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return path


def ends(words: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Exit status of a command, which says in one line why it is not 0."""
    status = main(words)
    said = capsys.readouterr().err
    assert status in (0, 1, 2)
    if status:
        assert said.startswith("mates-hf: ")
        assert len(said.strip().splitlines()) == 1, said
        assert len(said) > len("mates-hf: ") + 10
    return status


FAULTS: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_text("[1, 2]"),
    "an empty object": lambda file: file.write_text("{}"),
    "another array": lambda file: np.save(file.open("wb"), np.array(["a", "b"])),
    "gone": lambda file: file.unlink(),
}


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def renewed(path: Path, whole: Path, command: str) -> None:
    """The run as it was before a command that writes."""
    if command == "forget":
        shutil.rmtree(path)
        shutil.copytree(whole, path)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_are_damaged_or_gone(whole, path, capsys, command):
    found: dict[tuple[str, str], int] = {}
    for name in FILES:
        content = (path / name).read_bytes()
        for fault, damage in FAULTS.items():
            damage(path / name)
            found[name, fault] = ends(COMMANDS[command](path), capsys)
            renewed(path, whole, command)
            (path / name).write_bytes(content)
    if command in ("verify", "audit"):
        assert all(status for (name, fault), status in found.items() if name.startswith(ROUND) and fault != "gone")
    if command in ("cost", "where", "forget"):  # others show what they can
        assert all(found[f"{ROUND}/round.json", fault] == 1 for fault in FAULTS if fault != "gone")
    assert ends(COMMANDS[command](path), capsys) == 0


def each_entry(file: Path, entries: list[Any]) -> Iterator[None]:
    """A record with each entry replaced, one after the other; the entries of entries as well."""
    content, before = json.loads(file.read_text()), file.read_bytes()
    for name, value in content.items():
        rest = {key: one for key, one in content.items() if key != name}
        for wrong in entries:
            yield file.write_text(json.dumps(rest if wrong is NOTHING else {**rest, name: wrong})) and None
            file.write_bytes(before)
            if wrong is not NOTHING and isinstance(value, (dict, list)) and value:
                one = dict.fromkeys(value, wrong) if isinstance(value, dict) else [wrong for _ in value]
                yield file.write_text(json.dumps({**content, name: one})) and None
                file.write_bytes(before)


@pytest.mark.parametrize("file", [f"{ROUND}/round.json", "trainer_state.json"])
@pytest.mark.parametrize("command", QUICK)
def test_entries_that_are_missing_or_of_another_type(path, capsys, command, file):
    for _ in each_entry(path / file, [NOTHING, [1]]):
        ends(COMMANDS[command](path), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("file", [f"{ROUND}/round.json", "trainer_state.json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_entries_of_any_type(whole, path, capsys, command, file):
    wrong = WRONG if command not in ("verify", "report", "report, as JSON", "audit") else WRONG[:3]
    for _ in each_entry(path / file, wrong):
        ends(COMMANDS[command](path), capsys)
        renewed(path, whole, command)


def test_what_is_whole_has_no_damage_and_a_fault_of_this_program_keeps_its_traceback(whole, monkeypatch):
    assert find_damage([str(whole)]) is None
    assert find_damage([str(whole / ROUND)]) is None

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("mine")

    monkeypatch.setattr("mates_hf.reporting.cost.run_cost", fails)
    with pytest.raises(KeyError, match="mine"):
        main(["cost", str(whole)])


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "100"],
        ["plan", "--params", "nan", "--tokens", "26B", "--batch-tokens", "524288"],
        ["plan", "--params", "inf", "--tokens", "26B", "--batch-tokens", "524288"],
        ["plan", "--params", "-1", "--tokens", "26B", "--batch-tokens", "524288"],
        ["plan", "--params", "0", "--tokens", "26B", "--batch-tokens", "524288"],
        ["plan", "--params", "410M", "--tokens", "1e400", "--batch-tokens", "524288"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--devices", "0"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--price", "-1"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--device-flops", "0"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--row-tokens", "0"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--selection-ratio", "0"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--num-probes", "-5"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--update-steps", "0"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--looked-up", "500M"],
        ["plan", "--params", "410M", "--tokens", "26B", "--batch-tokens", "524288", "--pool-tokens", "nan"],
    ],
)  # fmt: skip
def test_a_plan_of_impossible_numbers(words, capsys):
    try:
        status = main(words)
    except SystemExit as end:  # usage
        status = int(end.code or 0)
    said = capsys.readouterr().err
    assert status in (1, 2), said
    assert "Traceback" not in said
