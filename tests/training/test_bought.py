"""What a round bought most, in words."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf import load_round
from mates_hf.data.rows import TokenRows
from mates_hf.training.bought import MIN_SCORE, most_bought, overrepresented
from tests.training.kit import make_arguments, make_pool, make_reference, run, small_config


def rows(texts: list[list[int]]) -> TokenRows:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return TokenRows(values=np.concatenate([np.asarray(text, np.int32) for text in texts]), offsets=offsets)


def test_tokens_are_those_of_a_test_of_two_shares_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    every = [rng.integers(0, 30, rng.integers(1, 12)).tolist() for _ in range(200)]
    chosen = [text for text in every if 7 in text or 9 in text][:60]
    expected = {}
    for token in range(30):
        a, b = sum(token in text for text in chosen), sum(token in text for text in every)
        p = (a + b + 1) / (len(chosen) + len(every) + 2)
        score = (a / len(chosen) - b / len(every)) / math.sqrt(p * (1 - p) * (1 / len(chosen) + 1 / len(every)))
        if score >= MIN_SCORE:
            expected[token] = (a / len(chosen), b / len(every))
    tokens, share, candidate_share = overrepresented(rows(chosen), rows(every))
    assert set(tokens.tolist()) == expected.keys() == {7, 9}
    assert tokens.tolist() == sorted(expected, key=lambda t: -expected[t][0] / (expected[t][1] + 1 / len(every)))
    for i, token in enumerate(tokens.tolist()):
        assert (share[i], candidate_share[i]) == pytest.approx(expected[token])


def test_what_is_bought_less_or_as_often_is_not_named() -> None:
    every = [[1, 2]] * 100 + [[1, 3]] * 100
    for chosen in ([[1, 2]] * 100, every):
        assert 3 not in overrepresented(rows(chosen), rows(every))[0]
        assert 1 not in overrepresented(rows(chosen), rows(every))[0]  # every row has it
    assert overrepresented(rows([[1, 2]] * 100), rows(every))[0].tolist() == [2]
    common, rare = [[1]] * 80 + [[1, 2]] * 120, [[1, 2]] * 40 + [[2]] * 160
    assert overrepresented(rows(common), rows(rare))[0].tolist() == [1]
    every = [[4, 5]] * 20 + [[4]] * 120 + [[6]] * 260  # 5 is rarer than 4, and more peculiar to what is chosen
    assert overrepresented(rows([[4, 5]] * 100 + [[4]] * 100), rows(every))[0].tolist() == [5, 4]
    assert len(overrepresented(rows([[5]]), rows([[6]]))[0]) == 0  # of single rows nothing is plain
    empty = TokenRows(values=np.zeros(0, np.int32), offsets=np.zeros(1, np.int64))
    assert len(overrepresented(empty, empty)[0]) == len(overrepresented(empty, rows(every))[0]) == 0


class Words:
    """A tokenizer of which some tokens are no words."""

    def decode(self, ids: list[int]) -> str:
        return {40: " sea", 41: " \ufffd", 42: " ,", 43: "longer than twenty characters"}.get(ids[0], f"w{ids[0]}")


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (Words(), ["sea", "longer than twenty characters", "w44"]),
        (types.SimpleNamespace(tokenizer=Words()), ["sea", "longer than twenty characters", "w44"]),  # a processor's
        (None, [None, None, None]),
    ],
)
def test_tokens_are_named_by_words(tokenizer: Any, texts: list[str | None]) -> None:
    from mates_hf.data.pool import CandidatePool

    pool = CandidatePool([{"input_ids": [40, 41, 42, 43, 44, 45] if i % 2 else [1, 2]} for i in range(400)])
    given: Any = types.SimpleNamespace(pool=pool, tokenizer=tokenizer)
    found = most_bought(given, np.arange(1, 400, 2), np.arange(400))
    assert [part["text"] for part in found] == texts
    assert [part["share"] for part in found] == [1.0] * 3
    assert all(0.4 < part["candidate_share"] < 0.6 for part in found)


def test_a_round_of_a_planted_pool_says_what_it_bought(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Rows of the reference's kind count up in eight tokens, 32 to 39; the tokenizer calls them w32 to w39."""
    given = {"update_steps": 8, "switch_lead_steps": 3, "num_probes": 80, "selection_ratio": 0.25}

    def prepare(trainer: Any) -> None:
        trainer.processing_class = trainer.callback_handler.processing_class = tiny_tokenizer

    from mates_hf import MatesCallback

    arguments = make_arguments(tmp_path, max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2)
    run(arguments, [MatesCallback(make_reference(), small_config(**given))], make_pool(1_000), prepare=prepare)
    record = load_round(tmp_path / "_mates" / "round-0001")
    found = record.info["bought_most"]
    assert found
    assert {part["text"] for part in found} <= {f"w{i}" for i in range(32, 40)}
    assert all(part["share"] > part["candidate_share"] for part in found)
    assert f'above all rows with "{found[0]["text"]}"' in repr(record) or "…" in repr(record)
