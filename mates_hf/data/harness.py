"""Passages out of lm-evaluation-harness tasks: context and gold target as the harness scores them.

Place in the flow: `reference` turns them into token rows. Trade-off: few-shot examples, descriptions and chat
templates are left out, so a passage is the zero-shot text that a base model is scored on. lm-eval is an extra and is
imported only when a task has to be built.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")  # in the order of preference
TASKS_DIR = Path(__file__).parents[1] / "evaluation" / "tasks"  # of the task files that ship with this library


def load_task(task: Any, metadata: Mapping[str, Any] | None) -> Any:
    """The lm-eval task of a name, a YAML file or a config; an lm-eval task is returned as it is.

    Args:
        task: one of those.
        metadata: for lm-eval's `TaskManager`.

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
    spec: Any = str(task) if isinstance(task, Path) else task
    found = task_manager([spec], metadata).load(spec)["tasks"]
    if len(found) != 1:
        raise ValueError(
            f"`task` must be a single task, got {spec!r}, a group of {len(found)}. Take one of {sorted(found)}."
        )
    return next(iter(found.values()))


def task_manager(specs: Iterable[Any], metadata: Mapping[str, Any] | None) -> Any:
    """A task manager that knows the tasks asked for.

    The harness's own index of several thousand files, which takes some 10 seconds to read, is read only where a name
    has to be found in it.

    Args:
        specs: names, paths of YAML files, or configs.
        metadata: handed to each task.

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
        task: an lm-eval task.
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
    name = str(getattr(task, "task_name", None) or type(task).__name__)
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
        task: an lm-eval task.
        doc: one of its documents.

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
            f"Context and gold target of the lm-eval task `{getattr(task, 'task_name', task)}` must be texts, got "
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
            f"The gold target of the lm-eval task `{task.task_name}` must be one of its {len(choices)} choices, got "
            f"{gold!r}. A split without labels cannot be a reference: pass another `split`."
        )
    return str(choices[gold])
