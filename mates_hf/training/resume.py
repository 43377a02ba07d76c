"""What a checkpoint must hold for the data order to go on exactly, and reading it back.

Place in the flow: `MatesCallback` keeps a small dict in `TrainerState.stateful_callbacks`, so it is written with
`trainer_state.json`, the last file of a checkpoint. The orders themselves are in the round directories; the dict says
how far they were consumed.

Trade-off: the running mean of the weights is too large for JSON and lies beside the rounds, one file a checkpoint that
falls inside the averaging window.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mates_hf.records import ROUND_FILE, MatesError, RoundMismatchError, round_path, set_aside

logger = logging.getLogger(__name__)

STATE_KEY = "mates_hf"
STATE_VERSION = 1


def weight_marks(model: torch.nn.Module) -> dict[str, str]:
    """A short hash of up to 1,024 entries of each trainable parameter: unequal where one was not restored."""
    marks = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
            marks[name] = hashlib.sha256(picked.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return marks


def check_weights(model: torch.nn.Module, marks: Mapping[str, str], checkpoint: Path | None) -> None:
    """Prove that the model resumed; restore from the checkpoint what the Trainer left out.

    Some transformers versions leave a parameter unrestored (the output head of a GPT-NeoX checkpoint in 5.23).

    Args:
        model: the model as the Trainer resumed it.
        marks: `weight_marks` of the model when the checkpoint was saved; empty where they were not.
        checkpoint: the checkpoint's folder, where it can be told.

    Raises:
        MatesError: parameters differ from the ones saved and the checkpoint does not hold them.
    """
    now = weight_marks(model)
    wrong = [name for name, mark in marks.items() if now.get(name) != mark]
    if not wrong:
        return
    path = checkpoint / "model.safetensors" if checkpoint is not None else None
    if path is not None and path.exists():
        from safetensors import safe_open

        parameters = dict(model.named_parameters())
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in set(wrong) & set(file.keys()):
                parameters[name].copy_(file.get_tensor(name))
        now = weight_marks(model)
        restored = [name for name in wrong if now.get(name) == marks[name]]
        wrong = [name for name in wrong if name not in restored]
        if restored:
            logger.warning("The Trainer left %s unrestored; restored from %s.", ", ".join(restored), path)
    if wrong:
        raise MatesError(
            f"The model must resume with the weights of its checkpoint; {len(wrong)} parameters differ "
            f"({', '.join(wrong[:4])}). Load the checkpoint's weights before training, or start a new run."
        )


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with another config, pool or reference than the checkpoint was made with.

    Args:
        saved: this library's state in the checkpoint.
        current: `Run.identity` of the run that resumes.

    Raises:
        RoundMismatchError: names what differs and shows both values.
    """
    for name, new in current.items():
        old = saved[name]
        if old != new:
            differing = {key: (old.get(key), new.get(key)) for key in {*old, *new} if old.get(key) != new.get(key)}
            shown = ", ".join(f"{key}: checkpoint {a!r}, this run {b!r}" for key, (a, b) in sorted(differing.items()))
            raise RoundMismatchError(
                f"A resumed run must have the {name} it was started with; they differ in {shown}. Use the same "
                f"{name}, or start a new run in another `output_dir`."
            )


def require_round(rounds_dir: Path, number: int, step: int) -> Path:
    """Directory of a round that a checkpoint needs.

    Args:
        rounds_dir: where the run's rounds are.
        number: the round.
        step: the step being resumed at, for the message.

    Returns:
        The directory.

    Raises:
        MatesError: it is not there.
    """
    path = round_path(rounds_dir, number)
    if not (path / ROUND_FILE).exists():
        raise MatesError(
            f"Resuming at step {step} needs the finished round `{path}`, which is not there. Move the `_mates` folder "
            "along with the checkpoints, or set `rounds_dir` to where it is."
        )
    return path


def set_earlier_run_aside(rounds_dir: Path) -> None:
    """A run that does not resume never loads a round: rename what an earlier run left to `.stale`."""
    left = sorted(path for path in rounds_dir.glob("round-*") if path.suffix != ".stale")
    for path in left:
        set_aside(path)
    for path in rounds_dir.glob("average-*.safetensors"):
        path.unlink()
    if left:
        logger.info("%d rounds of an earlier run set aside in %s", len(left), rounds_dir)


def average_path(rounds_dir: Path, step: int) -> Path:
    """Where the running mean of the weights is kept for the checkpoint at `step`."""
    return rounds_dir / f"average-{step}.safetensors"


def prune_averages(rounds_dir: Path, output_dir: Path, step: int) -> None:
    """Delete running means whose checkpoint is gone."""
    for path in rounds_dir.glob("average-*.safetensors"):
        saved_step = path.stem.removeprefix("average-")
        if saved_step != str(step) and not (output_dir / f"checkpoint-{saved_step}").exists():
            path.unlink(missing_ok=True)
