"""Static evidence in a run: counted once, given by name, weighed by the labels, and drawn alike after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, default_data_collator

from mates_hf import MatesCallback, MatesStream, NgramInfluenceModel
from mates_hf.prediction import moore_lewis
from mates_hf.training.verify import verify_run
from tests.training.kit import OLD_DATASETS, Stop, make_arguments, make_pool, make_reference, run, small_config


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows of each count, reference and pool."""
    calls: list[tuple[int, int]] = []
    original = NgramInfluenceModel.count_evidence

    def count_evidence(self: NgramInfluenceModel, reference: Any, background: Any) -> Any:
        calls.append((len(reference), len(background)))
        return original(self, reference, background)

    monkeypatch.setattr(NgramInfluenceModel, "count_evidence", count_evidence)
    return calls


def fits(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "_mates").glob("round-*/round.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["fit"] for path in paths]


def test_a_run_counts_once_and_each_round_says_what_it_tells_of_the_labels(tmp_path: Path, counted) -> None:
    run(make_arguments(tmp_path), [MatesCallback(make_reference(), small_config())])
    assert counted == [(24, 400)]  # a small pool is read whole
    found = fits(tmp_path)
    assert len(found) == 3
    # A third of the pool counts up, as the reference does: words tell most of the labels' order.
    assert all(0.2 < fit["evidence"] < 1.1 for fit in found)
    assert all(0.3 < fit["evidence_weight"] <= 1 for fit in found)
    verify_run(tmp_path)


def test_a_column_of_scores_stands_in_its_place_beside_the_labels(tmp_path: Path, counted) -> None:
    pool = make_pool()
    pool = pool.add_column("score", np.random.default_rng(0).random(len(pool)))
    arguments = make_arguments(tmp_path, max_steps=8, remove_unused_columns=False)
    run(arguments, [MatesCallback(make_reference(), small_config(score_column="score"))], pool)
    assert fits(tmp_path)[0]["evidence"] > 0.2
    assert fits(tmp_path)[0]["evidence_weight"] is None


def test_a_large_pool_is_sampled_by_its_rows_length(tmp_path: Path, counted, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("SAMPLE_TOKENS", 1_200), ("SAMPLE_TOKENS", 1_188), ("SAMPLE_ROWS", 30)):  # rows of 12 tokens
        monkeypatch.setattr(moore_lewis, name, most)
        arguments = make_arguments(tmp_path / f"{name}-{most}", max_steps=8)
        run(arguments, [MatesCallback(make_reference(), small_config())])
    assert counted == [(24, 400), (24, 99), (24, 30)]  # four samples are the whole pool


class NoEvidence(NgramInfluenceModel):
    """Takes what it is given and hands on what it knows, as a user's own model may."""

    def fit(self, candidates: Any, labels: Any, **more: Any) -> Any:
        assert "evidence" not in more
        return super().fit(candidates, labels, **more)


def test_a_model_that_does_not_name_it_gets_none(tmp_path: Path, counted) -> None:
    callback = MatesCallback(make_reference(), small_config(), influence_model=NoEvidence())
    run(make_arguments(tmp_path, max_steps=8), [callback])
    assert counted == []
    assert fits(tmp_path)[0]["evidence"] is None


def unequal_targets() -> Dataset:
    """Rows with more and fewer targets, of which rounds probe some. How many rows are counted must not follow."""
    pool, rng = make_pool(), np.random.default_rng(0)
    labels = [
        [-100] * skipped + row[skipped:]
        for row, skipped in zip(pool["labels"], rng.integers(0, 6, len(pool)), strict=True)
    ]
    return pool.remove_columns("labels").add_column("labels", labels)


def last_tokens(rows: list[Any]) -> dict[str, Any]:
    """A collator of one's own, whose labels the pool has not."""
    batch = default_data_collator(rows)
    return {**batch, "labels": batch["labels"].masked_fill(torch.arange(12) < 4, -100)}


def without_cache(trainer: Any) -> None:
    """As newer Trainers set it: with a cache, documents of a packed row see each other."""
    trainer.model.config.use_cache = False


KINDS: dict[str, tuple[Any, Any]] = {
    "unequal targets": (unequal_targets, default_data_collator),
    "own collator": (make_pool, last_tokens),
    "flattened": (lambda: Dataset.from_dict({"input_ids": make_pool()["input_ids"]}), DataCollatorWithFlattening()),
    "packed": (
        lambda: make_pool().add_column("position_ids", [[*range(5), *range(7)]] * 400), default_data_collator
    ),
    "stream": (lambda: MatesStream(make_pool(1_000).to_iterable_dataset(num_shards=4), 50), default_data_collator),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "most"), [("unequal targets", 2**21), *((kind, 1_000) for kind in KINDS)], ids=["whole", *KINDS]
)
def test_a_resumed_run_chooses_as_one_that_was_not_stopped(tmp_path: Path, counted, monkeypatch, kind, most) -> None:
    if kind == "stream" and OLD_DATASETS:
        pytest.skip("streams need datasets 4.0")
    monkeypatch.setattr(moore_lewis, "SAMPLE_TOKENS", most)
    make, collator = KINDS[kind]

    def start(folder: str, *others: Any, resume: bool = False) -> Any:
        arguments = make_arguments(tmp_path / folder, save_strategy="steps", save_steps=4)
        callback = MatesCallback(make_reference(), small_config(num_probes=20))
        return run(arguments, [callback, *others], make(), collator=collator, prepare=without_cache, resume=resume)

    whole = start("a")
    start("b", Stop(8))
    resumed = start("b", resume=True)
    num = 400 if most > 4_000 else 154 if kind == "packed" else 84  # 77 packed rows of two documents
    assert counted == [(24, num)] * 3
    assert np.array_equal(whole.losses, resumed.losses)
    assert [fit["spearman"] for fit in fits(tmp_path / "a")] == [fit["spearman"] for fit in fits(tmp_path / "b")]
