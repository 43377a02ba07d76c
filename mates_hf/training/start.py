"""What comes before the first step of a run that selects its data, whoever runs the loop.

`MatesCallback` (in a Trainer) and `MatesRounds` (in a loop of one's own) describe their loop as a `Loop`, and
`open_session` proves, in one order for both, that the run can be measured and has rows enough. This module knows no
object of the Trainer. The trade-off: a loop has to say more of itself than it would in a constructor, so that
everything that can be refused is refused before a step is taken or a file is written.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mates_hf.config import MatesConfig
from mates_hf.data.arguments import check_influence_model, check_probe
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.engine.model_traits import context_length, unwrap, vocabulary_size
from mates_hf.engine.processes import Processes
from mates_hf.engine.weight_store import adopt_engine
from mates_hf.errors import UnsupportedSettingError
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.own_probes import OWN_PROBES, STEPPING_PROBES
from mates_hf.influence.preconditioner import require_known, require_real_steps, unwrap_optimizer
from mates_hf.influence.probe import Probe, RunSettings, read_given
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.reference_feed import fed_reference
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.selection.plan import RunPlan
from mates_hf.training import resume
from mates_hf.training.blocked import Blocked
from mates_hf.training.checks.examples import check_examples
from mates_hf.training.checks.scoring_time import check_scoring_time
from mates_hf.training.checks.trainer import check_pool
from mates_hf.training.checks.whole_rows import named_where_memory_ends, require_whole_rows
from mates_hf.training.clock import RowClock
from mates_hf.training.duplicates import CopyMarks
from mates_hf.training.fitting import settle
from mates_hf.training.fitting import tell_no_round as tell_no_round
from mates_hf.training.mixed_in import MixedIn, mix_in, require_text
from mates_hf.training.own_order import require_one_clock, warn_of_own_streams
from mates_hf.training.run import InfluenceModel, Run, bound_to_run
from mates_hf.training.score_column import require_scores
from mates_hf.training.session import Session
from mates_hf.training.supply import (
    blocked_rows,
    check_stream,
    make_ledger,
    make_sampler,
    num_rows_of,
    pool_identity,
    told_rows,
)

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a user gives to have data selected.

    Attributes:
        reference: What the model should get better at.
        config: How data is chosen.
        probe: Measures influence.
        influence_model: Predicts influence.
    """

    reference: ReferenceTask
    config: MatesConfig
    probe: Probe
    influence_model: InfluenceModel

    def facts(self) -> dict[str, str]:
        """One short line for each, for a `repr`."""
        parts = {"config": self.config, "probe": self.probe, "influence_model": self.influence_model}
        shown = {name: " ".join(repr(part).split()) for name, part in parts.items()}
        return {"reference": f"{self.reference.name}, {len(self.reference):,} passages"} | shown


def checked_parts(reference: Any, config: Any, probe: Any, influence_model: Any) -> Parts:
    """The parts of a run, with defaults in place of None.

    Args:
        reference: A `ReferenceTask`.
        config: A `MatesConfig`, or None for the default settings.
        probe: A probe, or None for `DirectionalProbe(path_steps=32)`.
        influence_model: An influence model, or None for `NgramInfluenceModel()`.

    Returns:
        The four parts.

    Raises:
        TypeError: One of them is of another kind, or is a class or a name.
    """
    if not isinstance(reference, ReferenceTask):
        raise TypeError(
            f"`reference` must be a ReferenceTask, got {type(reference).__name__}. Make one with "
            "`ReferenceTask.from_dataset(...)`, `.from_lm_eval(...)` or `.from_examples(...)`."
        )
    if config is not None and not isinstance(config, MatesConfig):
        raise TypeError(f"`config` must be a MatesConfig or None, got {type(config).__name__}.")
    parts = Parts(
        reference,
        config or MatesConfig(),
        probe or DirectionalProbe(path_steps=PATH_STEPS),
        influence_model or NgramInfluenceModel(),
    )
    check_probe(parts.probe)
    check_influence_model(parts.influence_model, "fit", "predict", "save_pretrained")
    return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What a training loop says of itself before its first step.

    Attributes:
        model: The model that trains.
        optimizer: Its optimizer, wrapped by accelerate or not.
        lr_scheduler: The scheduler of its learning rates; None is a constant rate.
        tokenizer: The tokenizer that influence models decode with; None where there is none.
        pool: Everything that may be trained on.
        clock: How steps relate to rows.
        own_sampler: Gives the loop's own order of rows, in which it trains before the first selection.
        max_steps: Optimizer steps of the run.
        step: Optimizer steps done.
        max_grad_norm: The clipping threshold of the gradient's norm; None or 0 is off.
        run_loss: Finds out what the loop trains with, where the probe was not given a loss.
        output_dir: Where checkpoints go.
        rounds_dir: Where rounds go.
        saved: This library's state in the checkpoint that is resumed; None where there is none.
        checkpoint: The folder of that checkpoint, where it can be told.
        look_ahead_steps: Optimizer steps whose rows are fetched at the end of a step.
        progress: Whether the main process shows progress bars.
        saved_rounds: The rounds that checkpoints need, for the loop to add to, where their files do not tell; None
            where they are the Trainer's.
        mixed: the passages that the run trains on as well; None where there are none.
        asked: the fields of the config that were given otherwise than the run goes by (`fitting`).
        blocked: rows that must not be used; None of a stream, and before they are looked for.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    tokenizer: Any
    pool: CandidatePool
    clock: RowClock
    own_sampler: Any
    max_steps: int
    step: int
    max_grad_norm: float | None
    run_loss: Callable[[], RunLoss]
    output_dir: Path
    rounds_dir: Path
    saved: Mapping[str, Any] | None
    checkpoint: Path | None = None
    look_ahead_steps: int = 0
    progress: bool = True
    saved_rounds: list[int] | None = None
    mixed: MixedIn | None = None
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocked: Blocked | None = None

    @property
    def has_selected(self) -> bool:
        """Whether the run that is resumed has made a selection."""
        return bool(self.saved and self.saved["last_round"])

    @property
    def pool_is_whole(self) -> bool:
        """Whether every row may be trained on in the own order, as the dataloader has it: no stream, none blocked."""
        return self.blocked is not None and self.blocked.mask is None

    def plan(self, config: MatesConfig) -> RunPlan:
        """When the rounds of the run happen."""
        return RunPlan(
            num_rows=num_rows_of(self.pool) - (0 if self.blocked is None else self.blocked.num),
            batch_rows=self.clock.batch_rows * self.clock.accumulation,
            max_steps=self.max_steps,
            config=config,
            first_step=int(self.saved["origin_step"]) if self.saved else self.step,
            clock=self.clock,
        )


def prepare(parts: Parts, loop: Loop) -> tuple[Parts, Loop, RunPlan]:
    """What `open_session` takes.

    Args:
        parts: What the user gave.
        loop: The training loop.

    Returns:
        The parts with the config that the run goes by, which is what it began with, and fits a small pool; the loop
        with the passages that it trains on as well; and when its rounds happen.

    Raises:
        ValueError: no round fits the pool; the message names settings that do.
        MatesError: the run cannot be trained on the passages; the message names the way out.
    """
    parts = parts._replace(config=resume.config_to_resume(loop.saved, parts.config))
    blocked = blocked_rows(
        loop.pool, parts.config, loop.rounds_dir, Processes.of_run(), resumes=loop.saved is not None
    )
    loop = with_passages(parts, dataclasses.replace(loop, blocked=blocked))
    config, asked = settle(loop.plan(parts.config), loop.saved, loop.look_ahead_steps)
    return parts._replace(config=config), dataclasses.replace(loop, asked=asked), loop.plan(config)


def with_passages(parts: Parts, loop: Loop) -> Loop:
    """The loop with the passages of the reference task between its rows, where `reference_passes` asks for them.

    Args:
        parts: What the user gave.
        loop: The training loop.

    Returns:
        This, or the loop with its passages, and a clock that knows their places.

    Raises:
        MatesError: the run cannot be trained on them; the message names the way out.
    """
    if not parts.config.reference_passes:
        return loop
    check_pool(loop.pool, loop.model)
    tokenizer = getattr(loop.tokenizer, "tokenizer", loop.tokenizer)
    mixed = mix_in(
        parts.config,
        parts.reference.fit_to_model(vocabulary_size(loop.model), context_length(loop.model)),
        loop.pool,
        loop.clock,
        loop.max_steps,
        separator=getattr(tokenizer, "eos_token_id", None),
        saved=loop.saved,
    )
    return dataclasses.replace(loop, mixed=mixed, clock=dataclasses.replace(loop.clock, passages=mixed.schedule))


def open_session(parts: Parts, loop: Loop, plan: RunPlan) -> Session:
    """Check everything that can be known, and open the run's rounds. All processes must call it.

    Args:
        parts: What the user gave.
        loop: The training loop.
        plan: When its rounds happen.

    Returns:
        The session; its sampler is not installed anywhere yet.

    Raises:
        ValueError: The pool has too few rows, or token ids that the model does not know.
        MatesError: The run cannot be measured, resumed or written down; the message names the way out.
    """
    if not loop.has_selected:  # else the ledger says what is left, once the rounds are read back
        plan.check()
    check_stream(loop.pool, parts.config, parts.influence_model, plan, loop.saved)
    adopt_engine(loop.model, loop.optimizer)
    optimizer = unwrap_optimizer(loop.optimizer, unwrap(loop.model))
    if isinstance(parts.probe, DirectionalProbe):
        require_known(optimizer)
    elif isinstance(parts.probe, STEPPING_PROBES):
        require_real_steps(optimizer, type(parts.probe).__name__)
    check_pool(loop.pool, loop.model)
    check_examples(loop.pool, parts.reference, parts.influence_model, rows_together=_rows_together(loop))
    reference = parts.reference.fit_to_model(vocabulary_size(loop.model), context_length(loop.model))
    with named_where_memory_ends(loop.pool):
        reference = _compare(parts.probe, loop, reference)
    if loop.mixed is not None and loop.pool.reading is not None:
        require_text(loop.pool.reading)
    processes = Processes.of_run()
    require_one_clock(processes, dataclasses.asdict(loop.clock))
    run = _make_run(parts, loop, optimizer, reference, processes)
    processes.require_same("config, pool, reference and position", [run.identity(), loop.clock.start_position])
    require_whole_rows(run)
    check_scoring_time(run, plan)
    if run.config.score_column is not None:
        require_scores(run.pool.dataset, run.config.score_column)
    if loop.saved:
        resume.check_same_run(loop.saved, run.identity())
        resume.check_weights(loop.model, loop.saved.get("weights", {}), loop.checkpoint)
        resume.warn_without_optimizer(loop.checkpoint)
    passes = -(-loop.clock.position(plan.first_from_step) // loop.clock.rows_per_epoch)
    warn_of_own_streams(processes, loop.own_sampler, passes)
    finished = loop.step >= loop.max_steps
    sampler = make_sampler(run, loop.own_sampler, loop.clock, loop.saved, finished=finished)
    return Session(
        run,
        loop.clock,
        sampler,
        plan,
        output_dir=loop.output_dir,
        step=loop.step,
        look_ahead_steps=loop.look_ahead_steps,
        saved=loop.saved,
        saved_rounds=loop.saved_rounds,
    )


def _rows_together(loop: Loop) -> int:
    """Rows that one process trains in one batch."""
    return max(1, loop.clock.batch_rows // Processes.of_run().size)


def tell_opened(session: Session) -> None:
    """One line on what is ahead of a run, once it is sure to begin."""
    run, plan = session.run, session.plan
    logger.info(
        "%s%d rounds over %s, the first at step %d; %d reference tokens; %d processes",
        "at least " if run.config.first_steps else "", len(plan.rounds), told_rows(session),
        plan.first_boundary_step, run.reference.num_targets, run.processes.size,
    )  # fmt: skip
    schedule = session.clock.passages
    if schedule is not None:
        logger.info(
            "The run also trains on the reference task: %d rows of %d passages, spread over %d rows",
            schedule.num_slots, schedule.num_passages, schedule.num_rows,
        )  # fmt: skip


def _make_run(parts: Parts, loop: Loop, optimizer: Any, reference: ReferenceTask, processes: Processes) -> Run:
    run = Run(
        model=loop.model,
        optimizer=optimizer,
        reference=reference,
        pool=loop.pool,
        pool_identity=pool_identity(loop.pool, loop.saved, loop.blocked, loop.rounds_dir, processes),
        passages={} if loop.mixed is None else loop.mixed.identity(),
        asked=loop.asked,
        probe=parts.probe,
        lr_scheduler=loop.lr_scheduler,
        loss_reading={} if loop.pool.reading is None else loop.pool.reading.to_dict(),
        influence_model=bound_to_run(parts.influence_model, loop.model, loop.tokenizer),
        tokenizer=loop.tokenizer,
        config=parts.config,
        settings=RunSettings(
            max_grad_norm=loop.max_grad_norm or None,
            batch_rows=loop.clock.batch_rows * loop.clock.accumulation,
            tokens_per_batch=parts.config.probe_tokens_per_batch,
            seed=parts.config.selection_seed,
            progress=loop.progress and processes.is_main,
            processes=processes,
        ),
        ledger=make_ledger(loop.pool, parts.config.selection_seed, loop.blocked),
        blocked=loop.blocked,
        rounds_dir=loop.rounds_dir,
        processes=processes,
        side=Processes.of_run(beside_training=True),
    )
    run.copy_marks = CopyMarks(run)  # here, because it tries the collator, whose random streams are training's
    return run


def _compare(probe: Probe, loop: Loop, reference: ReferenceTask) -> ReferenceTask:
    """Hold what the probe would read of pool and reference against the run's own loss of it.

    A probe of the user's own reads token rows as they are, and of other rows what the run's collator makes.
    """
    if not isinstance(probe, OWN_PROBES) and reference.is_text and not loop.pool.beyond_text:
        return reference
    loss, reference_loss = getattr(probe, "loss", None), getattr(probe, "reference_loss", None)
    is_given = loss is not None
    run_loss = MODEL_LOSS if is_given else loop.run_loss()  # a loss that was given is compared with nothing
    module, pool = unwrap(loop.model), loop.pool
    pool.reading = read_given(module, pool, loss, reference_loss, run_loss)
    if not is_given and (pool.reading.compared or {}).get("loss", "") is None:
        raise UnsupportedSettingError(
            f"The loss that the run trains with must be known to be measured, but {type(module).__name__} returns "
            "none for a batch with labels. Pass it to the probe, as `DirectionalProbe(loss=...)`, or to "
            "`MatesRounds.order(..., compute_loss=...)`: a function of the model and a collated batch."
        )
    logger.info("Loss: %s", pool.reading.to_dict())
    if pool.reading.loss is not None and not is_given:
        logger.info(
            "Candidates are measured by %s, which no likelihood of their tokens equals: a row at a time, which is "
            "slower, and without token detail.", pool.reading.loss_name,
        )  # fmt: skip
    if reference_loss is not None and reference.is_text:
        return reference
    return fed_reference(module, reference, pool.reading, pool, reference_loss)
