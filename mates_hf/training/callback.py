"""`MatesCallback`: model-aware data selection in an unmodified `transformers.Trainer`.

Place in the flow: the Trainer calls the hooks; `on_train_begin` checks the run and puts a `ScheduledSampler` into its
dataloader, `on_step_end` runs a round at each boundary (`rounds.run_round`) and appends its order.

Trade-off: no subclass and no patched method, so the callback sees only what hooks are given. `attach(trainer)` is
optional and adds what they are not: metrics to every reporter, and the Trainer's own loss.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from mates_hf.config import MatesConfig
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence.directional import DirectionalProbe
from mates_hf.influence.ngram import NgramInfluenceModel
from mates_hf.influence.preconditioner import require_known, unwrap_optimizer
from mates_hf.influence.probe import Probe
from mates_hf.records import MatesError, RunSettings, UnsupportedSettingError
from mates_hf.selection.ledger import Ledger, RunPlan
from mates_hf.training import resume
from mates_hf.training.checks import check_run, context_length, vocabulary_size
from mates_hf.training.run import InfluenceModel, Run
from mates_hf.training.sampler import RowClock, ScheduledSampler
from mates_hf.training.session import Session, round_metrics

logger = logging.getLogger(__name__)


class MatesCallback(TrainerCallback):
    """Finds, while the model trains, which data helps it most, and spends the compute there.

    Give the Trainer the whole pool as `train_dataset` and add this callback; nothing else changes. Rounds are written
    to `<output_dir>/_mates`, metrics (`mates/...`) go to `state.log_history` and the log.

    Args:
        reference: what the model should get better at.
        config: how data is chosen; None takes the defaults.
        probe: measures influence; None is `DirectionalProbe()`.
        influence_model: predicts influence; None is `NgramInfluenceModel()`.

    Raises:
        TypeError: `reference` is no `ReferenceTask` or `config` no `MatesConfig`.
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
        self.probe = probe or DirectionalProbe()
        self.influence_model = influence_model or NgramInfluenceModel()
        self._trainer: Any = None
        self._session: Session | None = None
        self._proven = True

    def attach(self, trainer: Any) -> MatesCallback:
        """Optional: let metrics reach every reporter and have the Trainer's own `compute_loss` probed.

        Adds the callback to the Trainer where it is not there yet, and returns it.
        """
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything that can be known, then take over the data order. Raises before any step or file."""
        self._session = None
        dataloader, model = kwargs["train_dataloader"], kwargs["model"]
        self._refuse_unsupported(args, dataloader)
        saved = state.stateful_callbacks.get(resume.STATE_KEY) if state.global_step else None
        if state.global_step and saved is None:
            logger.warning(
                "The checkpoint at step %d has no state of MatesCallback: rounds are counted from here on.",
                state.global_step,
            )
        clock = _make_clock(args, state, dataloader, saved)
        pool = CandidatePool(dataloader.dataset, dataloader.collate_fn)
        origin_step = int(saved["origin_step"]) if saved else state.global_step
        plan = RunPlan(
            num_rows=len(pool),
            batch_rows=clock.batch_rows * clock.accumulation,
            max_steps=state.max_steps,
            config=self.config,
            first_step=origin_step,
            rows_per_pass=clock.rows_per_epoch,
        )
        if not plan.rounds:
            logger.warning(
                "No round takes effect before step %d: this run stays in the Trainer's own order.", state.max_steps
            )
            return
        plan.check()
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if isinstance(self.probe, DirectionalProbe):
            require_known(optimizer)
        _check_vocabulary(pool, model)
        run = Run(
            model=model,
            optimizer=optimizer,
            reference=self.reference.fit_to_model(vocabulary_size(model), context_length(model)),
            pool=pool,
            pool_identity=pool.identity(),
            probe=self._probe_with_loss(args),
            influence_model=self.influence_model,
            config=self.config,
            settings=self._settings(args, clock),
            ledger=Ledger(len(pool), self.config.selection_seed),
            rounds_dir=Path(self.config.rounds_dir or Path(args.output_dir) / "_mates"),
        )
        if saved:
            resume.check_same_run(saved, run.identity())
            resume.check_weights(model, saved.get("weights", {}), _find_checkpoint(args, state.global_step))
        sampler = ScheduledSampler(dataloader.get_sampler(), clock, saved["own_start"] if saved else None)
        self._session = Session(
            run,
            clock,
            sampler,
            plan.rounds,
            output_dir=Path(args.output_dir),
            origin_step=origin_step,
            step=state.global_step,
            resumed=saved is not None,
        )
        dataloader.set_sampler(sampler)
        state.stateful_callbacks[resume.STATE_KEY] = self._session.state
        self._proven = False
        logger.info(
            "%d rounds over %d candidates, the first at step %d; %d reference tokens",
            len(plan.rounds), len(pool), plan.rounds[0].boundary_step, run.reference.num_targets,
        )  # fmt: skip

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prove, once, that the first batch came from the schedule."""
        if self._proven or self._session is None:
            return
        self._proven = True
        clock = self._session.clock
        if self._session.sampler.drawn_position < clock.start_position + clock.batch_rows:
            raise UnsupportedSettingError(
                "The first batch must come from MatesCallback's schedule, but the dataloader did not ask its sampler "
                "for it. A setting or a Trainer subclass bypasses `dataloader.set_sampler`; train with the dataloader "
                "that `Trainer.get_train_dataloader` makes."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count rows; average weights inside the window; at a boundary, run a round and report it."""
        if self._session is None:
            return
        order = self._session.after_step(state.global_step, control.should_save and args.should_save)
        if order is not None:
            self._report(state, round_metrics(order.info))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the running mean for a checkpoint that `on_step_end` could not see coming (at an epoch's end, say)."""
        if self._session is not None and args.should_save:
            self._session.save_average(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model, the optimizer and the pool."""
        self._session = None

    def _report(self, state: Any, metrics: dict[str, float]) -> None:
        """Into every reporter where attached, else into `state.log_history` alone."""
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})

    def _refuse_unsupported(self, args: Any, dataloader: Any) -> None:
        check_run(args, dataloader, self.config)
        if self._trainer is not None:
            others = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, MatesCallback)]
            if len(others) > 1:
                raise MatesError(f"A Trainer must have one MatesCallback, got {len(others)}: give it one.")

    def _settings(self, args: Any, clock: RowClock) -> RunSettings:
        return RunSettings(
            max_grad_norm=args.max_grad_norm or None,
            batch_rows=clock.batch_rows * clock.accumulation,
            tokens_per_batch=self.config.probe_tokens_per_batch,
            seed=self.config.selection_seed,
            progress=not args.disable_tqdm and args.local_process_index == 0,
        )

    def _probe_with_loss(self, args: Any) -> Probe:
        """The probe, with the Trainer's own loss where `attach` gave access to one that is not the plain NLL."""
        from transformers import Trainer

        trainer = self._trainer
        own_loss = trainer is not None and (
            type(trainer).compute_loss is not Trainer.compute_loss
            or trainer.compute_loss_func is not None
            or trainer.label_smoother is not None
        )
        if own_loss and dataclasses.is_dataclass(self.probe) and hasattr(self.probe, "loss"):
            return dataclasses.replace(self.probe, loss=lambda model, batch: trainer.compute_loss(model, batch))
        if trainer is None and args.label_smoothing_factor:
            logger.warning(
                "The probes measure the plain negative log-likelihood, but the run trains with "
                "`label_smoothing_factor=%s`. `callback.attach(trainer)` has the Trainer's own loss probed.",
                args.label_smoothing_factor,
            )
        return self.probe


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
    position = int(saved["position"]) if saved else clock.position(step)
    return dataclasses.replace(anchored, start_position=position)


def _find_checkpoint(args: Any, step: int) -> Path | None:
    """The checkpoint folder a run resumed from, where it can be told."""
    given = args.resume_from_checkpoint
    candidates = [Path(given)] if isinstance(given, str) and given not in ("True", "true") else []
    candidates.append(Path(args.output_dir) / f"checkpoint-{step}")
    return next((path for path in candidates if path.is_dir()), None)


def _check_vocabulary(pool: CandidatePool, model: Any) -> None:
    """Token ids of a few fixed pool rows must be in the model's vocabulary.

    Raises:
        ValueError: names the row and the id.
    """
    size = vocabulary_size(model)
    if size is None:
        return
    ids = np.unique(np.linspace(0, len(pool) - 1, 64).astype(np.int64))
    rows = pool.token_rows(ids)
    for number, i in zip(ids, range(len(rows)), strict=True):
        values = rows.row(i)[0]
        if len(values) and (values.max() >= size or values.min() < 0):
            raise ValueError(
                f"Token ids must be in the model's vocabulary of {size}, got {int(values.max())} in pool row "
                f"{number}. The pool was tokenised with another tokenizer, or the embedding was not resized."
            )
