"""What evaluating the live model takes, all included, against the model time alone of the plain `lm_eval` command.

The rival is `lm_eval.models.huggingface.HFLM` under `lm_eval.evaluate`, on the same model in memory, with the same
requests, batch size and threads. Counted of it is only what passes inside `_loglikelihood_tokens`; tokenising, which
it repeats at every evaluation, and making metrics are left out. Counted of `Evaluator.run` is everything. The two take
turns within one process, and the ratio is the median over turns of ratios within a turn.

With `--data` the nine benchmarks themselves are read, else made-up items of their shapes.

Trade-off: a model of 1.3 M parameters, for which everything that is not a forward pass weighs most.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from benchmarks.lab.corpus import END, VOCAB, as_dataset, as_rows, byte_bpe
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate, median_ratio, seconds_of, temporary_folder
from benchmarks.lab.models import llama, trained, trainer_of
from benchmarks.lab.tables import figure
from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.rows import TokenRows
from mates_hf.evaluation import Evaluator, LmEvalCallback
from mates_hf.evaluation.evaluator import flat_metrics

GROUP = "mates_zero_shot_local"
BATCH = 8
CONTEXT = 1024  # of the model: the benchmarks' longest items almost fit
TOLERANCE = 1e-5  # relative, of metrics made of float32 log-likelihoods that were batched in another way
COUNTS = ("acc", "acc_norm", "accuracy")  # shares of items, which must not differ at all
# Median words of context, question and a choice, and number of choices, in the benchmarks' evaluated splits.
SHAPES = {
    "sciq": (52, 12, 1, 4),
    "arc_easy": (0, 16, 3, 4),
    "arc_challenge": (0, 20, 5, 4),
    "logiqa": (63, 13, 13, 4),
    "openbookqa": (0, 9, 3, 4),
    "boolq": (88, 8, 1, 2),
    "hellaswag": (0, 43, 25, 4),
    "piqa": (0, 7, 13, 2),
    "winogrande": (0, 18, 1, 2),
}


class TimedHFLM(HFLM):
    """The harness's own model, and the seconds it spent on forward passes and what belongs to them."""

    seconds = 0.0

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return super()._loglikelihood_tokens(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


def write_items(folder: Path, texts: list[str], num_items: int) -> Path:
    """Items of the benchmarks' shapes, of the corpus's words in their order; lengths vary by half around medians."""
    rng = np.random.default_rng(0)
    words = [word for text in texts for word in text.split() if word.isalpha()]  # as in prose

    def some(median: int) -> str:
        num = max(1, round(median * rng.uniform(0.5, 1.5))) if median else 0
        first = int(rng.integers(0, len(words) - num))
        return " ".join(words[first : first + num])

    def item(benchmark: str) -> dict[str, Any]:
        context, question, choice, num = SHAPES[benchmark]
        blank = " _ " if benchmark == "winogrande" else " "
        return {
            "context": some(context),
            "question": f"{some(question // 2)}{blank}{some(question - question // 2)}",
            "choices": [some(choice) for _ in range(num)],
            "label": int(rng.integers(num)),
        }

    for benchmark in SHAPES:
        (folder / benchmark).mkdir()
        lines = [json.dumps(item(benchmark)) for _ in range(num_items)]
        (folder / benchmark / "validation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def compare(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Figures of whether both paths give the same metrics: shares of items exactly, the others within `TOLERANCE`."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"metrics of one path only: {sorted(ours.keys() ^ theirs.keys())}")
    counts = [name for name in ours if name.partition("/")[2] in COUNTS]
    others = [name for name in ours if name not in counts]
    differing = sum(ours[name] != theirs[name] for name in counts)
    worst = max(abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-12) for name in others)
    return [
        figure(f"accuracies that differ, of {len(counts)}", differing, most=0),
        figure(f"largest relative difference of the other {len(others)} metrics", worst, most=TOLERANCE),
    ]


def count_managers(model: Any, rows: TokenRows, tokenizer: Any, metadata: Mapping[str, Any]) -> dict[str, int]:
    """How often lm-eval's task manager is built in a run with three evaluations."""
    callback = LmEvalCallback(GROUP, tokenizer, every_steps=1, limit=4, metadata=metadata, truncate=True)
    few, build = as_dataset(rows.take(np.arange(24))), TaskManager.__init__
    with (
        mock.patch.object(TaskManager, "__init__", autospec=True, side_effect=build) as built,
        temporary_folder(None) as folder,
    ):
        trainer = trainer_of(model, few, folder, 3, 8, [callback], logging_strategy="steps", logging_steps=500)
        trainer.train()
    evaluations = sum("lm_eval/seconds" in entry for entry in trainer.state.log_history)
    return {"built": built.call_count, "evaluations": evaluations}


def measure(quick: bool, data_dir: Path, limit: int, texts: list[str]) -> dict[str, Any]:
    """Seconds of both paths in turns, metrics of both, seconds of `prepare`, and how often tasks are built."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(texts, VOCAB), eos_token=END)
    rows = as_rows(np.concatenate(tokenizer(texts[:500], return_tensors="np")["input_ids"]), 128)
    # Choices of a model that has learnt nothing are all alike.
    model, _ = trained(rows, 20, llama(length=CONTEXT))
    metadata = {"data_dir": str(data_dir)}
    evaluator = Evaluator(GROUP, tokenizer, limit=limit, batch_size=BATCH, metadata=metadata, truncate=True)
    building = seconds_of(lambda: evaluator.loaded)
    preparing = seconds_of(lambda: evaluator.prepare(model))
    tasks = evaluator.loaded
    rival = TimedHFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=BATCH)
    model_seconds: list[float] = []
    found: dict[str, dict[str, float]] = {}

    def theirs() -> None:
        rival.seconds = 0.0
        results = lm_eval.evaluate(lm=rival, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=False)
        model_seconds.append(rival.seconds)
        found["theirs"] = flat_metrics(results["results"])

    def ours() -> None:
        found["ours"] = evaluator.run(model)

    theirs()  # once for nothing: threads start, memory is taken
    model_seconds.clear()
    seconds = alternate({"HFLM": theirs, "Evaluator.run": ours}, 2 if quick else 7)
    seconds["HFLM, model time"] = model_seconds
    return {
        "seconds": seconds,
        "metrics": found,
        "building": building,
        "preparing": preparing,
        "requests": sum(len(task.instances) for task in tasks["tasks"].values()),
        "managers": count_managers(model, rows, tokenizer, metadata),
    }


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    texts = [row["text"] for row in builtin_corpus(seed=0).pool]
    limit = 10 if bench.quick else 100
    given = bench.options.data and bench.options.data / "eval"
    with temporary_folder(None) as temporary:
        measured = measure(bench.quick, given or write_items(temporary, texts, limit), limit, texts)
    seconds, managers = measured["seconds"], measured["managers"]
    ratios = [a / b for a, b in zip(seconds["Evaluator.run"], seconds["HFLM, model time"], strict=True)]
    both = median_ratio(seconds["Evaluator.run"], seconds["HFLM"])
    managing = f"task managers built in a run of `LmEvalCallback` with {managers['evaluations']} evaluations"
    figures = [
        figure("seconds of `Evaluator.run`, all / of HFLM, model time", statistics.median(ratios), "x", most=1.1),
        figure("the same, least of the turns", min(ratios), "x"),
        figure("the same, most of the turns", max(ratios), "x"),
        figure("seconds of `Evaluator.run` / of `lm_eval.evaluate` with HFLM, both all", both, "x"),
        *(figure(name, statistics.median(values), "s") for name, values in seconds.items()),
        figure("building the tasks, once a run", measured["building"], "s"),
        figure("`prepare` with the tasks built, once a run", measured["preparing"], "s"),
        figure(managing, managers["built"], most=1),
        *compare(**measured["metrics"]),
    ]
    settings = {
        "items": f"{'the benchmarks' if given else 'made up'}, {limit} of each of {len(SHAPES)} tasks",
        "requests": measured["requests"], "context": CONTEXT, "batch": BATCH, "turns": len(ratios),
    }  # fmt: skip
    return bench.figures(settings, figures, measured)
