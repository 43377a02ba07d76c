"""What the rounds of one run share, and the small things that make them repeatable: orders, digests, timings.

Place in the flow: `rounds.run_round` takes a `Run` and returns an `Order`; `session` makes the one and schedules the
other. Trade-off: kept apart from `rounds.py` so that the method reads without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mates_hf.config import MatesConfig
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence.probe import Probe, count_parameters
from mates_hf.model_traits import hub_name
from mates_hf.preserve import local_shard
from mates_hf.processes import ALONE, Processes
from mates_hf.records import (
    COPY_AGAIN,
    FitReport,
    FloatArray,
    InfluenceLabels,
    MatesError,
    RunSettings,
    read_array,
    read_json,
    write_json,
)
from mates_hf.round_files import ROUND_FILE
from mates_hf.selection.ledger import Ledger
from mates_hf.training.averaging import trainable_parameters, whole_tensor

logger = logging.getLogger(__name__)


class InfluenceModel(Protocol):
    """Predicts influence from the candidate alone; see `NgramInfluenceModel`."""

    @property
    def report(self) -> FitReport:
        """How well held-out labels were predicted by the last fit."""
        ...

    def fit(self, candidates: Any, labels: InfluenceLabels, *args: Any, **kwargs: Any) -> Any:
        """Fit on labels, with `held_out_fraction`, `previous` (the last round's model or None) and `seed`."""
        ...

    def predict(self, dataset: Any) -> FloatArray:
        """(N,) float32 predicted influence, in the labels' unit."""
        ...

    def evaluate(self, candidates: Any, labels: InfluenceLabels, *args: Any, **kwargs: Any) -> FitReport:
        """How well fresh labels are predicted."""
        ...

    def save_pretrained(self, path: Any) -> None:
        """Write the fitted model to a directory."""
        ...

    @classmethod
    def from_pretrained(cls, path: Any) -> Any:
        """Read back what `save_pretrained` wrote."""
        ...


def bound_to_run(influence_model: InfluenceModel, model: Any, tokenizer: Any) -> InfluenceModel:
    """The influence model with what it needs of the run and was not given: one that has a `for_run` asks for it.

    Args:
        influence_model: fitted or not.
        model: the model that trains, unwrapped.
        tokenizer: the Trainer's `processing_class`, or None.

    Returns:
        This, or a copy that reads the model's states, or decodes with the tokenizer.

    Raises:
        ValueError: it needs what the run does not have.
    """
    bind = getattr(influence_model, "for_run", None)
    return influence_model if bind is None else bind(model=model, tokenizer=tokenizer)


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the rounds of one `train()` call share.

    Attributes:
        model: the model that trains, unwrapped.
        optimizer: its torch optimizer.
        reference: what the model should get better at.
        pool: everything that may be trained on.
        pool_identity: length, features and bytes of fixed rows.
        probe: measures influence.
        influence_model: unfitted, bound to this run; copied for each round.
        config: the run's `MatesConfig`.
        settings: what the training loop knows and probes need.
        ledger: which pool rows were trained on.
        rounds_dir: where round directories go; only the main process touches it.
        processes: those that train the model together.
        tokenizer: the Trainer's `processing_class`, for influence models that read text; None where it has none.
        latest_model: the last round's fit, whose labels are pooled into the next; None before the first.
        trusted_model: the last fit that passed the guard; None if none did.
        trusted_step_size: of the labels it was fitted on.
    """

    model: Any
    optimizer: Any
    reference: ReferenceTask
    pool: CandidatePool
    pool_identity: Mapping[str, Any]
    probe: Probe
    influence_model: InfluenceModel
    config: MatesConfig
    settings: RunSettings
    ledger: Ledger
    rounds_dir: Path
    processes: Processes = ALONE
    tokenizer: Any = None
    latest_model: InfluenceModel | None = None
    trusted_model: InfluenceModel | None = None
    trusted_step_size: float = 1.0

    def describe(self) -> dict[str, Any]:
        """What `round.json` records of the run, so that a round can be understood, and repeated, alone."""
        return {
            "config": self.config.to_dict(),
            "seed": self.config.selection_seed,
            "reference": {**self.reference.description, "digest": self.reference.digest()},
            "pool": dict(self.pool_identity),
            "model": {"name": hub_name(self.model), "num_parameters": count_parameters(self.model)},
            "loss": {} if self.pool.reading is None else self.pool.reading.to_dict(),
            "versions": library_versions(),
        }

    def load_model(self, path: Path) -> InfluenceModel:
        """The influence model that a round directory holds."""
        model: InfluenceModel = type(self.influence_model).from_pretrained(path / "influence_model")
        return bound_to_run(model, self.model, self.tokenizer)

    def remember(self, influence_model: InfluenceModel, info: Mapping[str, Any]) -> None:
        """Take a round's fit (and its `round.json`) into account for the next round."""
        self.latest_model = influence_model
        if info["guard"]["decision"] == "select":
            self.trusted_model, self.trusted_step_size = influence_model, float(info["step_size"])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run its checkpoint comes from."""
        return {
            "config": order_config(self.config),
            "pool": dict(self.pool_identity),
            "reference": {"digest": self.reference.digest()},
        }

    def key(self, step: int, weights: str) -> dict[str, Any]:
        """What a round's stages depend on; a round directory with this key is loaded instead of recomputed.

        Args:
            step: optimizer steps done.
            weights: `weights_digest` of the model as the probe looks at it (averaged).

        Returns:
            JSON values.
        """
        return {**self.identity(), "step": step, "weights": weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a round decided: the rows to train on next.

    Attributes:
        number: the round.
        from_position: global row position at which it takes effect.
        rows: (k,) int64 pool rows in training order.
        info: the round's `round.json`.
    """

    number: int
    from_position: int
    rows: npt.NDArray[Any]
    info: Mapping[str, Any]


def load_order(path: Path) -> Order:
    """The order a finished round decided, rows memory-mapped."""
    info = read_json(path / ROUND_FILE)
    rows = read_array(path / "selection.npy", np.int64)
    if rows is None:
        rows = read_array(path / "own_order.npy", np.int64)
    if rows is None:
        raise FileNotFoundError(f"`{path}` has neither selection.npy nor own_order.npy.")
    for name in ("number", "from_position", "cursor"):
        if not isinstance(info.get(name), int):
            raise MatesError(
                f"`{path / ROUND_FILE}` must hold the number `{name}`, got {info.get(name)!r}. {COPY_AGAIN}"
            )
    return Order(number=info["number"], from_position=info["from_position"], rows=rows, info=info)


class Stages:
    """Seconds and FLOPs of each stage, one INFO line each; kept on disk so a rerun adds nothing twice."""

    def __init__(self) -> None:
        self.seconds_and_flops: dict[str, dict[str, float]] = {}
        self._path: Path | None = None

    def load(self, path: Path) -> None:
        """Take over what an interrupted attempt at this round has done."""
        self._path = path / "stages.json"
        if self._path.exists():
            self.seconds_and_flops = read_json(self._path)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[dict[str, float]]:
        """Time a stage; what the body puts into the yielded dict is recorded with it."""
        stage: dict[str, float] = {}
        begin = time.perf_counter()
        yield stage
        stage["seconds"] = time.perf_counter() - begin
        if name not in self.seconds_and_flops:
            self.seconds_and_flops[name] = stage
            if self._path is not None:
                write_json(self._path, self.seconds_and_flops)
        logger.info("stage %s: %.2f s", name, stage["seconds"])


def order_config(config: MatesConfig) -> dict[str, Any]:
    """The fields of a config that decide what is trained on (not where files go or how large a probe's batch is)."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("rounds_dir", "keep_rounds", "probe_tokens_per_batch")
    }


def weights_digest(model: torch.nn.Module, processes: Processes = ALONE) -> str:
    """SHA-256 over names and bytes of the trainable parameters, the same for any number of processes.

    All processes must call it. Cost: a copy of the parameters to the host, one at a time; sharded ones are gathered.
    """
    digest = hashlib.sha256()
    for name, parameter in trainable_parameters(model).items():
        whole = whole_tensor(local_shard(parameter), parameter)
        digest.update(name.encode())
        digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().data)
    different = processes.differing(digest.hexdigest())
    if different:
        logger.warning(
            "The weights of processes %s differ from the main one's: influence is a mean over different models. "
            "Something updates them outside of the optimizer.", different,
        )  # fmt: skip
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions a round's result may depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "datasets", "numpy")
    return {name: version(name) for name in names}
