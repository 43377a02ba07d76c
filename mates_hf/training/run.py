"""What the rounds of one run share, and the small things that make them repeatable: orders, digests, timings.

Where it is used: `rounds.run_round` takes a `Run` and returns an `Order`; `session` makes the one and schedules the
other. Trade-off: kept apart from `rounds.py` so that the method reads without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mates_hf.config import BEFORE, MatesConfig
from mates_hf.data.batches import PLAIN
from mates_hf.data.documents import document_codes, require_column
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.disk import read_json, unless_disk_fails, write_json
from mates_hf.engine.model_traits import hub_name
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.influence.probe import Probe, RunSettings, count_parameters
from mates_hf.records import FitReport, FloatArray, InfluenceLabels, IntArray
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.blocked import Blocked

logger = logging.getLogger(__name__)


class InfluenceModel(Protocol):
    """Predicts influence from the candidate alone; see `NgramInfluenceModel`.

    One with an attribute `runs_beside_training` that is true is fitted and asked in a thread while training goes on,
    and in every process: it must use no model, no device and no random stream of the run's, and a row's prediction
    must not depend on the rows beside it.

    One with an attribute `reads_examples` that is true is given `Candidates`, the rows as the model that trains is fed
    them: to `fit` and `evaluate` those of the labels, one a label in their order, to `predict` any. It may run that
    model, which `for_run` gives it. All others are given text: the pool, or `TokenRows`.
    """

    @property
    def report(self) -> FitReport:
        """How well held-out labels were predicted by the last fit."""
        ...

    def fit(self, candidates: Any, labels: InfluenceLabels, *args: Any, **kwargs: Any) -> Any:
        """Fit on labels, with `held_out_fraction`, `previous` (the last round's model or None) and `seed`.

        One that takes `documents` is given the document of each label, to split by; so is its `evaluate`.
        """
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


def read_fitted(influence_model: InfluenceModel, path: Any) -> InfluenceModel:
    """A saved fit of an influence model; one that needs what no file holds reads it itself (`load_fitted`)."""
    load = getattr(influence_model, "load_fitted", None)
    found: InfluenceModel = type(influence_model).from_pretrained(path) if load is None else load(path)
    return found


def reads_examples(influence_model: Any) -> bool:
    """Whether an influence model reads rows as the model that trains is fed them, and not as text."""
    return bool(getattr(influence_model, "reads_examples", False))


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
        side: the same processes, by connections for what they say while they train.
        tokenizer: the Trainer's `processing_class`, for influence models that read text; None where it has none.
        latest_model: the last round's fit, whose labels are pooled into the next; None before the first.
        trusted_model: the last fit that passed the guard; None if none did.
        trusted_step_size: Step size of the labels it was fitted on.
        last_decision: The guard's decision in the last round; None before the first.
        last_reversed: whether the last round found its labels reversed.
        last_steps: Length of the last round, in optimizer steps, up to where a check ended it; None before the first.
        last_round: Number of the last round; None before the first.
        last_rises: What the last round knew of rises of the reference loss (`rise.rises_after`).
        ended_by: The check inside the last round that starts the coming one early, as `round.json` holds it.
        averaged_steps: Optimizer steps over which the weights that a round probes are averaged.
        lr_scheduler: the run's, to see how far the rates of a round go; None is a constant rate.
        loss_reading: which reading of the run's loss the probes take, for the record.
        copy_marks: tell which rows are one text (`duplicates.CopyMarks`), made where the run begins.
        evidence: log-odds of the reference task against the pool, once a fit has asked for them (`static_evidence`).
        reference_overlap: the reference task's n-grams, or hashes of its examples, made at the first selection; only
            in the main process.
        overlap_told: whether the run has warned of selected rows that share text with the reference task.
        passages: identity of the passages that the run trains on as well, and of their places; empty without any.
        asked: The fields of the config that were given otherwise than the run goes by, as they were given.
        blocked: rows that must not be used; None where there are none.
        row_memory: Bytes that the longest row took when it ran whole (`checks/whole_rows`); 0 where none was run.

    Raises:
        ValueError: the pool has not the `document_column`, the `group_column` or the `score_column`.
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
    ledger: Ledger | StreamLedger
    rounds_dir: Path
    processes: Processes = ALONE
    side: Processes = ALONE
    tokenizer: Any = None
    latest_model: InfluenceModel | None = None
    trusted_model: InfluenceModel | None = None
    trusted_step_size: float = 1.0
    last_decision: str | None = None
    last_reversed: bool = False
    last_steps: int | None = None
    last_round: int | None = None
    last_rises: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ended_by: Mapping[str, Any] | None = None
    averaged_steps: int = 0
    lr_scheduler: Any = None
    loss_reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copy_marks: Any = None
    evidence: Any = None
    reference_overlap: Any = None
    overlap_told: bool = False
    passages: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocked: Blocked | None = None
    row_memory: int = 0

    def __post_init__(self) -> None:
        for setting in ("document_column", "group_column", "score_column"):
            if (column := getattr(self.config, setting)) is not None:
                require_column(self.pool.dataset, column, setting)

    def describe(self) -> dict[str, Any]:
        """What `round.json` records of the run, so that a round can be understood, and repeated, alone."""
        return {
            "config": self.config.to_dict(),
            "seed": self.config.selection_seed,
            "reference": {**self.reference.description, "digest": self.reference.digest()},
            "pool": dict(self.pool_identity),
            "model": {"name": hub_name(self.model), "num_parameters": count_parameters(self.model)},
            "versions": library_versions(),
            "measured_with": self.measured_with(),
            "loss": dict(self.loss_reading),
            **({"num_removed": self.num_removed} if self.num_removed else {}),
            **self._where_any(),
        }

    @property
    def num_removed(self) -> int:
        """Rows that were removed from the run on request."""
        return 0 if self.blocked is None else len(self.blocked.removed)

    def load_model(self, path: Path) -> InfluenceModel:
        """The influence model that a round directory holds."""
        model = read_fitted(self.influence_model, path / "influence_model")
        return bound_to_run(model, self.model, self.tokenizer)

    def remember(self, influence_model: InfluenceModel, info: Mapping[str, Any]) -> None:
        """Take a round's fit (and its `round.json`) into account for the next round."""
        self.latest_model = influence_model
        if info["guard"]["decision"] == "select":
            self.trusted_model, self.trusted_step_size = influence_model, float(info["step_size"])

    def note_decision(self, info: Mapping[str, Any]) -> None:
        """Take what a round decided, and how long it is, into account for the next one."""
        self.last_steps = recorded_steps(info, self.config)
        self.last_decision = info["guard"]["decision"]
        self.last_reversed = bool(info["guard"].get("reversed", False))
        self.last_round, self.last_rises, self.ended_by = info["number"], info["guard"].get("rises", {}), None

    def documents(self, ids: IntArray) -> IntArray:
        """(N,) int64 document of some pool rows, equal where they are of one; rows of equal inputs are."""
        reading = self.pool.reading or PLAIN
        rows = self.pool.collated(ids, reading) if self.pool.beyond_text else self.pool.token_rows(ids)
        return document_codes(rows, self.pool, ids, self.config.document_column)

    def read_by(self, influence_model: InfluenceModel, ids: IntArray) -> Any:
        """What an influence model is fitted on, or judged by, of the labelled pool rows `ids`."""
        return self.pool.candidates(ids) if reads_examples(influence_model) else self.pool

    def measured_with(self) -> dict[str, Any]:
        """What labels and predictions are made with and no config says; a change redoes a stage, and no run."""
        return {
            "probe": _described(self.probe),
            "influence_model": _described(self.influence_model),
            "batch_rows": self.settings.batch_rows,
            "max_grad_norm": self.settings.max_grad_norm,
        }

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run its checkpoint comes from."""
        return {
            "config": order_config(self.config),
            "pool": dict(self.pool_identity),
            "reference": {"digest": self.reference.digest()},
            "measured_with": self.measured_with(),
            **self._where_any(),
        }

    def _where_any(self) -> dict[str, Any]:
        """Left out where there is nothing to say, so that runs of versions without them go on."""
        allowed = {} if self.blocked is None else self.blocked.identity()
        named = {"passages": dict(self.passages), "asked": dict(self.asked), "allowed": allowed}
        return {name: value for name, value in named.items() if value}

    def key(self, step: int, weights: str) -> dict[str, Any]:
        """What a round's stages depend on; a round directory with this key is loaded instead of recomputed.

        Args:
            step: optimizer steps done.
            weights: `digest.weights_digest` of the model as the probe looks at it (averaged).

        Returns:
            JSON values.
        """
        rates, identity = self.settings.learning_rates, self.identity()
        for name in _ALWAYS_SAID:
            if identity["config"][name] == BEFORE[name]:
                del identity["config"][name]
        return {
            **identity,
            "learning_rates": None if rates is None else list(rates),
            "rate_steps": self.settings.rate_steps,
            "step": step,
            "weights": weights,
            **({"num_removed": self.num_removed} if self.num_removed else {}),
        }


def recorded_steps(info: Mapping[str, Any], config: MatesConfig) -> int:
    """Length of a finished round in optimizer steps, from its `round.json`; those of earlier versions had one each."""
    return int(info.get("round_steps", config.update_steps))


class Stages:
    """Seconds and FLOPs of each stage, one INFO line each; kept on disk so a rerun adds nothing twice."""

    def __init__(self) -> None:
        self.seconds_and_flops: dict[str, dict[str, float]] = {}
        self._path: Path | None = None

    def load(self, path: Path) -> None:
        """Take over what an interrupted attempt at this round has done."""
        self._path = path / "stages.json"
        if self._path.exists():
            self.seconds_and_flops.update(read_json(self._path))

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
                path, self._path = self._path, None
                with unless_disk_fails("what the round's stages took, which a rerun of it then leaves out"):
                    write_json(path, self.seconds_and_flops)
                    self._path = path
        logger.info("stage %s: %.2f s", name, stage["seconds"])


# Always said, because their defaults change what is chosen; the keys of rounds that were made without them have none.
_ALWAYS_SAID = ("max_copies", "max_passes")
_CHANGES_NOTHING = {name: value for name, value in BEFORE.items() if name not in _ALWAYS_SAID}


def order_config(config: MatesConfig) -> dict[str, Any]:
    """The fields of a config that decide what is trained on: not those of folders, a batch's size, and alerts."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("rounds_dir", "keep_rounds", "probe_tokens_per_batch", "round_page")
        and not name.startswith("alert_")
        # Left out where they change nothing, so that runs of versions without them go on.
        and (name not in _CHANGES_NOTHING or value != _CHANGES_NOTHING[name])
    }


def takes(function: Any, name: str) -> bool:
    """Whether a function can be given an argument by this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


_DECIDES_NOTHING = (
    "tokens_per_batch", "progress", "processes", "shards_dir", "device", "tokenizer", "model", "max_seconds",
)  # fmt: skip


def _described(thing: Any) -> dict[str, Any]:
    """Class of a probe or an influence model and the arguments in which it differs from the defaults, as JSON values.

    Of a class without arguments that can be read back (a probe of one's own, say), its name alone.
    """
    found: dict[str, Any] = {"class": _name_of(type(thing))}
    try:
        parameters = inspect.signature(type(thing)).parameters
    except (TypeError, ValueError):  # a class written in C
        return found
    for name, parameter in parameters.items():
        if name in _DECIDES_NOTHING or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        value = _plain(getattr(thing, name, None))
        if hasattr(thing, name) and value != _plain(parameter.default):
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    """A value as JSON that is equal in every process and every start: what is none is told by its name."""
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(json.dumps(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _described(value)
    return _name_of(value if hasattr(value, "__qualname__") else type(value))


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{thing.__qualname__}"


def library_versions() -> dict[str, str]:
    """Versions a round's result may depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "datasets", "numpy")
    return {name: version(name) for name in names}
