"""Texts that share a word n-gram: which of these are partly in those.

Where it is used: `corpus` keeps its parts apart with it, and `evaluation/contamination` looks for reference passages
and evaluated texts in a candidate pool. The smaller side is indexed, the larger one read through once.

Trade-off: n-grams are compared by 64-bit hash. No shared n-gram is missed, and a false find has a chance of about the
product of both n-gram counts times 5e-20, for 16 bytes an n-gram of the indexed side and a batch of the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mates_hf.data.words import WORD, readings_of, weight_of

NGRAM_WORDS = 13  # the usual length for contamination checks: shorter ones recur in unrelated text

_BATCH_CHARACTERS = 4_000_000  # of text hashed at once: about 150 MB of words, ids and hashes
_MAX_FILTER_BITS = 24  # 16 MB, which a processor's last cache about holds
_HASH_BITS = 64
_MIX, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(_HASH_BITS // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What texts that were looked up share with the texts of an index.

    Attributes:
        positions: (M,) int64, looked-up texts that share an n-gram with an indexed one, ascending.
        indexed_positions: (K,) int64, indexed texts that share an n-gram with a looked-up one, ascending.
        num_texts: texts looked up.
        short_positions: (S,) int64, those of them with fewer words than an n-gram, which can share none, ascending.
    """

    positions: npt.NDArray[np.int64]
    indexed_positions: npt.NDArray[np.int64]
    num_texts: int
    short_positions: npt.NDArray[np.int64]

    @property
    def num_short(self) -> int:
        """Texts looked up that have fewer words than an n-gram."""
        return len(self.short_positions)


class HashTable:
    """Many 64-bit hashes, in which very many more are looked up.

    Args:
        hashes: (H,) uint64, in any order; repeats are one.

    Attributes:
        hashes: (D,) uint64, the different ones, ascending.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        self.hashes = np.unique(hashes)
        # Almost no n-gram of a large pool is in the index. One look at its first bits in a small table says so, where
        # a binary search would go through memory a dozen times.
        bits = min(max(int(len(self.hashes)).bit_length() + 6, 10), _MAX_FILTER_BITS)
        self._shift = np.uint64(_HASH_BITS - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self.hashes >> self._shift] = True

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look hashes up.

        Args:
            hashes: (T,) uint64.

        Returns:
            (S,) int64 positions in `hashes` of those that the table has, ascending, and (S,) int64 their numbers in
            the table.
        """
        maybe = np.flatnonzero(self._filter[(hashes >> self._shift).view(np.int64)])  # as numpy takes indices
        place = np.searchsorted(self.hashes, hashes[maybe])
        place[place == len(self.hashes)] = 0
        same = self.hashes[place] == hashes[maybe]
        return maybe[same], place[same]


class NgramIndex:
    """The word n-grams of some texts, to look other texts up in.

    Words are those of `words.words_of`: case, punctuation, white space and the form a text is stored in make no
    difference, and letters of scripts without spaces are parts of a word. A text of fewer than `n` words has no n-gram
    and shares none.

    Args:
        texts: the texts to index, read once; 16 bytes an n-gram stay in memory.
        n: Number of words in an n-gram.

    Attributes:
        n: Number of words in an n-gram.
        num_texts: texts indexed.
        short_positions: (S,) int64, those of them with fewer than `n` words, ascending.

    Raises:
        ValueError: `n` is below 1.
    """

    def __init__(self, texts: Iterable[str], n: int = NGRAM_WORDS) -> None:
        self.n = n
        self.num_texts = 0
        short = [np.zeros(0, np.int64)]
        found: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = [hash_ngrams([], n)]
        for batch in _batches(texts):
            hashes, owners = hash_ngrams(batch, n)
            short.append(_without(owners, len(batch)) + self.num_texts)
            found.append((hashes, owners + self.num_texts))
            self.num_texts += len(batch)
        self.short_positions = np.concatenate(short)
        hashes, owners = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(hashes, kind="stable")
        self._owners = owners[order]
        self._table = HashTable(hashes)
        self._ends = np.append(np.searchsorted(hashes[order], self._table.hashes), len(order)).astype(np.int64)

    @property
    def num_short(self) -> int:
        """Texts indexed that have fewer than `n` words."""
        return len(self.short_positions)

    def shared(self, texts: Iterable[str]) -> npt.NDArray[np.int64]:
        """(M,) int64 positions in `texts`, ascending, of those that share an n-gram with an indexed text."""
        return find_overlaps(texts, [self])[0].positions

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look n-grams up.

        Args:
            hashes: (T,) uint64, as `hash_ngrams` gives them.

        Returns:
            (S,) int64 positions in `hashes` of the n-grams that an indexed text has, ascending, and (S,) int64 numbers
            of these n-grams in the index, which `owners_of` takes.
        """
        return self._table.find(hashes)

    def owners_of(self, ngrams: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(K,) int64 positions, ascending, of the indexed texts that have one of the n-grams (numbers from `find`)."""
        is_asked = np.zeros(len(self._table.hashes), bool)
        is_asked[ngrams] = True
        return np.unique(self._owners[np.repeat(is_asked, np.diff(self._ends))])


def find_overlaps(texts: Iterable[str], indexes: Sequence[NgramIndex]) -> list[Overlap]:
    """Look texts up in several indexes at once, so that a large pool is read and hashed only once.

    Args:
        texts: The texts to look up, read once and a batch at a time.
        indexes: The indexes to look them up in, all with n-grams of the same length.

    Returns:
        One overlap an index, in their order.

    Raises:
        ValueError: no index, or indexes of different `n`.
    """
    lengths = sorted({index.n for index in indexes})
    if len(lengths) != 1:
        raise ValueError(f"`indexes` must be one at least, all with n-grams of one length, got the lengths {lengths}.")
    num_texts = 0
    short = [np.zeros(0, np.int64)]
    positions: list[list[npt.NDArray[np.int64]]] = [[np.zeros(0, np.int64)] for _ in indexes]
    ngrams = [np.zeros(0, np.int64) for _ in indexes]
    for batch in _batches(texts):
        hashes, owners = hash_ngrams(batch, lengths[0])
        for i, index in enumerate(indexes):
            where, which = index.find(hashes)
            positions[i].append(np.unique(owners[where]) + num_texts)
            ngrams[i] = np.union1d(ngrams[i], which)
        short.append(_without(owners, len(batch)) + num_texts)
        num_texts += len(batch)
    return [
        Overlap(
            positions=np.concatenate(positions[i]),
            indexed_positions=index.owners_of(ngrams[i]),
            num_texts=num_texts,
            short_positions=np.concatenate(short),
        )
        for i, index in enumerate(indexes)
    ]


def find_overlap(texts_a: Sequence[str], texts_b: Sequence[str], n: int = NGRAM_WORDS) -> npt.NDArray[np.int64]:
    """Find the texts in `texts_a` that share a word n-gram with any text in `texts_b`.

    Words, n-grams and the chance of a false find are those of `NgramIndex`.

    Args:
        texts_a: The texts to look up.
        texts_b: The texts that they must not share n-grams with; these are indexed, so the fewer the better.
        n: Number of words in an n-gram.

    Returns:
        (M,) int64 positions in `texts_a`, ascending.

    Raises:
        ValueError: `n` is below 1.
    """
    return NgramIndex(texts_b, n).shared(texts_a)


def hash_ngrams(texts: Sequence[str], n: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Hash every word n-gram; equal in every process.

    Where a text has letters of scripts without spaces, an n-gram begins at each word or letter and is as long as it
    takes to weigh as much as `n` words.

    Args:
        texts: The texts; all are held as words at once.
        n: Number of words in an n-gram.

    Returns:
        (T,) uint64 hash of each n-gram, text after text, and (T,) int64 position of its text.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1 word, got {n}.")
    vocabulary: dict[str, int] = {}
    ids: list[int] = []
    lengths: list[int] = []  # of each reading; a text has one or two
    owners: list[int] = []
    for position, text in enumerate(texts):
        for words in readings_of(text):
            ids.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
            lengths.append(len(words))
            owners.append(position)
    if not ids:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    words_T = np.array(ids, np.int64)
    reading_T = np.repeat(np.arange(len(lengths)), lengths)
    starts, sizes = _windows(words_T, reading_T, list(map(weight_of, vocabulary)), n)
    digests = [hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest() for word in vocabulary]
    hashes = _mixed(np.frombuffer(b"".join(digests), "<u8")[words_T], starts, sizes, n)
    return hashes, np.array(owners, np.int64)[reading_T[starts]]


def _windows(
    words_T: npt.NDArray[np.int64], reading_T: npt.NDArray[np.int64], weights: Sequence[int], n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(W,) first words of all n-grams, ascending, and (W,) their numbers of words; none lies in two readings."""
    if set(weights) == {WORD}:
        starts = np.arange(max(len(words_T) - n + 1, 0))
        sizes = np.full(len(starts), n)
    else:
        ends_T = np.cumsum(np.array(weights)[words_T])
        last_T = np.searchsorted(ends_T, np.concatenate([[0], ends_T[:-1]]) + n * WORD)
        starts = np.flatnonzero(last_T < len(ends_T))
        sizes = last_T[starts] - starts + 1
    inside = reading_T[starts] == reading_T[starts + sizes - 1]
    return starts[inside], sizes[inside]


def _mixed(
    digests_T: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.uint64]:
    """(W,) hash of the words of each window, in their order; a window has `n` words at least, for none weighs more."""
    num = len(digests_T)
    padded = np.concatenate([digests_T, np.zeros(n, np.uint64)])
    hashes_T = np.zeros(num, np.uint64)
    for j in range(n):
        hashes_T = (hashes_T ^ padded[j : j + num]) * _MIX
        hashes_T ^= hashes_T >> _HALF
    hashes = hashes_T[starts]
    for j in range(n, int(sizes.max(initial=0))):
        longer = np.flatnonzero(sizes > j)
        mixed = (hashes[longer] ^ digests_T[starts[longer] + j]) * _MIX
        hashes[longer] = mixed ^ (mixed >> _HALF)
    return hashes


def _without(owners: npt.NDArray[np.int64], num: int) -> npt.NDArray[np.int64]:
    """Positions below `num` that own no n-gram, ascending."""
    is_short = np.ones(num, bool)
    is_short[owners] = False
    return np.flatnonzero(is_short)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts of about `_BATCH_CHARACTERS` together, a longer one alone or last."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
