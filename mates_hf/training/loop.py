"""`MatesRounds`: the rounds of `MatesCallback` in a training loop of one's own, without the Trainer.

The loop asks for the rows of its next optimizer step; asking says that the step before is done. So the generator does
what the callback's hooks do: it counts rows, averages weights and runs a round at each boundary (`session`), and the
same `ScheduledSampler` gives the rows. This module knows no object of the Trainer.

The trade-off: nobody but the loop sees its loss and its steps. What it trains with is what it says (`compute_loss`, or
the model's own loss), and that it trains at all is seen from the weights at the first boundary.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn

from mates_hf.config import MatesConfig
from mates_hf.data.collated import Collator
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.display import card
from mates_hf.engine.digest import weight_marks
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.weight_store import weight_store
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.influence.preconditioner import unwrap_optimizer
from mates_hf.influence.probe import Probe
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss
from mates_hf.paths import expand_path
from mates_hf.records import IntArray
from mates_hf.training import resume
from mates_hf.training.checks.loop import (
    check_numbers,
    check_state,
    has_state,
    make_clock,
    refuse_unsupported,
    require_its_parameters,
    round_in,
)
from mates_hf.training.checks.preference import preference_refusal
from mates_hf.training.checks.trainer import own_memory
from mates_hf.training.run import InfluenceModel
from mates_hf.training.session import Session
from mates_hf.training.start import Loop, checked_parts, open_session, prepare, tell_no_round, tell_opened

logger = logging.getLogger(__name__)


class MatesRounds:
    """Gives a training loop of one's own the rows to train on, and runs a round at each boundary.

    Rounds, guard, records and resume are those of `MatesCallback`; the loop stays the user's:

        rounds = MatesRounds(reference, pool, config, output_dir="runs/mine")
        for step, rows in rounds.order(model, optimizer, batch_size=16, max_steps=10_000):
            loss = model(**collate([pool[int(i)] for i in rows])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    To resume, save `state_dict()` with each checkpoint, at the end of a step; load the checkpoint's model, optimizer
    and scheduler and give it to `load_state_dict` before `order`. `accelerator.register_for_checkpointing(rounds)`
    does both. The rows are then those of the run that was not stopped. Keep the folder of the rounds along with the
    checkpoints. With `reference_passes`, read rows as `rounds.dataset[int(i)]`: some of them are passages.

    Args:
        reference: What the model should get better at.
        pool: The map-style dataset of everything that may be trained on. Its rows are dicts.
        config: How data is chosen. None takes the defaults.
        output_dir: The run's folder. Rounds go to `_mates` in it, unless the config has a `rounds_dir`.
        collate_fn: Makes the loop's batch of a list of rows. None where rows have `input_ids` and, where not every
            token is trained, `labels`.
        tokenizer: The tokenizer of the pool, for influence models that read text.
        probe: Measures influence. None is `DirectionalProbe(path_steps=32)`.
        influence_model: Predicts influence. None is `NgramInfluenceModel()`.
        progress: Whether the main process shows progress bars.

    Raises:
        TypeError: An argument is of another kind, or `pool` is no map-style dataset.
        ValueError: `pool` is empty, or has neither `input_ids` nor a collator to make them.
        UnsupportedSettingError: `pool` is a stream, or belongs to preference training.
    """

    def __init__(
        self,
        reference: ReferenceTask,
        pool: Any,
        config: MatesConfig | None = None,
        *,
        output_dir: str | os.PathLike[str],
        collate_fn: Collator | None = None,
        tokenizer: Any = None,
        probe: Probe | None = None,
        influence_model: InfluenceModel | None = None,
        progress: bool = True,
    ) -> None:
        self._parts = checked_parts(reference, config, probe, influence_model)
        if not isinstance(output_dir, (str, os.PathLike)) or not os.fspath(output_dir):
            raise TypeError(f"`output_dir` must be the path of the run's folder, got {output_dir!r}.")
        refusal = preference_refusal(None, collate_fn)
        if refusal is not None:
            raise UnsupportedSettingError(f"MatesRounds cannot select data in this run: {refusal}.")
        self.pool = CandidatePool(pool, collate_fn)
        self.output_dir = expand_path(output_dir)
        self._tokenizer, self._progress = tokenizer, progress
        self._state: dict[str, Any] = {"version": resume.STATE_VERSION, "step": 0}
        self._session: Session | None = None
        self._optimizer: Any = None
        self._began = False  # `order` was called, and did not refuse
        self._given = self._ended = 0  # the step whose rows were given last, and the last one that is accounted for
        self._saved = self._start = 0  # the step of the last `state_dict`, and the one that `order` began after
        self._metrics: dict[str, float] = {}
        self._dataset = None if self._parts.config.reference_passes else pool
        self._first_marks: dict[str, str] | None = None  # of the weights at the start, until a step was seen

    def __repr__(self) -> str:
        state = f"step {self._given:,}" if self._began else f"not begun, step {self._state['step']:,}"
        facts = {"pool": f"{len(self.pool):,} rows", "output_dir": str(self.output_dir), "state": state}
        return card("MatesRounds", {**self._parts.facts(), **facts})

    @property
    def dataset(self) -> Any:
        """What the ids of `order` are rows of: the pool, and with `reference_passes` the passages behind it.

        Raises:
            MatesError: with `reference_passes`, before `order` was called: passages are laid out for its model.
        """
        if self._dataset is None:
            raise MatesError("With `reference_passes`, `dataset` must be asked for after `order` was called.")
        return self._dataset

    def order(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        batch_size: int,
        max_steps: int | None = None,
        lr_scheduler: Any = None,
        max_grad_norm: float | None = None,
        compute_loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
        seed: int = 42,
    ) -> Generator[tuple[int, IntArray], None, None]:
        """The rows of each optimizer step, in order. All processes must call it at the same point, with the same data.

        One item is one optimizer step, however many micro-batches the loop cuts it into. Asking for the next item says
        that the step is done: a round runs then, where the step was a boundary. So items must not be asked for ahead.

        Before the first selection the order is a shuffle by `seed`, the one that a Trainer with that `seed` trains in
        where its sampler is left as it is. Each pass over the pool has one of its own, and where the pool ends inside
        a batch, the pass's first rows fill it up. In several processes the main one's share of a batch is its first
        rows, and so on: the rows that accelerate's dataloader gives each process.

        Args:
            model: The live model, as the loop calls it, after `accelerator.prepare` where that is used.
            optimizer: Its optimizer, also as `accelerator.prepare` returned it.
            batch_size: Rows of one optimizer step, over all processes.
            max_steps: Optimizer steps of the whole run, those before a resume included.
            lr_scheduler: The scheduler of the learning rates, which says how far a round goes. None is a constant
                rate.
            max_grad_norm: The threshold by which the loop clips the gradient's norm. None does not clip.
            compute_loss: The loss of a collated batch, a mean, where the loop trains with another one than the model
                returns. A probe that was given a loss needs none.
            seed: Seed of the shuffle before the first selection. 42 is the Trainer's default.

        Returns:
            A generator of pairs: the number of the optimizer step, 1 for the first one of the run, and the int64 rows
            of `dataset` of this process, `batch_size` over the number of processes of them. Closing it, or leaving the
            `for` loop that holds it, lets go of the folder of the rounds.

        Raises:
            TypeError: `max_steps` is missing, or `optimizer` is no optimizer.
            ValueError: A number is out of its range, or the pool has too few rows for that many steps.
            MatesError: The run cannot be measured, resumed or written down, or `order` was called before.
        """
        if self._began:
            raise MatesError(
                "`order` must be called once: a MatesRounds is the rounds of one run, got a second call. To start "
                "again or to resume, make a new MatesRounds; `load_state_dict` continues from a checkpoint."
            )
        check_numbers(batch_size, max_steps, max_grad_norm, seed)
        assert max_steps is not None
        refuse_unsupported(model, optimizer)
        step = int(self._state["step"])
        saved = self._state if step else None
        loop = Loop(
            model=unwrap(model),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            tokenizer=self._tokenizer,
            pool=self.pool,
            clock=make_clock(len(self.pool), batch_size, step, saved),
            own_sampler=SeedableRandomSampler(range(len(self.pool)), generator=torch.Generator(), data_seed=seed),
            max_steps=max_steps,
            step=step,
            max_grad_norm=max_grad_norm,
            run_loss=lambda: MODEL_LOSS if compute_loss is None else RunLoss(compute_loss, "`compute_loss`", True),
            output_dir=self.output_dir,
            rounds_dir=expand_path(self._parts.config.rounds_dir or self.output_dir / "_mates"),
            saved=saved,
            progress=self._progress,
            saved_rounds=[] if saved is None else [round_in(saved)],
        )
        self._open(loop, saved)
        steps = self._steps()
        next(steps)  # up to its first item, so that closing it lets go of the run, also where nothing was asked for
        return steps

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the rounds to continue, JSON values. All processes must call it.

        To be called at the end of a step, after `optimizer.step()`: it counts the step as done, and runs the round
        where it is a boundary. Inside the averaging window it also writes the running mean of the weights to the
        folder of the rounds.

        Returns:
            The state, the same in all processes.

        Raises:
            MatesError: the loop was left since the rows of a step were given, so it is not known whether that step
                was taken.
        """
        session = self._session
        if session is None:
            if self._began and self._given != self._state["step"]:
                raise MatesError(
                    f"`state_dict` must be called inside the loop, at the end of a step, but the loop was left at "
                    f"step {self._given}, which may be done or not. Call it (or `accelerator.save_state`) before "
                    "`break`. A checkpoint that was saved before is still good."
                )
            return copy.deepcopy(self._state)
        if self._given > self._ended:
            self._end_step(True)
        self._keep_state()
        if session.saved_rounds is not None and self._saved != self._given:
            session.saved_rounds.append(round_in(session.state))
        self._saved = self._given
        return copy.deepcopy(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: to be called before `order`, in all processes.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            TypeError: It is no mapping.
            ValueError: It has not what `state_dict` returns.
            MatesError: `order` was called already, or another version of this library saved it.
        """
        if self._began:
            raise MatesError(
                "`load_state_dict` must be called before `order`, which has begun to give rows already. Load the "
                "checkpoint first."
            )
        check_state(state_dict)
        self._state = copy.deepcopy(dict(state_dict))

    def new_metrics(self) -> dict[str, float]:
        """`mates/...` metrics of the rounds that were not asked for yet, for the loop's own log; mostly empty."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @own_memory
    def _open(self, loop: Loop, saved: Mapping[str, Any] | None) -> None:
        """Check everything that can be known, before any step or file."""
        parts, loop, plan = prepare(self._parts, loop)
        if not plan.rounds and not loop.has_selected:
            tell_no_round(plan)
        require_its_parameters(loop.model, loop.optimizer)
        self._optimizer = unwrap_optimizer(loop.optimizer, loop.model)
        session = open_session(parts, loop, plan)
        try:
            if saved and saved.get("has_optimizer_state") and not has_state(self._optimizer):
                logger.warning(
                    "The checkpoint was saved with optimizer state, and the optimizer has none now: the rows already "
                    "selected are trained on, but weights and later selections differ from the uninterrupted run's. "
                    "Load the optimizer before `order`."
                )
            self._first_marks = weight_marks(loop.model, session.run.processes)
            session.run.processes.meet()  # none trains while another one may still be refusing
        except BaseException:
            session.close()
            raise
        self._session, self._began = session, True
        self._dataset = self._dataset if loop.mixed is None else loop.mixed.dataset
        self._given = self._ended = self._start = self._saved = loop.step
        tell_opened(session)

    def _steps(self) -> Generator[tuple[int, IntArray], None, None]:
        """Each step's rows; what the loop gave back in between is accounted for here."""
        session = self._session
        assert session is not None
        own = np.arange(session.clock.batch_rows).reshape(session.run.processes.size, -1)[session.run.processes.rank]
        try:
            yield 0, own  # nobody sees this one: `order` takes it
            for rows in self._batches(session):
                self._prove(session)
                self._given += 1
                yield self._given, rows[own]
                if self._ended < self._given:
                    self._end_step(False)
            self._finish()
        finally:
            self._let_go()

    def _batches(self, session: Session) -> Iterator[IntArray]:
        """Whole batches of all processes, pass after pass."""
        sampler, clock, left = session.sampler, session.clock, session.plan.max_steps - self._given
        for epoch in itertools.count(clock.first_epoch):
            sampler.set_epoch(epoch)
            rows = iter(sampler)
            skipped = max(clock.start_position - clock.epoch_position(epoch), 0)
            deque(itertools.islice(rows, skipped), maxlen=0)  # what was trained on before a resume
            for _ in range((clock.rows_per_epoch - skipped) // clock.batch_rows):
                if left < 1:
                    return
                left -= 1
                batch = np.fromiter(itertools.islice(rows, clock.batch_rows), np.int64)
                missing = clock.batch_rows - len(batch)
                if missing:  # the pool ends inside a batch, which only a pass in the own order does
                    assert sampler.uses_own_rows(clock.position(self._given))
                    batch = np.concatenate([batch, np.resize(sampler.own_rows, missing).astype(np.int64)])
                yield batch
            deque(rows, maxlen=0)

    @own_memory
    def _prove(self, session: Session) -> None:
        """Behind the first batch of a pass: all processes drew the same."""
        session.begin_step(self._given)

    @own_memory
    def _end_step(self, saves: bool) -> None:
        """The step that was given is done: count its rows; average inside the window; at a boundary, run a round."""
        session, step = self._session, self._given
        assert session is not None
        if step == session.next_look:
            self._require_trained(session, step)
        self._metrics.update(session.after_step(step, saves))
        if saves or session.last_look == step:
            session.run.processes.meet()  # none trains while another one may still be failing
        self._ended = step

    def _require_trained(self, session: Session, step: int) -> None:
        """Before a round: refuse to measure a model that is not the one that trains."""
        run, first = session.run, self._first_marks
        weight_store(run.model).forget_derived()
        require_its_parameters(run.model, run.optimizer)
        if first is None:
            return
        if weight_marks(run.model, run.processes) == first:
            raise MatesError(
                f"The model that was given to `order` must be the one that trains, but none of its weights changed in "
                f"steps {self._start + 1} to {step}. Call `optimizer.step()` once for each item, before the next one "
                "is asked for, with the model and the optimizer that were given to `order`, and with a learning rate "
                "above 0."
            )
        self._first_marks = None

    @own_memory
    def _finish(self) -> None:
        """All steps are done: the last round's order is waited for, and the end can be saved."""
        session = self._session
        assert session is not None
        session.settle()
        self._metrics.update(session.new_metrics())
        self._keep_state()

    def _keep_state(self) -> None:
        """Note the state as it is now, for a checkpoint."""
        session = self._session
        assert session is not None
        if "weights" not in session.state:
            session.state["weights"] = weight_marks(session.run.model, session.run.processes)
        state = copy.deepcopy({name: session.state[name] for name in session.state})
        self._state = {**state, "has_optimizer_state": has_state(self._optimizer)}

    def _let_go(self) -> None:
        """The loop is over, or was left: nothing writes any more, and others may use the folder."""
        session, self._session = self._session, None
        if session is not None:
            session.abandon()
            session.close()
        self._optimizer = None
