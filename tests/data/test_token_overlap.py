"""Runs of tokens that rows share with passages: by brute force, at every border, and as the advice says."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data import token_overlap
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.data.token_overlap import SHORTEST_PASSAGE, TokenNgramIndex, shared_rows

few_tokens = st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=8)


def runs(ids: list[int], size: int) -> set[tuple[int, ...]]:
    found = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    return {run for run in found if len(set(run)) > 1}


@settings(max_examples=80, deadline=None)
@given(few_tokens, few_tokens, st.sampled_from([5, 7, 13]), st.integers(1, 30))
def test_rows_that_share_a_run_by_brute_force(rows, passages, n, block):
    expected = []
    for i, row in enumerate(rows):
        sizes = [min(n, len(passage)) for passage in passages]
        pairs = zip(passages, sizes, strict=True)
        if any(runs(row, size) & runs(passage, size) for passage, size in pairs if size >= SHORTEST_PASSAGE):
            expected.append(i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_overlap, "_BLOCK_TOKENS", block)
        index = TokenNgramIndex(TokenRows.from_lists(passages), n)
        assert index.shared(TokenRows.from_lists(rows)).tolist() == expected
    assert index.num_short == sum(len(passage) < SHORTEST_PASSAGE for passage in passages)


def test_ids_beyond_any_table_and_of_any_type():
    passage = (10**12 + np.arange(40)).tolist()
    index = TokenNgramIndex(TokenRows.from_lists([passage, list(range(20))]))
    rows = TokenRows.from_lists([[7, *passage[5:18]], passage[5:17], [*range(3, 16), 9]])
    assert index.shared(rows).tolist() == [0, 2]
    small = TokenRows(values=np.arange(30, dtype=np.uint16), offsets=np.array([0, 30]))
    assert index.shared(small).tolist() == [0]


def test_the_rows_of_a_dataset_that_hold_a_passage_can_be_left_out():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1000, (9_000, 20)).tolist()
    passages = rng.integers(0, 1000, (4, 30)).tolist()
    rows[17][4:17], rows[8_500][:13] = passages[1][2:15], passages[3][17:]
    rows[40][:12] = passages[0][:12]
    dataset = Dataset.from_dict({"input_ids": rows})
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": passages}), input_ids_column="input_ids")
    found = shared_rows(dataset, reference)
    assert found.tolist() == [17, 8_500]
    assert shared_rows(TokenRows.from_lists(rows), reference).tolist() == [17, 8_500]
    rest = dataset.select(np.setdiff1d(np.arange(len(dataset)), found))  # as the docstring and the warning say
    assert len(rest) == 8_998
    assert shared_rows(rest, reference).tolist() == []
    assert shared_rows(dataset, reference, n=12).tolist() == [17, 40, 8_500]
    with pytest.raises(ValueError, match=r"`n` must be at least 5 tokens, got 4"):
        shared_rows(dataset, reference, n=4)
