"""What a budget keeps of a scored dataset: the rule, and a result that can be asked again with another budget.

Where it is used: the selector predicts, `keep_rows` chooses by it, `Selection` is what the caller gets. Trade-off: a
result holds eight bytes a row and the dataset, so that another budget, the rejected rows and the reasons for one row
cost no second scoring.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.display import card, html_card, number
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.prediction.worth import row_worth
from mates_hf.records import IntArray
from mates_hf.selection.choose import gumbel_top_k, nth_true, ranked

logger = logging.getLogger(__name__)

SPAN_TARGETS = 32  # of a row are explained together
_WELL_USED = 0.9  # of a token budget; below it, a warning

Ranking = Literal["influence", "row_worth"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to keep. Exactly one of the first four is given.

    Attributes:
        ratio: Share of the rows to keep, in (0, 1]; rounded to whole rows, at least one.
        k: Number of rows to keep.
        threshold: Lowest `influence` of a row that is kept. Of path labels only the order means anything.
        num_tokens: Largest number of trained tokens of the kept rows together. Rows are taken from the highest
            influence down; a row that does not fit into what is left is skipped.
        temperature: Temperature of the Gumbel noise, in standard deviations of the labels; 0 takes the highest.
        seed: Random seed of the noise and of the order among ties, from 0 to below 2**64.
        order_only: Whether the labels give an order and price no step, so that a threshold means nothing. Then a
            warning says so.

    Raises:
        ValueError: none or several are given, or one is out of range.
    """

    ratio: float | None = None
    k: int | None = None
    threshold: float | None = None
    num_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    order_only: bool = False

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("ratio", "k", "threshold", "num_tokens")}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                "Exactly one of `ratio`, `k`, `threshold` and `num_tokens` must say how much to keep, got "
                f"{', '.join(f'{name}={values[name]!r}' for name in given) or 'none'}."
            )
        rules: dict[str, tuple[bool, str]] = {
            "ratio": (self.ratio is None or 0 < self.ratio <= 1, "in (0, 1]"),
            "k": (_is_count(self.k), "a whole number of at least 0"),
            "threshold": (self.threshold is None or not math.isnan(self.threshold), "a number"),
            "num_tokens": (_is_count(self.num_tokens), "a whole number of at least 0"),
            "temperature": (0 <= self.temperature < math.inf, "a finite number of at least 0"),
            "seed": (self.seed is not None and _is_count(self.seed) and self.seed < 2**64, _SEEDS),
        }
        for name, (ok, rule) in rules.items():
            if not ok:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        if self.threshold is not None and self.temperature:
            raise ValueError(
                f"`temperature` must be 0 with `threshold`, which asks for all rows above it, got {self.temperature}. "
                "Use `ratio` or `k` with a temperature."
            )
        if self.threshold is not None and self.order_only:
            logger.warning(
                "`threshold` has no meaning here: the influence model was fitted on path labels, which give an order "
                "and whose zero and scale are not those of a step. Use `ratio`, `k` or `num_tokens`."
            )

    def of_labels(self, label_unit: Any) -> Budget:
        """The budget where the labels price a step (`"step"`) or give an order (`"order"`); None is not known."""
        return dataclasses.replace(self, order_only=label_unit == "order")

    @property
    def ranking(self) -> Ranking:
        """What rows are ranked by: `influence` where tokens are counted, `row_worth` where rows are."""
        return "row_worth" if self.threshold is None and self.num_tokens is None else "influence"


_SEEDS = "a whole number from 0 to below 2**64"


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0)


def asked_for(budget: Budget) -> str:
    """A budget as it was written, defaults left out."""
    said = [f"{name}={getattr(budget, name)}" for name in ("ratio", "k", "threshold", "num_tokens")]
    said = [word for word in said if not word.endswith("=None")]
    return ", ".join([*said, *([f"temperature={budget.temperature}, seed={budget.seed}"] * (budget.temperature > 0))])


def rank_values(scored: Predictions, ranking: Ranking) -> npt.NDArray[np.float32]:
    """What rows are ranked by, (N,) float32, higher is better.

    `influence` as predicted; or `row_worth` of it, in nats/token times tokens (`influence` is `influence_per_token`
    times a step size that all rows share, so both rank alike).
    """
    if ranking == "influence":
        return scored.influence
    return np.asarray(row_worth(scored.influence, scored.num_targets), np.float32)


def temperature_unit(num_targets: npt.NDArray[np.int32], ranking: Ranking, label_std: float) -> float:
    """Standard deviation of the labels in the unit that rows are ranked in.

    Args:
        num_targets: (N,) trained tokens of the rows.
        ranking: What the rows are ranked by.
        label_std: Standard deviation of the labels' `influence`.

    Returns:
        `label_std`; for `row_worth`, n (d - mean), what that is over rows of these lengths whose influence d does not
        depend on their length n: `label_std` times the root of the mean of n squared.

    Raises:
        ValueError: the fit did not record a standard deviation.
    """
    if not (math.isfinite(label_std) and label_std > 0):
        raise ValueError(
            "A `temperature` above 0 is in standard deviations of the labels, and this model's fit records "
            f"{label_std}. Use `temperature=0`."
        )
    if ranking == "influence":
        return label_std
    trained = num_targets[num_targets > 0].astype(np.float64)
    return label_std * (float(np.sqrt(np.mean(trained**2))) if len(trained) else 1.0)


def keep_rows(scored: Predictions, budget: Budget, label_std: float) -> IntArray:
    """The rows that a budget keeps.

    Args:
        scored: Predictions of N rows.
        budget: How much to keep. Rows without a trained token come last in a row budget and never in a token budget;
            with `threshold` their influence, the intercept, decides. Rows that rank alike stand in one random order.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.

    Returns:
        (k,) int64 row numbers, ascending.

    Raises:
        ValueError: `k` is more than there are rows, or a temperature without `label_std`.
    """
    num = len(scored.influence)
    if budget.threshold is not None:
        return np.flatnonzero(scored.influence >= np.float32(budget.threshold))
    if budget.k is not None and budget.k > num:
        raise ValueError(f"`k` must be at most the number of rows ({num}), got {budget.k}.")
    trained = scored.num_targets > 0
    values = rank_values(scored, budget.ranking)[trained]
    if budget.temperature and len(values):
        values = values / np.float32(temperature_unit(scored.num_targets, budget.ranking, label_std))
    where = np.flatnonzero(trained)
    if budget.num_tokens is not None:
        order = where[ranked(values, budget.temperature, budget.seed)]
        return np.sort(_fill(order, scored.num_targets, int(budget.num_tokens)))
    k = budget.k if budget.k is not None else share_of(num, budget.ratio)
    chosen = where[gumbel_top_k(values, min(k, len(values)), temperature=budget.temperature, seed=budget.seed)]
    if k > len(values):
        others = nth_true(~trained, np.arange(k - len(values)))
        chosen = np.sort(np.concatenate([chosen, others]))
    return chosen.astype(np.int64)


def _fill(order: IntArray, num_targets: npt.NDArray[np.int32], num_tokens: int) -> IntArray:
    """The rows of an order that fit into a number of tokens, each tried in its turn."""
    left, skipped, parts = num_tokens, None, [order[:0]]
    while len(order):
        ends = np.cumsum(num_targets[order], dtype=np.int64)
        num = int(np.searchsorted(ends, left, side="right"))
        parts.append(order[:num])
        left -= int(ends[num - 1]) if num else 0
        if num < len(order) and skipped is None:
            skipped = int(order[num])
        rest = order[num + 1 :]
        order = rest[num_targets[rest] <= left]
    used = num_tokens - left
    if skipped is not None and used < _WELL_USED * num_tokens:
        logger.warning(
            "`num_tokens=%d` keeps %d tokens in %d rows, %.0f %% of the budget: rows are taken whole, and those left "
            "are longer than what is left of it. The first that does not fit is row %d, with %d trained tokens. Raise "
            "`num_tokens`, or cut the rows.",
            num_tokens, used, sum(map(len, parts)), 100 * used / num_tokens, skipped, int(num_targets[skipped]),
        )  # fmt: skip
    return np.concatenate(parts)


def share_of(num: int, ratio: float | None) -> int:
    """Rows in a share of `num`: rounded, at least one where there is one."""
    return min(num, max(1, round(num * (ratio or 0.0))))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Selection:
    """A scored dataset and what a budget keeps of it.

    Attributes:
        dataset: The dataset as it was given.
        influence: (N,) float32 predicted influence in the unit of the labels, higher is better; the intercept where a
            row has no target.
        num_targets: (N,) int32 trained tokens of each row.
        rows: (k,) int64 kept rows, ascending.
        budget: The budget that decided which rows are kept.
        scorer: The object that predicted, which `explain` asks again.
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.
    """

    dataset: Any
    influence: npt.NDArray[np.float32]
    num_targets: npt.NDArray[np.int32]
    rows: IntArray
    budget: Budget
    scorer: Scorer
    label_std: float

    @classmethod
    def make(cls, dataset: Any, scored: Predictions, budget: Budget, scorer: Scorer, label_std: float) -> Selection:
        """Choose by a budget."""
        rows = keep_rows(scored, budget, label_std)
        return cls(
            dataset=dataset,
            influence=scored.influence,
            num_targets=scored.num_targets,
            rows=rows,
            budget=budget,
            scorer=scorer,
            label_std=label_std,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return card(*self._facts())

    def _repr_html_(self) -> str:
        return html_card(*self._facts())

    def _facts(self) -> tuple[str, dict[str, str]]:
        """Title and lines of what is printed."""
        kept, rest = self.influence[self.rows], self.influence[~self._kept()]
        tokens = self.num_targets[self.rows].sum(dtype=np.int64), self.num_targets.sum(dtype=np.int64)
        facts = {
            "trained tokens": f"{tokens[0]:,} of {tokens[1]:,} ({tokens[0] / max(1, tokens[1]):.1%})",
            "asked for": asked_for(self.budget),
            "ranked by": f"{self.ranked_by}, threshold {number(self.threshold)}",
            "mean influence": f"kept {_mean(kept)}, others {_mean(rest)} nats/token (higher is better)",
            "columns": ", ".join(self.dataset.column_names),
            "see": ".selected, .rejected, .explain(row), .rethreshold(ratio=...)",
        }
        return f"Selection: {len(self.rows):,} of {len(self.influence):,} rows ({self.ratio:.1%})", facts

    @property
    def selected(self) -> Any:
        """The kept rows, in the dataset's order."""
        return self.dataset.select(self.rows)

    @property
    def rejected(self) -> Any:
        """The other rows, in the dataset's order."""
        return self.dataset.select(np.flatnonzero(~self._kept()))

    @property
    def ratio(self) -> float:
        """Share of the rows that is kept."""
        return len(self.rows) / max(1, len(self.influence))

    @property
    def ranked_by(self) -> Ranking:
        """What `threshold` is counted in: `influence`, or `row_worth` where the budget counts rows."""
        return self.budget.ranking

    @property
    def threshold(self) -> float:
        """The budget's threshold, else the lowest value of `ranked_by` among kept rows with targets; inf without any.

        With a temperature some rows above it are rejected.
        """
        if self.budget.threshold is not None:
            return float(self.budget.threshold)
        rows = self.rows[self.num_targets[self.rows] > 0]
        return float(self._values()[rows].min()) if len(rows) else math.inf

    def rethreshold(
        self,
        *,
        ratio: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        num_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Selection:
        """The same scored rows under another budget, without scoring again; arguments as in `MatesSelector.filter`."""
        budget = Budget(
            ratio=ratio, k=k, threshold=threshold, num_tokens=num_tokens, temperature=temperature, seed=seed
        ).of_labels("order" if self.budget.order_only else None)
        scored = Predictions(self.influence, self.num_targets)
        return Selection.make(self.dataset, scored, budget, self.scorer, self.label_std)

    def explain(self, i: int) -> dict[str, Any]:
        """Why a row was kept or not.

        Args:
            i: Number of a row of the dataset.

        Returns:
            `row`, `selected`, `influence`, `num_targets`, `rank` (1 is the highest of N by `ranked_by`), `ranked_by`,
            `value` in it, `threshold`, and `spans`: stretches of the row in text order, each with `num_targets`,
            `text` (None without tokenizer) and the `influence` predicted for it alone, > 0 helps. For an n-gram model
            the mean of the spans, weighted by their targets, is the row's influence.

        Raises:
            ValueError: there is no such row.
        """
        if not 0 <= i < len(self.influence):
            raise ValueError(f"`i` must be a row of the dataset, 0 to {len(self.influence) - 1}, got {i}.")
        values = self._values()
        return {
            "row": int(i),
            "selected": bool(self._kept()[i]),
            "influence": float(self.influence[i]),
            "num_targets": int(self.num_targets[i]),
            "rank": int((values > values[i]).sum()) + 1,
            "ranked_by": self.ranked_by,
            "value": float(values[i]),
            "threshold": self.threshold,
            "spans": self._spans(int(i)),
        }

    def _spans(self, i: int) -> list[dict[str, Any]]:
        """Predictions of the row's stretches; each begins with the token before its first target."""
        ids, labels = self.scorer.column.open(self.dataset).rows(np.array([i])).row(0)
        cuts = range(0, max(len(ids) - 1, 0), SPAN_TARGETS)
        parts = [slice(cut, cut + SPAN_TARGETS + 1) for cut in cuts]
        rows = TokenRows.from_lists([ids[part].tolist() for part in parts], [labels[part].tolist() for part in parts])
        influence, num_targets = self.scorer.predict(rows)
        tokenizer = self.scorer.column.tokenizer
        return [
            {
                "num_targets": int(num_targets[j]),
                "text": None if tokenizer is None else tokenizer.decode(ids[part][0 if j == 0 else 1 :].tolist()),
                "influence": float(influence[j]),
            }
            for j, part in enumerate(parts)
        ]

    def _values(self) -> npt.NDArray[np.float32]:
        return rank_values(Predictions(self.influence, self.num_targets), self.ranked_by)

    def _kept(self) -> npt.NDArray[np.bool_]:
        kept = np.zeros(len(self.influence), bool)
        kept[self.rows] = True
        return kept


def _mean(influence: npt.NDArray[np.float32]) -> str:
    return number(float(influence.mean(dtype=np.float64))) if len(influence) else "-"
