"""What an n-gram influence model is made of: additive tables, and the statistics they were fitted on.

Where it is used: `additive` fits them, `ngram_model` keeps them. Trade-off: bigrams are exact in the statistics, so
that rounds can be added up and explained, and hashed in the tables, so that scoring reads one fixed array.

Shape suffixes: N rows, V vocabulary, H hash buckets, C cells (distinct bigrams).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.prediction.ngram.kernels import score_rows, score_spans

FloatVector = npt.NDArray[np.float64]

_WORD = np.int64(32)


def join_keys(previous: npt.NDArray[np.int64], token: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(C,) int64 keys of bigrams: `previous << 32 | token`, whatever the vocabulary's size."""
    return previous << _WORD | token


def split_keys(keys: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(C,) int64 previous tokens and targets of keys."""
    return keys >> _WORD, keys & np.int64(0xFFFFFFFF)


def _require(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise ValueError(f"`{name}` must be {rule}, and is not")


def _read(tensors: Mapping[str, npt.NDArray[Any]], name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A saved array of one dimension, of this type and finite."""
    array = tensors.get(name)
    _require(array is not None, name, "among the arrays")
    assert array is not None
    _require(array.ndim == 1 and array.dtype == dtype, name, f"one-dimensional {np.dtype(dtype)}")
    _require(bool(np.isfinite(array).all()), name, "finite")
    return array


@dataclasses.dataclass(frozen=True)
class Tables:
    """Additive effects; a candidate's value is the mean over its targets of the three entries.

    Attributes:
        token: (V,) effect of the target token.
        previous: (V,) effect of the token before it.
        bigram: (H,) effect of the hashed bigram.
    """

    token: npt.NDArray[Any]
    previous: npt.NDArray[Any]
    bigram: npt.NDArray[Any]

    @classmethod
    def zeros(cls, vocab_size: int, num_buckets: int) -> Tables:
        """Tables without effect, float64."""
        return cls(np.zeros(vocab_size), np.zeros(vocab_size), np.zeros(num_buckets))

    @classmethod
    def read(cls, tensors: Mapping[str, npt.NDArray[Any]], name: str, num_buckets: int) -> Tables:
        """Tables among saved arrays, checked: scoring and fitting look them up without a check of bounds.

        Args:
            tensors: arrays by name.
            name: Name of the tables among them.
            num_buckets: Hash buckets of the model.

        Returns:
            The tables, float32.

        Raises:
            ValueError: an array is missing, of another type or size, or not finite.
        """
        tables = cls(*(_read(tensors, f"{name}.{field.name}", np.float32) for field in dataclasses.fields(cls)))
        _require(len(tables.token) == len(tables.previous) > 0, f"{name}.previous", f"as long as {name}.token")
        _require(len(tables.bigram) == num_buckets, f"{name}.bigram", f"of `num_buckets` ({num_buckets}) entries")
        return tables

    def resized(self, vocab_size: int) -> Tables:
        """Float64 copy for a vocabulary at least as large; the new ids have no effect."""
        pad = (0, vocab_size - len(self.token))
        token, previous = (np.pad(table.astype(np.float64), pad) for table in (self.token, self.previous))
        return Tables(token, previous, self.bigram.astype(np.float64))

    def plus(self, other: Tables, weight: float = 1.0) -> Tables:
        """Sum with `weight` times tables of the same sizes."""
        return Tables(
            self.token + weight * other.token,
            self.previous + weight * other.previous,
            self.bigram + weight * other.bigram,
        )

    @staticmethod
    def sum_of(first: Tables, *others: Tables | None) -> Tables:
        """Sum of tables of the same sizes, of those that there are."""
        return functools.reduce(Tables.plus, (part for part in others if part is not None), first)

    def scaled(self, factor: float) -> Tables:
        """All effects times `factor`, float32, as scoring reads them."""
        return Tables(*((factor * table).astype(np.float32) for table in (self.token, self.previous, self.bigram)))

    def score(self, rows: TokenRows | TokenSpans) -> FloatVector:
        """(N,) float64 mean over each row's targets; 0 for a row without targets."""
        tables = (self.token, self.previous, self.bigram)
        if isinstance(rows, TokenSpans):
            return score_spans(rows, tables)
        return score_rows(rows.values, rows.offsets, rows.labels, tables)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sparse table of bigrams, from which all margins follow.

    Attributes:
        keys: (C,) int64 ascending, `previous << 32 | token`.
        counts: (C,) float32 weight: targets of this round plus decayed ones of earlier rounds.
        sums: (C,) float32 weighted sum of the standardised derivative (0 for document labels).
    """

    keys: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float32]

    @classmethod
    def empty(cls) -> Statistics:
        """No bigram seen."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))

    @classmethod
    def read(cls, tensors: Mapping[str, npt.NDArray[Any]], vocab_size: int) -> Statistics:
        """Statistics among saved arrays, checked as `Tables.read` checks.

        Args:
            tensors: arrays by name.
            vocab_size: length of the tables fitted on them.

        Returns:
            The statistics.

        Raises:
            ValueError: an array is missing, of another type or size, not finite, or holds no bigrams.
        """
        dtypes: dict[str, type[np.generic]] = {"keys": np.int64, "counts": np.float32, "sums": np.float32}
        found = cls(**{name: _read(tensors, f"statistics.{name}", dtype) for name, dtype in dtypes.items()})
        keys = found.keys
        _require(len(keys) == len(found.counts) == len(found.sums), "statistics.counts", "as long as statistics.keys")
        rising = bool(np.all(keys[1:] > keys[:-1])) and (not len(keys) or keys[0] >= 0)
        known = all(not len(keys) or ids.max() < vocab_size for ids in (found.token, found.previous))
        _require(rising and known, "statistics.keys", f"rising bigrams of ids below {vocab_size}")
        _require(bool((found.counts >= 0).all()), "statistics.counts", "at least 0")
        return found

    def times(self, weight: np.float32) -> Statistics:
        """The same cells with `weight` times their weight."""
        return Statistics(self.keys, self.counts * weight, self.sums * weight)

    @property
    def token(self) -> npt.NDArray[np.int64]:
        """(C,) int64 target of each cell."""
        return split_keys(self.keys)[1]

    @property
    def previous(self) -> npt.NDArray[np.int64]:
        """(C,) int64 token before it."""
        return split_keys(self.keys)[0]
