"""Evaluation of the model as it is now, by lm-eval tasks: what `LmEvalCallback` does at a step, without the Trainer.

Where it is used: above `live`; `callback` and the example for checkpoints call it. Tasks are built and their requests
tokenised once, checked against the model before anything is trained, and asked again at every evaluation.

Trade-off: lm-eval's standard errors are left out, because they would be computed again at every step of a curve.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mates_hf.data.harness import OTHER_SEED, as_lm_eval_seeds, random_streams, spec_of, task_manager
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import undisturbed
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import EvaluationError
from mates_hf.evaluation.checks import (
    check_labels,
    check_requests,
    check_task,
    check_ties,
    check_tokenizer,
    own_copy,
    warn_of_redraws,
)
from mates_hf.evaluation.continuations import Continuations, answer, assist, longest

logger = logging.getLogger(__name__)


class Evaluator:
    """Tasks and a tokenizer, to evaluate a model with, again and again.

    Args:
        tasks: lm-eval tasks and groups: names (lm-eval's or this library's), paths of YAML files, configs, or tasks.
        tokenizer: the model's; a copy is used.
        limit: first documents of each task only.
        batch_size: rows of a micro-batch of the longest texts; of shorter ones as many as have as many tokens.
        metadata: for the tasks, as lm-eval's `--metadata`: `{"data_dir": ...}` for the local ones.
        truncate: cut contexts that are longer than the model's from the left, with one warning, as lm-eval does;
            without it they are an error.

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
        limit: int | None = None,
        batch_size: int = 8,
        metadata: Mapping[str, Any] | None = None,
        truncate: bool = False,
    ) -> None:
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ImportError('Evaluation needs lm-eval: `pip install "mates-hf[eval]"`.') from error
        names = [tasks] if isinstance(tasks, (str, Path, dict)) else list(tasks)
        if not names:
            raise ValueError("`tasks` must name one lm-eval task or group at least, got none.")
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        check_tokenizer(tokenizer)
        # A task object of the caller's is copied, because how it builds its requests is replaced.
        self.tasks = [spec_of(name) if isinstance(name, (str, Path)) else own_copy(name) for name in names]
        self.tokenizer = copy.deepcopy(tokenizer)
        self.limit = limit
        self.batch_size = batch_size
        self.metadata = dict(metadata or {})
        self.truncate = truncate
        self._loaded: dict[str, Any] | None = None
        self._streams: Any = None  # where building left the random streams
        self._live: Any = None

    @property
    def loaded(self) -> dict[str, Any]:
        """lm-eval's `tasks` and `groups` by name, with their requests; built at first use."""
        if self._loaded is None:
            started = time.perf_counter()
            with as_lm_eval_seeds():
                loaded = self._load()
                self._streams = random_streams()
                for task in loaded["tasks"].values():
                    warn_of_redraws(task, self.limit)
                    check_labels(task)
            self._loaded = loaded
            logger.info("%d tasks built in %.1f s", len(loaded["tasks"]), time.perf_counter() - started)
        return self._loaded

    def _load(self) -> dict[str, Any]:
        """Load all tasks, then build all requests, in the order in which lm-eval does both."""
        names = [task for task in self.tasks if isinstance(task, (str, dict))]
        with _without_advice():
            loaded = dict(task_manager(names, self.metadata).load(list(self.tasks)))
        for task in loaded["tasks"].values():
            check_task(task)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=OTHER_SEED)
        for task in loaded["tasks"].values():
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
            check_requests(task)
            # What `lm_eval.evaluate` builds at each evaluation is what was built here.
            task.build_all_requests = functools.partial(_ask_again, task)
        return loaded

    @property
    def num_tokens(self) -> int:
        """Tokens that the last `run` passed through the model, over all processes; known in the main one."""
        return 0 if self._live is None else int(self._live.num_tokens)

    def prepare(self, model: nn.Module, processes: Processes = ALONE, *, progress: bool = False) -> None:
        """Build the tasks, tokenise their requests, and prove that the model can answer and lm-eval can judge.

        All processes call it together; only the main one reads tasks and data.

        Args:
            model: the live model.
            processes: The processes of the run.
            progress: show progress bars.

        Raises:
            ValueError: a task, split, file or column is not there, or the tokenizer is not the model's.
            EvaluationError: contexts are longer than the model's, choices or labels are such that accuracy says
                nothing of the model, lm-eval cannot judge the answers, memory runs out, or the model gives NaN.
            ProcessError: another process failed.
        """

        def body() -> dict[str, float]:
            live = self._live_model(model, processes, progress)
            pairs = []
            for name, task in self.loaded["tasks"].items():
                by_request = [live.pairs_of(request) for request in task.instances]
                asked = [pair for found in by_request for pair in found]
                self._check_lengths(name, asked, live.max_tokens)
                check_ties(task, [live.as_read(found) for found in by_request])
                pairs += asked
            hardest = longest(Continuations.from_pairs(pairs, live.max_tokens), self.batch_size)
            answer(unwrap(model), hardest, batch_rows=self.batch_size, progress=False, processes=processes)
            self._judge_made_up_answers(live)
            return {}

        self._together(model, processes, body)

    def run(self, model: nn.Module, processes: Processes = ALONE, *, progress: bool = False) -> dict[str, float]:
        """Evaluate the model as it is; afterwards it is as it was, to the bit, and so are all random streams.

        Args:
            model: the live model, in every process.
            processes: The processes of the run; all call it together, and share the requests.
            progress: show progress bars.

        Returns:
            `<task or group>/<metric>` -> value, the same in every process.

        Raises:
            EvaluationError: the model gives NaN, or memory runs out.
            ProcessError: another process failed.
        """

        def body() -> dict[str, float]:
            live = self._live_model(model, processes, progress)
            live.num_tokens = 0
            return self._evaluated(live)

        return self._together(model, processes, body)

    def _evaluated(self, live: Any) -> dict[str, float]:
        """What lm-eval makes of the answers."""
        import lm_eval

        loaded = self.loaded
        with as_lm_eval_seeds(self._streams):
            found = lm_eval.evaluate(lm=live, task_dict=loaded, limit=self.limit, bootstrap_iters=0, log_samples=False)
        return flat_metrics(found["results"])

    def _judge_made_up_answers(self, live: Any) -> None:
        """Prove that answers can be judged, so that a metric that cannot be computed does not end a run later."""
        live.made_up = True
        try:
            self._evaluated(live)
        except Exception as error:
            raise EvaluationError(
                f"lm-eval must be able to judge answers to the tasks {sorted(self.loaded['tasks'])}, but on made-up "
                f"answers it ends in {type(error).__name__}: {error}. Try the tasks one by one, and leave out the one "
                "whose metrics or `process_results` fail, or mend it."
            ) from error
        finally:
            live.made_up = False

    def _together(
        self, model: nn.Module, processes: Processes, body: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """The main process does its part and the others assist; the model is left as found."""
        module = unwrap(model)
        with undisturbed(module), processes.together():
            module.eval()
            if not processes.is_main:
                return assist(module, processes)
            try:
                metrics = body()
            finally:
                if self._live is not None:
                    self._live.model = None
            processes.publish({"metrics": metrics})
        return metrics

    def _live_model(self, model: nn.Module, processes: Processes, progress: bool) -> Any:
        """What lm-eval asks; keeps the tokenised requests from one evaluation to the next."""
        from mates_hf.evaluation.live import LiveModel, longest_input

        max_tokens = longest_input(unwrap(model), self.tokenizer)
        if self._live is None or self._live.max_tokens != max_tokens:
            self._live = LiveModel(self.tokenizer, batch_rows=self.batch_size, max_tokens=max_tokens)
        self._live.model, self._live.processes, self._live.progress = unwrap(model), processes, progress
        return self._live

    def _check_lengths(self, name: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int) -> None:
        """Contexts that do not fit are an error, or one warning where they may be cut."""
        lengths = np.array([len(context) + len(targets) - 1 for context, targets in pairs])
        num_long = int((lengths > limit).sum())
        longest_targets = max(len(targets) for _, targets in pairs)
        if longest_targets > limit:
            raise EvaluationError(
                f"Every choice must fit into the model's context of {limit} tokens, but one of `{name}` has "
                f"{longest_targets}. Leave the task out."
            )
        if not num_long:
            return
        told = (
            f"{num_long} of {len(pairs)} requests of `{name}` are longer than the model's context of {limit} tokens "
            f"(the longest has {lengths.max()})"
        )
        if not self.truncate:
            raise EvaluationError(
                f"Evaluated items must fit into the model's context, but {told}. Leave the task out, or pass "
                "`truncate=True`, which cuts contexts from the left as lm-eval does."
            )
        logger.warning("%s: their contexts are cut from the left.", told)


def _ask_again(task: Any, **arguments: Any) -> None:
    """In place of a task's `build_all_requests`: the requests it has, without their last answers."""
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, lm-eval does not advise to pass metadata, as it does for each local task, also where they were."""
    source = logging.getLogger("lm_eval.api.task")

    def keep(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)


def flat_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """lm-eval's results as one level: `<task or group>/<metric>` -> value, without standard errors.

    Args:
        results: the `results` of `lm_eval.evaluate`.

    Returns:
        Values by name; a filter other than lm-eval's `none` stays in the name.
    """
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (numbers.Real, np.number)):
                found[f"{task}/{metric if filtered == 'none' else key}"] = float(value)
    return found
