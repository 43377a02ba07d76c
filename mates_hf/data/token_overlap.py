"""Rows that share a run of 13 tokens with the reference task's passages.

Where it is used: each round looks the rows up that it selected (`training/duplicates`); `shared_rows` names all such
rows of a dataset, for those who want to leave them out. `evaluation/contamination` compares words instead: it finds a
passage in any form and under any tokenizer, and reads text at a hundredth of this speed.

Trade-off: a passage counts as shared only where its tokens are; an ending or a space that is tokenised otherwise
breaks a run. N-grams are compared by 64-bit hash: none is missed, and 8 bytes each of the reference stay in memory.

Shape suffixes: N rows, T tokens over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.overlap import HashTable
from mates_hf.data.pool import open_candidates
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.records import IntArray

NGRAM_TOKENS = 13  # as many as words in `overlap`, which are fewer letters: what is found is looked at, not dropped
SHORTEST_PASSAGE = 5  # tokens; a shorter passage is in rows that have nothing to do with it

_CHUNK_ROWS = 4_096
_BLOCK_TOKENS = 1 << 17  # hashed at once: their buffers stay in a processor's cache
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_NUM_KNOWN = 1 << 18  # token ids whose hash is kept in a table


class TokenNgramIndex:
    """The runs of tokens of some passages, to look rows up in.

    Args:
        passages: The passages, without padding. One of fewer than `n` tokens is one run as a whole; one of fewer than
            `SHORTEST_PASSAGE` has none. A run of one repeated token does not count.
        n: Number of tokens in a run.

    Attributes:
        n: Number of tokens in a run.
        num_short: passages that are too short to be looked for.

    Raises:
        ValueError: `n` is below `SHORTEST_PASSAGE`.
    """

    def __init__(self, passages: TokenRows, n: int = NGRAM_TOKENS) -> None:
        if n < SHORTEST_PASSAGE:
            raise ValueError(f"`n` must be at least {SHORTEST_PASSAGE} tokens, got {n}: shorter runs are everywhere.")
        self.n = n
        self._known = _spread(np.arange(_NUM_KNOWN, dtype=np.int64))
        self._powers = _powers(_BASE, _BLOCK_TOKENS + n)
        self._inverses = _powers(pow(_BASE, -1, 1 << 64), _BLOCK_TOKENS + n)
        lengths = passages.lengths
        self.num_short = int(np.count_nonzero(lengths < SHORTEST_PASSAGE))
        sizes = {n, *lengths[(lengths >= SHORTEST_PASSAGE) & (lengths < n)].tolist()}
        self._tables: dict[int, HashTable] = {}
        found: dict[int, list[npt.NDArray[np.uint64]]] = {size: [np.zeros(0, np.uint64)] for size in sizes}
        for start, sums in self._blocks(passages.values):
            for size in sizes:
                hashes = self._hashes(sums, size)
                first = start + np.arange(len(hashes))
                row = np.searchsorted(passages.offsets, first, side="right") - 1
                inside = first + size <= passages.offsets[row + 1]
                if size < n:
                    inside &= lengths[row] == size
                here = np.flatnonzero(inside)
                tokens = passages.values[first[here][:, None] + np.arange(size)]
                found[size].append(hashes[here[(tokens != tokens[:, :1]).any(axis=1)]])
        for size, parts in found.items():
            hashes = np.concatenate(parts)
            if len(hashes):
                self._tables[size] = HashTable(hashes)

    def shared(self, rows: TokenRows) -> IntArray:
        """(M,) int64 numbers, ascending, of the rows that share a run with a passage. Cost: about 10 ns a token."""
        found = [np.zeros(0, np.int64)]
        for start, sums in self._blocks(rows.values):
            for size, table in self._tables.items():
                first = start + table.find(self._hashes(sums, size))[0]
                row = np.searchsorted(rows.offsets, first, side="right") - 1
                found.append(np.unique(row[first + size <= rows.offsets[row + 1]]))
        return np.unique(np.concatenate(found))

    def shared_of(self, pool: Any, ids: IntArray | None = None) -> IntArray:
        """(M,) int64, ascending, those of the pool rows `ids` (None: of all) that share a run with a passage."""
        rows = np.sort(pool.candidate_ids if ids is None else ids)
        found = [np.zeros(0, np.int64)]
        for number, chunk in enumerate(pool.chunks(rows, _CHUNK_ROWS)):
            found.append(rows[number * _CHUNK_ROWS + self.shared(chunk)])
        return np.concatenate(found)

    def _blocks(self, values: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """First token of each block, and running sums of its tokens times powers, the block's end overlapping."""
        for start in range(0, len(values), _BLOCK_TOKENS):
            tokens = values[start : start + _BLOCK_TOKENS + self.n - 1]
            known = len(tokens) and 0 <= tokens.min() and tokens.max() < _NUM_KNOWN
            digests = self._known.take(tokens) if known else _spread(tokens.astype(np.int64))
            digests *= self._powers[: len(tokens)]
            sums = np.zeros(len(tokens) + 1, np.uint64)
            np.cumsum(digests, out=sums[1:])
            yield start, sums

    def _hashes(self, sums: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
        """Hash of the run of `size` tokens at each of a block's tokens; the same run has the same anywhere."""
        num = min(max(len(sums) - size, 0), _BLOCK_TOKENS)
        hashes = sums[size : size + num] - sums[:num]
        hashes *= self._inverses[:num]
        return hashes


def shared_rows(candidates: Any, reference: ReferenceTask, n: int = NGRAM_TOKENS) -> IntArray:
    """All rows that share a run of tokens with a reference task, to leave them out of a pool.

    `dataset.select(np.setdiff1d(np.arange(len(dataset)), shared_rows(dataset, reference)))` is the dataset without
    them. For texts, or another tokenizer than the reference's, there is `evaluation.check_contamination`.

    Args:
        candidates: A `datasets.Dataset` with `input_ids`, or anything else that a probe takes.
        reference: Reference task whose passages are looked for; those of fewer than `n` tokens as a whole.
        n: Number of tokens in a run.

    Returns:
        (M,) int64 row numbers, ascending.

    Raises:
        ValueError: there is no row, no `input_ids`, or `n` is too small.
        TypeError: these are no candidates.
        UnsupportedSettingError: the candidates are streamed, or the reference task is of examples.
    """
    pool, rows = open_candidates(candidates)
    index = TokenNgramIndex(reference.text("a search for shared text", "Compare the bytes of examples instead."), n)
    return index.shared_of(pool) if rows is None else index.shared(rows)


def _powers(base: int, num: int) -> npt.NDArray[np.uint64]:
    """(num,) uint64 powers of an odd number from the 0th on, modulo 2**64."""
    steps = np.full(num, base, np.uint64)
    steps[:1] = 1
    return np.cumprod(steps)


def _spread(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Numbers as 64-bit hashes, one-to-one."""
    spread = values.view(np.uint64) + np.uint64(_BASE)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        spread ^= spread >> np.uint64(shift)
        spread *= np.uint64(factor)
    spread ^= spread >> np.uint64(31)
    return spread
