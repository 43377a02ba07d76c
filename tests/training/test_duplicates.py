"""Copies of a text, and the reference's passages in a pool: chosen once, counted, told, and found again by verify."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from mates_hf import MatesCallback, NgramInfluenceModel
from mates_hf.config import BEFORE, MatesConfig
from mates_hf.data.pool import CandidatePool
from mates_hf.data.token_overlap import shared_rows
from mates_hf.disk import read_json, write_json
from mates_hf.errors import RoundMismatchError
from mates_hf.round_files import write_checksums
from mates_hf.training.checks.trainer import check_look_ahead
from mates_hf.training.clock import RowClock
from mates_hf.training.duplicates import CopyMarks
from mates_hf.training.resume import config_to_resume
from mates_hf.training.start import Loop, Parts, prepare
from mates_hf.training.verify import verify_run
from tests.training.kit import LENGTH, VOCAB, Result, make_arguments, make_pool, make_reference, run, small_config

NUM_ROWS, NUM_COPIED = 400, 100
ROUNDS = ("round-0001", "round-0002", "round-0003")


def make_copies() -> Dataset:
    """The best texts, which are passages of the reference, many times, among rows that are there once."""
    rows = np.random.default_rng(0).integers(0, VOCAB, (NUM_ROWS, LENGTH))
    for i in range(NUM_COPIED):
        rows[4 * i] = 32 + (i % 8 + np.arange(LENGTH)) % 8
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


POOL = make_copies()
TEXTS = [tuple(row) for row in POOL["input_ids"][:]]


def train(output_dir: Path, resume: str | None = None, **config: Any) -> Result:
    args = make_arguments(output_dir, save_strategy="steps", save_steps=9)
    model = NgramInfluenceModel(num_buckets=256)
    callback = MatesCallback(make_reference(), small_config(random_rounds=1, **config), influence_model=model)
    return run(args, [callback], POOL, resume=resume)


def selected(output_dir: Path, name: str) -> Sequence[int]:
    return np.load(output_dir / "_mates" / name / "selection.npy").tolist()


def most_copies(rows: Sequence[int]) -> int:
    return max(sum(TEXTS[row] == TEXTS[other] for other in rows) for row in rows)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Result]:
    path = tmp_path_factory.mktemp("copies")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    logger = logging.getLogger("mates_hf")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        return path, lines, train(path)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("no-limit")
    return path, train(path, max_copies=None)


def test_a_text_is_chosen_once_a_round_and_what_it_shares_with_the_reference_is_told(limited, unlimited):
    path, lines, result = limited
    shared = shared_rows(POOL, make_reference())
    assert shared.tolist() == list(range(0, 4 * NUM_COPIED, 4))  # of 12 tokens: a short passage counts as a whole
    for name in ROUNDS[:2]:
        rows = selected(path, name)
        assert most_copies(rows) == 1
        assert len(rows) == len(set(rows)) == 24  # k rows all the same
        info = read_json(path / "_mates" / name / "round.json")
        candidates = np.load(path / "_mates" / name / "candidates.npy").tolist()
        assert info["repeated_share"] == (48 - len({TEXTS[row] for row in candidates})) / 48 > 0
        assert info["num_passed_over"] > 0
        leaks = sorted(set(rows) & set(shared.tolist()))
        assert info["reference_overlap"] == {
            "rows": len(leaks), "share": len(leaks) / 24, "ngram": 13, "examples": leaks[:8], "num_short_passages": 0,
        }  # fmt: skip
        assert leaks
    logged = [entry for entry in result.trainer.state.log_history if "mates/reference_overlap" in entry]
    assert [entry["mates/reference_overlap"] for entry in logged][1] == len(leaks) / 24
    assert logged[1]["mates/repeated_share"] == info["repeated_share"]
    warnings = [line for line in lines if line.startswith("WARNING") and "with the reference task" in line]
    assert len(warnings) == 1  # for the whole run
    assert "`mates_hf.data.token_overlap.shared_rows(dataset, reference)`" in warnings[0]
    rounds = [line for line in lines if line.startswith("INFO round ")]
    assert rounds[0].startswith("INFO round 1 at step 6, 40 probed, held-out Spearman")
    assert "passed over as copies" in rounds[0]
    assert verify_run(path).problem is None
    assert most_copies(selected(unlimited[0], ROUNDS[0])) > 1
    assert verify_run(unlimited[0]).problem is None


def test_a_random_share_is_recorded_told_and_verified(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mates_hf"):
        train(tmp_path / "run", random_share=0.25)
    path = tmp_path / "run" / "_mates" / ROUNDS[0]
    info = read_json(path / "round.json")
    assert (info["num_rows"], info["num_random"], info["config"]["random_share"]) == (24, 6, 0.25)
    assert "6 of them at random" in caplog.text
    rows, candidates = selected(tmp_path / "run", ROUNDS[0]), np.load(path / "candidates.npy")
    assert most_copies(rows) == 1
    order = candidates[np.argsort(-np.load(path / "scores.npy"), kind="stable")].tolist()
    assert max(order.index(row) for row in rows) > 30  # of 48: none by worth is that far down
    assert verify_run(tmp_path / "run").problem is None
    for name, changed, file in (
        ("num_random", 5, "round.json"),
        ("config", {**info["config"], "random_share": 0.5}, "key.json"),
    ):
        wrong = {**info, name: changed}
        write_json(path / "round.json", wrong)
        write_checksums(path, wrong)
        problem = verify_run(tmp_path / "run").problem
        assert problem is not None
        assert problem.file == file


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (lambda path, info: np.save(path / "hashes.npy", np.arange(len(np.load(path / "hashes.npy")), dtype="u8")), 0),
        (lambda path, info: info.update(num_passed_over=info["num_passed_over"] + 1), 1),
        (lambda path, info: info.update(repeated_share=0.0), 1),
        (lambda path, info: (path / "hashes.npy").unlink(), 2),
    ],
    ids=["hashes", "passed-over", "share", "missing"],
)
def test_verify_finds_hashes_that_do_not_give_the_selection(limited, tmp_path, change, file):
    shutil.copytree(limited[0], tmp_path / "run")
    path = tmp_path / "run" / "_mates" / ROUNDS[0]
    info = read_json(path / "round.json")
    change(path, info)
    write_json(path / "round.json", info)
    write_checksums(path, info)
    problem = verify_run(tmp_path / "run").problem
    assert problem is not None
    assert problem.file == ("selection.npy", "round.json", "SHA256SUMS")[file]


def make_old(path: Path) -> None:
    """A run as versions without `max_copies` left it: no field, no hashes, no facts."""
    for name in ROUNDS:
        folder = path / "_mates" / name
        (folder / "hashes.npy").unlink()
        info = read_json(folder / "round.json")
        for field in ("repeated_share", "num_passed_over", "reference_overlap"):
            del info[field]
        del info["config"]["max_copies"]
        write_json(folder / "round.json", info)
        assert "max_copies" not in read_json(folder / "key.json")["config"]  # None is as if there were no such field
        write_checksums(folder, info)
    state = read_json(path / "checkpoint-9" / "trainer_state.json")
    del state["stateful_callbacks"]["mates_hf"]["config"]["max_copies"]
    write_json(path / "checkpoint-9" / "trainer_state.json", state)


def test_an_older_run_is_verified_and_resumed_as_it_was_selected(unlimited, tmp_path, caplog):
    shutil.copytree(unlimited[0], tmp_path / "run")
    make_old(tmp_path / "run")
    assert verify_run(tmp_path / "run").problem is None
    before = {name: selected(unlimited[0], name) for name in ROUNDS}
    shutil.rmtree(tmp_path / "run" / "_mates" / ROUNDS[1])  # the run was stopped before it
    resumed = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-9"))
    assert "goes on as it began, with `max_copies=None`" in caplog.text
    assert {name: selected(tmp_path / "run", name) for name in ROUNDS} == before
    assert resumed.rows == unlimited[1].rows[-len(resumed.rows) :]
    assert not list((tmp_path / "run" / "_mates").glob("*.stale*"))
    assert read_json(tmp_path / "run" / "_mates" / ROUNDS[1] / "round.json")["config"]["max_copies"] is None
    assert verify_run(tmp_path / "run").problem is None


def test_another_limit_than_the_run_began_with_is_refused(limited, unlimited, tmp_path):
    shutil.copytree(unlimited[0], tmp_path / "old")
    make_old(tmp_path / "old")
    for path, asked, began in ((tmp_path / "old", 2, None), (limited[0], None, 1), (unlimited[0], 1, None)):
        with pytest.raises(RoundMismatchError, match=f"max_copies: checkpoint {began}, this run {asked}"):
            train(path, resume=str(path / "checkpoint-9"), max_copies=asked)


def test_rows_of_equal_tokens_and_other_pictures_are_no_copies(make_tiny_model):
    from mates_hf.data.batches import Reading

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    config = SimpleNamespace(max_copies=1)
    for name, constants, num_texts in (("pixel_values", {}, 3), ("kinds", {}, 3), ("kinds", {"kinds": 1}, 1)):
        pool = CandidatePool(
            [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], name: [1, 1, 1]} for _ in range(3)], collator
        )
        pool.reading = Reading(constants=constants)
        marks = CopyMarks(SimpleNamespace(pool=pool, config=config, tokenizer=None, model=make_tiny_model()))
        assert len(set(marks.hashes(pool.token_rows(), np.arange(3)).tolist())) == num_texts, name


def test_what_a_run_without_a_checkpoint_or_with_one_of_this_version_goes_on_with():
    newer = {"random_share": 0.3, "first_round_steps": 50, "max_passes": None}
    for config in ({"max_copies": 1, **newer}, {"max_copies": None, **newer}, None):
        assert config_to_resume({"config": config}, MatesConfig()) == MatesConfig()
    assert config_to_resume(None, MatesConfig()) == config_to_resume({}, MatesConfig()) == MatesConfig()
    assert config_to_resume({"config": {}}, MatesConfig(temperature=1.0)) == MatesConfig(**BEFORE, temperature=1)
    assert config_to_resume({"config": {}}, MatesConfig(max_copies=2)).max_copies == 2


def test_an_older_checkpoint_is_planned_by_the_config_that_it_goes_on_with(tmp_path):
    parts = Parts(None, MatesConfig(), None, None)  # type: ignore[arg-type]
    unused = ("model", "optimizer", "lr_scheduler", "tokenizer", "own_sampler", "max_grad_norm", "run_loss")
    loop = Loop(
        **dict.fromkeys((*unused, "output_dir")), rounds_dir=tmp_path, pool=CandidatePool(make_pool(20)),
        max_steps=9, step=3,
        clock=RowClock(batches_per_epoch=5, accumulation=1, batch_rows=4),
        saved={"config": {"max_copies": 1}, "origin_step": 0, "last_round": None},
    )  # fmt: skip
    found, prepared, planned = prepare(parts, loop)
    assert found.config == planned.config == MatesConfig(**{**BEFORE, "max_copies": 1})
    assert prepared.asked == {}


def test_what_is_fetched_ahead_is_held_against_the_lead_that_an_older_run_has():
    """By today's defaults the first round is 50 steps and the lead 25; rounds of one length had 32."""
    args = SimpleNamespace(gradient_accumulation_steps=1)
    loader = SimpleNamespace(num_workers=7, prefetch_factor=4)
    with pytest.raises(ValueError, match="`switch_lead_steps` must be at least 29"):
        check_look_ahead(args, loader, MatesConfig())
    check_look_ahead(args, loader, config_to_resume({"config": {}}, MatesConfig()))
    check_look_ahead(args, loader, MatesConfig(switch_lead_steps=29))  # what the error says to set
