"""What crosses folder borders: the errors, influence labels, the fit report, and the round directory.

Place in the flow: left of every folder, so every stage can import it and it imports none. It needs numpy and pyarrow
only, so a finished round can be read on a machine without torch: `load_round(path)`.

Trade-off: a round is a directory of plain files (Parquet, npy, JSON), not one archive. It costs a few more file
handles and can be opened by anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

ROUND_FILE = "round.json"
KEY_FILE = "key.json"


class MatesError(RuntimeError):
    """Root of the errors this library raises about state (wrong input raises `ValueError` or `TypeError`)."""


class UnsupportedSettingError(MatesError):
    """A setting of the run that would bypass or break the data order; raised before the first optimizer step."""


class InfluenceError(MatesError):
    """Influence that must not be selected on: non-finite, all zero or all equal."""


class WeakSignalError(MatesError):
    """The guard refused a round and `on_weak_signal="error"`."""


class RoundMismatchError(MatesError):
    """A round directory belongs to another config, pool or file layout than the run that asks for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceLabels:
    """Measured influence of N candidates; sign: > 0 helps, higher is better.

    Attributes:
        candidate_id: (N,) int64, row of the candidate in the pool.
        influence: (N,) float32, nats/token of reference loss that one optimizer step on the candidate alone takes off,
            relative to the null step.
        influence_per_token: (N,) float32, mean over the candidate's trained tokens of the directional derivative.
            `influence = influence_per_token * step_size`.
        loss: (N,) float32, the candidate's own loss, nats/token.
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
        columns = ("candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe")
        return dataclasses.replace(
            self, token_derivatives=derivatives, **{name: getattr(self, name)[rows] for name in columns}
        )

    def check(self) -> InfluenceLabels:
        """Refuse labels that must not be fitted and selected on.

        Returns:
            The labels.

        Raises:
            InfluenceError: no candidate was measured, or influence is non-finite, all zero or all equal; names the
                candidates.
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
            raise InfluenceError(
                f"The influence of all {len(self)} candidates (candidate_id {self.candidate_id[:8].tolist()} ...) is "
                f"{what}, so it cannot rank anything. Check that parameters are trainable, that the learning rate is "
                "not 0, and that the candidates differ."
            )
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitReport:
    """How well an influence model predicts labels it was not fitted on (held out by candidate).

    Attributes:
        num_labels: labels fitted, without the held-out ones.
        num_held_out: held-out labels.
        spearman: held-out rank correlation of predicted influence with the label.
        interval: 95 % bootstrap interval of `spearman`.
        spearman_within_group: mean rank correlation inside groups of at least 8, weighted by size; None without any.
        slope: least-squares slope of label on prediction (1 is calibrated).
        top_fifth_overlap: share of the truly best fifth found in the predicted best fifth (0.2 is chance).
        calibration: (mean predicted, mean label) for each tenth of the predictions, in the labels' unit.
        label_std: standard deviation of the labels, in the labels' unit.
        seconds: wall-clock of the fit.
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

    def passes(self, min_spearman: float) -> bool:
        """True where the guard lets a round select: rank correlation large enough and its interval above 0."""
        return bool(self.spearman >= min_spearman and self.interval[0] > 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitReport:
        """Inverse of `to_dict`; keys of a newer version are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        kept["interval"] = tuple(kept["interval"])
        kept["calibration"] = tuple(tuple(pair) for pair in kept.get("calibration", ()))
        return cls(**kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a probe must know of the run that only the training loop can tell it.

    Attributes:
        learning_rates: one a parameter group, of the step to come; None reads the optimizer's own.
        max_grad_norm: clipping threshold of the run; None or 0 is off.
        batch_rows: rows in one optimizer step, over all devices and accumulation.
        tokens_per_batch: padded tokens in one forward pass of a probe.
        seed: for whatever a probe draws.
        progress: show a progress bar.
    """

    learning_rates: tuple[float, ...] | None = None
    max_grad_norm: float | None = None
    batch_rows: int = 1
    tokens_per_batch: int = 8192
    seed: int = 0
    progress: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """A finished round as read from its directory.

    Attributes:
        path: the round directory.
        info: `round.json`.
        labels: `probes.parquet`, with the per-token derivatives of `token_derivatives.npy`.
        candidates: (M,) int64 pool rows that were scored, or None.
        scores: (M,) float32 predicted influence of `candidates`, or None.
        selection: (k,) int64 pool rows in training order, or None where the guard kept the Trainer's own order.
    """

    path: Path
    info: Mapping[str, Any]
    labels: InfluenceLabels
    candidates: IntArray | None
    scores: FloatArray | None
    selection: IntArray | None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, flush it to disk and rename: a reader sees all of it or none."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_array(path: Path, value: npt.NDArray[Any]) -> None:
    """Write a `.npy` file under a temporary name, flush it to disk and rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, value, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_array(path: Path) -> npt.NDArray[Any] | None:
    """Memory-map a `.npy` file read-only, or None where there is none. Never unpickles."""
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None


def write_labels(path: Path, labels: InfluenceLabels) -> None:
    """Write `probes.parquet`, and beside it `token_derivatives.npy` where there are per-token derivatives."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if labels.token_derivatives is not None:
        write_array(path.with_name("token_derivatives.npy"), labels.token_derivatives)
    table = pa.table(
        {
            "candidate_id": pa.array(labels.candidate_id, pa.int64()),
            "influence": pa.array(labels.influence, pa.float32()),
            "influence_per_token": pa.array(labels.influence_per_token, pa.float32()),
            "loss": pa.array(labels.loss, pa.float32()),
            "num_tokens": pa.array(labels.num_tokens, pa.int32()),
            "probe": pa.array(labels.probe.tolist(), pa.string()),
        }
    )
    meta = {"step_size": labels.step_size, "info": dict(labels.info)}
    table = table.replace_schema_metadata({"mates_hf": json.dumps(meta)})
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_labels(path: Path) -> InfluenceLabels:
    """Read what `write_labels` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    meta = json.loads((table.schema.metadata or {}).get(b"mates_hf", b'{"step_size": 1.0, "info": {}}'))
    columns = {name: table.column(name).to_numpy() for name in table.column_names if name != "probe"}
    derivatives = read_array(path.with_name("token_derivatives.npy"))
    return InfluenceLabels(
        **columns,
        probe=np.array(table.column("probe").to_pylist(), dtype=np.str_),
        step_size=meta["step_size"],
        token_derivatives=derivatives,
        info=meta["info"],
    )


def load_round(path: str | os.PathLike[str]) -> RoundRecord:
    """Read a finished round directory with numpy and pyarrow alone.

    Args:
        path: a round directory, `<output_dir>/_mates/round-0003`.

    Returns:
        The record; arrays are memory-mapped.

    Raises:
        FileNotFoundError: the directory or its `round.json` is missing, so the round never finished.
    """
    path = Path(path)
    if not (path / ROUND_FILE).exists():
        raise FileNotFoundError(f"`{path}` is not a finished round: it has no {ROUND_FILE}.")
    return RoundRecord(
        path=path,
        info=json.loads((path / ROUND_FILE).read_text(encoding="utf-8")),
        labels=read_labels(path / "probes.parquet"),
        candidates=read_array(path / "candidates.npy"),
        scores=read_array(path / "scores.npy"),
        selection=read_array(path / "selection.npy"),
    )


def round_path(rounds_dir: Path, number: int) -> Path:
    """Directory of a finished round."""
    return rounds_dir / f"round-{number:04d}"


class RoundWriter:
    """A round in the making: stage results in `round-0003.partial`, renamed to `round-0003` when complete.

    Safe to kill at any instant: each stage's file appears whole or not at all, `round.json` is written last and the
    rename follows it. A rerun with the same key finds the finished stages; with another weights digest it sets the old
    directory aside as `.stale`; with another config or pool it refuses.

    Args:
        rounds_dir: `<output_dir>/_mates`.
        number: the round's number.
        key: what the round depends on: `config`, `pool`, `reference`, `step` and `weights`, plain JSON values.

    Raises:
        RoundMismatchError: a directory of that number was made with another config, pool or reference; both values
            are shown.
    """

    def __init__(self, rounds_dir: Path, number: int, key: Mapping[str, Any]) -> None:
        self.final_path = round_path(rounds_dir, number)
        self.path = self.final_path.with_suffix(".partial")
        self.key = json.loads(json.dumps(dict(key)))
        for path in (self.final_path, self.path):
            self._reconcile(path)
        if not self.final_path.exists() and not self.path.exists():
            self.path.mkdir(parents=True)
            write_json(self.path / KEY_FILE, self.key)

    def _reconcile(self, path: Path) -> None:
        """Keep a directory whose key matches, set a stale one aside, refuse one of another config or pool."""
        if not path.exists():
            return
        key_path = path / KEY_FILE
        found = json.loads(key_path.read_text(encoding="utf-8")) if key_path.exists() else None
        if found == self.key:
            return
        if found is not None:
            for name in ("config", "pool", "reference"):
                if found.get(name) != self.key.get(name):
                    raise RoundMismatchError(
                        f"`{path}` was made with another {name}: it has {found.get(name)}, this run has "
                        f"{self.key.get(name)}. Use another `output_dir` or `rounds_dir`, or the {name} it was made "
                        "with."
                    )
        set_aside(path)

    @property
    def complete(self) -> bool:
        """True where a finished round of this key is already on disk."""
        return (self.final_path / ROUND_FILE).exists()

    def finish(self, info: Mapping[str, Any]) -> Path:
        """Write `round.json`, rename the directory to its final name and return that."""
        write_json(self.path / ROUND_FILE, info)
        os.replace(self.path, self.final_path)
        return self.final_path


def set_aside(path: Path) -> Path:
    """Rename a directory to `<name>.stale`, replacing an earlier stale one, and return the new path."""
    stale = path.with_name(path.name.removesuffix(".partial") + ".stale")
    if stale.exists():
        shutil.rmtree(stale)
    os.replace(path, stale)
    return stale
