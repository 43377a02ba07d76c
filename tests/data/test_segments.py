"""Documents inside packed rows: where they begin, and rows that carry them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from mates_hf import NgramInfluenceModel
from mates_hf.data.arrow import effective_labels
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.data.segments import document_starts
from mates_hf.errors import UnsupportedSettingError
from mates_hf.prediction.ngram.evidence import log_odds
from mates_hf.records import InfluenceLabels

ROWS = TokenRows.from_lists(
    [[1, 2, 3, 4, 5], [6, 7], [], [8, 9, 10, 11]], seq_lengths=[[3, 2], [2], [], [1, 0, 3]]
)  # fmt: skip


def test_rows_carry_their_documents():
    assert ROWS.segments.tolist() == [0, 3, 5, 7, 8, 11]
    assert ROWS.owners.tolist() == [0, 0, 1, 3, 3]
    assert ROWS.num_targets.tolist() == [3, 1, 0, 2]  # the first token of each document is no target
    assert ROWS.row(0)[1].tolist() == [-100, 2, 3, -100, 5]
    taken = ROWS.take(np.array([3, 2, 0, 3]))
    assert np.diff(taken.segments).tolist() == [1, 3, 3, 2, 1, 3]
    assert np.array_equal(ROWS.take(np.array([True, False, False, True])).segments, [0, 3, 5, 6, 9])
    apart = ROWS.unpacked()
    assert [apart.row(i)[0].tolist() for i in range(5)] == [[1, 2, 3], [4, 5], [6, 7], [8], [9, 10, 11]]
    assert apart.segments is None
    assert apart.num_targets.sum() == ROWS.num_targets.sum()
    assert ROWS.by_row(apart.num_targets).tolist() == ROWS.num_targets.tolist()
    batch = ROWS.batch(np.array([0, 3]), "cpu")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0], [8, 0, 0], [9, 10, 11]]
    assert "5 documents" in repr(ROWS)
    pool = CandidatePool([{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}])
    assert np.array_equal(pool.token_rows().segments, [0, 3, 5])
    assert pool.token_rows().num_targets.tolist() == [3]
    plain = CandidatePool([{"input_ids": [1, 2, 3, 4, 5]}])
    assert pool.identity()["rows_sha256"] != plain.identity()["rows_sha256"]


def test_a_trained_first_token_stands_behind_the_document_in_front():
    """The run's labels are followed: this packer trains the first token of a document, from the end of the last."""
    rows = TokenRows.from_lists([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]], [[3, 2]])
    apart = rows.unpacked()
    assert [part.tolist() for part in apart.row(0)] == [[1, 2, 3, 4], [-100, 2, 3, 4]]
    assert [part.tolist() for part in apart.row(1)] == [[4, 5], [-100, 5]]
    assert apart.num_targets.sum() == rows.num_targets.sum() == 4


@pytest.mark.parametrize("borders", [[0, 3, 11], [0, 3, 3, 5, 7, 11], [1, 5, 7, 11], [0, 5, 7, 12], []])
def test_documents_that_do_not_fit_the_rows(borders):
    with pytest.raises(ValueError, match="`segments` must"):
        TokenRows(values=ROWS.values, offsets=ROWS.offsets, segments=np.array(borders, np.int64))
    with pytest.raises(ValueError, match="`seq_lengths` must add up"):
        TokenRows.from_lists([[1, 2]], seq_lengths=[[3]])


IDS = torch.arange(10, 17)[None]
ANEW = [True, False, False, True, False, True, False]
SAYS = {
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
    "cu_seq_lens_q": torch.tensor([0, 3, 5, 7], dtype=torch.int32),
    "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2]]),
    "seq_lengths": [3, 2, 2],
}


@pytest.mark.parametrize("keys", [[name] for name in SAYS] + [list(SAYS)])
def test_where_documents_begin(keys):
    assert document_starts({"input_ids": IDS, **{key: SAYS[key] for key in keys}}, "it").tolist() == ANEW


def test_one_document_is_no_packed_row():
    one: dict[str, Any] = {"input_ids": IDS, "position_ids": torch.arange(7)[None], "cu_seq_lens_k": [0, 7]}
    assert document_starts(one, "it") is document_starts({"input_ids": IDS}, "it") is None
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])  # on the left
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert document_starts({"input_ids": IDS, "position_ids": padded, "attention_mask": mask}, "it") is None
    axes = torch.zeros(3, 1, 7, dtype=torch.long)  # as vision models have them
    assert document_starts({"input_ids": IDS, "position_ids": axes}, "it") is None
    assert document_starts({"input_ids": IDS, "position_ids": 2 + SAYS["position_ids"]}, "it").tolist() == ANEW


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"position_ids": [[0, 1, 2, 4, 5, 6, 7]]}, "`position_ids` must count up by 1.*got 2, 4 from it"),
        ({"position_ids": [[0, 0, 1, 1, 2, 2, 3]]}, "`position_ids` must count up by 1"),
        ({**SAYS, "cu_seq_lens_q": [0, 4, 7]}, r"`cu_seq_lens_q` and .* must mark the same documents.*\[0, 4\]"),
        ({"cu_seq_lens_q": [0, 3, 6]}, "`cu_seq_lens_q` must cover the 7 tokens"),
        ({"seq_lengths": [3, 3]}, "`seq_lengths` must cover the 7 tokens"),
    ],
)
def test_contradictions_are_refused(batch, match):
    given = {key: torch.as_tensor(value) for key, value in batch.items()}
    with pytest.raises(UnsupportedSettingError, match=match):
        document_starts({"input_ids": IDS, **given}, "it")


def test_a_collator_that_flattens_gives_plain_rows_and_padding_is_left_out():
    lists = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    pool = CandidatePool(Dataset.from_dict({"input_ids": lists}), DataCollatorWithFlattening())
    rows = pool.token_rows()
    assert rows.segments is None
    assert rows.labels is None
    assert rows.values.tolist() == sum(lists, [])

    def fills(rows):
        ids = [*rows[0]["input_ids"], 0, 0, 0]
        positions = [*range(len(ids) - 3), 0, 0, 0]
        labels = [-100, *ids[1:-3], -100, -100, -100]
        found = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {key: torch.tensor([value]) for key, value in found.items()}

    filled = CandidatePool(Dataset.from_dict({"input_ids": lists}), fills).token_rows()
    assert filled.segments is None
    assert filled.values.tolist() == rows.values.tolist()


class Packing:
    """Flattens as TRL's collator does: positions by `seq_lengths`, no label where they are 0."""

    def __init__(self, *, trains_first: bool = False) -> None:
        self.trains_first, self.calls = trains_first, 0

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        self.calls += 1
        ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
        positions = torch.cat([torch.arange(size) for row in rows for size in row["seq_lengths"]])[None]
        given = torch.tensor([[token for row in rows for token in row.get("labels", row["input_ids"])]])
        labels = given if self.trains_first else torch.where(positions == 0, -100, given)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("trains_first", [False, True])
def test_packed_columns_are_read_as_the_collator_makes_them(labelled, trains_first):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 6, 4).tolist() for _ in range(120)]
    lists = [rng.integers(3, 60, sum(sizes)).tolist() for sizes in lengths]
    columns = {"input_ids": lists, "seq_lengths": lengths}
    if labelled:
        columns["labels"] = [[-100 if token % 3 == 0 else token for token in row] for row in lists]
    collator = Packing(trains_first=trains_first)
    pool = CandidatePool(Dataset.from_dict(columns), collator)
    assert pool.is_read_by_columns is not trains_first  # one that trains first tokens is read row by row
    before = collator.calls
    rows = pool.token_rows()
    assert collator.calls == before + (len(pool) if trains_first else 0)
    slow = CandidatePool([dict(row) for row in pool.dataset], collator).token_rows()
    for name in ("values", "offsets", "segments"):
        assert np.array_equal(getattr(rows, name), getattr(slow, name))
    assert np.array_equal(effective_labels(rows), effective_labels(slow))


def test_lengths_that_do_not_fit_are_named_by_row():
    lists = [[5, 6, 7, 8] for _ in range(200)]
    lengths = [[2, 2] for _ in lists]
    pool = CandidatePool(Dataset.from_dict({"input_ids": lists, "seq_lengths": lengths}), Packing())
    assert pool.is_read_by_columns
    pool._columns._opened.clear()
    pool._columns.dataset = Dataset.from_dict(
        {"input_ids": lists, "seq_lengths": [*lengths[:150], [3, 3], *lengths[151:]]}
    )
    with pytest.raises(UnsupportedSettingError, match="`seq_lengths` must cover the 4 tokens.*to 6 from pool row 150"):
        pool._columns.read(np.arange(200), "all")


def test_ngrams_begin_anew_with_each_document():
    """A packed row's predictions are its documents' added up, and no bigram crosses a border."""
    rng = np.random.default_rng(0)
    docs = [rng.integers(3, 30, size).tolist() for size in rng.integers(2, 12, 240)]
    packed = TokenRows.from_lists(
        [sum(docs[i : i + 3], []) for i in range(0, 240, 3)],
        seq_lengths=[[len(doc) for doc in docs[i : i + 3]] for i in range(0, 240, 3)],
    )
    apart = packed.unpacked()
    derivatives = rng.normal(size=int(packed.num_targets.sum())).astype(np.float32)
    ends = np.cumsum(packed.num_targets)
    means = np.add.reduceat(derivatives, ends - packed.num_targets) / packed.num_targets
    labels = InfluenceLabels(
        candidate_id=np.arange(len(packed)),
        influence=means.astype(np.float32),
        influence_per_token=means.astype(np.float32),
        loss=np.ones(len(packed), np.float32),
        num_tokens=packed.num_targets,
        probe=np.full(len(packed), "directional"),
        step_size=1.0,
        token_derivatives=derivatives,
        reference_losses=None,
        info={},
    )
    model = NgramInfluenceModel(num_buckets=2**12).fit(packed, labels)
    alone = model.predict_per_token(apart) * apart.num_targets
    assert np.allclose(packed.by_row(alone) / packed.num_targets, model.predict_per_token(packed), atol=1e-6)
    seen = {(a, b) for doc in docs for a, b in zip(doc, doc[1:], strict=False)}
    counted = zip(model._statistics.previous.tolist(), model._statistics.token.tolist(), strict=True)
    assert set(counted) == seen
    for one, other in zip(log_odds(packed, packed, 2**12), log_odds(apart, apart, 2**12), strict=True):
        assert np.allclose(one.token, other.token)
        assert np.allclose(one.bigram, other.bigram)
