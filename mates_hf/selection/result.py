"""What a budget keeps of a scored dataset: a result that can be asked again with another budget.

Where it is used: the selector predicts, `keep_rows` chooses by it, `Selection` is what the caller gets. Trade-off: a
result holds eight bytes a row and the dataset, so that another budget, the rejected rows and the reasons for one row
cost no second scoring.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.groups import Groups, read_groups, shares_of
from mates_hf.display import card, html_card, number
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.records import IntArray
from mates_hf.selection.budget import Budget, Ranking, asked_for, keep_rows, rank_values
from mates_hf.selection.quota import Bounds, Quota


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
        groups: Groups of the rows, where a column says them.
        bounds: Bounds of what each group gets, where there are any.
    """

    dataset: Any
    influence: npt.NDArray[np.float32]
    num_targets: npt.NDArray[np.int32]
    rows: IntArray
    budget: Budget
    scorer: Scorer
    label_std: float
    groups: Groups | None = None
    bounds: Bounds | None = None

    @classmethod
    def make(
        cls,
        dataset: Any,
        scored: Predictions,
        budget: Budget,
        scorer: Scorer,
        label_std: float,
        bounds: Bounds | None = None,
        groups: Groups | None = None,
    ) -> Selection:
        """Choose by a budget, within the bounds on groups."""
        quota = None
        if bounds is not None:
            if bounds.column not in dataset.column_names:
                raise ValueError(
                    f"`group_column` must be a column of the dataset, got {bounds.column!r}; it has "
                    f"{sorted(dataset.column_names)}."
                )
            groups = read_groups(dataset, bounds.column) if groups is None else groups
            quota = Quota.of(groups.codes, bounds.most, bounds.least)
        rows = keep_rows(scored, budget, label_std, quota)
        return cls(
            dataset=dataset,
            influence=scored.influence,
            num_targets=scored.num_targets,
            rows=rows,
            budget=budget,
            scorer=scorer,
            label_std=label_std,
            groups=groups,
            bounds=bounds,
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
    def shares(self) -> dict[str, dict[str, float]]:
        """By group: `rows` and `kept` as shares of all, and `boost`, how many times its share it got; sorted by name.

        Empty where no column says the groups.
        """
        if self.groups is None:
            return {}
        names, num_groups = self.groups.names, len(self.groups.names)
        every = np.bincount(self.groups.codes, minlength=num_groups)
        return shares_of(names, every, np.bincount(self.groups.codes[self.rows], minlength=num_groups))

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
        random_share: float = 0.0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Selection:
        """The same scored rows under another budget, without scoring again; arguments as in `MatesSelector.filter`."""
        budget = Budget(
            ratio=ratio,
            k=k,
            threshold=threshold,
            num_tokens=num_tokens,
            random_share=random_share,
            temperature=temperature,
            seed=seed,
            order_only=self.budget.order_only,
        )
        scored = Predictions(self.influence, self.num_targets)
        return Selection.make(
            self.dataset, scored, budget, self.scorer, self.label_std, self.bounds, self.groups
        )  # fmt: skip

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
        rows, texts = self.scorer.column.stretches(self.dataset, i)
        influence, num_targets = self.scorer.predict(rows)
        found = zip(num_targets.tolist(), texts, influence.tolist(), strict=True)
        return [{"num_targets": num, "text": text, "influence": value} for num, text, value in found]

    def _values(self) -> npt.NDArray[np.float32]:
        return rank_values(Predictions(self.influence, self.num_targets), self.ranked_by)

    def _kept(self) -> npt.NDArray[np.bool_]:
        kept = np.zeros(len(self.influence), bool)
        kept[self.rows] = True
        return kept


def _mean(influence: npt.NDArray[np.float32]) -> str:
    return number(float(influence.mean(dtype=np.float64))) if len(influence) else "-"
