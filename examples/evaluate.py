# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval,report]"]
# ///
"""Evaluate checkpoints on zero-shot tasks: a table, a plot over trained tokens, and the numbers as JSON.

A path is a checkpoint, a model's folder, a Hub id, or a whole run (an `output_dir`, which stands for its
`checkpoint-*` folders). Several make one table, and one line each in the plot:

    python examples/evaluate.py runs/my-run
    python examples/evaluate.py runs/demo/mates-0 runs/demo/random-0 --limit 500
    python examples/evaluate.py EleutherAI/pythia-410m runs/my-run --tasks mates_zero_shot lambada_openai
    python examples/evaluate.py runs/my-run --tasks mates_zero_shot_local --data_dir data/eval  # without a network
    accelerate launch examples/evaluate.py runs/my-run --batch_size 32

Processes share the requests, and only the main one reads and writes results. They go into the folder `evaluation` of
the first run given, unless `--output_dir` names another. What `evaluation.json` there already has, of the same
weights, tasks, limit and versions, is not evaluated again. Checkpoints that were not written to their end are skipped
by name.

The plot is drawn over the run's own token count where it was asked to keep one (`include_num_input_tokens_seen`), else
over what the Trainer's FLOP count comes to (padding included; not under FSDP 1, where it counts a share), else over
optimizer steps; the axis says which. `--tokens_per_step` goes before all of these.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from mates_hf.engine.processes import Processes
from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator
from mates_hf.paths import expand_path
from mates_hf.training.checkpoints import find_fault

RESULTS, PLOT = "evaluation.json", "evaluation.png"
# What the table shows of a task: the first of these that it has, else its first metric.
SHOWN = ("accuracy", "acc_norm", "acc")
STEPS, ASKED = "optimizer steps", "trained tokens (millions), steps x --tokens_per_step"
COUNTED = "input tokens (millions)"
DERIVED = "input tokens (millions), from the Trainer's FLOP count"
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", help="checkpoints, model folders, Hub ids, or runs (their `output_dir`)")
    parser.add_argument("--tasks", nargs="+", default=["mates_zero_shot"], help="lm-eval tasks, groups, YAML files")
    parser.add_argument("--data_dir", default=None, help="folder of the local tasks' files")
    parser.add_argument("--limit", type=int, default=None, help="first documents of each task only")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch, in each process")
    parser.add_argument("--truncate", action="store_true", help="cut long contexts from the left, as lm-eval does")
    parser.add_argument("--tokenizer", default=None, help="None: the checkpoint's, the run's or the adapted model's")
    parser.add_argument("--tokens_per_step", type=int, default=None, help="of a run, for the plot and the table")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=["accuracy", "choice_prob"],
        help="what is plotted: a metric of the group (of each task where there is no group), or `task/metric`",
    )
    parser.add_argument(
        "--output_dir", default=None, help=f"folder of {RESULTS} and {PLOT}; None: `evaluation` in the first run given"
    )
    arguments = parser.parse_args(argv)
    arguments.output_dir = str(expand_path(arguments.output_dir or default_output_dir(arguments.paths)))
    if arguments.data_dir is not None:
        arguments.data_dir = str(expand_path(arguments.data_dir))
    return arguments


def default_output_dir(paths: Sequence[str]) -> str:
    """The folder `evaluation` of the first run that is a folder; where none is, of the current one's `runs`."""
    for folder in map(expand_path, paths):
        if folder.is_dir():  # a checkpoint may be deleted by the run, so that its results go beside it
            return str((folder.absolute().parent if step_in_name(folder) is not None else folder) / "evaluation")
    return "runs/evaluation"


# --- which checkpoints ---


def find_checkpoints(given: str) -> list[dict[str, Any]]:
    """The complete checkpoints that a path stands for, in the order of their steps; the others are named."""
    folder = expand_path(given)
    if not folder.is_dir():
        return [on_the_hub(given)]
    numbered = [path for path in folder.iterdir() if path.is_dir() and step_in_name(path) is not None]
    found = []
    for path in sorted(numbered, key=lambda path: step_in_name(path) or 0) or [folder]:
        step = step_in_name(path)
        fault = find_fault(path, step) if step is not None else None
        weights = [file for file in path.iterdir() if _WEIGHTS.fullmatch(file.name)]
        if fault is None and not weights:
            sharded = any(entry.is_dir() for entry in path.iterdir())
            fault = "its weights are sharded: `accelerate merge-weights`" if sharded else "it has no weights"
        if fault is not None:
            show(f"Skipped {path}: {fault}")
            continue
        state = read_state(path)
        found.append(
            {
                "run": given,
                "path": str(path),
                "step": state.get("global_step", step),
                "state": {name: state.get(name) for name in ("num_input_tokens_seen", "total_flos")},
                "is_adapter": (path / "adapter_config.json").exists(),
                "revision": None,
                "files": stamps(weights),
            }
        )
    return found


def on_the_hub(given: str) -> dict[str, Any]:
    """A model of the Hub, at the commit that its name means now."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in ("config.json", "adapter_config.json"):
        try:
            file = hf_hub_download(given, name)
        except EntryNotFoundError:  # also where there is no connection and the file is not in the cache
            continue
        except (HfHubHTTPError, HFValidationError) as error:
            raise ValueError(f"A path must be a folder or a model on the Hub, got {given!r}: {error}") from error
        commit = Path(file).parent.name
        is_adapter = name == "adapter_config.json"
        return {"run": given, "path": given, "step": None, "state": {}, "is_adapter": is_adapter, "revision": commit,
                "files": {"commit": commit}}  # fmt: skip
    raise ValueError(
        f"A path must be a folder or a model on the Hub, got {given!r}, which is neither (or cannot be reached)."
    )


def step_in_name(path: Path) -> int | None:
    """The step of a `checkpoint-<step>` folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def read_state(path: Path) -> dict[str, Any]:
    """What the Trainer wrote beside the weights; empty where it wrote nothing."""
    file = path / "trainer_state.json"
    return json.loads(file.read_bytes()) if file.exists() else {}


def stamps(files: Iterable[Path], root: Path | None = None) -> dict[str, list[int]]:
    """Size and time of change (ns) by name: equal where files were not written again."""
    described = {str(file.relative_to(root)) if root else file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(described.items())}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything but the weights that a result depends on."""
    data_dir = Path(arguments.data_dir) if arguments.data_dir else None
    data = stamps(data_dir.rglob("*.jsonl*"), data_dir) if data_dir else None
    packages = ("mates-hf", "lm-eval", "transformers", "torch")
    return {
        "tasks": arguments.tasks,
        "task_files": stamps(Path(task) for task in arguments.tasks if Path(task).is_file()),
        "data": data,
        "limit": arguments.limit,
        "truncate": arguments.truncate,
        "tokenizer": arguments.tokenizer,
        "versions": {name: version(name) for name in packages},
    }


# --- evaluation ---


def load_model(checkpoint: Mapping[str, Any], device: Any) -> Any:
    """A checkpoint's model, with its adapter where it is one."""
    where = {"revision": checkpoint["revision"]} if checkpoint["revision"] else {}
    path = checkpoint["path"]
    if checkpoint["is_adapter"]:
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError as error:
            raise ImportError(f"{path} is an adapter, which needs peft to be loaded: `pip install peft`.") from error
        return AutoPeftModelForCausalLM.from_pretrained(path, dtype="auto", **where).to(device)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True, **where)
    if info["missing_keys"]:
        raise ValueError(
            f"A checkpoint must have all weights of its model, but {path} lacks {sorted(info['missing_keys'])[:5]}, "
            "which would be evaluated with random values."
        )
    return model.to(device)


def load_tokenizer(checkpoint: Mapping[str, Any], given: str | None) -> Any:
    """The tokenizer asked for, or that of the checkpoint, of its run, or of the model that was adapted."""
    path = Path(checkpoint["path"])
    if given or not path.is_dir():
        return AutoTokenizer.from_pretrained(given or checkpoint["path"])
    for folder in (path, path.parent):
        if any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
            return AutoTokenizer.from_pretrained(str(folder))
    if checkpoint["is_adapter"]:
        adapted = json.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        return AutoTokenizer.from_pretrained(adapted)
    raise ValueError(
        f"`--tokenizer` must be given where none was saved, got None, and {path} has none. The Trainer saves it where "
        "it is its `processing_class`."
    )


def trained_tokens(checkpoint: Mapping[str, Any], model: Any) -> tuple[float | None, str]:
    """Tokens that a checkpoint was trained on, and how that is known; None where it is not.

    The Trainer adds 6 x tokens x parameters without embeddings at every step, so its sum tells the tokens, provided
    that it counted the parameters as they are counted here: then the quotient is a whole number.
    """
    state = checkpoint["state"]
    if state.get("num_input_tokens_seen"):
        return state["num_input_tokens_seen"], COUNTED
    each = 6 * model.num_parameters(exclude_embeddings=True) if hasattr(model, "num_parameters") else 0
    tokens = (state.get("total_flos") or 0) / each if each else 0.0
    if tokens < max(1, checkpoint["step"] or 0) or abs(tokens - round(tokens)) > 1e-3:
        return None, STEPS
    return round(tokens), DERIVED


def prepare(evaluator: Evaluator, model: Any, processes: Processes) -> None:
    """Build the tasks; what can be done where that fails is said in this command's words."""
    try:
        evaluator.prepare(model, processes)
    except ConnectionError as error:
        raise ConnectionError(
            f"`--tasks` must be tasks whose data can be read, and the Hub cannot be reached ({error}). Without a "
            "network, put the benchmarks into a folder, as <benchmark>/<split>.jsonl with rows of `context`, "
            "`question`, `choices` and `label`, and pass `--tasks mates_zero_shot_local --data_dir FOLDER`."
        ) from error
    except EvaluationError as error:
        raise EvaluationError(str(error).replace("`truncate=True`", "`--truncate`")) from error


def evaluate(arguments: argparse.Namespace, device: Any, processes: Processes) -> list[dict[str, Any]]:
    """Results of all checkpoints, in the main process; the others help with those that are evaluated now."""
    file = Path(arguments.output_dir) / RESULTS
    known: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    if processes.is_main:  # it alone reads and writes results: no file system need be shared
        settings = settings_of(arguments)
        checkpoints = [checkpoint for given in arguments.paths for checkpoint in find_checkpoints(given)]
        if not checkpoints:
            raise ValueError(f"`paths` must have a complete checkpoint, got none in {arguments.paths}.")
        known = read_results(file)
        wanted = [checkpoint for checkpoint in checkpoints if result_of(checkpoint, settings, known) is None]
        show(f"{len(checkpoints)} checkpoints, {len(checkpoints) - len(wanted)} of them evaluated before")
        processes.publish({"wanted": wanted})
    else:
        wanted = processes.receive()[0]["wanted"]
    evaluator, run = None, None
    for checkpoint in wanted:
        model = load_model(checkpoint, device)
        if evaluator is None or checkpoint["run"] != run:  # the checkpoints of a run have one tokenizer
            run = checkpoint["run"]
            evaluator = Evaluator(
                arguments.tasks,
                load_tokenizer(checkpoint, arguments.tokenizer),
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                metadata={"data_dir": arguments.data_dir} if arguments.data_dir else None,
                truncate=arguments.truncate,
            )
            prepare(evaluator, model, processes)
        begin = time.perf_counter()
        metrics = evaluator.run(model, processes, progress=sys.stderr.isatty())
        if processes.is_main:
            seconds = time.perf_counter() - begin
            tokens, source = trained_tokens(checkpoint, model)
            result = {"path": checkpoint["path"], "files": checkpoint["files"], "settings": settings,
                      "step": checkpoint["step"], "tokens": tokens, "tokens_from": source,
                      "groups": list(evaluator.loaded["groups"]), "metrics": metrics, "seconds": seconds}  # fmt: skip
            stale = [old for old in known if (old["path"], old["settings"]) == (result["path"], settings)]
            known = [old for old in known if old not in stale] + [result]
            write_results(file, known)
            show(f"{checkpoint['path']}: {len(metrics)} metrics in {seconds:.1f} s")
    found = ((checkpoint, result_of(checkpoint, settings, known)) for checkpoint in checkpoints)
    return [{**result, "run": checkpoint["run"]} for checkpoint, result in found if result is not None]


# --- results ---


def result_of(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], known: Iterable[dict[str, Any]]
) -> dict[str, Any] | None:
    """What is known of a checkpoint with these weights under these settings."""
    wanted = (checkpoint["path"], checkpoint["files"], settings)
    return next((old for old in known if (old["path"], old["files"], old["settings"]) == wanted), None)


def read_results(file: Path) -> list[dict[str, Any]]:
    """Results of earlier calls."""
    if not file.exists():
        return []
    try:
        results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--output_dir` must have no other file called {RESULTS} than one of this script, got {file}. Choose "
            "another folder, or delete the file."
        ) from error
    return results


def write_results(file: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """All results, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def shown_metrics(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The metric that the table shows of each task and, after the tasks, of each group."""
    found: dict[str, list[str]] = {}
    groups: set[str] = set()
    for result in results:
        groups.update(result["groups"])
        for name in result["metrics"]:
            task, _, metric = name.partition("/")
            found.setdefault(task, []).append(metric)
    chosen = {task: next((name for name in SHOWN if name in there), there[0]) for task, there in found.items()}
    return {task: chosen[task] for task in sorted(chosen, key=lambda task: task in groups)}


def tell(results: Sequence[Mapping[str, Any]], tokens_per_step: int | None) -> None:
    """The table: a row for each checkpoint, a column for each task and for each group's mean."""
    shown = shown_metrics(results)
    heads = [task.removeprefix("mates_").removesuffix("_local") for task in shown]
    widths = [max(len(head), len(metric)) + 2 for head, metric in zip(heads, shown.values(), strict=True)]
    names = [result["path"] for result in results]
    left = max(map(len, [*names, "checkpoint"]))
    tokens = [position(result, tokens_per_step)[0] for result in results]
    show(f"\n{'checkpoint':{left}s}{'step':>9s}{'M tokens':>10s}"
         + "".join(f"{head:>{width}s}" for head, width in zip(heads, widths, strict=True)))  # fmt: skip
    show(" " * (left + 19) + "".join(f"{name:>{width}s}" for name, width in zip(shown.values(), widths, strict=True)))
    for result, name, count in zip(results, names, tokens, strict=True):
        values = [result["metrics"].get(f"{task}/{metric}") for task, metric in shown.items()]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        step = "-" if result["step"] is None else str(result["step"])
        show(f"{name:{left}s}{step:>9s}{'-' if count is None else f'{count / 1e6:.4g}':>10s}"
             + "".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True)))  # fmt: skip


def position(result: Mapping[str, Any], tokens_per_step: int | None) -> tuple[float | None, str]:
    """Trained tokens of a result, and how they are known."""
    if tokens_per_step is not None and result["step"] is not None:
        return result["step"] * tokens_per_step, ASKED
    return result["tokens"], result["tokens_from"]


def axis(results: Sequence[Mapping[str, Any]], tokens_per_step: int | None) -> tuple[list[float], str]:
    """Positions on the horizontal axis, and its label: tokens only where all were counted in the same way."""
    placed = [position(result, tokens_per_step) for result in results]
    sources = {source for _, source in placed}
    if len(sources) == 1 and STEPS not in sources:
        return [tokens / 1e6 for tokens, _ in placed if tokens is not None], sources.pop()
    return [float(result["step"]) for result in results], STEPS


def curves(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float | None]]:
    """Values by name: of `task/metric`, or of a metric of every group, or of every task where there is no group."""
    if "/" in metric:
        names = [metric]
    else:
        groups = {group for result in results for group in result["groups"]}
        there = dict.fromkeys(name for result in results for name in result["metrics"] if name.endswith(f"/{metric}"))
        names = [name for name in there if name.partition("/")[0] in groups] or list(there)
    found = {name: [result["metrics"].get(name) for result in results] for name in names}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def plot(results: Sequence[Mapping[str, Any]], metrics: Sequence[str], tokens_per_step: int | None, file: Path) -> str:
    """Each metric over trained tokens, a line for each run; models without a step are level lines."""
    try:
        import matplotlib
    except ImportError:
        return "No plot: pip install 'mates-hf[report]'"
    drawn = {metric: curves(results, metric) for metric in metrics}
    absent = [metric for metric, found in drawn.items() if not found]
    placed = [result for result in results if result["step"] is not None]
    if not placed or len(absent) == len(drawn):
        return f"No plot: {'no checkpoint tells its step' if not placed else f'no metric {absent}'}"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positions, label = axis(placed, tokens_per_step)
    where = {result["path"]: at for result, at in zip(placed, positions, strict=True)}
    panels = [metric for metric in drawn if drawn[metric]]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    runs = list(dict.fromkeys(result["run"] for result in results))
    for panel, metric in zip(axes[0], panels, strict=True):
        for name, values in drawn[metric].items():
            for run in runs:
                points = [(where.get(r["path"]), v) for r, v in zip(results, values, strict=True)
                          if r["run"] == run and v is not None]  # fmt: skip
                text = run if len(drawn[metric]) == 1 else f"{run}, {name.partition('/')[0]}"
                line = sorted((at, value) for at, value in points if at is not None)
                if line:
                    panel.plot(*zip(*line, strict=True), marker=".", label=text)
                for value in (value for at, value in points if at is None):
                    panel.axhline(value, linestyle="--", color="tab:grey", label=text)
        panel.set_xlabel(label)
        panel.set_ylabel(next(iter(drawn[metric])) if len(drawn[metric]) == 1 else metric)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return f"{file}{f' (no metric {absent})' if absent else ''}"


def show(text: str) -> None:
    """One line to the person at the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Find checkpoints, evaluate those that were not yet, show all."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    state = PartialState()
    processes = Processes.of_run()
    with processes.together():  # what goes wrong in one process ends all of them, by its name
        results = evaluate(arguments, state.device, processes)
    if processes.is_main:
        output_dir = Path(arguments.output_dir)
        tell(results, arguments.tokens_per_step)
        show(f"\n{output_dir / RESULTS}")
        show(plot(results, arguments.metric, arguments.tokens_per_step, output_dir / PLOT))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
