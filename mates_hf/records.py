"""What crosses folder borders: influence labels, and the report of a fit.

Both are plain data with numpy arrays, and need numpy only: what a run left on disk can be read on a machine without
torch. `round_files` keeps them on disk. Everything to the right may import this module, which imports no folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.display import card, html_card, interval, number, some_of, spread, spread_text
from mates_hf.errors import InfluenceError, UnrankableError
from mates_hf.errors import MatesError as MatesError  # where it was imported from before

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_NO_NUMBERS = ("interval", "calibration", "ranking", "probe")  # of a fit report
_LABEL_COLUMNS = ("candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe")

LOSS_REDUCTION = "loss_reduction"  # `InfluenceLabels.kind` of a `LossReductionProbe`
PATH_LABELS = "path"  # `InfluenceLabels.kind` of a `DirectionalProbe` that read several points

STATE_KEY = "mates_hf"  # of the run's state in `TrainerState.stateful_callbacks`


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceLabels:
    """Measured influence of N candidates; higher is better, and the probe says what its zero means.

    Attributes:
        candidate_id: (N,) int64, row of the candidate in the pool.
        influence: (N,) float32, relative to the null step. One-step labels: nats/token of reference loss that one
            optimizer step on the candidate takes off. Path labels (see `kind`): an order, whose zero and scale are not
            those of a step.
        influence_per_token: (N,) float32, mean over the candidate's trained tokens of the directional derivative.
            `influence = influence_per_token * step_size`.
        loss: (N,) float32, the candidate's own loss, nats/token; of a `DirectionalProbe` the mean of the losses at
            either side of the weights, which differs from it by curvature (1e-4 was seen).
        num_tokens: (N,) int32, trained tokens (targets) of the candidate.
        probe: (N,) str, the probe that measured the row.
        step_size: scale between the two influence columns (1.0 where a probe measures no derivative).
        token_derivatives: (num_tokens.sum(),) float32 or None, the derivative at each trained token, candidates in row
            order, tokens in text order. Its mean over a candidate is `influence_per_token`.
        reference_losses: (R, 2) float32 or None, of each passage of the reference task its mean loss at the null step,
            nats/token, and how many trained tokens it has.
        info: what the probe wants recorded (epsilon, its agreement, seconds, FLOPs, skipped candidates).
    """

    candidate_id: IntArray
    influence: FloatArray
    influence_per_token: FloatArray
    loss: FloatArray
    num_tokens: npt.NDArray[np.int32]
    probe: npt.NDArray[np.str_]
    step_size: float = 1.0
    token_derivatives: FloatArray | None = None
    reference_losses: FloatArray | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        num = len(self.candidate_id)
        for name in ("influence", "influence_per_token", "loss", "num_tokens", "probe"):
            if len(getattr(self, name)) != num:
                raise ValueError(f"`{name}` must have one entry a candidate ({num}), got {len(getattr(self, name))}.")
        if self.token_derivatives is not None and len(self.token_derivatives) != int(self.num_tokens.sum()):
            raise ValueError(
                f"`token_derivatives` must have one entry a trained token ({int(self.num_tokens.sum())}), got "
                f"{len(self.token_derivatives)}."
            )

    def __len__(self) -> int:
        return len(self.candidate_id)

    def __repr__(self) -> str:
        return card(_labels_title(self), _labels_facts(self))

    def _repr_html_(self) -> str:
        return html_card(_labels_title(self), _labels_facts(self))

    def to_pandas(self) -> Any:
        """The labels as a table, one row a candidate.

        Returns:
            A `pandas.DataFrame` with `candidate_id`, `influence`, `influence_per_token`, `loss`, `num_tokens` and
            `probe`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise ImportError(
                "`InfluenceLabels.to_pandas` must have pandas, which is not installed: `pip install pandas`."
            ) from error
        return pandas.DataFrame({name: np.asarray(getattr(self, name)) for name in _LABEL_COLUMNS})

    @property
    def kind(self) -> str:
        """What the labels are: "path", "directional" (a derivative at one point), or the name that a probe gives them.

        Those are "one_step" and "loss_reduction" of the others here. Several are joined by commas. Labels of a
        `DirectionalProbe` that do not say how many points it read are taken for path labels, its default.
        """
        names = [str(name) for name in np.unique(self.probe)]
        is_path = self.info.get("path_points", 2) != 1
        return ", ".join(PATH_LABELS if name == "directional" and is_path else name for name in names)

    @property
    def offsets(self) -> IntArray:
        """(N + 1,) int64: candidate i's derivatives are `token_derivatives[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.num_tokens, dtype=np.int64)])

    def take(self, index: npt.NDArray[Any]) -> InfluenceLabels:
        """The labels of some candidates: `index` is (M,) int positions or an (N,) bool mask."""
        rows = np.flatnonzero(index) if index.dtype == bool else index
        derivatives = self.token_derivatives
        if derivatives is not None:
            offsets = self.offsets
            parts = [derivatives[offsets[i] : offsets[i + 1]] for i in rows]
            derivatives = np.concatenate(parts) if parts else derivatives[:0]
        return dataclasses.replace(
            self, token_derivatives=derivatives, **{name: getattr(self, name)[rows] for name in _LABEL_COLUMNS}
        )

    def check(self) -> InfluenceLabels:
        """Refuse labels that must not be fitted and selected on.

        Returns:
            The labels.

        Raises:
            InfluenceError: no candidate was measured, or influence is non-finite; names the candidates.
            UnrankableError: influence is all zero or all equal.
        """
        if not len(self):
            raise InfluenceError("No candidate was measured: none of the probed rows has a trained token.")
        bad = ~(np.isfinite(self.influence) & np.isfinite(self.influence_per_token) & np.isfinite(self.loss))
        if bad.any():
            raise InfluenceError(
                f"Influence and loss must be finite; {int(bad.sum())} of {len(self)} candidates are not, first "
                f"candidate_id {self.candidate_id[bad][:8].tolist()}. Look for NaN in these rows' loss, or lower the "
                "learning rate."
            )
        if np.all(self.influence == 0) or (len(self) > 1 and np.all(self.influence == self.influence[0])):
            what = "zero" if self.influence[0] == 0 else f"equal ({self.influence[0]:.3g})"
            error = UnrankableError(
                f"The influence of all {len(self)} candidates (candidate_id {self.candidate_id[:8].tolist()} ...) is "
                f"{what}, so it cannot rank anything. Check that parameters are trainable, that the learning rate is "
                "not 0, and that the candidates differ."
            )
            error.labels = self
            raise error
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitReport:
    """How well an influence model predicts labels it was not fitted on (held out by document).

    Attributes:
        num_labels: labels fitted, without the held-out ones.
        num_held_out: held-out labels.
        spearman: held-out rank correlation of prediction and label, of what `ranking` says.
        interval: 95 % bootstrap interval of `spearman`, over documents.
        spearman_within_group: mean rank correlation inside groups of at least 8, weighted by size; None without any.
        slope: least-squares slope of label on prediction (1 is calibrated).
        top_fifth_overlap: share of the truly best fifth found in the predicted best fifth (0.2 is chance).
        calibration: (mean predicted, mean label) for each tenth of the predictions, in the labels' unit.
        label_std: standard deviation of the labels, in the labels' unit.
        seconds: wall-clock of the fit.
        flops: FLOPs of the fit, by the rule of `mates_hf.flops`; None where the influence model does not say.
        flops_per_token: FLOPs of a prediction, for each trained token of a candidate, by the same rule.
        ranking: what rank correlations and overlap are of: "worth", what a row of its length adds to a batch, which is
            what a round selects by; "influence" where all rows have one length and both rank alike.
        probe: what the labels are, as `InfluenceLabels.kind` says; None where it was not recorded.
        evidence: standard deviation of what static evidence alone predicts of the fitted labels, in theirs: 0 where it
            tells nothing of them; None where the fit was given none.
        evidence_weight: weight, in [0, 1], of static evidence beside the labels in what is predicted, both in their
            standard deviations; None where the fit was given none.
    """

    num_labels: int
    num_held_out: int
    spearman: float
    interval: tuple[float, float]
    spearman_within_group: float | None = None
    slope: float = float("nan")
    top_fifth_overlap: float = float("nan")
    calibration: tuple[tuple[float, float], ...] = ()
    label_std: float = float("nan")
    seconds: float = 0.0
    flops: float | None = None
    flops_per_token: float | None = None
    ranking: Literal["influence", "worth"] = "influence"
    probe: str | None = None
    evidence: float | None = None
    evidence_weight: float | None = None

    def __repr__(self) -> str:
        return card(_fit_title(self), _fit_facts(self))

    def _repr_html_(self) -> str:
        return html_card(_fit_title(self), _fit_facts(self))

    def passes(self, min_spearman: float) -> bool:
        """True where the guard lets a round select: rank correlation large enough and its interval above 0."""
        return bool(self.spearman >= min_spearman and self.interval[0] > 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitReport:
        """Inverse of `to_dict`; keys of a newer version are ignored, and what is no number is a `ValueError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        numbers = [value for key, value in kept.items() if key not in _NO_NUMBERS]
        pairs: list[Any] = [kept.get("interval"), *(kept.get("calibration") or ())]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"A fit report must have an `interval` and a `calibration` of pairs, got {pairs}.")
        numbers += [value for pair in pairs for value in pair]
        needed = [kept.get("spearman"), *pairs[0]]
        if not all(isinstance(value, (int, float, type(None))) for value in numbers) or None in needed:
            raise ValueError(f"A fit report must hold numbers, got {kept}.")
        if kept.get("ranking", "influence") not in ("influence", "worth"):
            raise ValueError(f"`ranking` of a fit report must be 'influence' or 'worth', got {kept['ranking']!r}.")
        if not isinstance(kept.get("probe"), (str, type(None))):
            raise ValueError(f"`probe` of a fit report must be a name or None, got {kept['probe']!r}.")
        kept["interval"], *calibration = (tuple(pair) for pair in pairs)
        kept["calibration"] = tuple(calibration)
        return cls(**kept)


def _labels_title(labels: InfluenceLabels) -> str:
    """First line of labels."""
    probes = ", ".join(sorted({str(name) for name in np.unique(some_of(labels.probe))})) if len(labels) else ""
    return f"InfluenceLabels: {len(labels):,} candidates ({probes or 'no probe'})"


def _labels_facts(labels: InfluenceLabels) -> dict[str, str]:
    """Facts of labels; arrays are read by a sample."""
    tokens = int(np.sum(labels.num_tokens, dtype=np.int64)) if len(labels) else 0
    each = "with" if labels.token_derivatives is not None else "without"
    facts = {
        "influence": f"{spread_text(labels.influence)} nats/token",
        "loss": f"mean {number(spread(labels.loss).get('mean'))} nats/token",
        "tokens": f"{tokens:,} trained, {each} a derivative for each",
    }
    if labels.info:
        known = ("epsilon", "epsilon_agreement", "reference_loss", "num_skipped", "seconds", "flops")
        kept = [f"{name} {number(labels.info[name])}" for name in known if name in labels.info]
        facts["info"] = ", ".join(kept) or f"{len(labels.info)} values"
    return facts


def _fit_title(report: FitReport) -> str:
    """First line of a fit report."""
    return (
        f"FitReport: held-out Spearman {report.spearman:.3f}, 95% interval {interval(report.interval)}, "
        f"{report.num_held_out:,} held out"
    )


def _fit_facts(report: FitReport) -> dict[str, str]:
    """Facts of a fit report."""
    facts = {
        "labels": f"{report.num_labels:,} fitted, standard deviation {number(report.label_std)}",
        "slope": f"{number(report.slope)} (1 is calibrated)",
        "best fifth": f"{number(report.top_fifth_overlap)} of it found (0.2 is chance)",
    }
    if report.evidence is not None:
        beside = "" if report.evidence_weight is None else f", {number(report.evidence_weight)} of it beside them"
        facts["static evidence"] = f"{number(report.evidence)} standard deviations of the labels{beside}"
    if report.spearman_within_group is not None:
        facts["in groups"] = f"Spearman {number(report.spearman_within_group)}"
    if report.calibration:
        (low, low_label), (high, high_label) = report.calibration[0], report.calibration[-1]
        facts["lowest tenth"] = f"predicted {number(low)}, labels {number(low_label)}"
        facts["highest tenth"] = f"predicted {number(high)}, labels {number(high_label)}"
    facts["cost"] = f"{report.seconds:.2g} s, {number(report.flops)} FLOPs"
    return facts
