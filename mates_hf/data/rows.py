"""Token rows: what influence models read, and the fast way to feed a model.

Where it is used: everything that may be trained on or cared about becomes a `TokenRows`; nothing to the right of
`data/` looks at a dataset's columns. Trade-off: inputs other than token ids and labels do not fit in; where a model
takes some, a probe is fed rows of the run's collator instead (`feeds`).

`TokenSpans` is the same for corpora that should stay where they are: rows as stretches of buffers that others own.

Shape suffixes: N rows, T tokens over all rows, M rows of one buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import IGNORED as IGNORED
from mates_hf.data.batches import ModelBatch

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """N rows of tokens, flat.

    Attributes:
        values: (T,) integer token ids, row after row.
        offsets: (N + 1,) int64; row i is `values[offsets[i]:offsets[i + 1]]`.
        labels: (T,) integer, the id each position is trained to be predicted as from the ones before it, or -100; None
            means every token but the first of its row is its own label. A row's first label is never a target.
        segments: (S + 1,) int64 borders of the documents of packed rows, those of rows among them; a token sees the
            tokens of its own document alone. None: a row is one document. With segments there are always labels: where
            none are given, the first token of each document has none.
    """

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[Any] | None = None
    segments: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.segments is None:
            return
        borders = np.asarray(self.segments, np.int64)
        object.__setattr__(self, "segments", borders)
        if not len(borders) or (np.diff(borders) <= 0).any() or not np.isin(self.offsets, borders).all():
            raise ValueError(
                "`segments` must rise, and have every row's border among them, from 0 to the number of tokens "
                f"({len(self.values)}), got {borders[:8].tolist()} for the rows {self.offsets[:8].tolist()}. Give the "
                "borders of all documents of all rows."
            )
        if borders[0] != 0 or borders[-1] != len(self.values):
            raise ValueError(f"`segments` must be from 0 to {len(self.values)}, got {borders[0]} to {borders[-1]}.")
        if self.labels is None:
            labels = self.values.astype(np.int64)
            labels[borders[:-1]] = IGNORED
            object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        trained = "every token but a row's first" if self.labels is None else "those with a label"
        packed = "" if self.segments is None else f", {len(self.segments) - 1:,} documents"
        return f"TokenRows: {len(self):,} rows{packed}, {len(self.values):,} tokens; trained: {trained}"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) int64 tokens in each row."""
        return np.diff(self.offsets)

    @property
    def one_by_one(self) -> bool:
        """False: rows go into one batch."""
        return False

    @property
    def target_mask(self) -> npt.NDArray[np.bool_]:
        """(T,) bool, True where the token is predicted and trained."""
        mask = np.ones(len(self.values), bool) if self.labels is None else self.labels != IGNORED
        starts = self.offsets[:-1][self.lengths > 0]
        mask[starts] = False
        return mask

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """(N,) int32 trained tokens in each row."""
        if self.labels is None:
            return np.maximum(self.lengths - 1, 0).astype(np.int32)
        total = np.concatenate([[0], np.cumsum(self.target_mask)])
        return np.asarray(total[self.offsets[1:]] - total[self.offsets[:-1]], np.int32)

    def row(self, i: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Token ids and labels of row i, both (length,); the first label is -100."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        labels = (self.values if self.labels is None else self.labels)[span].copy()
        labels[:1] = IGNORED
        return self.values[span], labels

    def take(self, index: npt.NDArray[Any]) -> TokenRows:
        """Some rows: `index` is (M,) int row numbers or an (N,) bool mask; order and repeats are kept."""
        rows = np.flatnonzero(index) if index.dtype == bool else np.asarray(index, np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        where = flat_index(self.offsets[rows], lengths)
        return TokenRows(
            values=self.values[where],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[where],
            segments=None if self.segments is None else self._segments_of(rows, offsets),
        )

    def _segments_of(self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Borders of the documents of some rows that are laid out at `offsets`."""
        assert self.segments is not None
        first, last = (np.searchsorted(self.segments, self.offsets[rows + end]) for end in (0, 1))
        counts = last - first
        where = flat_index(first, counts)
        return np.append(self.segments[where] + np.repeat(offsets[:-1] - self.offsets[rows], counts), offsets[-1])

    def unpacked(self) -> TokenRows:
        """A row for each document, whose trained tokens are the same in the same order; the rows where none is packed.

        Where a document's first token is trained, the run predicts it from the end of the document before it: it then
        stands at that one's end, where it is a target and no other token sees it.
        """
        if self.segments is None:
            return self
        assert self.labels is not None
        starts = self.segments[:-1]
        trained = self.target_mask[starts]
        lengths = np.diff(self.segments) + np.append(trained[1:], np.zeros(min(1, len(starts)), np.bool_))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        where = flat_index(starts, lengths)
        return TokenRows(values=self.values[where], offsets=offsets, labels=self.labels[where])

    def by_row(self, sums: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N,) sums over the documents of each row of what `unpacked` has of each, (S,)."""
        found = np.zeros(len(self), sums.dtype)
        np.add.at(found, self.owners, sums)
        return found

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """(S,) int64 row of each document; where none is packed, a row is one."""
        if self.segments is None:
            return np.arange(len(self))
        return np.asarray(np.searchsorted(self.offsets, self.segments[:-1], side="right") - 1, np.int64)

    def padded(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """All rows padded on the right with token 0: ids, where there is a token, and labels, each (N, L).

        Documents of packed rows are no rows here; `unpacked` makes them some.
        """
        here = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        ids, labels = np.zeros(here.shape, np.int64), np.full(here.shape, IGNORED, np.int64)
        ids[here] = self.values
        labels[here] = np.where(self.target_mask, self.values if self.labels is None else self.labels, IGNORED)
        return ids, here, labels

    def batch(self, index: npt.NDArray[Any], device: torch.device | str) -> ModelBatch:
        """The rows `index` in one batch, padded on the right and masked, on a device; documents of packed rows apart.

        Padding is token 0: any id does, nothing that counts looks at it.
        """
        import torch

        ids_BL, here_BL, labels_BL = self.take(index).unpacked().padded()
        mask = torch.from_numpy(here_BL.astype(np.int64))
        inputs = {"input_ids": torch.from_numpy(ids_BL), "attention_mask": mask}
        return ModelBatch(inputs, torch.from_numpy(labels_BL)).to(device)

    @classmethod
    def from_lists(
        cls,
        input_ids: Iterable[Sequence[int]],
        labels: Iterable[Sequence[int]] | None = None,
        seq_lengths: Iterable[Sequence[int]] | None = None,
    ) -> TokenRows:
        """Rows from sequences of ids and, where not every token is trained, of labels of the same lengths.

        Args:
            input_ids: token ids of each row.
            labels: labels of each row; None where every token but the first of a document is its own.
            seq_lengths: lengths of the documents of each packed row; None where a row is one document.

        Returns:
            The rows.

        Raises:
            ValueError: labels or lengths do not fit the ids.
        """
        rows = [np.asarray(row, np.int64) for row in input_ids]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        values = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        flat_labels = None
        if labels is not None:
            label_rows = [np.asarray(row, np.int64) for row in labels]
            if [len(row) for row in label_rows] != [len(row) for row in rows]:
                raise ValueError("`labels` must have the lengths of `input_ids`, row by row.")
            flat_labels = np.concatenate(label_rows) if label_rows else np.zeros(0, np.int64)
        segments = None
        if seq_lengths is not None:
            parts = [np.asarray(row, np.int64) for row in seq_lengths]
            if [int(row.sum()) for row in parts] != [len(row) for row in rows]:
                raise ValueError("`seq_lengths` must add up to the lengths of `input_ids`, row by row.")
            lengths = np.concatenate([*parts, np.zeros(0, np.int64)])
            segments = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
        return cls(values=values, offsets=offsets, labels=flat_labels, segments=segments)


def flat_index(starts: npt.NDArray[np.int64], lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(T,) int64 positions of all tokens of rows that begin at `starts`, row after row."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def stretches(lengths: npt.NDArray[np.int64], max_tokens: int) -> Iterator[slice]:
    """Stretches of rows with at most so many tokens together, or of one row that has more.

    Args:
        lengths: (N,) int64 tokens of each row.
        max_tokens: tokens of a stretch, at most.

    Yields:
        Slices of the N rows, one after the other.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start] - lengths[start])
        stop = max(int(np.searchsorted(ends, before + max_tokens, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


class Piece(NamedTuple):
    """Rows that lie in one buffer.

    Attributes:
        values: (B,) integer, the whole buffer; never written to.
        starts: (M,) int64 position of each row's first token in it.
        lengths: (M,) int64 tokens of each row.
        where: (M,) int64 number of each row among the N.
    """

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    where: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSpans:
    """N rows of tokens in buffers that are not copied; every token but the first of a row is a target.

    Attributes:
        pieces: The rows, buffer by buffer; together each of the N rows once.
        num_rows: Number N of rows.
        first_row: Number of row 0 in errors, where the N rows are a part of something larger.
        vocab_size: Size of the vocabulary; ids of this and above raise an error. None allows any.
    """

    pieces: tuple[Piece, ...]
    num_rows: int
    first_row: int = 0
    vocab_size: int | None = None

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """(N,) int32 trained tokens in each row."""
        num = np.zeros(self.num_rows, np.int32)
        for piece in self.pieces:
            num[piece.where] = np.maximum(piece.lengths - 1, 0)
        return num
