"""What candidate pool, reference task and evaluated tasks share: text that must not be in two of them.

Where it is used: before a run, on what the run will read. A pool row that holds an evaluated text teaches the answer,
a pool row that holds a reference passage is selected for having it, and a reference task that is evaluated too makes
the result as good as the selection is at finding that task.

Trade-off: a shared run of 13 words is the usual sign, and finds copies, not paraphrases. It finds them in any script
and in any form that text is stored in (`data/words` says which differences make none, and how long a run is in scripts
without spaces). A text that is shorter cannot be compared, so a report with one is not clean; a prompt's wording that
a task repeats in every document counts as shared once it is that long.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from mates_hf.data.harness import name_of
from mates_hf.data.overlap import NGRAM_WORDS, NgramIndex, Overlap, find_overlaps
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.texts import is_lm_eval_task, texts_of

logger = logging.getLogger(__name__)

POOL = "pool"
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedText:
    """What two sides share: `left` and `right` are `"pool"`, `"reference"` or the name of an evaluated task.

    Attributes:
        left: the first side.
        right: the second.
        left_positions: (M,) int64, rows of the first side that share a 13-gram with the second, ascending.
        right_positions: (K,) int64, rows of the second side that share one with the first, ascending.
        num_left: rows of the first side that were read.
        num_right: rows of the second side.
    """

    left: str
    right: str
    left_positions: npt.NDArray[np.int64]
    right_positions: npt.NDArray[np.int64]
    num_left: int
    num_right: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContaminationReport:
    """What `check_contamination` found.

    Attributes:
        pairs: one entry for each two sides that were compared: `"pool/reference"`, `"pool/sciq"`, `"reference/sciq"`.
        num_texts: texts of each side.
        short: for each side, (S,) int64 positions of its texts with fewer than 13 words, which could not be compared.
        also_evaluated: evaluated tasks that are the reference task by name; True where it is the same split too, False
            where it is another, None where that is not known.
        pool_is_partial: True where `max_pool_rows` were read and no more.
    """

    pairs: Mapping[str, SharedText]
    num_texts: Mapping[str, int]
    short: Mapping[str, npt.NDArray[np.int64]]
    also_evaluated: Mapping[str, bool | None]
    pool_is_partial: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """For each pair, how many rows of its left side share text with its right side."""
        return {name: len(pair.left_positions) for name, pair in self.pairs.items()}

    @property
    def num_short(self) -> dict[str, int]:
        """Texts of each side with fewer than 13 words."""
        return {side: len(positions) for side, positions in self.short.items()}

    @property
    def not_compared(self) -> dict[str, int]:
        """For each side of which the report cannot speak, how many of its texts were too short.

        Short passages and evaluated texts count, for any row may hold them unseen. A short pool row can hold no run of
        13 words of another text, so pool rows count only where all of them are short, and nothing was compared.
        """
        return {
            side: num for side, num in self.num_short.items() if num and (side != POOL or num == self.num_texts[side])
        }

    @property
    def is_clean(self) -> bool:
        """True where nothing was found, and no side is in `not_compared`."""
        return not self.also_evaluated and not any(self.counts.values()) and not self.not_compared

    def kept(self, side: str, *, drop_short: bool = False) -> npt.NDArray[np.int64]:
        """Rows of a side that share nothing with any other side, for `pool.select(report.kept("pool"))`.

        Where a side has texts that were too short to be compared, one WARNING line says so.

        Args:
            side: `"pool"`, `"reference"` or the name of an evaluated task.
            drop_short: leave out what was too short to be compared.

        Returns:
            (M,) int64 positions among the rows that were read, ascending.

        Raises:
            ValueError: there is no such side.
        """
        if side not in self.num_texts:
            raise ValueError(f"`side` must be one of {sorted(self.num_texts)}, got {side!r}.")
        keep = np.ones(self.num_texts[side], bool)
        for pair in self.pairs.values():
            if side == pair.left:
                keep[pair.left_positions] = False
            if side == pair.right:
                keep[pair.right_positions] = False
        if drop_short:
            keep[self.short[side]] = False
        elif self.not_compared:
            unseen = ", ".join(f"{num:,} of {self._called(name)}" for name, num in self.not_compared.items())
            logger.warning(
                "What is kept of `%s` may share text with what has fewer than %d words and could not be compared: %s. "
                "`drop_short=True` leaves such rows of a side out.",
                side,
                NGRAM_WORDS,
                unseen,
            )
        return np.flatnonzero(keep)

    def findings(self) -> list[str]:
        """One sentence for each thing to act on; none where the report is clean."""
        found = [
            f"{len(pair.left_positions):,} of {self._called(pair.left)} share a {NGRAM_WORDS}-gram with "
            f"{len(pair.right_positions):,} of {self._called(pair.right)}. {self._remedy(pair)}"
            for pair in self.pairs.values()
            if len(pair.left_positions)
        ]
        for name, same_split in self.also_evaluated.items():
            split = {True: "on the same split", False: "on another split", None: "on a split that is not known here"}
            found.append(
                f"The reference task is also evaluated, as `{name}`, {split[same_split]}: what is measured there was "
                "selected for. Report other tasks."
            )
        for side, num in self.not_compared.items():
            found.append(
                f"{num:,} of {self._called(side)} have fewer than {NGRAM_WORDS} words, so what holds them cannot be "
                f'told. Leave them out: `report.kept("{side}", drop_short=True)`.'
            )
        return found

    def lines(self) -> list[str]:
        """The findings, the pairs that share nothing, and what was too short to be compared, for people."""
        lines = self.findings()
        clean: dict[str, list[str]] = {}
        for pair in self.pairs.values():
            if not len(pair.left_positions):
                clean.setdefault(pair.left, []).append(self._called(pair.right))
        for left, others in clean.items():
            lines.append(f"None of {self._called(left)} share a {NGRAM_WORDS}-gram with any of {', '.join(others)}.")
        short = [f"{num:,} of {self._called(side)}" for side, num in self.num_short.items() if num]
        if short:
            lines.append(f"Too short to be compared (fewer than {NGRAM_WORDS} words): {', '.join(short)}.")
        return lines

    def warn(self) -> None:
        """Log each finding as one WARNING line; nothing where the report is clean."""
        for line in self.findings():
            logger.warning("%s", line)

    def _called(self, side: str) -> str:
        """A side with its number of rows, in words."""
        num = self.num_texts[side]
        if side == POOL:
            return f"the first {num:,} pool rows" if self.pool_is_partial else f"{num:,} pool rows"
        return f"{num:,} reference passages" if side == REFERENCE else f"{num:,} texts of `{side}`"

    def _remedy(self, pair: SharedText) -> str:
        if pair.left == POOL:
            return 'Drop these pool rows: `pool.select(report.kept("pool"))`.'
        return f'Drop these texts of `{pair.right}`: keep `report.kept("{pair.right}")`.'


def check_contamination(
    *,
    pool: Any = None,
    reference: ReferenceTask | Iterable[Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    text_column: str = "text",
    max_pool_rows: int | None = None,
) -> ContaminationReport:
    """Look for what pool, reference task and evaluated tasks share: a run of 13 words, whatever the form of the text.

    Case, punctuation, spaces and the way the letters are stored make no difference; `data/words` says more, and how
    long a run is in Chinese, Japanese, Korean, Thai and other scripts without spaces between words.

    Texts may be given as strings, or as rows (dicts) that have `text_column`, or else `input_ids`, which are decoded
    without special tokens; a `datasets.Dataset`, a list or a stream of either. Cost: every side is read once, the pool
    as a stream (about 10 MB of English or 3 MB of Chinese a second on one core). Reference and evaluated texts take
    16 bytes a word of memory.

    Args:
        pool: the candidate pool. A stream is read to its end, or to `max_pool_rows`.
        reference: a reference task, or its passages.
        evaluation: for each task's name its texts, or an lm-eval task, whose evaluated documents are read as context
            and gold target (`TaskManager().load("sciq")["tasks"]` is such a mapping).
        tokenizer: Tokenizer that made the token ids, where there are any.
        text_column: Column of the text, in rows that are dicts.
        max_pool_rows: read the first rows only; None reads all.

    Returns:
        The report; nothing is logged before its `warn` is called.

    Raises:
        ValueError: fewer than two sides, a side without rows, a row without texts, token ids without tokenizer, or an
            evaluated task that is called "pool" or "reference".
        TypeError: a side or a row of the wrong kind, such as a dict of splits.
    """
    evaluation = _checked_evaluation(evaluation)
    if (pool is not None) + (reference is not None) + len(evaluation) < 2 or (pool is None and reference is None):
        raise ValueError(
            "Two sides to compare must be given at least, of `pool`, `reference` and `evaluation`, one of the first "
            f"two among them; got pool={type(pool).__name__}, reference={type(reference).__name__} and the evaluated "
            f"tasks {sorted(evaluation)}."
        )
    if max_pool_rows is not None and max_pool_rows < 1:
        raise ValueError(f"`max_pool_rows` must be at least 1 row or None, got {max_pool_rows}.")
    read = functools.partial(texts_of, tokenizer=tokenizer, text_column=text_column)
    sides = {name: read(value, f"evaluation[{name!r}]") for name, value in evaluation.items()}
    passages: list[str] = []
    if reference is not None:
        passages = list(read(reference, "reference"))
        sides = {REFERENCE: iter(passages), **sides}
    indexes = {name: _index(texts, name) for name, texts in sides.items()}
    num_texts = {name: index.num_texts for name, index in indexes.items()}
    short = {name: index.short_positions for name, index in indexes.items()}

    pairs: dict[str, SharedText] = {}
    pool_is_partial = False
    if pool is not None:
        texts = itertools.islice(read(pool, "pool"), max_pool_rows)
        num_rows = min((num for num in (_length(pool), max_pool_rows) if num is not None), default=None)
        # None: a bar on a terminal only, for there is no telling here which process is the main one.
        bar = tqdm(texts, desc="contamination", unit="row", total=num_rows, disable=None, leave=False)
        overlaps = find_overlaps(bar, list(indexes.values()))
        _check_some(overlaps[0].num_texts, "pool")
        num_texts, short = {POOL: overlaps[0].num_texts, **num_texts}, {POOL: overlaps[0].short_positions, **short}
        pool_is_partial = max_pool_rows == overlaps[0].num_texts and max_pool_rows != _length(pool)
        pairs |= _pairs(POOL, overlaps, indexes)
    if reference is not None and evaluation:
        others = {name: index for name, index in indexes.items() if name != REFERENCE}
        pairs |= _pairs(REFERENCE, find_overlaps(passages, list(others.values())), others)
    return ContaminationReport(
        pairs=pairs,
        num_texts=num_texts,
        short=short,
        also_evaluated=_also_evaluated(reference, evaluation),
        pool_is_partial=pool_is_partial,
    )


def _checked_evaluation(evaluation: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if evaluation is None:
        return {}
    if not isinstance(evaluation, Mapping):
        raise TypeError(
            f"`evaluation` must be a mapping of names to texts or lm-eval tasks, got {type(evaluation).__name__}: "
            '`{"sciq": texts}`.'
        )
    reserved = {POOL, REFERENCE}.intersection(evaluation)
    if reserved:
        raise ValueError(f"An evaluated task must not be called {sorted(reserved)[0]!r}: that is another side's name.")
    return evaluation


def _index(texts: Iterable[str], name: str) -> NgramIndex:
    index = NgramIndex(texts)
    _check_some(index.num_texts, name)
    return index


def _check_some(num: int, name: str) -> None:
    if not num:
        raise ValueError(f"`{name}` must have rows, got none. An iterator that was read before has none left.")


def _length(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:  # a stream
        return None


def _pairs(left: str, overlaps: Iterable[Overlap], indexes: Mapping[str, NgramIndex]) -> dict[str, SharedText]:
    return {
        f"{left}/{right}": SharedText(
            left=left,
            right=right,
            left_positions=overlap.positions,
            right_positions=overlap.indexed_positions,
            num_left=overlap.num_texts,
            num_right=index.num_texts,
        )
        for overlap, (right, index) in zip(overlaps, indexes.items(), strict=True)
    }


def _also_evaluated(reference: Any, evaluation: Mapping[str, Any]) -> dict[str, bool | None]:
    """Evaluated tasks of the reference task's name, and whether they are read from the split that it was made of."""
    if not isinstance(reference, ReferenceTask):
        return {}
    found: dict[str, bool | None] = {}
    for name, side in evaluation.items():
        if reference.name not in (name, name_of(side) if is_lm_eval_task(side) else name):
            continue
        made_of = reference.description.get("split")
        if made_of is None or not is_lm_eval_task(side):
            found[name] = None
        else:
            found[name] = made_of == ("test" if side.has_test_docs() else "validation")
    return found
