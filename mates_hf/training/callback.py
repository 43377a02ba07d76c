"""`MatesCallback`: model-aware data selection in an unmodified `transformers.Trainer`.

Where it is used: the Trainer calls the hooks; `on_train_begin` checks the run (`start`) and puts a `ScheduledSampler`
into its dataloader, `on_step_end` runs a round at each boundary (`rounds.run_round`) and appends its order. A loop
without the Trainer has the same of `loop.MatesRounds`.

Trade-off: no subclass and no patched method, so the callback sees only what hooks are given. The Trainer itself, whose
loss is probed and whose reporters get the metrics, is looked up in the frames that call them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask
from mates_hf.display import card
from mates_hf.engine.reporters import find_trainer, report, tell_unreported
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.influence.probe import Probe
from mates_hf.influence.run_loss import RunLoss
from mates_hf.records import STATE_KEY
from mates_hf.reporting.alerts import Alert, round_alerts, send_alert, weak_rounds_before
from mates_hf.reporting.cost import idle_seconds
from mates_hf.round_files import round_path
from mates_hf.training import resume
from mates_hf.training.checkpoints import num_random_states
from mates_hf.training.checks.loss import refuse_unknown_loss, run_loss_of
from mates_hf.training.checks.preference import preference_refusal
from mates_hf.training.checks.trainer import check_look_ahead, check_run, look_ahead_steps, own_memory, resume_caveats
from mates_hf.training.clock import RowClock
from mates_hf.training.opening import run_folders
from mates_hf.training.order import Order
from mates_hf.training.own_order import check_rows_once, find_sampler, install
from mates_hf.training.run import InfluenceModel
from mates_hf.training.session import Session
from mates_hf.training.start import Loop, Parts, checked_parts, open_session, prepare, tell_no_round, tell_opened
from mates_hf.training.supply import open_pool

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
        parts = checked_parts(reference, config, probe, influence_model)
        self.reference, self.config, self.probe, self.influence_model = parts
        self._trainer: Any = None
        self._session: Session | None = None
        self._last_round = 0.0  # when the last one was decided, or training began
        self._proven = True
        self._restore_sampler: Callable[[], None] | None = None  # gives a dataloader the sampler it had

    def __repr__(self) -> str:
        return card("MatesCallback", self._parts.facts())

    @property
    def _parts(self) -> Parts:
        return Parts(self.reference, self.config, self.probe, self.influence_model)

    def attach(self, trainer: Any) -> MatesCallback:
        """Add the callback to a Trainer where it is not there yet, and return it; as `callbacks=[...]` does.

        Two callbacks of one Trainer, or one of two, are then found before the first step.
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
        parts, loop, plan = prepare(self._parts, self._describe(args, state, dataloader, kwargs))
        check_look_ahead(args, dataloader, parts.config)
        if not plan.rounds and not loop.has_selected:
            if state.is_world_process_zero:
                tell_no_round(plan)
            if loop.mixed is None and loop.pool_is_whole:
                return
        self._session = open_session(parts, loop, plan)
        dataset = None if loop.mixed is None else loop.mixed.dataset
        self._restore_sampler = install(dataloader, self._session.sampler, dataset)
        written = num_random_states(args.world_size, args.save_on_each_node)
        self._session.state["num_random_states"] = written
        state.stateful_callbacks[STATE_KEY] = self._session.state
        self._proven = False
        self._session.run.processes.meet()  # none trains while another one may still be refusing
        if state.is_world_process_zero:
            tell_unreported(self._trainer or find_trainer(self), args.report_to)
        tell_opened(self._session)
        self._last_round = time.monotonic()

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
        if session.sampler.is_over(state.global_step):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"
        metrics = session.after_step(state.global_step, control.should_save, control.should_evaluate)
        self._report(state, session, metrics)
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
            self._report(state, self._session, self._session.new_metrics())
        session = self._session
        self._let_go()
        if session is not None:
            session.sampler.require_more(state.global_step, state.max_steps)

    def _let_go(self) -> None:
        """As before `on_train_begin`; also what is left where training broke off, to be tried with a smaller batch."""
        session, self._session = self._session, None
        if session is not None:
            session.abandon()
            session.close()
        if self._restore_sampler is not None:
            self._restore_sampler()
            self._restore_sampler = None

    def _report(self, state: Any, session: Session, metrics: dict[str, float]) -> None:
        """Into every reporter; a round that somebody should look at as an alert too."""
        report(self, self._trainer, state, metrics)
        order = session.order
        if "mates/round" in metrics and order is not None and session.run.processes.is_main:
            for alert in self._alerts(session, order, metrics):
                send_alert(alert)

    def _alerts(self, session: Session, order: Order, metrics: dict[str, float]) -> list[Alert]:
        """What of the round that has just been decided is worth an alert."""
        now, before = time.monotonic(), self._last_round
        self._last_round = now
        idle = idle_seconds(round_path(session.run.rounds_dir, order.number), order.info)
        idle += metrics.get("mates/waited_seconds", 0.0)
        weak = weak_rounds_before(session.run.rounds_dir, order.number)
        return round_alerts(order.info, self.config, weak_before=weak, idle_share=idle / max(now - before, 1e-9))

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

    def _describe(self, args: Any, state: Any, dataloader: Any, given: dict[str, Any]) -> Loop:
        """The Trainer's loop, from what its hook is given."""
        saved = resume.saved_state(state)
        trainer = self._trainer or find_trainer(self)
        output_dir, rounds_dir = run_folders(args, state, self.config, trainer)
        return Loop(
            model=given["model"],
            optimizer=given["optimizer"],
            lr_scheduler=given.get("lr_scheduler"),
            tokenizer=given.get("processing_class"),
            pool=open_pool(dataloader.dataset, dataloader.collate_fn),
            clock=_make_clock(args, state, dataloader, saved),
            own_sampler=find_sampler(dataloader),
            max_steps=state.max_steps,
            step=state.global_step,
            max_grad_norm=args.max_grad_norm,
            run_loss=functools.partial(_loss_of, trainer),
            output_dir=output_dir,
            rounds_dir=rounds_dir,
            saved=saved,
            checkpoint=_find_checkpoint(args, output_dir, state.global_step),
            look_ahead_steps=look_ahead_steps(dataloader, args.gradient_accumulation_steps),
            progress=not args.disable_tqdm,
        )


def _loss_of(trainer: Any) -> RunLoss:
    """What the Trainer trains with; a run of an unknown one is refused."""
    if trainer is None:
        refuse_unknown_loss()
    return run_loss_of(trainer)


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
