"""Texts of a round with the influence of each token: the best, the worst, those at the threshold, those measured.

Where it is used: by a run after each round, and by whoever reports on a run and has its pool. Two kinds of numbers are
shown and kept apart. Candidates have the influence that the round's influence model predicts for each token; probed
rows have what was measured of each.

Trade-off: only an influence model that adds up tokens (`NgramInfluenceModel`) has a value for each; texts are shown
without colours for the others. Of a text so many tokens are shown, and of a token so many characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.disk import read_array
from mates_hf.prediction.worth import row_worth
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.reporting.page.plain import MAX_PIECE
from mates_hf.reporting.page.rounds import Facts
from mates_hf.round_files import PROBES_FILE, read_labels

NUM_SHOWN = 10
NUM_MEASURED = 5  # at either end of the probed rows
MAX_TOKENS = 160  # of a text
NUM_NGRAMS = 12
_MAX_PENDING = 8  # tokens that one character may be made of


class Shown(NamedTuple):
    """Pool rows of one kind, best first.

    Attributes:
        kind: "top", "bottom", "border", "measured_top" or "measured_bottom".
        ids: (N,) int64 pool rows.
        influence: (N,) predicted influence of each, or what was measured.
        selected: (N,) whether the round chose it; None where rows were probed.
    """

    kind: str
    ids: IntArray
    influence: npt.NDArray[Any]
    selected: npt.NDArray[np.bool_] | None


def shown_rows(path: Path, num_random: int) -> tuple[list[Shown], float]:
    """Which candidates of a round are shown.

    Args:
        path: The round's directory.
        num_random: Number of rows of its selection that were drawn at random.

    Returns:
        The kinds, none where the round scored nothing; and the mean predicted influence of its candidates.
    """
    arrays = [read_array(path / name) for name in ("candidates.npy", "scores.npy", "num_targets.npy", "selection.npy")]
    if any(array is None or not len(array) for array in arrays):
        return [], 0.0
    candidates, scores, num_targets, selection = (np.asarray(array) for array in arrays)
    there = np.isfinite(scores)  # rows that `forget` took out of the round have no score, and are shown nowhere
    candidates, scores, num_targets = candidates[there], scores[there], num_targets[there]
    if not len(scores):
        return [], 0.0
    worth = row_worth(scores, num_targets)
    order = np.argsort(-worth, kind="stable")
    chosen = np.isin(candidates, selection)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    by_worth = np.sort(place[chosen])  # places of the chosen rows; those drawn at random come last
    if not len(by_worth):
        return [], float(scores.mean(dtype=np.float64))
    least = int(by_worth[max(len(by_worth) - num_random, 1) - 1])
    half = NUM_SHOWN // 2
    above = [int(p) for p in by_worth if p <= least][-half:]
    below = [int(p) for p in range(least + 1, len(order)) if not chosen[order[p]]][:half]
    places = {
        "top": range(min(NUM_SHOWN, len(order))),
        "border": [*above, *below],
        "bottom": range(max(len(order) - NUM_SHOWN, 0), len(order)),
    }
    found = [
        Shown(kind, candidates[rows], scores[rows], chosen[rows])
        for kind, at in places.items()
        if len(rows := order[np.asarray(list(at), np.int64)])
    ]
    return found, float(scores.mean(dtype=np.float64))


def all_shown(path: Path, num_random: int) -> list[Shown]:
    """Which candidates and which probed rows of a round are shown; arguments as of `shown_rows`."""
    measured = [shown for shown, _ in _measured(read_labels(path / PROBES_FILE))]
    return [*shown_rows(path, num_random)[0], *measured]


def example_texts(path: Path, info: Facts, pool: CandidatePool, tokenizer: Any, model: Any, unit: float) -> Facts:
    """The texts of a round with the influence of their tokens.

    Args:
        path: The round's directory.
        info: Its `round.json`.
        pool: The pool that it chose from.
        tokenizer: Decodes token ids; None shows the ids.
        model: The influence model that scored its candidates; None, or one that does not add up tokens, leaves them
            without colours.
        unit: What a prediction of it is multiplied by to be in the unit of the round's scores.

    Returns:
        One list for each kind of `Shown`. An entry has `row`, `influence`, `selected`, `num_tokens`, and `pieces`:
        text of a token, and its `influence` above that of the average candidate (higher is better) or None.
    """
    found, average = shown_rows(path, int(info.get("num_random") or 0))
    told: Facts = {}
    for shown in found:
        rows = pool.token_rows(shown.ids)
        values = predicted_tokens(model, rows)
        if values is not None:
            values = values * unit - average
        told[shown.kind] = _entries(shown, rows, values, tokenizer)
    labels = read_labels(path / PROBES_FILE)
    for shown, derivatives in _measured(labels):
        rows = pool.token_rows(shown.ids)
        told[shown.kind] = _entries(shown, rows, _on_targets(rows, derivatives), tokenizer)
    return told


def _measured(labels: InfluenceLabels) -> Iterator[tuple[Shown, npt.NDArray[Any] | None]]:
    """The best and the worst of the probed rows, with the influence of each trained token above the average one."""
    num = min(NUM_MEASURED, len(labels) // 2)
    order = np.argsort(-row_worth(labels.influence, labels.num_tokens), kind="stable")
    derivatives = labels.token_derivatives
    average = 0.0 if derivatives is None or not len(derivatives) else float(np.mean(derivatives, dtype=np.float64))
    for kind, at in (("measured_top", order[:num]), ("measured_bottom", order[len(order) - num :])):
        if not len(at):
            continue
        some = labels.take(at)
        values = None if some.token_derivatives is None else some.token_derivatives.astype(np.float64) - average
        yield (
            Shown(kind, some.candidate_id, some.influence, None),
            (None if values is None else values * labels.step_size),
        )


def _on_targets(rows: TokenRows, values: npt.NDArray[Any] | None) -> npt.NDArray[np.float64] | None:
    """(T,) values of the trained tokens at their places, NaN elsewhere; None where they are not of these rows."""
    mask = rows.target_mask
    if values is None or int(mask.sum()) != len(values):
        return None
    placed = np.full(len(rows.values), np.nan)
    placed[mask] = values
    return placed


def predicted_tokens(model: Any, rows: TokenRows) -> npt.NDArray[np.float64] | None:
    """(T,) influence that a model predicts for each trained token alone, NaN elsewhere; None where it cannot."""
    at = np.flatnonzero(rows.target_mask)
    if not callable(getattr(model, "explain", None)) or not len(at):
        return None
    pairs = np.stack([rows.values[at - 1], rows.values[at]], axis=1).astype(np.int64).ravel()
    spans = TokenRows(values=pairs, offsets=np.arange(len(at) + 1, dtype=np.int64) * 2)
    return _on_targets(rows, np.asarray(model.predict(spans), np.float64))


def _entries(shown: Shown, rows: TokenRows, values: npt.NDArray[Any] | None, tokenizer: Any) -> list[Facts]:
    """One entry a row."""
    entries = []
    for i in range(len(rows)):
        start, end = int(rows.offsets[i]), int(rows.offsets[i + 1])
        ids = rows.values[start : min(end, start + MAX_TOKENS)].tolist()
        of_tokens = [None] * len(ids) if values is None else _known(values[start : start + len(ids)])
        entries.append(
            {
                "row": int(shown.ids[i]),
                "influence": float(shown.influence[i]),
                "selected": None if shown.selected is None else bool(shown.selected[i]),
                "num_tokens": end - start,
                "cut": end - start > len(ids),
                "pieces": list(_pieces(ids, of_tokens, tokenizer)),
            }
        )
    return entries


def _known(values: npt.NDArray[Any]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _pieces(ids: Sequence[int], values: Sequence[float | None], tokenizer: Any) -> Iterator[Facts]:
    """Text and influence token by token; tokens that only make a character together are one piece."""
    decode = getattr(getattr(tokenizer, "tokenizer", tokenizer), "decode", None)
    before, first = "", 0
    for i in range(len(ids)):
        if decode is None:
            text = f"[{ids[i]}] "
        else:
            so_far = str(decode(list(ids[: i + 1]), skip_special_tokens=False))
            whole = not so_far.endswith("\ufffd") or i + 1 - first >= _MAX_PENDING or i + 1 == len(ids)
            if not whole:
                continue
            text = so_far[len(before) :] if so_far.startswith(before) else str(decode([ids[i]]))
            before = so_far
        known = [value for value in values[first : i + 1] if value is not None]
        cut = text if len(text) <= MAX_PIECE else text[:MAX_PIECE] + "…"
        yield {"text": cut, "influence": sum(known) / len(known) if known else None}
        first = i + 1


def ngram_texts(model: Any, tokenizer: Any, step_size: float) -> Facts | None:
    """The n-grams that raise and lower predicted influence most.

    Args:
        model: The fitted influence model.
        tokenizer: Decodes token ids, or None.
        step_size: What an effect is multiplied by to be in the unit of the labels.

    Returns:
        As `NgramInfluenceModel.explain` gives them; None where the model cannot say.
    """
    explain = getattr(model, "explain", None)
    if not callable(explain):
        return None
    decodes = getattr(tokenizer, "tokenizer", tokenizer)
    found = explain(NUM_NGRAMS, decodes if callable(getattr(decodes, "decode", None)) else None)
    return {
        side: [
            {
                "kind": entry["kind"],
                "text": (entry["text"] or "")[:MAX_PIECE] if entry["text"] is not None else None,
                "ids": entry["ids"],
                "effect": entry["effect"] * step_size,
                "count": entry["count"],
            }
            for entry in found[side]
        ]
        for side in ("raises", "lowers")
    }
