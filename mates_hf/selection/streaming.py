"""Scoring and filtering streams (`datasets.IterableDataset`), whose rows are seen once and never all together.

Where it is used: `MatesSelector` maps and filters streams with it. Trade-off: nobody knows a stream's best fifth
before its end, so the threshold is taken from its first rows and then holds for all; the ratio that comes out is near
the one asked for where those rows are like the rest, and is reported. A row's fate depends on the row and the
threshold alone, so a stream can be stopped and resumed anywhere (`state_dict`).

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.display import card, html_card, number
from mates_hf.prediction.score import INFLUENCE_COLUMN, Predictions, Scorer
from mates_hf.selection.budget import Budget, Ranking, share_of, temperature_unit
from mates_hf.selection.options import Options, not_one_dataset

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StreamInput:
    """A stream, and what scores its rows as they are read.

    Attributes:
        stream: The stream, which gives plain Python values.
        had: Format that the stream had, in which the new stream gives its rows.
        columns: Columns that the stream says it has, or else those of its first rows.
        scorer: The influence model with the column to score.
        options: How rows are scored.
        label_std: Standard deviation of the labels' `influence`.
    """

    stream: Any
    had: str | None
    columns: list[str]
    scorer: Scorer
    options: Options
    label_std: float

    def map(self) -> Any:
        """The stream with a float32 `influence` column; rows keep their order and are scored when they are read."""
        import datasets

        features, removed_by_user = None, self.options.removed
        if INFLUENCE_COLUMN in self.columns and INFLUENCE_COLUMN not in removed_by_user:
            logger.warning("The stream's column `%s` is replaced by this selector's predictions.", INFLUENCE_COLUMN)
        removed = [name for name in removed_by_user if name != INFLUENCE_COLUMN]  # which is written either way
        if self.stream.features is not None:
            kept = {name: kind for name, kind in self.stream.features.items() if name not in removed}
            features = datasets.Features({**kept, INFLUENCE_COLUMN: datasets.Value("float32")})
        sizes: dict[str, Any] = {"batched": True, "batch_size": self.options.batch_size}
        mapped = self.stream.map(AddInfluence(self.scorer), features=features, remove_columns=removed or None, **sizes)
        return mapped if self.had is None else mapped.with_format(self.had)

    def score(self) -> Predictions:
        """Refused: nobody has all rows of a stream."""
        raise not_one_dataset(type(self.stream))

    def select(self, budget: Budget) -> StreamSelection:
        """Find the threshold of the stream; its rows are read once here and again when the selection is.

        Args:
            budget: How much to keep: a `threshold`, or a `ratio` with its temperature.

        Returns:
            The selection.

        Raises:
            ValueError: the budget needs the whole dataset, or the stream is empty.
        """
        if self.options.bounds is not None:
            raise ValueError(
                f"`group_column={self.options.bounds.column!r}` needs the whole dataset, because a group's share is "
                "known at its end only. Filter each group's stream by itself, or load the dataset without streaming."
            )
        if INFLUENCE_COLUMN in self.columns:
            logger.warning(
                "The stream's column `%s` is not used: its rows are scored as they are read.", INFLUENCE_COLUMN
            )
        if budget.threshold is not None:
            rule = Rule("influence", float(np.float32(budget.threshold)))
            return self._selection(rule, num_calibration_rows=0, calibration_ratio=math.nan)
        if budget.ratio is None:
            raise ValueError(
                "A stream must be filtered by `ratio` or `threshold`: the best `k` rows or `num_tokens` are known at "
                "its end only. Use `ratio=` and `.take(k)`, or load the dataset without streaming."
            )
        parts, content = [], []
        for batch in self.stream.take(self.options.calibration_rows).iter(self.options.batch_size):
            parts.append(self.scorer.predict_batch(batch))
            content += self.scorer.column.identities(batch)
        if not parts:
            raise ValueError("The stream must have rows, got none. Check its files and filters.")
        scored = Predictions.joined(parts)
        rule = _rule_without_threshold(scored, budget, self.label_std)
        values = rule.values(scored, content)
        above = budget.ratio * (1 - budget.random_share)
        threshold = float(np.sort(values)[::-1][share_of(len(values), above) - 1])
        chance = budget.ratio * budget.random_share / (1 - above) if above < 1 else 0.0
        rule = dataclasses.replace(rule, threshold=threshold, chance=chance)
        share = float(np.mean(rule.kept(values, scored.num_targets, content)))
        logger.info(
            "Threshold %.4g of %s, from the first %d rows of the stream, of which it keeps %.4f (asked for %.4f).",
            rule.threshold, rule.ranking, len(values), share, budget.ratio,
        )  # fmt: skip
        return self._selection(rule, num_calibration_rows=len(values), calibration_ratio=share)

    def _selection(self, rule: Rule, **calibrated: Any) -> StreamSelection:
        sizes = {"batch_size": self.options.batch_size, **calibrated}
        return StreamSelection(self.stream, self.had, self.scorer, rule, **sizes)


def _rule_without_threshold(scored: Predictions, budget: Budget, label_std: float) -> Rule:
    """The rule of a row budget whose threshold is still to be taken from these rows."""
    noise = 0.0
    if budget.temperature:
        noise = budget.temperature * temperature_unit(scored.num_targets, budget.ranking, label_std)
    num_tokens = int(scored.num_targets.sum(dtype=np.int64))
    mean = float(scored.influence.astype(np.float64) @ scored.num_targets) / max(1, num_tokens)
    return Rule(budget.ranking, -math.inf, mean, noise, budget.seed)


@dataclasses.dataclass(frozen=True)
class AddInfluence:
    """What `map` does to a batch of a stream."""

    scorer: Scorer

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The new column of the batch."""
        return {INFLUENCE_COLUMN: self.scorer.predict_batch(batch).influence}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which rows of a stream are kept: a function of the row.

    Attributes:
        ranking: What rows are ranked by.
        threshold: Lowest value that is kept, in the unit of the ranking, noise included.
        mean: Mean influence over the trained tokens of the first rows; `row_worth` is counted from it.
        noise: Scale of the Gumbel noise, in the unit of the ranking; 0 adds none.
        seed: Random seed of the noise and of the rows that are kept by chance.
        chance: Probability that a row below the threshold is kept.
    """

    ranking: Ranking
    threshold: float
    mean: float = 0.0
    noise: float = 0.0
    seed: int = 0
    chance: float = 0.0

    def kept(
        self, values: npt.NDArray[np.float64], num_targets: npt.NDArray[np.int32], content: list[bytes]
    ) -> npt.NDArray[np.bool_]:
        """(N,) bool, True where a row of this value is kept: at or above the threshold, or by chance."""
        kept = values >= self.threshold
        if self.chance:
            kept |= (_uniform(content, self.seed, b"share") < self.chance) & (num_targets > 0)
        return kept

    def values(self, scored: Predictions, content: list[bytes]) -> npt.NDArray[np.float64]:
        """(N,) float64 what rows are ranked by; -inf where a row budget meets a row without targets."""
        values = scored.influence.astype(np.float64)
        if self.ranking == "row_worth":
            values = scored.num_targets * (values - self.mean)
            values[scored.num_targets == 0] = -math.inf
        return values + self.noise * _gumbel(content, self.seed) if self.noise else values


def _uniform(content: list[bytes], seed: int, stream: bytes = b"") -> npt.NDArray[np.float64]:
    """(N,) numbers in (0, 1) that depend on the seed and a row's content, not on where it stands in the stream."""
    key = int(seed).to_bytes(8, "little")
    hashed = (hashlib.blake2b(row, digest_size=8, key=key, person=stream).digest() for row in content)
    words = np.array([int.from_bytes(digest, "little") for digest in hashed], np.float64)
    return np.asarray((words + 0.5) / 2.0**64)


def _gumbel(content: list[bytes], seed: int) -> npt.NDArray[np.float64]:
    """(N,) Gumbel(0, 1) noise that depends on the seed and a row's content."""
    return np.asarray(-np.log(-np.log(_uniform(content, seed))))


class StreamSelection:
    """A filtered stream, and how much of it was kept so far.

    Args:
        stream: The stream, which gives plain Python values.
        had: Format in which the kept rows are given.
        scorer: The influence model with the column to score.
        rule: The rule that decides which rows are kept.
        batch_size: Number of rows that are scored at once.
        num_calibration_rows: Number of first rows that the threshold was taken from; 0 where it was given.
        calibration_ratio: Share of these first rows that is kept; NaN without any.
    """

    def __init__(
        self,
        stream: Any,
        had: str | None,
        scorer: Scorer,
        rule: Rule,
        *,
        batch_size: int,
        num_calibration_rows: int,
        calibration_ratio: float,
    ) -> None:
        self._stream, self._had, self._batch_size = stream, had, batch_size
        self._keep = _Keep(scorer, rule)
        self.rule = rule
        self.num_calibration_rows = num_calibration_rows
        self.calibration_ratio = calibration_ratio

    def __repr__(self) -> str:
        return card(*self._facts())

    def _repr_html_(self) -> str:
        return html_card(*self._facts())

    def _facts(self) -> tuple[str, dict[str, str]]:
        """Title and lines of what is printed."""
        share = "" if math.isnan(self.calibration_ratio) else f", which kept {self.calibration_ratio:.1%} of them"
        taken = (
            f"from the first {self.num_calibration_rows:,} rows{share}" if self.num_calibration_rows else "as given"
        )
        facts = {
            "threshold": f"{number(self.threshold)} of {self.ranked_by}, {taken}",
            "read so far": f"{self.num_kept:,} of {self.num_seen:,} rows kept",
            "see": ".selected, .ratio, .num_seen, .num_kept",
        }
        return "StreamSelection", facts

    @property
    def selected(self) -> Any:
        """The stream of kept rows, in their order; a new one each time, and all are counted together."""
        kept = self._stream.filter(self._keep, batched=True, batch_size=self._batch_size)
        return kept if self._had is None else kept.with_format(self._had)

    @property
    def ranked_by(self) -> Ranking:
        """What `threshold` is counted in."""
        return self.rule.ranking

    @property
    def threshold(self) -> float:
        """Lowest value of `ranked_by` that is kept, noise of a temperature included."""
        return self.rule.threshold

    @property
    def num_seen(self) -> int:
        """Rows that went by in this process; those that a DataLoader's workers read are not among them."""
        return self._keep.num_seen

    @property
    def num_kept(self) -> int:
        """Rows of those that were kept."""
        return self._keep.num_kept

    @property
    def ratio(self) -> float:
        """Achieved share, `num_kept / num_seen`; NaN before the first row."""
        return self.num_kept / self.num_seen if self.num_seen else math.nan


class _Keep:
    """What `filter` asks of a batch of a stream."""

    def __init__(self, scorer: Scorer, rule: Rule) -> None:
        self.scorer, self.rule = scorer, rule
        self.num_seen = self.num_kept = 0
        self._next_report = 10_000

    def __call__(self, batch: Mapping[str, Any]) -> list[bool]:
        scored, content = self.scorer.predict_batch(batch), self.scorer.column.identities(batch)
        kept = self.rule.kept(self.rule.values(scored, content), scored.num_targets, content)
        self.num_seen += len(kept)
        self.num_kept += int(kept.sum())
        if self.num_seen >= self._next_report:
            self._next_report *= 10
            logger.info("Kept %d of %d rows of the stream (%.4f).", self.num_kept, self.num_seen, self._ratio())
        found: list[bool] = kept.tolist()
        return found

    def _ratio(self) -> float:
        return self.num_kept / self.num_seen
