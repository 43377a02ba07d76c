"""Passages out of lm-evaluation-harness tasks: context and gold target as the harness scores them.

Where it is used: `reference` turns them into token rows. Trade-off: few-shot examples, descriptions and chat
templates are left out, so a passage is the zero-shot text that a base model is scored on. lm-eval is an extra and is
imported only when a task has to be built.

The code of a task may draw from the global random streams (GPQA shuffles the choices of each document so). Whatever
runs it does so inside `as_lm_eval_seeds`, so that documents are those of `lm_eval` itself, whoever drew before.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.collated import forked_rng
from mates_hf.data.passages import first_rows
from mates_hf.paths import expand_path

logger = logging.getLogger(__name__)

PYTHON_SEED, OTHER_SEED = 0, 1234  # those of `lm_eval.simple_evaluate`; the other is numpy's, torch's and few-shot's
SPLITS = ("train", "validation", "test")  # in the order of preference
TASKS_DIR = Path(__file__).parents[1] / "evaluation" / "tasks"  # of the task files that ship with this library


@contextlib.contextmanager
def as_lm_eval_seeds(begin: Any = None) -> Iterator[None]:
    """Run a task's code on the random streams that lm-eval gives it; the caller's are put back as found.

    Args:
        begin: Streams to continue at, as `random_streams` gives them; None begins as lm-eval begins.

    Yields:
        Nothing.
    """
    import torch

    with forked_rng(PYTHON_SEED):
        if begin is None:
            np.random.seed(OTHER_SEED)  # noqa: NPY002
            torch.default_generator.manual_seed(OTHER_SEED)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed(OTHER_SEED)
        else:
            python, numpy, torch_cpu = begin
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            torch.set_rng_state(torch_cpu)
        yield


def random_streams() -> Any:
    """Where the streams of python, numpy and torch are, for `as_lm_eval_seeds` to continue at."""
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def read_passages(
    task: Any, metadata: Mapping[str, Any] | None, split: str | None, limit: int | None
) -> tuple[str, str, bool, list[tuple[str, str]]]:
    """The passages of a task: what a reference task is made of.

    Args:
        task: The task, in any form that `load_task` takes.
        metadata: Metadata that lm-eval's `TaskManager` gets.
        split: The split to read, in the form that `documents` takes.
        limit: Number of first documents to read; None reads all.

    Returns:
        The task's name, the split used, whether lm-eval evaluates on that one, and context and gold target of each
        document.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no such task or split, a group instead of a task, or a document without gold target.
    """
    with as_lm_eval_seeds():
        built = load_task(task, metadata)
        name, used, docs = documents(built, split)
        is_evaluated = used == ("test" if built.has_test_docs() else "validation")
        return name, used, is_evaluated, [prompt_and_target(built, doc) for doc in first_rows(docs, limit)]


def evaluated_texts(task: Any) -> list[str]:
    """Context and gold target of each document that an lm-eval task is evaluated on, joined."""
    with as_lm_eval_seeds():
        return ["".join(prompt_and_target(task, doc)) for doc in task.eval_docs]


def load_task(task: Any, metadata: Mapping[str, Any] | None) -> Any:
    """The lm-eval task of a name, a YAML file or a config; an lm-eval task is returned as it is.

    Args:
        task: A task's name, a YAML file, a config or an lm-eval task.
        metadata: Metadata that lm-eval's `TaskManager` gets.

    Returns:
        The task, its documents loaded.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task, or it is a group or tag of several.
    """
    if not isinstance(task, (str, Path, dict)):
        if not hasattr(task, "doc_to_text"):
            raise ValueError(f"`task` must be a name, YAML file, config or lm-eval task, got {type(task).__name__}.")
        return task
    spec = spec_of(task)
    found = task_manager([spec], metadata).load(spec)["tasks"]
    if len(found) != 1:
        raise ValueError(
            f"`task` must be a single task, got {spec!r}, a group of {len(found)}. Take one of {sorted(found)}."
        )
    return next(iter(found.values()))


def name_of(task: Any) -> str:
    """An lm-eval task's name, without a draw: its own `task_name` draws a random one whenever it is asked."""
    named = getattr(getattr(task, "config", None), "task", None)
    return str(named or getattr(task, "task_name", None) or type(task).__name__)


def spec_of(task: Any) -> Any:
    """What lm-eval is asked for: a YAML file's path as text, without `~`; anything else as it is."""
    is_file = isinstance(task, Path) or (isinstance(task, str) and task.endswith((".yaml", ".yml")))
    return str(expand_path(task)) if is_file else task


def task_manager(specs: Iterable[Any], metadata: Mapping[str, Any] | None) -> Any:
    """A task manager that knows the tasks asked for.

    The harness's own index of several thousand files, which takes some 10 seconds to read, is read only where a name
    has to be found in it.

    Args:
        specs: Names, paths of YAML files, or configs.
        metadata: Metadata that each task gets.

    Returns:
        An lm-eval `TaskManager`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task or file.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('lm-eval tasks need lm-eval: `pip install "mates-hf[eval]"`.') from error
    files = [spec for spec in specs if isinstance(spec, str) and spec.endswith((".yaml", ".yml"))]
    absent = [file for file in files if not Path(file).is_file()]
    if absent:
        raise ValueError(f"`task` must be an existing file where it ends in .yaml, got {absent[0]!r}.")
    names = [spec for spec in specs if isinstance(spec, str) and spec not in files]
    arguments = {"include_path": str(TASKS_DIR), "metadata": dict(metadata or {})}
    manager = TaskManager(include_defaults=False, **arguments)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_defaults=True, **arguments)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"`task` must be a task that lm-eval knows, got {name!r}."
                f"{' Close: ' + ', '.join(close) + '.' if close else ''} `lm-eval ls tasks` lists them all; the path "
                "of a YAML file of your own works too."
            )
    return manager


def documents(task: Any, split: str | None) -> tuple[str, str, Any]:
    """The task's name, the split used, and that split's documents.

    Args:
        task: An lm-eval task.
        split: `"train"`, `"validation"` or `"test"`; None takes the first of them there is, and warns where the
            harness evaluates on that one.

    Returns:
        Name, split, and the documents as a sequence.

    Raises:
        ValueError: the task has no such split.
    """
    there = {
        "train": task.has_training_docs(),
        "validation": task.has_validation_docs(),
        "test": task.has_test_docs(),
    }
    available = [name for name in SPLITS if there[name] and _has_data(task, name)]
    name = name_of(task)
    if not available or (split is not None and split not in available):
        raise ValueError(f"`split` must be a split of the task `{name}` ({available}), got {split!r}.")
    used = split or available[0]
    if split is None and used == ("test" if there["test"] else "validation"):
        logger.warning(
            "The lm-eval task `%s` has no split but the one it is evaluated on (%s): results on it will be biased by "
            "the selection. Report other tasks, or other passages of this one.",
            name,
            used,
        )
    docs = {"train": task.training_docs, "validation": task.validation_docs, "test": task.test_docs}[used]()
    return name, used, docs if hasattr(docs, "__len__") else list(docs)


def prompt_and_target(task: Any, doc: Any) -> tuple[str, str]:
    """Context and gold target of a document; their concatenation is what the harness scores or would have generated.

    Args:
        task: An lm-eval task.
        doc: A document of the task.

    Returns:
        The context, empty where the whole text is scored, and the target with the white space that joins them.

    Raises:
        ValueError: the document has no gold target, or its context is no text.
    """
    kind = task.OUTPUT_TYPE
    config = getattr(task, "config", None)
    delimiter = getattr(config, "target_delimiter", " ")
    if kind == "loglikelihood_rolling":
        prompt, target = "", task.doc_to_target(doc)
    elif getattr(task, "multiple_input", False):  # as in WinoGrande: the choices are contexts, the target is shared
        prompt, target = _choose(task, doc, task.doc_to_text(doc)), f"{delimiter}{task.doc_to_target(doc)}"
    else:
        prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
        target = target[0] if isinstance(target, list) and target else target
        if isinstance(target, int) and not isinstance(target, bool):
            target = _choose(task, doc, target)
        # The harness scores a plain target as it stands (it brings its own white space), a choice after the delimiter.
        if kind != "loglikelihood" and isinstance(target, str):
            target = f"{delimiter}{target}"
    if not isinstance(prompt, str) or not isinstance(target, str):
        raise ValueError(
            f"Context and gold target of the lm-eval task `{name_of(task)}` must be texts, got "
            f"{type(prompt).__name__} and {type(target).__name__}. Take another task, or `from_dataset`."
        )
    return prompt, target


def _has_data(task: Any, split: str) -> bool:
    """False where a task's config names a split that its dataset does not have (a folder without that file)."""
    config, dataset = getattr(task, "config", None), getattr(task, "dataset", None)
    named = getattr(config, {"train": "training_split"}.get(split, f"{split}_split"), None)
    return named is None or not isinstance(dataset, Mapping) or named in dataset


def _choose(task: Any, doc: Any, gold: Any) -> str:
    choices = task.doc_to_choice(doc)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(
            f"The gold target of the lm-eval task `{name_of(task)}` must be one of its {len(choices)} choices, got "
            f"{gold!r}. A split without labels cannot be a reference: pass another `split`."
        )
    return str(choices[gold])
