"""What a checkpoint must hold for the data order to go on exactly, and reading it back.

Where it is used: `MatesCallback` keeps a small dict in `TrainerState.stateful_callbacks`, so it is written with
`trainer_state.json`, the last file of a checkpoint. The orders themselves are in the round directories; the dict says
how far they were consumed.

Trade-off: the running mean of the weights is too large for JSON and lies beside the rounds, one file a checkpoint that
falls inside the averaging window; `rounds_on_disk` finds both.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mates_hf.config import BEFORE, MatesConfig
from mates_hf.engine.averaging import trainable_parameters
from mates_hf.engine.digest import MARK, weight_marks
from mates_hf.errors import MatesError, RoundMismatchError
from mates_hf.records import STATE_KEY

logger = logging.getLogger(__name__)

STATE_VERSION = 2


def saved_state(state: Any) -> dict[str, Any] | None:
    """This library's state in the checkpoint that a `TrainerState` comes from, or None where there is none.

    Args:
        state: The state as the Trainer resumed it, or a fresh one.

    Returns:
        What `Session.state` was when the checkpoint was saved.

    Raises:
        MatesError: another version of this library wrote it.
    """
    saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
    if saved is not None:
        require_version(saved)
    if saved is not None and saved["step"] == state.global_step:
        return dict(saved)
    if state.global_step:
        logger.warning(
            "The checkpoint at step %d has no state of MatesCallback: rounds are counted from here on.",
            state.global_step,
        )
    return None


def require_version(saved: Mapping[str, Any]) -> None:
    """Refuse the state that another version of this library saved.

    Args:
        saved: this library's state in a checkpoint.

    Raises:
        MatesError: names both versions.
    """
    if saved.get("version") != STATE_VERSION:
        raise MatesError(
            f"The checkpoint's state of mates_hf must be of version {STATE_VERSION}, got {saved.get('version')!r}: "
            "resume with the mates_hf version that wrote it."
        )


def check_weights(model: torch.nn.Module, marks: Mapping[str, str], checkpoint: Path | None) -> None:
    """Prove that the model resumed; restore from the checkpoint what the Trainer left out.

    The Trainer of transformers 5 does not translate names back that `save_pretrained` changed, and leaves such
    parameters as they were made: the output head of GPT-NeoX, the experts of Mixtral and Qwen3-MoE.

    Args:
        model: the model as the Trainer resumed it.
        marks: `weight_marks` of the model when the checkpoint was saved; empty where they were not.
        checkpoint: the checkpoint's folder, where it can be told.

    Raises:
        MatesError: parameters differ from the ones saved and the checkpoint does not hold them.
    """
    if any(not mark.startswith(MARK) for mark in marks.values()):
        logger.warning(
            "The checkpoint's marks of the weights are of an earlier version of mates_hf and cannot be compared: make "
            "sure that the Trainer restored every parameter."
        )
        return
    now = weight_marks(model)
    wrong = [name for name, mark in marks.items() if now.get(name) != mark]
    if not wrong:
        return
    if checkpoint is not None:
        parameters = {name: p for name, p in trainable_parameters(model).items() if not hasattr(p, "to_local")}
        with torch.no_grad():
            for name, value in _read_parameters(model, checkpoint, set(wrong) & set(parameters)).items():
                parameters[name].copy_(value)
        now = weight_marks(model)
        restored = [name for name in wrong if now.get(name) == marks[name]]
        wrong = [name for name in wrong if name not in restored]
        if restored:
            logger.warning("The Trainer left %s unrestored; restored from %s.", ", ".join(restored), checkpoint)
    if wrong:
        raise MatesError(
            f"The model must resume with the weights of its checkpoint; {len(wrong)} parameters differ "
            f"({', '.join(wrong[:4])}). Load the checkpoint's weights before training, or start a new run."
        )


def _read_parameters(model: torch.nn.Module, checkpoint: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of some parameters: under their own names, else as `from_pretrained` translates them."""
    from safetensors import safe_open
    from transformers import PreTrainedModel

    found: dict[str, torch.Tensor] = {}
    path = checkpoint / "model.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in names & set(file.keys())}
    missing = names - set(found)
    if missing and isinstance(model, PreTrainedModel) and (checkpoint / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        found.update((name, p.detach()) for name, p in saved.named_parameters() if name in missing)
    return found


def warn_without_optimizer(checkpoint: Path | None) -> None:
    """Say that a run goes on, but not as it would have, where its checkpoint holds the model alone."""
    if checkpoint is not None and not any(checkpoint.glob("*optimizer*")):
        logger.warning(
            "%s has no optimizer state (`save_only_model`): the rows already selected are trained on in their order, "
            "but the optimizer starts anew, so weights and later selections differ from the uninterrupted run's.",
            checkpoint,
        )


def config_to_resume(saved: Mapping[str, Any] | None, config: MatesConfig) -> MatesConfig:
    """The config that a resumed run goes on with: what a version did without a field, its runs go on with.

    Args:
        saved: this library's state in the checkpoint, or None.
        config: The config as it was given.

    Returns:
        `config`; with the value of `config.BEFORE` for each field that the checkpoint is older than, where its default
        was given.
    """
    began_with = (saved or {}).get("config")
    if not isinstance(began_with, Mapping):
        return config
    default, kept = MatesConfig(), {}
    for name, value in BEFORE.items():
        given = getattr(config, name)
        if name not in began_with and given == getattr(default, name) != value:
            logger.warning(
                "The checkpoint is of a version without `%s`: the run goes on as it began, with `%s=%s`. A new run "
                "has `%s=%s`.", name, name, value, name, given,
            )  # fmt: skip
            kept[name] = value
    return dataclasses.replace(config, **kept)


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with another config, pool or reference than the checkpoint was made with; tell of another probe.

    Another probe, influence model, batch or clipping makes other labels, not another run: it is warned of, and rounds
    that were measured otherwise and are come through again are set aside and run anew.

    Args:
        saved: this library's state in the checkpoint.
        current: `Run.identity` of the run that resumes.

    Raises:
        RoundMismatchError: names what differs and shows both values.
    """
    for name, new in current.items():
        old = saved.get(name)
        if name == "measured_with":
            _tell_other_measure(old, new)
            continue
        if not isinstance(old, Mapping):
            raise MatesError(
                f"The checkpoint's state of mates_hf must have the {name} of its run, got {old!r}: the checkpoint was "
                "changed (its trainer_state.json, where a Trainer wrote it). Resume from another checkpoint."
            )
        if name == "config":  # fields that a later version added changed nothing in an older checkpoint
            old = {**MatesConfig(**BEFORE).to_dict(), **old}
            old = {key: old[key] for key in {*saved[name], *new}}
        if old != new:
            shown = _differences(old, new)
            raise RoundMismatchError(
                f"A resumed run must have the {name} it was started with; they differ in {shown}. Use the same "
                f"{name}, or start a new run in another `output_dir`."
            )


def _tell_other_measure(old: Any, new: Mapping[str, Any]) -> None:
    """Warn where labels will be made with something else; an older checkpoint does not say with what they were."""
    if isinstance(old, Mapping) and old != new:
        logger.warning(
            "Labels from here on are made with something else than before (%s): they may be of another kind or scale "
            "than those that earlier rounds leave to the influence model.", _differences(old, new),
        )  # fmt: skip


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between a checkpoint and the run that resumes it."""
    differing = {key: (old.get(key), new.get(key)) for key in {*old, *new} if old.get(key) != new.get(key)}
    return ", ".join(f"{key}: checkpoint {a!r}, this run {b!r}" for key, (a, b) in sorted(differing.items()))
