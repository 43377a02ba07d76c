"""`MatesCallback`: model-aware data selection in an unmodified `transformers.Trainer`.

Place in the flow: the Trainer calls the hooks; `on_train_begin` checks the run and puts a `ScheduledSampler` into its
dataloader, `on_step_end` runs a round at each boundary (`rounds.run_round`) and appends its order.

Trade-off: no subclass and no patched method, so the callback sees only what hooks are given. `attach(trainer)` is
optional and adds what they are not: metrics to every reporter, and the Trainer's own loss.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mates_hf.config import MatesConfig
from mates_hf.data.arguments import check_influence_model, check_probe
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.display import card
from mates_hf.engine.model_traits import context_length, unwrap, vocabulary_size
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.preconditioner import require_known, require_steps, unwrap_optimizer
from mates_hf.influence.probe import Probe, RunSettings, read_given
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.influence.reference_feed import fed_reference
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import STATE_KEY
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import RunPlan
from mates_hf.training import resume
from mates_hf.training.checkpoints import num_random_states
from mates_hf.training.checks import (
    check_pool,
    check_run,
    look_ahead_steps,
    own_memory,
    resume_caveats,
)
from mates_hf.training.clock import RowClock
from mates_hf.training.duplicates import CopyMarks
from mates_hf.training.opening import run_folders
from mates_hf.training.own_loss import find_trainer, refuse_unknown_loss, run_loss_of
from mates_hf.training.own_order import check_rows_once, find_sampler, install, require_one_clock, warn_of_own_streams
from mates_hf.training.preference import preference_refusal
from mates_hf.training.run import InfluenceModel, Run, bound_to_run
from mates_hf.training.sampler import ScheduledSampler
from mates_hf.training.session import Session

logger = logging.getLogger(__name__)


class MatesCallback(TrainerCallback):
    """Finds, while the model trains, which data helps it most, and spends the compute there.

    Give the Trainer the whole pool as `train_dataset` and add this callback; nothing else changes. Rounds are written
    to `<output_dir>/_mates`, metrics (`mates/...`) go to `state.log_history` and the log.

    Args:
        reference: what the model should get better at.
        config: how data is chosen; None takes the defaults.
        probe: measures influence; None is `DirectionalProbe(path_steps=32)`, whose labels look further than a step.
        influence_model: predicts influence; None is `NgramInfluenceModel()`. An `EncoderInfluenceModel` takes the
            Trainer's `processing_class` as training tokenizer where it has none.

    Raises:
        TypeError: `reference` is no `ReferenceTask` or `config` no `MatesConfig`, or a class or a name is given for a
            probe or an influence model.
    """

    def __init__(
        self,
        reference: ReferenceTask,
        config: MatesConfig | None = None,
        *,
        probe: Probe | None = None,
        influence_model: InfluenceModel | None = None,
    ) -> None:
        if not isinstance(reference, ReferenceTask):
            raise TypeError(
                f"`reference` must be a ReferenceTask, got {type(reference).__name__}. Make one with "
                "`ReferenceTask.from_dataset(...)` or `ReferenceTask.from_lm_eval(...)`."
            )
        if config is not None and not isinstance(config, MatesConfig):
            raise TypeError(f"`config` must be a MatesConfig or None, got {type(config).__name__}.")
        self.reference = reference
        self.config = config or MatesConfig()
        self.probe = probe or DirectionalProbe(path_steps=PATH_STEPS)
        self.influence_model = influence_model or NgramInfluenceModel()
        check_probe(self.probe)
        check_influence_model(self.influence_model, "fit", "predict", "save_pretrained")
        self._trainer: Any = None
        self._session: Session | None = None
        self._proven = True
        self._restore_sampler: Callable[[], None] | None = None  # gives a dataloader the sampler it had

    def __repr__(self) -> str:
        parts = {"config": self.config, "probe": self.probe, "influence_model": self.influence_model}
        shown = {name: " ".join(repr(part).split()) for name, part in parts.items()}
        return card("MatesCallback", {"reference": f"{self.reference.name}, {len(self.reference):,} passages"} | shown)

    def attach(self, trainer: Any) -> MatesCallback:
        """Optional: let metrics reach every reporter and have the Trainer's own `compute_loss` probed.

        Adds the callback to the Trainer where it is not there yet, and returns it.
        """
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @own_memory
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything that can be known, then take over the data order. Raises before any step or file."""
        self._let_go()
        dataloader, model = kwargs["train_dataloader"], kwargs["model"]
        self._refuse_unsupported(args, dataloader, model)
        for caveat in resume_caveats():
            logger.warning("%s", caveat)
        saved = resume.saved_state(state)
        clock = _make_clock(args, state, dataloader, saved)
        pool = CandidatePool(dataloader.dataset, dataloader.collate_fn)
        origin_step = int(saved["origin_step"]) if saved else state.global_step
        plan = RunPlan(
            num_rows=len(pool),
            batch_rows=clock.batch_rows * clock.accumulation,
            max_steps=state.max_steps,
            config=self.config,
            first_step=origin_step,
            clock=clock,
        )
        has_selected = bool(saved and saved["last_round"])
        if not plan.rounds and not has_selected:
            logger.warning(
                "No round takes effect before step %d: this run stays in the Trainer's own order.", state.max_steps
            )
            return
        if not has_selected:  # else the ledger says what is left, once the rounds are read back
            plan.check()
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if isinstance(self.probe, DirectionalProbe):
            require_known(optimizer)
        elif isinstance(self.probe, OneStepProbe):
            require_steps(optimizer)
        check_pool(pool, model)
        reference = self.reference.fit_to_model(vocabulary_size(model), context_length(model))
        reference = self._compare(model, pool, reference)
        processes = Processes.of_run()
        require_one_clock(processes, dataclasses.asdict(clock))
        tokenizer = kwargs.get("processing_class")
        output_dir, rounds_dir = run_folders(args, state, self.config, self._trainer or find_trainer(self))
        run = Run(
            model=model,
            optimizer=optimizer,
            reference=reference,
            pool=pool,
            pool_identity=pool.identity(),
            probe=self.probe,
            lr_scheduler=kwargs.get("lr_scheduler"),
            loss_reading={} if pool.reading is None else pool.reading.to_dict(),
            influence_model=bound_to_run(self.influence_model, model, tokenizer),
            tokenizer=tokenizer,
            config=resume.config_to_resume(saved, self.config),
            settings=self._settings(args, clock, processes),
            ledger=Ledger(len(pool), self.config.selection_seed),
            rounds_dir=rounds_dir,
            processes=processes,
            side=Processes.of_run(beside_training=True),
        )
        run.copy_marks = CopyMarks(run)  # here, because it tries the collator, whose random streams are training's
        processes.require_same("config, pool, reference and position", [run.identity(), clock.start_position])
        if saved:
            resume.check_same_run(saved, run.identity())
            checkpoint = _find_checkpoint(args, output_dir, state.global_step)
            resume.check_weights(model, saved.get("weights", {}), checkpoint)
            resume.warn_without_optimizer(checkpoint)
        finished = state.global_step >= state.max_steps
        own = find_sampler(dataloader)
        warn_of_own_streams(processes, own, -(-clock.position(plan.first_from_step) // clock.rows_per_epoch))
        sampler = ScheduledSampler(own, clock, saved, num_rows=len(pool), finished=finished)
        self._session = Session(
            run,
            clock,
            sampler,
            plan,
            output_dir=output_dir,
            step=state.global_step,
            look_ahead_steps=look_ahead_steps(dataloader, args.gradient_accumulation_steps),
            saved=saved,
        )
        self._restore_sampler = install(dataloader, sampler)
        written = num_random_states(args.world_size, args.save_on_each_node)
        self._session.state["num_random_states"] = written
        state.stateful_callbacks[STATE_KEY] = self._session.state
        self._proven = False
        processes.meet()  # none trains while another one may still be refusing
        logger.info(
            "%d rounds over %d candidates, the first at step %d; %d reference tokens; %d processes",
            len(plan.rounds), len(pool), plan.first_boundary_step, run.reference.num_targets, processes.size,
        )  # fmt: skip

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the next row where another callback ended the epoch before (`control.should_epoch_stop`)."""
        if self._session is not None:
            self._session.begin_epoch(state.global_step)

    @own_memory
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prove, once, that the first batch came from the schedule; for each pass, that it is one in all processes."""
        if self._session is None:
            return
        if self._proven:
            self._session.begin_step(state.global_step)
            return
        self._proven = True
        clock = self._session.clock
        if self._session.sampler.drawn_position < clock.start_position + clock.batch_rows:
            raise UnsupportedSettingError(
                "The first batch must come from MatesCallback's schedule, but the dataloader did not ask its sampler "
                "for it. A setting or a Trainer subclass bypasses `dataloader.set_sampler`; train with the dataloader "
                "that `Trainer.get_train_dataloader` makes."
            )
        self._session.begin_step(state.global_step)
        if not self._session.sampler.each_once:
            check_rows_once(self._session.sampler.own_rows)

    @own_memory
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count rows; average weights inside the window; at a boundary, run a round and report it."""
        if self._session is None:
            return
        session = self._session
        self._report(state, session.after_step(state.global_step, control.should_save, control.should_evaluate))
        if control.should_save or session.last_look == state.global_step:
            session.run.processes.meet()  # none trains while another one may still be failing

    @own_memory
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A round beside training comes to its end here: a checkpoint or new worker processes may follow."""
        if self._session is not None:
            self._session.settle()

    @own_memory
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the running mean for a checkpoint that `on_step_end` could not see coming (at an epoch's end, say)."""
        if self._session is not None:
            self._session.save_average(state.global_step)

    @own_memory
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model, the optimizer and the pool; the dataloader has its own sampler again."""
        if self._session is not None:
            self._session.settle()
            self._report(state, self._session.new_metrics())
        self._let_go()

    def _let_go(self) -> None:
        """As before `on_train_begin`; also what is left where training broke off, to be tried with a smaller batch."""
        session, self._session = self._session, None
        if session is not None:
            session.abandon()
            session.close()
        if self._restore_sampler is not None:
            self._restore_sampler()
            self._restore_sampler = None

    def _report(self, state: Any, metrics: dict[str, float]) -> None:
        """Into every reporter where attached, else into `state.log_history` alone."""
        if not metrics:
            return
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})

    def _refuse_unsupported(self, args: Any, dataloader: Any, model: Any) -> None:
        refusal = preference_refusal(self._trainer or find_trainer(self), getattr(dataloader, "collate_fn", None))
        if refusal is not None:
            raise UnsupportedSettingError(f"MatesCallback cannot select data in this run: {refusal}.")
        check_run(args, dataloader, model, self.config)
        if self._trainer is not None:
            others = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, MatesCallback)]
            if len(others) > 1:
                raise UnsupportedSettingError(f"A run must have one MatesCallback, got {len(others)}: give it one.")
            if self._trainer.model is not model:
                raise MatesError(
                    "`callback.attach(trainer)` must be given the Trainer that trains, got another one. Attach the "
                    "callback to this Trainer, or make a new callback for it."
                )

    def _compare(self, model: Any, pool: CandidatePool, reference: ReferenceTask) -> ReferenceTask:
        """Hold what the probe would read of pool and reference against the run's own loss of it.

        A probe of the user's own reads token rows as they are.
        """
        if not isinstance(self.probe, (DirectionalProbe, OneStepProbe)):
            return reference
        is_given = self.probe.loss is not None
        trainer = self._trainer or find_trainer(self)
        if trainer is None and not is_given:
            refuse_unknown_loss()
        module = unwrap(model)
        pool.reading = read_given(module, pool, self.probe.loss, self.probe.reference_loss, run_loss_of(trainer))
        logger.info("Loss: %s", pool.reading.to_dict())
        if pool.reading.loss is not None and not is_given:
            logger.info(
                "Candidates are measured by %s, which no likelihood of their tokens equals: a row at a time, which is "
                "slower, and without token detail.", pool.reading.loss_name,
            )  # fmt: skip
        return reference if self.probe.reference_loss else fed_reference(module, reference, pool.reading, pool)

    def _settings(self, args: Any, clock: RowClock, processes: Processes) -> RunSettings:
        return RunSettings(
            max_grad_norm=args.max_grad_norm or None,
            batch_rows=clock.batch_rows * clock.accumulation,
            tokens_per_batch=self.config.probe_tokens_per_batch,
            seed=self.config.selection_seed,
            progress=not args.disable_tqdm and processes.is_main,
            processes=processes,
        )


def _make_clock(args: Any, state: Any, dataloader: Any, saved: dict[str, Any] | None) -> RowClock:
    """Steps and positions of this `train()` call, from what the Trainer does at its start."""
    clock = RowClock(
        batches_per_epoch=len(dataloader),
        accumulation=args.gradient_accumulation_steps,
        batch_rows=dataloader.total_batch_size,
    )
    step = state.global_step
    first_epoch = step // clock.steps_per_epoch
    anchored = dataclasses.replace(
        clock,
        first_epoch=first_epoch,
        start_step=step,
        first_epoch_step=step if args.ignore_data_skip else first_epoch * clock.steps_per_epoch,
    )
    if not saved:
        return dataclasses.replace(anchored, start_position=clock.position(step))
    return dataclasses.replace(anchored, start_position=int(saved["position"]), own_start=int(saved["own_start"]))


def _find_checkpoint(args: Any, output_dir: Path, step: int) -> Path | None:
    """The checkpoint folder a run resumed from, where it can be told."""
    given = args.resume_from_checkpoint
    candidates = [Path(given)] if isinstance(given, str) and given not in ("True", "true") else []
    candidates.append(output_dir / f"checkpoint-{step}")
    return next((path for path in candidates if path.is_dir()), None)
