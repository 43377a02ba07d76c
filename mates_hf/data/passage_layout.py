"""How passages are laid out as rows that a run can be trained on, proven with the run's own collator.

Where it is used: before the first step of a run with `reference_passes`. A passage is a row of its own. Where every
pool row has one length and the collator pads none, whole passages are laid one after another into blocks of that
length, the tokenizer's end token between them; what is left of a block has the label -100.

Trade-off: a collator is code that nobody can read beforehand, so it is tried. Its own labels win: one that makes
labels of all tokens trains all tokens of a passage, also those of a prompt that the reference task leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import effective_labels
from mates_hf.data.collated import Collator, forked_rng, name_of
from mates_hf.data.columns import fixed_positions
from mates_hf.data.passage_rows import PassageRows, columns_of
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.token_columns import as_array
from mates_hf.errors import UnsupportedSettingError
from mates_hf.records import IntArray

_NUM_LOOKED_AT = 16  # pool rows whose columns say what a passage's are


def lay_out(reference: ReferenceTask, pool: CandidatePool, separator: int | None = None) -> PassageRows:
    """The passages as rows that the run can be trained on, between those of the pool.

    Args:
        reference: The passages, cut to the model's context.
        pool: Rows and collator of the run. Without a collator rows of one length are taken to be stacked, and others
            to be padded by the loop.
        separator: The token between two passages in a block; None lays them side by side.

    Returns:
        A row for each passage, or blocks of whole passages; a passage that is longer than a block is cut into several,
        each of which begins with the last token of the one before it.

    Raises:
        UnsupportedSettingError: pool rows and passages make no batch, or target tokens would not be trained in it.
    """
    text = reference.text("`reference_passes`", "Set `reference_passes=0`.")
    with forked_rng(0):
        rows = [pool.dataset[i] for i in fixed_positions(len(pool), _NUM_LOOKED_AT).tolist()]
    columns, left_out = columns_of(rows)
    lengths = {len(as_array(row["input_ids"], "input_ids", "the pool")) for row in rows} if columns else set()
    problem, collate_fn = "" if columns else "they have no `input_ids`", pool.collate_fn
    if columns and (collate_fn is not None or len(lengths) > 1):
        labels = effective_labels(text)
        found = PassageRows(dataclasses.replace(text, labels=labels), np.ones(len(labels), np.bool_), columns)
        problem = "" if collate_fn is None else _problem(found, pool.dataset, collate_fn)
        if not problem:
            return found
    if len(lengths) == 1 and min(lengths) > 1:
        found = PassageRows(*_blocks(text, min(lengths), separator), columns)
        if not any(column.kind == "labels" for column in columns):
            problem = "rows of one length without `labels` say of no token that it is not trained"
        else:
            problem = "" if collate_fn is None else _problem(found, pool.dataset, collate_fn)
        if not problem:
            return found
    by = "the rows of the pool" if collate_fn is None else f"the collator `{name_of(collate_fn)}`"
    without = f" Of columns that differ from row to row a passage has none: {left_out}." if left_out else ""
    raise UnsupportedSettingError(
        f"With `reference_passes` a batch must take pool rows and passages of the reference task together, but {by} "
        f"did not: {problem}.{without} Give the pool rows of token ids (`input_ids`), with `labels` where all have "
        "one length, or use a collator that pads (`DataCollatorForLanguageModeling`), or set `reference_passes=0`."
    )


def _blocks(rows: TokenRows, length: int, separator: int | None) -> tuple[TokenRows, npt.NDArray[np.bool_]]:
    """Whole passages laid into blocks, as many as fit into each, in their order."""
    filler = 0 if separator is None else separator
    blocks: list[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = []
    room = 0
    between = 0 if separator is None else 1
    for ids, labels in _pieces(rows, length):
        if not blocks or len(ids) + between > room:
            blocks.append([])
            room = length
        elif between:
            blocks[-1].append((np.array([filler]), np.array([IGNORED])))
            room -= 1
        blocks[-1].append((ids, labels))
        room -= len(ids)
    values = np.full((len(blocks), length), filler, np.int64)
    targets = np.full((len(blocks), length), IGNORED, np.int64)
    here = np.zeros((len(blocks), length), np.bool_)
    for number, block in enumerate(blocks):
        ids = np.concatenate([part for part, _ in block])
        values[number, : len(ids)] = ids
        targets[number, : len(ids)] = np.concatenate([part for _, part in block])
        here[number, : len(ids)] = True
    offsets = np.arange(len(blocks) + 1, dtype=np.int64) * length
    return TokenRows(values=values.reshape(-1), offsets=offsets, labels=targets.reshape(-1)), here.reshape(-1)


def _pieces(rows: TokenRows, length: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Token ids and labels of each passage, cut where it is longer than a block, without pieces that train nothing."""
    found = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        for start in range(0, max(len(ids) - 1, 1), length - 1):  # a block's first token is never a target
            piece = labels[start : start + length].copy()
            piece[:1] = IGNORED
            if (piece != IGNORED).any():
                found.append((ids[start : start + length], piece))
    return found


def _problem(rows: PassageRows, dataset: Any, collate_fn: Collator) -> str:
    """Why a pool row and a passage make no batch, tried with the longest and the shortest; empty where they do."""
    lengths = rows.tokens.lengths
    for i in sorted({0, int(lengths.argmin()), int(lengths.argmax())}):
        try:
            with forked_rng(0):
                usual = collate_fn([dataset[0], dataset[0]])
                batches = [(collate_fn([dataset[0], rows[i]]), 1), (collate_fn([rows[i], dataset[0]]), 0)]
                batches.append((collate_fn([rows[i]]), 0))
            for batch, place in batches:
                if set(batch) != set(usual):
                    return (
                        f"with a passage a batch has {sorted(map(str, batch))}, and without {sorted(map(str, usual))}"
                    )
                problem = _untrained(rows, i, batch, place)
                if problem:
                    return problem
        except Exception as error:  # what a collator raises is its own business
            return f"{type(error).__name__}: {error}".strip().rstrip(".")
    return ""


def _untrained(rows: PassageRows, i: int, batch: Mapping[str, Any], place: int) -> str:
    """Why a batch does not train a passage's target tokens; empty where it does, or where nothing says so."""
    span = slice(rows.tokens.offsets[i], rows.tokens.offsets[i + 1])
    here = rows.here[span]
    ids, labels = (part[here] for part in rows.tokens.row(i))
    together = as_array(batch["input_ids"], "input_ids", "the batch")
    place = min(place, len(together) - 1)  # a collator that flattens makes one row of several
    found = together[place]
    at = _find(found, ids)
    if at is None:
        return f"the tokens of passage {i} are not in the batch as they are"
    mask = batch.get("attention_mask")
    if (
        mask is not None
        and getattr(mask, "ndim", 0) == 2
        and not np.all(as_array(mask, "", "")[place][at : at + len(ids)])
    ):
        return f"tokens of passage {i} are masked"
    shifted = batch.get("shift_labels")
    given = batch.get("labels") if shifted is None else shifted
    targets = np.flatnonzero(labels != IGNORED)
    if given is None:
        return ""
    where = at + targets - (shifted is not None)
    trained = as_array(given, "labels", "the batch")[place][where]
    wrong = trained != ids[targets]
    # A collator that pads with a token of the text (the end token, say) trains it nowhere, in pool rows neither.
    is_padding = len(np.unique(ids[targets][wrong])) == 1 and (trained[wrong] == IGNORED).all() and not wrong.all()
    if wrong.any() and not is_padding:
        return f"of passage {i} it trains {np.count_nonzero(~wrong)} of {len(targets)} target tokens"
    return ""


def _find(row: npt.NDArray[Any], ids: IntArray) -> int | None:
    """Where in a row some ids stand one after another; None where they do not."""
    if row.ndim != 1:
        return None
    for at in np.flatnonzero(row[: len(row) - len(ids) + 1] == ids[0]).tolist() if len(row) >= len(ids) else ():
        if np.array_equal(row[at : at + len(ids)], ids):
            return int(at)
    return None
