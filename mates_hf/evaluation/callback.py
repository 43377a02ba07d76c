"""`LmEvalCallback`: lm-eval tasks on the live model, inside the run.

Where it is used: beside `MatesCallback`, and independent of it; from this library it only learns that a round has
happened. Evaluating writes no checkpoint and loads no second copy of the model.

Trade-off: training waits while the model is evaluated. All processes share the requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mates_hf.data.reference import ReferenceTask
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import undisturbed
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.reporters import find_trainer, report
from mates_hf.evaluation.contamination import check_contamination
from mates_hf.evaluation.evaluator import Evaluator
from mates_hf.records import STATE_KEY

logger = logging.getLogger(__name__)

PREFIX = "lm_eval"


class LmEvalCallback(TrainerCallback):
    """Evaluates the model with lm-eval tasks while it trains, without changing a bit of its training.

    Metrics (`lm_eval/<task>/<metric>`) go to every reporter of the Trainer, with what they took: `lm_eval/seconds`,
    and `lm_eval/tokens` that went through the model. Tasks are built once, before the first step, and checked there.
    Where `MatesCallback` is in the same Trainer, texts that its reference shares with what is evaluated are warned of,
    and texts that are too short to be compared are counted.

    Args:
        tasks: lm-eval tasks and groups: names (`mates_zero_shot`, or any that lm-eval has), paths of YAML files,
            configs, or tasks. Their answers must be scored by likelihood.
        tokenizer: the model's; a copy is used.
        every_steps: evaluate after every so many optimizer steps, and after the last; None evaluates at each of
            `MatesCallback`'s rounds, and after the last step.
        limit: first documents of each task only.
        batch_size: rows of a micro-batch of the longest texts, in each process; of shorter ones as many as have
            as many tokens.
        metadata: for the tasks, as lm-eval's `--metadata`: `{"data_dir": ...}` for `mates_zero_shot_local`.
        truncate: cut contexts that are longer than the model's from the left, with one warning, as lm-eval does;
            without it they are an error before the first step.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an argument is out of range, or the tokenizer has no end token, or puts special tokens behind a
            text.
    """

    def __init__(
        self,
        tasks: str | Path | Sequence[Any],
        tokenizer: Any,
        *,
        every_steps: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        metadata: Mapping[str, Any] | None = None,
        truncate: bool = False,
    ) -> None:
        if every_steps is not None and (not isinstance(every_steps, int) or every_steps < 1):
            raise ValueError(f"`every_steps` must be None or a whole number of at least 1, got {every_steps!r}.")
        self.evaluator = Evaluator(
            tasks, tokenizer, limit=limit, batch_size=batch_size, metadata=metadata, truncate=truncate
        )
        self.every_steps = every_steps
        self._trainer: Any = None
        self._processes = ALONE
        self._evaluated_step: int | None = None
        self._last_round: Any = None

    def attach(self, trainer: Any) -> LmEvalCallback:
        """Add the callback to a Trainer where it is not there yet, and return it; as `callbacks=[...]` does."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the tasks and check them against the model. Raises before any step."""
        model = kwargs["model"]
        self._processes = Processes.of_run()
        self._evaluated_step = (
            state.global_step
        )  # a resumed run has reported this step, and a new one has learnt nothing
        self._last_round = _last_round(state)
        self.evaluator.prepare(model, self._processes, progress=not args.disable_tqdm)
        with self._processes.together():
            if self._processes.is_main:
                self._warn_of_contamination(model)
            self._processes.meet()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where a callback that was asked after this one has run a round."""
        if self.every_steps is None:
            self._evaluate_after_round(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate at the steps asked for, and after the last one."""
        step = state.global_step
        asked = self.every_steps is not None and step % self.every_steps == 0
        if asked or step >= state.max_steps:
            self._evaluate(args, state, kwargs["model"])
        elif self.every_steps is None:
            self._evaluate_after_round(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate what an early stop left, unless an earlier checkpoint has been loaded in its place."""
        if not args.load_best_model_at_end:
            self._evaluate(args, state, kwargs["model"])

    def _evaluate_after_round(self, args: Any, state: Any, model: Any) -> None:
        last_round = _last_round(state)
        if last_round != self._last_round:
            self._last_round = last_round
            self._evaluate(args, state, model)

    def _evaluate(self, args: Any, state: Any, model: Any) -> None:
        if self._evaluated_step == state.global_step:
            return
        self._evaluated_step = state.global_step
        started = time.perf_counter()
        found = self.evaluator.run(model, self._processes, progress=not args.disable_tqdm)
        seconds = time.perf_counter() - started
        logger.info("step %d: %d metrics in %.1f s", state.global_step, len(found), seconds)
        metrics = {f"{PREFIX}/{name}": value for name, value in found.items()}
        metrics[f"{PREFIX}/seconds"] = self._processes.agree(seconds)
        metrics[f"{PREFIX}/tokens"] = self._processes.agree(self.evaluator.num_tokens)
        report(self, self._trainer, state, metrics)

    def _warn_of_contamination(self, model: Any) -> None:
        """Where `MatesCallback` is in the same Trainer, its reference must share no text with what is evaluated."""
        trainer = self._trainer or find_trainer(self)
        callbacks = trainer.callback_handler.callbacks if trainer is not None else []
        references = [task for c in callbacks if isinstance(task := getattr(c, "reference", None), ReferenceTask)]
        with undisturbed(unwrap(model)):
            for reference in references:
                check_contamination(
                    reference=reference,
                    evaluation=self.evaluator.loaded["tasks"],
                    tokenizer=self.evaluator.tokenizer,
                ).warn()


def _last_round(state: Any) -> Any:
    """What tells `MatesCallback`'s last round from the one before it; None before the first."""
    saved = state.stateful_callbacks.get(STATE_KEY)
    return saved.get("last_round") if isinstance(saved, Mapping) else None
