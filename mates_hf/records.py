"""What crosses folder borders: the errors, influence labels, the fit report, and how plain files are kept.

Place in the flow: left of every folder, so every stage can import it and it imports none. It needs numpy only, so
what a run left on disk can be read on a machine without torch; `round_files` builds round directories of it.

Trade-off: files are written whole or not at all and read with distrust, which costs a flush to disk and a look at
each; in exchange a killed run leaves no half file, and a damaged one is a `MatesError` that names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.disk import json_bytes as json_bytes
from mates_hf.disk import write_array as write_array
from mates_hf.disk import write_json as write_json
from mates_hf.disk import written_whole as written_whole
from mates_hf.display import card, html_card
from mates_hf.summaries import fit_facts, fit_title, labels_facts, labels_title

if TYPE_CHECKING:
    from mates_hf.processes import Processes

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

COPY_AGAIN = "Copy the directory again from where it was written."

_LABEL_COLUMNS = ("candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe")

STATE_KEY = "mates_hf"  # of the run's state in `TrainerState.stateful_callbacks`


class MatesError(RuntimeError):
    """Root of the errors this library raises about state (wrong input raises `ValueError` or `TypeError`)."""


class UnsupportedSettingError(MatesError):
    """A setting of the run that would bypass or break the data order; raised before the first optimizer step."""


class InfluenceError(MatesError):
    """Influence that must not be selected on: non-finite, all zero or all equal."""


class UnrankableError(InfluenceError):
    """Finite influence that ranks nothing: all zero, all equal, or of a single document.

    Attributes:
        labels: those measured, where labels are what ranks nothing; else None.
    """

    labels: InfluenceLabels | None = None


class EvaluationError(MatesError):
    """A model that cannot be evaluated as it is: it gives NaN, or its context is too short for a task's items."""


class WeakSignalError(MatesError):
    """The guard refused a round and `on_weak_signal="error"`."""


class RoundMismatchError(MatesError):
    """A round directory belongs to another config, pool or file layout than the run that asks for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceLabels:
    """Measured influence of N candidates; higher is better, and the probe says what its zero means.

    Attributes:
        candidate_id: (N,) int64, row of the candidate in the pool.
        influence: (N,) float32, relative to the null step. One-step labels: nats/token of reference loss that one
            optimizer step on the candidate takes off. Path labels: an order; zero and scale are not those of a step.
        influence_per_token: (N,) float32, mean over the candidate's trained tokens of the directional derivative.
            `influence = influence_per_token * step_size`.
        loss: (N,) float32, the candidate's own loss, nats/token; of a `DirectionalProbe` the mean of the losses at
            either side of the weights, which differs from it by curvature (1e-4 was seen).
        num_tokens: (N,) int32, trained tokens (targets) of the candidate.
        probe: (N,) str, the probe that measured the row.
        step_size: scale between the two influence columns (1.0 where a probe measures no derivative).
        token_derivatives: (num_tokens.sum(),) float32 or None, the derivative at each trained token, candidates in row
            order, tokens in text order. Its mean over a candidate is `influence_per_token`.
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
        return card(labels_title(self), labels_facts(self))

    def _repr_html_(self) -> str:
        return html_card(labels_title(self), labels_facts(self))

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
        flops: FLOPs of the fit, by the rule of `mates_hf.influence.flops`; None where the model does not say.
        flops_per_token: FLOPs of a prediction, for each trained token of a candidate, by the same rule.
        ranking: what rank correlations and overlap are of: "worth", what a row of its length adds to a batch, which is
            what a round selects by; "influence" where all rows have one length and both rank alike.
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

    def __repr__(self) -> str:
        return card(fit_title(self), fit_facts(self))

    def _repr_html_(self) -> str:
        return html_card(fit_title(self), fit_facts(self))

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
        numbers = [value for key, value in kept.items() if key not in ("interval", "calibration", "ranking")]
        pairs: list[Any] = [kept.get("interval"), *(kept.get("calibration") or ())]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"A fit report must have an `interval` and a `calibration` of pairs, got {pairs}.")
        numbers += [value for pair in pairs for value in pair]
        needed = [kept.get("spearman"), *pairs[0]]
        if not all(isinstance(value, (int, float, type(None))) for value in numbers) or None in needed:
            raise ValueError(f"A fit report must hold numbers, got {kept}.")
        if kept.get("ranking", "influence") not in ("influence", "worth"):
            raise ValueError(f"`ranking` of a fit report must be 'influence' or 'worth', got {kept['ranking']!r}.")
        kept["interval"], *calibration = (tuple(pair) for pair in pairs)
        kept["calibration"] = tuple(calibration)
        return cls(**kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a probe must know of the run that only the training loop can tell it.

    Attributes:
        learning_rates: one a parameter group, of the step to come; None reads the optimizer's own.
        max_grad_norm: clipping threshold of the run; None or 0 is off.
        batch_rows: rows in one optimizer step, over all devices and accumulation.
        rate_steps: the optimizer steps of the coming round, counted in steps at `learning_rates`: the sum of the
            learning rates scheduled for them over the present ones; None where no round is known.
        tokens_per_batch: padded tokens in one forward pass of a probe.
        seed: for whatever a probe draws.
        progress: show a progress bar.
        processes: those that train the model together and measure at the same time; None is one process.
        shards_dir: where a probe keeps what it has measured so far; None keeps nothing.
    """

    learning_rates: tuple[float, ...] | None = None
    max_grad_norm: float | None = None
    batch_rows: int = 1
    rate_steps: float | None = None
    tokens_per_batch: int = 8192
    seed: int = 0
    progress: bool = False
    processes: Processes | None = None
    shards_dir: Path | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        MatesError: it is damaged or holds something else.
    """
    require_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MatesError(f"`{path}` must be a whole JSON object, and is damaged ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise MatesError(f"`{path}` must be a JSON object, got {type(value).__name__}. {COPY_AGAIN}")
    return value


def read_array(path: Path, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any] | None:
    """Memory-map a `.npy` file read-only. Never unpickles.

    Args:
        path: the file.
        dtype: with it, the array must be one-dimensional and of this type.

    Returns:
        The array, or None where there is no file.

    Raises:
        MatesError: the file is damaged, or holds another type or shape.
    """
    if not path.exists():
        return None
    require_file(path)
    try:
        with np.errstate(all="ignore"):
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header ends in any of a dozen kinds, `tokenize`'s among them
        raise MatesError(f"`{path}` must be a whole .npy file, and is damaged ({error}). {COPY_AGAIN}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise MatesError(f"`{path}` must be a .npy file, got a zip archive. {COPY_AGAIN}")
    if dtype is not None and (array.dtype != dtype or array.ndim != 1):
        raise MatesError(
            f"`{path}` must hold {np.dtype(dtype)} in one dimension, got {array.dtype} of shape {array.shape}. "
            f"{COPY_AGAIN}"
        )
    return array


def require_file(path: Path) -> None:
    """Raise unless `path` is a plain file: opening a pipe or a device could wait for ever.

    Args:
        path: what is to be opened.

    Raises:
        FileNotFoundError: there is nothing there.
        MatesError: it is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"`{path}` is not there.")
    if not path.is_file():
        raise MatesError(f"`{path}` must be a plain file, and is none. {COPY_AGAIN}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, a piece in memory at a time."""
    require_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
