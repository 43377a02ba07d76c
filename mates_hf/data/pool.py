"""The candidate pool: every row that may be trained on, read as the Trainer would train on it.

Where it is used: `training/` makes a `CandidatePool` of the Trainer's dataset and collator. Influence models read it
as `TokenRows` (`token_rows`), probes are fed `Candidates` (`candidates`). A pool row is `dataset[i]` put through the
collator alone, so shuffled, sliced, concatenated, transformed datasets and plain torch datasets all count.

Trade-off: reading row by row (`collated`) is exact and slow; a `datasets.Dataset` of token ids whose collator was seen
to give exactly its columns is read from Arrow instead (`columns`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import PLAIN, Candidates, Reading
from mates_hf.data.collated import (
    TOKEN_KEYS,
    CollatedRow,
    Collator,
    drawn_row,
    forked_rng,
    name_of,
    read_row,
    stack_rows,
)
from mates_hf.data.columns import DatasetColumns, LabelRule, visible_columns
from mates_hf.data.feeds import CollatedRows, StackedColumns, as_text
from mates_hf.data.pool_identity import NUM_IDENTITY_ROWS as NUM_IDENTITY_ROWS
from mates_hf.data.pool_identity import features_of, identity_of, look_beyond_text, marks_of, refuse_streams
from mates_hf.data.rows import TokenRows, stretches
from mates_hf.data.segments import document_starts
from mates_hf.display import card
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)


class CandidatePool:
    """A map-style dataset plus the collator that the Trainer uses; a view of some or all of its rows.

    Args:
        dataset: A `datasets.Dataset`, a torch `Dataset` or any sequence whose rows are dicts.
        collate_fn: The collator of the dataloader; None where rows have `input_ids` and, where not every token is
            trained, `labels`.
        ids: (N,) pool rows of the view, in order; None for all rows.

    Attributes:
        reading: How the run's loss follows from a collated row; None until the two were compared
            (`influence/reading`).

    Raises:
        ValueError: the dataset is empty, or has neither `input_ids` nor a collator to make them.
        TypeError: the dataset is no map-style dataset.
        UnsupportedSettingError: the dataset is streamed, or its columns contradict each other about the documents of a
            packed row.
    """

    def __init__(
        self, dataset: Any, collate_fn: Collator | None = None, ids: Sequence[int] | IntArray | None = None
    ) -> None:
        refuse_streams(dataset)
        self.dataset = dataset
        self.collate_fn = collate_fn
        self._num_rows = len(dataset)
        if not self._num_rows:
            raise ValueError("The candidate pool must have rows, got an empty dataset. Check its split and filters.")
        names = visible_columns(dataset)
        if collate_fn is None and names is not None:
            if "input_ids" not in names:
                raise ValueError(
                    f"The candidate pool must have a column `input_ids`, got the columns {names}. Tokenise it "
                    "(`dataset.map(lambda row: tokenizer(row['text']))`), or pass the `collate_fn` that does. Rows of "
                    "images or speech need one: `CandidatePool(dataset, collate_fn)`."
                )
            document_starts(dataset[0], "the dataset")
        self.reading: Reading | None = None
        # None: all rows, which a large pool's memory need not hold.
        self._ids: IntArray | None = None if ids is None else self._checked(ids).copy()
        # Shared by all views: the open columns, and the label rule of the collator once it was looked for.
        self._columns = DatasetColumns(dataset)
        self._told_slow = False
        self._seen: dict[str, Any] = {}  # what was found of the first row; shared by all views

    def __len__(self) -> int:
        return self._num_rows if self._ids is None else len(self._ids)

    def __repr__(self) -> str:
        collator = "none" if self.collate_fn is None else name_of(self.collate_fn)
        facts = {"rows": f"{len(self):,} of {self._num_rows:,}", "dataset": type(self.dataset).__name__}
        return card("CandidatePool", {**facts, "collator": collator})

    @property
    def trained_from(self) -> Any:
        """What the dataloader reads rows from."""
        return self.dataset

    @property
    def candidate_ids(self) -> IntArray:
        """(N,) int64 pool rows of the view."""
        return np.arange(self._num_rows) if self._ids is None else self._ids

    def select(self, ids: Sequence[int] | IntArray) -> CandidatePool:
        """A view of the pool rows `ids` (rows of the pool, not of this view), in that order."""
        view = CandidatePool.__new__(CandidatePool)
        view.__dict__.update(self.__dict__)
        view._ids = self._checked(ids).copy()
        return view

    def token_rows(self, ids: Sequence[int] | IntArray | None = None) -> TokenRows:
        """The pool rows `ids` (None: the view's) as they would be trained on, in that order.

        Cost: a copy of the tokens on the fast path; one `dataset[i]` and one collator call a row otherwise. Random
        numbers that those draw come from a seed of the row's own, so two readings are equal, and the streams of
        `random`, numpy and torch are left as found.

        Args:
            ids: (N,) pool rows; repeats are allowed.

        Returns:
            N rows without padding.

        Raises:
            ValueError: a row has no integer token ids, or an id is not a row of the pool.
            UnsupportedSettingError: the collator makes no `input_ids`, or contradicts itself about documents of a row.
        """
        rows = self.candidate_ids if ids is None else self._checked(ids)
        reading = self.reading or PLAIN
        rule = self._label_rule() if reading.is_plain_text else None
        return stack_rows(self._read_rows(rows)) if rule is None else self._columns.read(rows, rule)

    @property
    def is_read_by_columns(self) -> bool:
        """Whether all there is of rows is read from Arrow columns: no dataset row, no collator, no random stream."""
        return (self.reading or PLAIN).is_plain_text and not self.beyond_text and self._label_rule() is not None

    def candidates(self, ids: Sequence[int] | IntArray | None = None) -> Candidates:
        """The pool rows `ids` (None: the view's) as a model is fed them, in that order.

        Args:
            ids: (N,) pool rows; repeats are allowed.

        Returns:
            N rows: without padding where token ids, labels and mask are all there is, else as the collator makes them.
        """
        reading = self.reading or PLAIN
        if reading.feed == "plain":
            return self.token_rows(ids)
        return self.collated(self.candidate_ids if ids is None else self._checked(ids), reading)

    def collated(self, ids: IntArray, reading: Reading) -> CollatedRows:
        """The pool rows `ids` as their collator makes them, whatever the pool's own reading says."""
        return CollatedRows.of(self.dataset, self.collate_fn or StackedColumns(TOKEN_KEYS), reading, ids)

    def chunks(
        self, ids: Sequence[int] | IntArray | None, size: int, *, max_tokens: int | None = None
    ) -> Iterator[TokenRows]:
        """`token_rows(ids)` in pieces, one in memory at a time; sorted ids are read fastest.

        Args:
            ids: (N,) pool rows; None for the view's.
            size: Largest number of rows of a piece.
            max_tokens: Largest number of tokens of a piece, padding included; a row with more is a piece of its own.
                None sets no limit.

        Returns:
            The pieces, in the order of `ids`.

        Raises:
            ValueError: a bound is below 1.
        """
        rows = self.candidate_ids if ids is None else self._checked(ids)
        if size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"`size` and `max_tokens` must be at least 1, got {size} and {max_tokens}.")
        return self._pieces(rows, size, max_tokens)

    def _pieces(self, rows: IntArray, size: int, max_tokens: int | None) -> Iterator[TokenRows]:
        in_columns = (self.reading or PLAIN).is_plain_text and self._label_rule() is not None
        for start in range(0, len(rows), size):
            piece = rows[start : start + size]
            if max_tokens is None:
                yield self.token_rows(piece)
            elif in_columns:
                for span in stretches(self._columns.lengths(piece), max_tokens):
                    yield self.token_rows(piece[span])
            else:
                yield from _stacked(self._read_rows(piece), max_tokens)

    @property
    def beyond_text(self) -> tuple[str, ...]:
        """Inputs of the model that are no text (pixels, sound), as the collator makes them of the first row."""
        if "beyond_text" not in self._seen:
            self._seen["beyond_text"], self._seen["has_text"] = look_beyond_text(self.dataset, self.collate_fn)
        found: tuple[str, ...] = self._seen["beyond_text"]
        return found

    @property
    def has_text(self) -> bool:
        """Whether rows have token ids, alone or beside other inputs."""
        return not self.beyond_text or bool(self._seen["has_text"])

    def input_hashes(self, ids: Sequence[int] | IntArray) -> npt.NDArray[np.uint64]:
        """(N,) uint64 of the bytes of all inputs of the pool rows `ids`, labels left out; each is collated once."""
        return self.collated(self._checked(ids), self.reading or PLAIN).hashes

    def identity(self) -> dict[str, Any]:
        """What the view holds, as plain JSON values that are equal for equal content.

        Returns:
            `num_rows`, `features` (columns and their types) and `rows_sha256`, over the tokens and labels of 1,024
            rows whose positions depend on the number of rows only. Where rows are more than text it is over all
            inputs and labels, and `inputs` names those that are no text.
        """
        return identity_of(self)

    def row_marks(self) -> npt.NDArray[np.uint64]:
        """(K,) uint64 hashes of the rows that `identity` reads, one by one: which of them were changed."""
        return marks_of(self)

    def _features(self) -> str:
        """Names and Arrow types of a `datasets.Dataset`, else the keys and the type of the first row."""
        return features_of(self.dataset)

    def _checked(self, ids: Sequence[int] | IntArray) -> IntArray:
        """`ids` as (N,) int64, or an error."""
        array = np.asarray(ids)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise ValueError(f"`ids` must be a list of pool row numbers, got {array.dtype} of shape {array.shape}.")
        array = array.astype(np.int64, copy=False)
        if len(array) and (array.min() < 0 or array.max() >= self._num_rows):
            raise ValueError(
                f"`ids` must be rows of the pool, 0 to {self._num_rows - 1}, got {array.min()} to {array.max()}. Pool "
                "rows are counted in the whole pool, not in a view of it."
            )
        return array

    def _read_rows(self, ids: IntArray) -> Iterator[CollatedRow]:
        """One row at a time, each on random streams seeded by its id, in the layout that influence models read."""
        reading = self.reading or PLAIN
        same_length = reading.likelihood != "classes" and not reading.encoder_decoder
        for i in ids.tolist():
            given = drawn_row(self.dataset, i)
            with forked_rng(i):
                row = read_row(
                    given,
                    self.collate_fn,
                    f"pool row {i}",
                    same_length=same_length,
                    labels_of=reading.labels_of,
                )
            if not reading.is_plain_text:
                there = slice(None) if row.attention_mask is None else row.attention_mask != 0
                labels = row.labels if row.labels is None or not same_length else row.labels[there]
                row = CollatedRow(*as_text(row.input_ids[there], labels, reading), None)
            yield row.as_one_text() if reading.packed == "together" else row

    def _label_rule(self) -> LabelRule | None:
        """How to read the Arrow columns, or None where rows must be read one by one."""
        if visible_columns(self.dataset) is None:
            return None
        rule = self._columns.find_rule(self.collate_fn)
        if rule is None and not self._told_slow:
            self._told_slow = True
            logger.info(
                "Candidates are read row by row: the collator %s does more than pad and label token ids.",
                name_of(self.collate_fn),
            )
        return rule


def _stacked(rows: Iterator[CollatedRow], max_tokens: int) -> Iterator[TokenRows]:
    """Rows that are read one by one, stacked as soon as the next one would be too many tokens."""
    held: list[CollatedRow] = []
    tokens = 0
    for row in rows:
        if held and tokens + len(row.input_ids) > max_tokens:
            yield stack_rows(held)
            held, tokens = [], 0
        held.append(row)
        tokens += len(row.input_ids)
    if held:
        yield stack_rows(held)


def read_candidates(candidates: Any) -> tuple[IntArray, TokenRows]:
    """Candidates of any accepted kind as ids and rows.

    Args:
        candidates: A `CandidatePool`, a `TokenRows`, a `datasets.Dataset` with `input_ids` (and `labels` where not
            every token is trained), or any map-style sequence of such dicts.

    Returns:
        (N,) int64 candidate ids (pool rows; row numbers where there is no pool) and the N rows.

    Raises:
        ValueError: there is no candidate, or no `input_ids`.
        TypeError: not one of those kinds.
        UnsupportedSettingError: the candidates are streamed.
    """
    if isinstance(candidates, TokenRows):
        if not len(candidates):
            raise ValueError("`candidates` must have rows, got none.")
        return np.arange(len(candidates)), candidates
    pool = candidates if isinstance(candidates, CandidatePool) else CandidatePool(candidates)
    if not len(pool):
        raise ValueError("`candidates` must have rows, got an empty view of a pool.")
    return pool.candidate_ids, pool.token_rows()


def open_candidates(candidates: Any) -> tuple[CandidatePool, TokenRows | None]:
    """Candidates of any accepted kind as a pool, and as token rows where that is what was given.

    Args:
        candidates: The candidates, in any form that `read_candidates` takes.

    Returns:
        A pool whose ids are the candidates' ids, and the rows or None.
    """
    if isinstance(candidates, TokenRows):
        if not len(candidates):
            raise ValueError("`candidates` must have rows, got none.")
        return CandidatePool(_RowDicts(candidates)), candidates
    pool = candidates if isinstance(candidates, CandidatePool) else CandidatePool(candidates)
    if not len(pool):
        raise ValueError("`candidates` must have rows, got an empty view of a pool.")
    return pool, None


class _RowDicts:
    """Token rows as a map-style dataset of dicts."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids, labels = self.rows.row(i)
        row = {"input_ids": ids, "labels": labels if self.rows.labels is not None else ids}
        segments = self.rows.take(np.array([i])).segments
        return row if segments is None else {**row, "seq_lengths": np.diff(segments)}


def rows_to_predict(dataset: Any) -> TokenRows:
    """The rows of whatever `read_candidates` accepts; unlike candidates to fit on, there may be none."""
    return dataset if isinstance(dataset, TokenRows) else read_candidates(dataset)[1]


def rows_of(candidates: Any, candidate_ids: Sequence[int] | IntArray) -> TokenRows:
    """The rows with these candidate ids, in that order, of whatever `read_candidates` accepts.

    Args:
        candidates: The candidates, in any form that `read_candidates` takes.
        candidate_ids: (M,) pool rows.

    Returns:
        M rows; those of a pool need not be in the view.

    Raises:
        ValueError: an id is not a row of the pool.
    """
    if isinstance(candidates, TokenRows):
        ids = np.asarray(candidate_ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(candidates)):
            raise ValueError(
                f"`candidate_ids` must be rows 0 to {len(candidates) - 1} of the candidates, got {ids.min()} to "
                f"{ids.max()}. Pass the candidates that were measured."
            )
        return candidates.take(ids)
    pool = candidates if isinstance(candidates, CandidatePool) else CandidatePool(candidates)
    return pool.token_rows(candidate_ids)
