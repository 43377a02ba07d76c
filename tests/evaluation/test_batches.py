"""Micro-batches of an evaluation have as many tokens as the longest rows make, whatever the answers; few waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.lab.operations import counted
from mates_hf.evaluation import continuations
from mates_hf.evaluation.continuations import Continuations, _batches, log_likelihoods

SAME = 1e-5  # float32 products in batches of other sizes


@pytest.mark.parametrize("most_logits", [8, 60, 10**9])
@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_every_row_is_in_one_batch_of_bounded_tokens_and_logits(batch_rows: int, most_logits: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 200)
    num_logits = np.minimum(rng.integers(1, 6, 200), lengths)
    order = np.lexsort((np.arange(200), -lengths))
    batches = _batches(order, lengths, num_logits, batch_rows, most_logits)
    np.testing.assert_array_equal(np.concatenate(batches), order)
    for batch in batches[:-1]:
        longest = lengths[batch].max()
        assert len(batch) >= batch_rows
        assert len(batch) == batch_rows or len(batch) * longest <= batch_rows * lengths.max()
        kept = (longest - lengths[batch] + num_logits[batch]).max()
        assert len(batch) == batch_rows or len(batch) * kept <= most_logits
    if most_logits == 10**9:
        assert len(batches) < 0.85 * 200 / batch_rows


def requests(vocab: int = 64) -> Continuations:
    rng = np.random.default_rng(1)
    pairs = []
    for length in rng.integers(2, 30, 40):
        context = rng.integers(3, vocab, length).tolist()
        pairs += [(context, rng.integers(3, vocab, size).tolist()) for size in (1, 1, 3)]
    return Continuations.from_pairs(pairs)


def test_answers_do_not_depend_on_the_batches(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = make_tiny_model().eval(), requests()
    sums, greedy = log_likelihoods(model, asked, batch_rows=1)
    for i in range(0, len(asked), 17):
        tokens = torch.from_numpy(asked.values[asked.offsets[i] : asked.offsets[i + 1]])
        count = int(asked.num_targets[i])
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1]).logits[0, -count:].log_softmax(-1)
        assert sums[i] == pytest.approx(float(logits.gather(1, tokens[-count:, None]).sum()), rel=SAME)
        assert greedy[i] == bool((logits.argmax(-1) == tokens[-count:]).all())
    monkeypatch.setattr(continuations, "_CHUNK", 7)
    for batch_rows in (2, 16):
        other, same = log_likelihoods(model, asked, batch_rows=batch_rows)
        np.testing.assert_allclose(other, sums, rtol=SAME)
        np.testing.assert_array_equal(same, greedy)


def test_an_evaluation_waits_once(make_tiny_model: Callable[..., Any]) -> None:
    model, asked = make_tiny_model().eval(), requests()
    shapes: list[int] = []
    model.register_forward_pre_hook(lambda *_: shapes.append(1))
    with counted() as mode:
        log_likelihoods(model, asked, batch_rows=4)
    assert mode.syncs["cpu"] == 1
    assert mode.syncs.total() <= 1 + 2 * len(shapes)  # those of the model
