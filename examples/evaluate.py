# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval,report]"]
# [tool.uv.sources]
# mates-hf = { path = ".." }
# ///
"""Evaluate checkpoints on zero-shot tasks: a table, a picture over the run, and the numbers as JSON.

A path is a checkpoint, a model's folder, a Hub id, or a run (an `output_dir` stands for its checkpoints):

    python examples/evaluate.py runs/pretrain
    python examples/evaluate.py EleutherAI/pythia-410m runs/my-run --tasks mates_zero_shot lambada_openai --limit 500
    accelerate launch examples/evaluate.py runs/my-run --tasks mates_zero_shot_local --data_dir data/eval  # offline

Processes share the requests. What `evaluation.json` has of the same weights and settings is not evaluated again. Two
checkpoints of a million parameters, on nine tasks of 40 items, took 8 CPU seconds and 0.6 GB of memory. Last lines:

    runs/pretrain/evaluation/evaluation.json
"""

import argparse
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mates_hf.engine.processes import Processes
from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator
from mates_hf.training.checkpoints import find_fault

SHOWN = ("accuracy", "acc_norm", "acc")  # the table shows the first of these that a task has
PLOTTED = ("accuracy", "choice_prob")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", help="checkpoints, model folders, Hub ids, or runs")
    parser.add_argument("--tasks", nargs="+", default=["mates_zero_shot"], help="lm-eval tasks, groups, YAML files")
    parser.add_argument("--data_dir", help="folder of the local tasks' files")
    parser.add_argument("--limit", type=int, help="first documents of each task only")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch, in each process")
    parser.add_argument("--truncate", action="store_true", help="cut long contexts from the left, as lm-eval does")
    parser.add_argument("--tokenizer", help="None: the checkpoint's or the run's")
    parser.add_argument("--output_dir", help="of the results; None: `evaluation` in the first run given")
    given = parser.parse_args(argv)
    folder = Path(given.paths[0]).expanduser()
    run = folder.parent if step_of(folder) is not None else folder  # a run may delete its checkpoints
    given.output_dir = Path(given.output_dir or (run if folder.is_dir() else Path("runs")) / "evaluation").expanduser()
    return given


def step_of(path: Path) -> int | None:
    """The step of a `checkpoint-<step>` folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def find_checkpoints(given: str) -> list[dict[str, Any]]:
    """The whole checkpoints that a path stands for, by step; the others are named."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        try:
            commit = AutoConfig.from_pretrained(given)._commit_hash
        except OSError as error:
            raise ValueError(f"A path must be a folder or a model on the Hub, got {given!r}: {error}") from error
        return [{"run": given, "path": given, "step": None, "tokens": None, "weights": {"commit": commit}}]
    numbered = [path for path in folder.glob("checkpoint-*") if step_of(path) is not None]
    found = []
    for path in sorted(numbered, key=lambda path: step_of(path) or 0) or [folder]:
        step, state_file = step_of(path), path / "trainer_state.json"
        weights = {file.name: file.stat().st_mtime_ns for file in sorted(path.glob("*model*.[sb][ai][fn]*"))}
        fault = find_fault(path, step) if step is not None else None
        if fault or not weights:
            print(f"Skipped {path}: {fault or 'it has no weights (or shards: `accelerate merge-weights`)'}")
            continue
        state = json.loads(state_file.read_bytes()) if state_file.exists() else {}
        tokens = state.get("num_input_tokens_seen") or None  # where the run counted (`include_num_input_tokens_seen`)
        found.append({"run": given, "path": str(path), "step": step, "tokens": tokens, "weights": weights})
    return found


def load_model(path: str) -> Any:
    """A checkpoint's model; where it is an adapter, with the model that it adapts."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"])[:5]:
        raise ValueError(f"A checkpoint must have all weights of its model, got {path} without {missing}.")
    return model


def load_tokenizer(path: Path, given: str | None, model: Any) -> Any:
    """The tokenizer asked for, or that of the checkpoint, of its run, or of the model that was adapted."""
    folders = [str(folder) for folder in (path, path.parent) if path.is_dir() and any(folder.glob("tokenizer*"))]
    adapted = [model.name_or_path] if model.name_or_path != str(path) or not path.is_dir() else []
    for name in [given] if given else folders + adapted:
        return AutoTokenizer.from_pretrained(name)
    raise ValueError(f"`--tokenizer` must be given where none was saved (as `processing_class`), got None for {path}.")


def prepare(evaluator: Evaluator, model: Any, processes: Processes) -> None:
    """Build the tasks; what can be done where that fails is said in this command's words."""
    try:
        evaluator.prepare(model, processes)
    except ConnectionError as error:
        way_out = "Without a network, pass `--tasks mates_zero_shot_local --data_dir FOLDER` (docs/evaluate.md)."
        raise ConnectionError(f"`--tasks` must be tasks whose data can be read, got {error}. {way_out}") from error
    except EvaluationError as error:
        raise EvaluationError(str(error).replace("`truncate=True`", "`--truncate`")) from error


def evaluate(given: argparse.Namespace, file: Path, device: Any, processes: Processes) -> list[dict[str, Any]]:
    """Results of all checkpoints, in the main process; the others help with those that are evaluated now."""
    settings = {name: getattr(given, name) for name in ("tasks", "data_dir", "limit", "truncate", "tokenizer")}
    settings |= {name: version(name) for name in ("mates-hf", "lm-eval", "transformers", "torch")}
    checkpoints, done = [], {}
    if processes.is_main:
        checkpoints = [{**found, "settings": settings} for path in given.paths for found in find_checkpoints(path)]
        for found in checkpoints:
            found["key"] = json.dumps([found["path"], found["weights"], settings])
        if not checkpoints:
            raise ValueError(f"`paths` must have a whole checkpoint, got none in {given.paths}.")
        done = {old["key"]: old for old in (json.loads(file.read_text("utf-8")) if file.exists() else [])}
        wanted = [checkpoint for checkpoint in checkpoints if checkpoint["key"] not in done]
        print(f"{len(checkpoints)} checkpoints, {len(checkpoints) - len(wanted)} of them evaluated before")
        processes.publish({"wanted": wanted})
    else:
        wanted = processes.receive()[0]["wanted"]
    metadata = {"data_dir": str(Path(given.data_dir).expanduser())} if given.data_dir else None
    options = {"limit": given.limit, "batch_size": given.batch_size, "truncate": given.truncate, "metadata": metadata}
    evaluator, run = None, None
    for checkpoint in wanted:
        model = load_model(checkpoint["path"]).to(device)
        if checkpoint["run"] != run:  # the checkpoints of a run have one tokenizer
            run, tokenizer = checkpoint["run"], load_tokenizer(Path(checkpoint["path"]), given.tokenizer, model)
            evaluator = Evaluator(given.tasks, tokenizer, **options)
            prepare(evaluator, model, processes)
        metrics = evaluator.run(model, processes, progress=sys.stderr.isatty())
        if processes.is_main:
            done[checkpoint["key"]] = {**checkpoint, "groups": list(evaluator.loaded["groups"]), "metrics": metrics}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".tmp").write_text(json.dumps(list(done.values()), indent=1), "utf-8")
            file.with_suffix(".tmp").replace(file)
            print(f"{checkpoint['path']}: {len(metrics)} metrics")
    return [{**done[checkpoint["key"]], **checkpoint} for checkpoint in checkpoints]


def tell(results: list[dict[str, Any]]) -> None:
    """The table: a row for each checkpoint, a column for each task with an accuracy, and last the groups' means."""
    shown = {}
    for name in [name for metric in SHOWN for name in results[0]["metrics"] if name.endswith("/" + metric)]:
        shown.setdefault(name.partition("/")[0], name)
    tasks = sorted(shown, key=results[0]["groups"].__contains__)
    heads = [task.removeprefix("mates_").removesuffix("_local") for task in tasks]
    left = max(len(result["path"]) for result in results)
    print("  ".join([f"\n{'checkpoint':{left}}", *heads]))
    for result in results:
        cells = (f"{result['metrics'][shown[t]]:>{len(head)}.3f}" for t, head in zip(tasks, heads, strict=True))
        print("  ".join([f"{result['path']:{left}}", *cells]))


def plot(results: list[dict[str, Any]], file: Path) -> str:
    """Means of groups, or each task, over tokens where all runs counted them, else over steps."""
    placed = [result for result in results if result["step"] is not None]
    if not placed:
        return "No picture: no checkpoint of a run was given."
    where, axis = ("tokens", "trained tokens") if all(r["tokens"] for r in placed) else ("step", "optimizer steps")
    figure = Figure(figsize=(5.5 * len(PLOTTED), 4.2))
    for panel, metric in zip(figure.subplots(1, len(PLOTTED)), PLOTTED, strict=True):
        names = [name for name in placed[0]["metrics"] if name.endswith("/" + metric)]
        for name in [name for name in names if name.partition("/")[0] in placed[0]["groups"]] or names:
            for run in dict.fromkeys(result["run"] for result in placed):
                line = [(result[where], result["metrics"][name]) for result in placed if result["run"] == run]
                panel.plot(*zip(*line, strict=True), marker=".", label=f"{run}, {name.partition('/')[0]}")
        panel.set(xlabel=axis, ylabel=metric)
        panel.legend(fontsize=7)
    figure.savefig(file, dpi=150)
    return str(file)


def main(argv: list[str] | None = None) -> None:
    """Find checkpoints, evaluate those that were not yet, show all."""
    given = parse(argv)
    state, processes, file = PartialState(), Processes.of_run(), given.output_dir / "evaluation.json"
    with processes.together():  # what goes wrong in one process ends all of them, by its name
        results = evaluate(given, file, state.device, processes)
    if processes.is_main:
        tell(results)
        print(f"\n{file}\n{plot(results, file.with_suffix('.png'))}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
