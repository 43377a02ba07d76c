"""Which checkpoint of a run can be resumed: the last one that was written to its end.

Where it is used: before `Trainer.train`, in place of `resume_from_checkpoint=True`. That takes the folder with the
highest number, also one that a killed run left half-written, and then stops with an error about a missing or damaged
file; nothing is lost, but nothing goes on either until someone deletes the folder.

    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))

Trade-off: files are recognised by their ends (a JSON object that closes, a zip archive's directory, a safetensors
header that agrees with the file's length), not by reading all of them: milliseconds for any size. Bytes that went bad
in the middle are left to the Trainer and to `resume.check_weights`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mates_hf.records import STATE_KEY

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TORCH_FILES = re.compile(r"(optimizer|scheduler|scaler|rng_state(_\d+)?)\.pth?|(pytorch|adapter)_model.*\.bin")
_LONGEST_HEADER = 100 * 2**20  # bytes; what safetensors itself allows


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint with the highest step that was written to its end; later ones are skipped with a warning.

    Args:
        output_dir: the run's `TrainingArguments.output_dir`.

    Returns:
        Its path, or None where there is none, for `Trainer.train(resume_from_checkpoint=...)`: a run without a
        checkpoint starts from the beginning.
    """
    found = [(int(match[1]), path) for path, match in _numbered(Path(output_dir)) if path.is_dir()]
    for step, path in sorted(found, reverse=True):
        fault = find_fault(path, step)
        if fault is None:
            return str(path)
        logger.warning("Checkpoint %s was not written to its end (%s): going back to the one before.", path, fault)
    return None


def find_fault(path: Path, step: int) -> str | None:
    """What shows that a checkpoint is not whole, or None.

    Args:
        path: the checkpoint's folder.
        step: the step in its name.

    Returns:
        A few words.
    """
    try:
        state = json.loads((path / _STATE_FILE).read_bytes())
    except FileNotFoundError:  # written last
        return f"it has no {_STATE_FILE}"
    except ValueError:
        return f"{_STATE_FILE} is cut short"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"{_STATE_FILE} is of another step"
    files = sorted(file for file in path.iterdir() if file.is_file())
    damaged = [file.name for file in files if not _is_whole(file)]
    if damaged:
        return f"{', '.join(damaged)} cut short"
    names = {file.name for file in files}
    for index in names.intersection(_INDEXES):
        content = json.loads((path / index).read_bytes())
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            return f"{index} names no files"
        missing = set(weight_map.values()) - names
        if missing:
            return f"{', '.join(sorted(missing))} missing"
    unwritten = _missing_random_states(state, names)
    if unwritten:
        return f"{', '.join(unwritten)} missing: a process was stopped before it had written its random state"
    sharded = any(
        entry.is_dir() for entry in path.iterdir()
    )  # FSDP, DeepSpeed and further adapters: their own folders
    if not (sharded or names.intersection(_WEIGHTS + _INDEXES)):
        return "it has no weights"
    return None


def num_random_states(world_size: int, save_on_each_node: bool) -> int:
    """How many processes write their random state into a checkpoint's folder, for this library's state in it.

    Args:
        world_size: Processes of the run.
        save_on_each_node: Whether each node writes a checkpoint of its own, on a disk of its own.

    Returns:
        The number, at least 1.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return min(local, world_size) if save_on_each_node else world_size


def _missing_random_states(state: Mapping[str, Any], names: set[str]) -> list[str]:
    """Files that other processes than the main one, which writes `trainer_state.json` last, should have written."""
    callbacks = state.get("stateful_callbacks")
    ours = callbacks.get(STATE_KEY) if isinstance(callbacks, Mapping) else None
    num = ours.get("num_random_states", 1) if isinstance(ours, Mapping) else 1
    if not isinstance(num, int) or num < 2 or "scheduler.pt" not in names:  # one process, or the model alone
        return []
    there = {name for name in names if re.fullmatch(r"rng_state_\d+\.pth", name)}
    wanted = [f"rng_state_{rank}.pth" for rank in range(num)]
    # On a node of its own the processes have other numbers than from 0 on.
    return [] if len(there) >= num else [name for name in wanted if name not in there]


def _numbered(output_dir: Path) -> list[tuple[Path, re.Match[str]]]:
    if not output_dir.is_dir():
        return []
    matches = [(path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in output_dir.iterdir()]
    return [(path, match) for path, match in matches if match is not None]


def _is_whole(path: Path) -> bool:
    """False where a file of a kind that a checkpoint is made of was cut short."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    elif path.suffix == ".safetensors":
        return _safetensors_length(path) == path.stat().st_size
    elif _TORCH_FILES.fullmatch(path.name):
        return zipfile.is_zipfile(path)
    return True


def _safetensors_length(path: Path) -> int:
    """Bytes that a safetensors file must have by its own header; -1 where that is cut short."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1
    return 8 + length + max(ends, default=0)
