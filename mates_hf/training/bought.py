"""What a round bought most, in words: tokens that rows it chose have more often than the candidates have.

Where it is used: the end of the select stage; the round's line and `mates-hf round` show it. Trade-off: a few hundred
rows of each are compared, so it costs the same in a slice of any size, and names only what is plain in those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.columns import fixed_positions
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray
from mates_hf.training.run import Run

NUM_COMPARED = 256  # rows of each
NUM_NAMED = 3
MIN_SCORE = 4.0  # standard errors: with 50,000 tokens to look at, one such comes about once in a round by chance


def most_bought(run: Run, selected: IntArray, candidates: IntArray) -> list[dict[str, Any]]:
    """The tokens by which the selection differs most from what it was chosen from.

    Args:
        run: the run's state; its tokenizer makes text of tokens.
        selected: (k,) int64 pool rows that the round chose.
        candidates: (M,) int64 pool rows that it chose from.

    Returns:
        Up to three, the most peculiar first, as JSON values: `token_id`, `text` (None without a tokenizer), `share` of
        the selected rows that have the token, and `candidate_share`. None where rows have no text.
    """
    if not run.pool.has_text:
        return []
    chosen, every = (
        run.pool.token_rows(ids[fixed_positions(len(ids), NUM_COMPARED)]) for ids in (selected, candidates)
    )
    tokens, share, candidate_share = overrepresented(chosen, every)
    tokenizer = getattr(run.tokenizer, "tokenizer", run.tokenizer)
    named: list[dict[str, Any]] = []
    for token, has, had in zip(tokens.tolist(), share.tolist(), candidate_share.tolist(), strict=True):
        text = None if tokenizer is None else _text_of(tokenizer, token)
        if text != "" and len(named) < NUM_NAMED:
            named.append({"token_id": token, "text": text, "share": has, "candidate_share": had})
    return named


def overrepresented(
    chosen: TokenRows, every: TokenRows
) -> tuple[IntArray, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Tokens that more rows have among the chosen ones than a test of two shares lets pass as chance.

    Args:
        chosen: The rows that were chosen.
        every: The rows that they were chosen from.

    Returns:
        (T,) token ids whose score is at least `MIN_SCORE`, the largest ratio of shares first; (T,) share of the chosen
        rows that have each, and (T,) share of all.
    """
    tokens, counts = np.unique(_once_a_row(chosen), return_counts=True)
    others, other_counts = np.unique(_once_a_row(every), return_counts=True)
    share, candidate_share = counts / max(len(chosen), 1), np.zeros(len(tokens))
    place = np.minimum(np.searchsorted(others, tokens), max(len(others) - 1, 0))
    known = others[place] == tokens if len(others) else np.zeros(len(tokens), bool)
    candidate_share[known] = other_counts[place[known]] / max(len(every), 1)
    # One row more and one less on each side, so that a token which every row has, or none, has a finite score.
    both = (counts + candidate_share * len(every) + 1) / (len(chosen) + len(every) + 2)
    error = np.sqrt(both * (1 - both) * (1 / max(len(chosen), 1) + 1 / max(len(every), 1)))
    score = (share - candidate_share) / error
    # By the ratio, not by the score: that of a word which nearly all rows have says little of what they are.
    order = np.lexsort((tokens, -share / (candidate_share + 1 / max(len(every), 1))))
    order = order[score[order] >= MIN_SCORE]
    return tokens[order].astype(np.int64), share[order], candidate_share[order]


def _once_a_row(rows: TokenRows) -> IntArray:
    """Token ids of all rows, each as often as rows have it."""
    of_row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    pairs = np.unique(np.stack([of_row, rows.values.astype(np.int64)]), axis=1)
    return np.asarray(pairs[1], np.int64)


def _text_of(tokenizer: Any, token: int) -> str:
    """A token as a word; empty where it is none: half a character, a space, a sign alone."""
    text = str(tokenizer.decode([token])).strip()
    return text if any(map(str.isalnum, text)) and "\ufffd" not in text else ""
