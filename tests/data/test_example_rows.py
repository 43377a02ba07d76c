"""Rows of any modality: what tells two of them apart, the reference task made of them, and the pool that has them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from mates_hf.data.batches import PLAIN
from mates_hf.data.collated import collate
from mates_hf.data.documents import document_codes
from mates_hf.data.examples import beyond_text, content_of
from mates_hf.data.feeds import CollatedRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.errors import UnsupportedSettingError
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.training.static_evidence import evidence_for
from tests.training.modalities import captions, images, speech


def test_equal_content_is_equal_and_any_other_is_not() -> None:
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [whole, whole.copy(), np.asfortranarray(whole)]
    assert len({content_of(value) for value in same}) == 1
    assert content_of({"a": 1, "b": 2}) == content_of({"b": 2, "a": 1})
    others: list[Any] = [
        whole, whole.T, whole.reshape(3, 2), whole.astype(np.float64), whole + 1e-7,
        torch.from_numpy(whole).to(torch.bfloat16),
        {"a": whole}, {"b": whole}, [whole], None, 0, 0.0, False, "0", b"0", "", [], {}, [1, [2]], [[1], 2],
    ]  # fmt: skip
    assert len({content_of(value) for value in others}) == len(others)
    with pytest.raises(TypeError, match="made of arrays.*got object.*data_collator"):
        content_of({"a": object()})


def test_what_of_a_batch_is_no_text() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    text = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": ids,
        "weights": ids.float(),
        "mask_2d": ids.float()[:, :2],
    }
    assert beyond_text(text) == ()
    num = text["input_ids"].shape[1]
    of_tokens = {"margin": torch.ones(1), "teacher": torch.rand(1, num, 9), "target_mapping": torch.eye(num)[None]}
    assert beyond_text({**text, **of_tokens}) == ()
    assert beyond_text({**text, "pixel_values": torch.zeros(1, 3, 2, 2)}) == ("pixel_values",)
    assert beyond_text({**text, "pixels": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}) == ("pixels",)
    assert beyond_text({"codes": ids, "labels": ids, "return_loss": True}) == ("codes",)


@pytest.mark.parametrize("make", [images, speech, captions])
def test_a_reference_task_of_examples(make: Any) -> None:
    rows = make(12)
    task = ReferenceTask.from_examples(rows, name="what matters", limit=10)
    counts = [int((np.asarray(row["labels"]) != -100).sum()) for row in rows[:10]]
    assert len(task) == 10
    assert task.num_targets == sum(counts) == task.description["num_targets"]
    assert "10, " in repr(task)
    first, second = task.split(0.3, seed=1)
    assert len(first) == 3
    assert first.num_targets + second.num_targets == task.num_targets
    assert len(task.subset(4)) == 4
    assert task.take(np.arange(10)).digest() == task.digest() != task.take(np.arange(10)[::-1]).digest()
    assert task.fit_to_model(5, 2) is task
    # The digest is the task's own, also once the run has fed it.
    fed = CollatedRows.of(rows, default_data_collator, PLAIN, np.arange(10))
    assert dataclasses.replace(task, fed=fed).digest() == task.digest()
    for name in rows[0]:
        changed = [dict(row) for row in rows]
        value = torch.as_tensor(np.asarray(changed[3][name])).clone()
        changed[3][name] = value + 1 if value.dim() == 0 else torch.cat([value[:1] + 1, value[1:]])
        assert ReferenceTask.from_examples(changed, limit=10).digest() != task.digest(), name


def test_a_collator_of_its_own_decides_what_an_example_is() -> None:
    rows = images(4)

    def brighter(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        return {**batch, "pixel_values": batch["pixel_values"] + 1}

    digests = {ReferenceTask.from_examples(rows, made).digest() for made in (None, default_data_collator, brighter)}
    assert len(digests) == 3


def test_what_is_no_reference_task() -> None:
    with pytest.raises(TypeError, match="numbered rows.*list\\(stream.take"):
        ReferenceTask.from_examples(iter(images(2)))
    with pytest.raises(ValueError, match="empty"):
        ReferenceTask.from_examples([])
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        ReferenceTask.from_examples(images(2), limit=0)
    with pytest.raises(TypeError, match="An example must be a dict, got list as row 0"):
        ReferenceTask.from_examples([[1, 2]])
    with pytest.raises(TypeError, match="`data_collator` must be a function"):
        ReferenceTask.from_examples(images(2), "default")


def test_static_evidence_is_left_out_where_the_task_has_no_text() -> None:
    task = ReferenceTask.from_examples(captions(4))
    run = SimpleNamespace(influence_model=NgramInfluenceModel(text_only=True), reference=task, evidence=None)
    assert evidence_for(run) == {}  # type: ignore[arg-type]
    with pytest.raises(UnsupportedSettingError, match="must be of text for tokens of it to be read"):
        _ = task.weighted_rows


def test_a_pool_of_images_is_known_by_all_of_them() -> None:
    rows = images(6)
    pool = CandidatePool(rows, default_data_collator)
    assert pool.beyond_text == ("pixel_values",)
    assert not pool.has_text
    assert pool.identity()["inputs"] == "pixel_values"
    relabelled = [{**row, "labels": 3 - row["labels"]} for row in rows]
    other = CandidatePool(relabelled, default_data_collator)
    assert pool.identity() != other.identity()
    assert (pool.row_marks() != other.row_marks()).all()
    ids = np.arange(6)
    assert pool.input_hashes(ids).tolist() == other.input_hashes(ids).tolist()  # whatever the labels are
    assert len(set(pool.input_hashes(ids).tolist())) == 6
    rows_again = pool.collated(np.array([0, 1, 0]), PLAIN)
    codes = document_codes(rows_again)
    assert codes[0] == codes[2] != codes[1]
    owned = [{**row, "who": "a" if i < 2 else None} for i, row in enumerate(rows)]
    named = CandidatePool(owned, _without_owner)
    by_name = document_codes(named.collated(ids, PLAIN), named, ids, "who")
    assert by_name[0] == by_name[1]
    assert len(set(by_name.tolist())) == 5


def _without_owner(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = default_data_collator([{name: row[name] for name in row if name != "who"} for row in rows])
    return batch


def test_a_pool_of_text_is_known_as_before() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
    pool = CandidatePool(rows, default_data_collator)
    assert pool.beyond_text == ()
    assert pool.has_text
    assert "inputs" not in pool.identity()


class Drawn:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": torch.rand(3, 2, 2) + i, "labels": 0}


def test_what_a_row_draws_is_the_same_beside_any_other_rows() -> None:
    before = torch.get_rng_state()
    alone = collate(Drawn(), default_data_collator, [2])["pixel_values"][0]
    beside = collate(Drawn(), default_data_collator, [4, 2, 1])["pixel_values"][1]
    assert torch.equal(alone, beside)
    assert torch.equal(torch.get_rng_state(), before)
