"""Passages as rows of the pool: what is trained of each, by every kind of collator; what cannot be mixed in."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    default_data_collator,
)

from mates_hf.data.passage_layout import lay_out
from mates_hf.data.passage_rows import MixedDataset, PassageRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.errors import UnsupportedSettingError
from tests.data.test_pool import EOS, tokenizer  # noqa: F401

PASSAGES = [[10, 11, 12], [20, 21, 22, 23, 24], [30, 31], list(range(40, 57)), [7, 8, 9, 10]]
BLOCK = 8


def task(loss_on: str = "all") -> ReferenceTask:
    rows: dict[str, Any] = {"input_ids": PASSAGES}
    if loss_on == "all":
        return ReferenceTask.from_dataset(Dataset.from_dict(rows), input_ids_column="input_ids")
    rows["labels"] = [[-100] * (len(ids) - 1) + ids[-1:] for ids in PASSAGES]
    return ReferenceTask.from_dataset(
        Dataset.from_dict(rows), input_ids_column="input_ids", labels_column="labels", loss_on="completion"
    )


def blocks(**columns: Any) -> Dataset:
    ids = np.random.default_rng(0).integers(2, 60, (20, BLOCK)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, **columns})


def texts(**columns: Any) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {"input_ids": [rng.integers(2, 60, n).tolist() for n in rng.integers(3, 9, 20)], **columns}
    )


def transitions(rows: PassageRows, collate_fn: Any) -> Iterator[tuple[int, int]]:
    """Each trained token and the one before it, of all rows, as the collator makes them between rows of a pool."""
    for i in range(len(rows)):
        batch = collate_fn([rows[i]])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        for t in range(1, len(ids)):
            if labels[t] != -100:
                assert labels[t] == ids[t]
                yield ids[t - 1], ids[t]


def wanted(loss_on: str) -> Counter[tuple[int, int]]:
    first = {"all": lambda ids: 1, "completion": lambda ids: len(ids) - 1}[loss_on]
    return Counter((ids[t - 1], ids[t]) for ids in PASSAGES for t in range(first(ids), len(ids)))


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("separator", [None, EOS])
def test_blocks_train_each_target_token_once_and_nothing_else(loss_on, separator):
    """Also those of a passage that is longer than a block, each behind the token that stands before it."""
    rows = lay_out(task(loss_on), CandidatePool(blocks(), default_data_collator), separator)
    assert {len(rows[i]["input_ids"]) for i in range(len(rows))} == {BLOCK}
    assert Counter(transitions(rows, default_data_collator)) == wanted(loss_on)
    parted = [20, 21, 22, 23, 24, EOS, 30, 31]
    assert (parted in [rows[i]["input_ids"] for i in range(len(rows))]) == (separator is not None)


def test_blocks_mask_what_fills_them_up():
    pool = blocks(attention_mask=[[1] * BLOCK] * 20, token_type_ids=[[0] * BLOCK] * 20, length=[BLOCK] * 20)
    rows = lay_out(task(), CandidatePool(pool, default_data_collator), EOS)
    for i in range(len(rows)):
        row = rows[i]
        real = np.array(row["attention_mask"]) == 1
        assert (np.array(row["labels"])[~real] == -100).all()
        assert row["token_type_ids"] == [0] * BLOCK
        assert row["length"] == BLOCK
    assert min(sum(rows[i]["attention_mask"]) for i in range(len(rows))) < BLOCK


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_a_collator_that_pads_labels_gets_a_row_a_passage(loss_on, tokenizer):  # noqa: F811
    pool = texts().map(lambda row: {"labels": row["input_ids"]})
    collator = DataCollatorForTokenClassification(tokenizer)
    rows = lay_out(task(loss_on), CandidatePool(pool, collator))
    assert [rows[i]["input_ids"] for i in range(len(rows))] == PASSAGES
    assert Counter(transitions(rows, collator)) == wanted(loss_on)


def test_a_collator_that_makes_its_own_labels_trains_every_token(tokenizer):  # noqa: F811
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = lay_out(task("completion"), CandidatePool(texts(), collator))
    assert [set(rows[i]) for i in range(len(rows))] == [{"input_ids"}] * len(PASSAGES)
    assert Counter(transitions(rows, collator)) == wanted("all")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_values_have_the_type_of_a_pool_rows(kind):
    pool = blocks(attention_mask=[[1] * BLOCK] * 20).with_format(kind)
    rows = lay_out(task(), CandidatePool(pool, default_data_collator))
    for name, value in rows[0].items():
        assert type(value) is type(pool[0][name])
        assert value.dtype == pool[0][name].dtype
    assert default_data_collator([pool[0], rows[0]])["input_ids"].shape == (2, BLOCK)


def test_columns_that_differ_from_row_to_row_are_left_out_where_no_collator_needs_them(tokenizer):  # noqa: F811
    def pad(rows: list[dict[str, Any]]) -> Any:
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row["input_ids"]} for row in rows])

    pool = texts(url=[f"page {i}" for i in range(20)], lang=["en"] * 20)
    pool = pool.map(lambda row: {"n": len(row["input_ids"]), "at": list(range(len(row["input_ids"])))})
    row = lay_out(task(), CandidatePool(pool, pad))[1]
    assert row == {"input_ids": PASSAGES[1], "lang": "en", "n": 5, "at": [0, 1, 2, 3, 4]}
    scored = texts(weight=np.linspace(0, 1, 20).tolist())

    def weighted(rows: list[dict[str, Any]]) -> Any:
        return {**pad(rows), "weight": torch.tensor([row["weight"] for row in rows])}

    with pytest.raises(UnsupportedSettingError, match=r"did not: KeyError: 'weight'. Of columns .*\['weight'\].*Give"):
        lay_out(task(), CandidatePool(scored, weighted))


def pixels(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = default_data_collator([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    return {**found, "pixel_values": torch.stack([torch.tensor(row["image"]) for row in rows])}


def cut(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.tensor([(row["input_ids"] + [0] * 3)[:3] for row in rows]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("columns", [{}, {"seq_lengths": [[2, len(row) - 2] for row in texts()["input_ids"]]}])
def test_passages_lie_between_flattened_and_packed_rows(columns):
    """A passage is a row of one document, whichever way the rows of the pool are packed."""
    rows = lay_out(task(), CandidatePool(texts(**columns), DataCollatorWithFlattening()))
    assert [rows[i]["input_ids"] for i in range(len(rows))] == list(PASSAGES)
    assert all(rows[i].get("seq_lengths", [len(rows[i]["input_ids"])]) == [len(PASSAGES[i])] for i in range(len(rows)))


@pytest.mark.parametrize(
    ("pool", "collator", "said"),
    [
        (blocks(image=np.random.default_rng(0).random((20, 2, 2)).tolist()), pixels, "KeyError: 'image'"),
        (blocks().remove_columns("labels"), default_data_collator, "rows of one length without `labels`"),
        (blocks().remove_columns("labels"), None, "rows of one length without `labels`"),
        (texts(), cut, "the tokens of passage 3 are not in the batch as they are"),
        (Dataset.from_dict({"text": ["a"] * 20}), lambda rows: {}, "they have no `input_ids`"),
    ],
    ids=["images", "blocks without labels", "a loop's blocks without labels", "cut", "texts"],
)
def test_what_cannot_be_mixed_is_refused_with_the_way_out(pool, collator, said):
    with pytest.raises(UnsupportedSettingError, match=rf"(?s){said}.*or set `reference_passes=0`"):
        lay_out(task(), CandidatePool(pool, collator))


def test_a_collator_that_hides_tokens_is_refused(tokenizer):  # noqa: F811
    tokenizer.mask_token = "<unk>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True)
    with pytest.raises(UnsupportedSettingError, match="target tokens"):
        lay_out(task(), CandidatePool(texts(), collator))


def test_without_a_collator_rows_of_one_length_stay_so_and_others_have_their_own():
    assert {len(row["input_ids"]) for row in map(lay_out(task(), CandidatePool(blocks())).__getitem__, range(4))} == {
        8
    }
    rows = lay_out(task(), CandidatePool(texts()))
    assert [rows[i]["input_ids"] for i in range(5)] == PASSAGES


class Listed(list):
    """A dataset without `__getitems__`, with something of its own."""

    name = "mine"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("kind", [Listed, lambda rows: Dataset.from_list(rows)])
def test_the_view_answers_for_the_pool_and_behind_it_for_the_passages(kind):
    pool = kind(list(blocks()))
    rows = lay_out(task(), CandidatePool(pool, default_data_collator), EOS)
    view = pickle.loads(pickle.dumps(MixedDataset(pool, rows)))
    assert len(view) == len(pool) == 20
    assert view[3] == pool[3]
    assert view[-1] == pool[-1]
    assert view[np.int64(21)] == rows[1]
    assert view.__getitems__([22, 4, 20, 0]) == [rows[2], pool[4], rows[0], pool[0]]
    assert view.__getitems__([20, 21]) == [rows[0], rows[1]]
    with pytest.raises(IndexError, match=f"from 0 to {len(rows) - 1}, got {len(rows)}"):
        view[20 + len(rows)]
    assert hasattr(view, "set_epoch") == hasattr(pool, "set_epoch")
    if isinstance(pool, Listed):
        view.set_epoch(3)
        assert (view.name, view.epoch) == ("mine", 3)
    else:
        assert view.column_names == pool.column_names
        assert view["labels"][:2] == pool["labels"][:2]
    with pytest.raises(AttributeError):
        _ = view.nothing_like_this
