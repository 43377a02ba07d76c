"""What a checkpoint must hold for the data order to go on exactly, and reading it back.

Place in the flow: `MatesCallback` keeps a small dict in `TrainerState.stateful_callbacks`, so it is written with
`trainer_state.json`, the last file of a checkpoint. The orders themselves are in the round directories; the dict says
how far they were consumed.

Trade-off: the running mean of the weights is too large for JSON and lies beside the rounds, one file a checkpoint that
falls inside the averaging window.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mates_hf.config import MatesConfig
from mates_hf.records import STATE_KEY, MatesError, RoundMismatchError, read_json
from mates_hf.round_files import ROUND_FILE, round_path, set_aside
from mates_hf.training.checkpoints import last_complete_checkpoint
from mates_hf.training.digest import MARK, weight_marks

logger = logging.getLogger(__name__)

STATE_VERSION = 2


def saved_state(state: Any) -> dict[str, Any] | None:
    """This library's state in the checkpoint that a `TrainerState` comes from, or None where there is none.

    Args:
        state: as the Trainer resumed it, or fresh.

    Returns:
        What `Session.state` was when the checkpoint was saved.

    Raises:
        MatesError: another version of this library wrote it.
    """
    saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
    if saved is not None and saved.get("version") != STATE_VERSION:
        raise MatesError(
            f"The checkpoint's MatesCallback state must be of version {STATE_VERSION}, got {saved.get('version')!r}: "
            "resume with the mates_hf version that wrote it."
        )
    if saved is not None and saved["step"] == state.global_step:
        return dict(saved)
    if state.global_step:
        logger.warning(
            "The checkpoint at step %d has no state of MatesCallback: rounds are counted from here on.",
            state.global_step,
        )
    return None


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
        parameters = {name: p for name, p in model.named_parameters() if not hasattr(p, "to_local")}
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
    """The config that a resumed run goes on with: a run that began without a limit on copies stays without one.

    Args:
        saved: this library's state in the checkpoint, or None.
        config: as it was given.

    Returns:
        `config`; with `max_copies=None` where the checkpoint is older than that field and its default was given.
    """
    began_with = (saved or {}).get("config")
    is_default = config.max_copies == MatesConfig().max_copies
    if not is_default or not isinstance(began_with, Mapping) or "max_copies" in began_with:
        return config
    logger.warning(
        "The checkpoint is of a version without `max_copies`: the run goes on as it began, with `max_copies=None`. A "
        "new run chooses each text once a round."
    )
    return dataclasses.replace(config, max_copies=None)


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
                f"The checkpoint's MatesCallback state must have the {name} of its run, got {old!r}: its "
                "trainer_state.json was changed. Resume from another checkpoint."
            )
        if name == "config":  # fields that a later version added changed nothing in an older checkpoint
            old = {**MatesConfig(max_copies=None).to_dict(), **old}
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


def require_round(rounds_dir: Path, last_round: Mapping[str, Any], step: int) -> Path:
    """Directory of the round whose rows a checkpoint was trained on.

    Args:
        rounds_dir: where the run's rounds are.
        last_round: `number` and `order_sha256` of the round, from the checkpoint.
        step: the step being resumed at, for the message.

    Returns:
        The directory.

    Raises:
        MatesError: it is not there, or another attempt at the round has taken its place.
    """
    path = round_path(rounds_dir, last_round["number"])
    if not (path / ROUND_FILE).exists():
        raise MatesError(
            f"Resuming at step {step} needs the finished round `{path}`, which is not there. Move the `_mates` folder "
            "along with the checkpoints, or set `rounds_dir` to where it is. If `keep_rounds` had it deleted, resume "
            "from a later checkpoint."
        )
    found = read_json(path / ROUND_FILE).get("order_sha256", "none")
    if found != last_round["order_sha256"]:
        raise MatesError(
            f"Resuming at step {step} needs the selection that the checkpoint was trained on (SHA-256 "
            f"{last_round['order_sha256'][:12]}), but `{path}` holds another ({found[:12]}): the run was resumed from "
            "an earlier checkpoint since, and that round was run again. Resume from a later checkpoint of that "
            "attempt, or put the directory set aside as `.stale` back under its name."
        )
    return path


def round_before(rounds_dir: Path, number: int) -> Path | None:
    """Directory of the last finished round before a round, where there is one."""
    paths = (round_path(rounds_dir, earlier) for earlier in range(number - 1, -1, -1))
    return next((path for path in paths if (path / ROUND_FILE).exists()), None)


def last_passed(rounds_dir: Path, number: int) -> int | None:
    """The last round on disk, up to `number`, that passed the guard; `keep_rounds` deletes others."""
    for earlier in range(number, -1, -1):
        path = round_path(rounds_dir, earlier) / ROUND_FILE
        if path.exists() and read_json(path)["guard"]["decision"] == "select":
            return earlier
    return None


def last_fitted(rounds_dir: Path, number: int) -> int | None:
    """The last round on disk, up to `number`, that has an influence model: labels that rank nothing leave none."""
    for earlier in range(number, -1, -1):
        path = round_path(rounds_dir, earlier)
        if (path / ROUND_FILE).exists() and (path / "influence_model").exists():
            return earlier
    return None


def prune_rounds(rounds_dir: Path, output_dir: Path, number: int, keep: int) -> None:
    """Delete rounds that are neither among the newest nor asked for by a resume.

    Args:
        rounds_dir: where the run's rounds are.
        output_dir: where its checkpoints are.
        number: the last finished round.
        keep: how many of the newest stay.
    """
    needed = rounds_needed(rounds_dir, output_dir, number)
    for path in sorted(rounds_dir.glob("round-*")):
        digits = path.name.removeprefix("round-").split(".")[0]
        if digits.isdigit() and int(digits) <= number - keep and int(digits) not in needed and path.exists():
            # Out of the way first: what a kill leaves of it must not be taken for a round.
            shutil.rmtree(path if path.suffix == ".stale" else set_aside(path))


def rounds_needed(rounds_dir: Path, output_dir: Path, number: int) -> set[int]:
    """Rounds that a resume would ask for, from the last complete checkpoint or from the next one.

    A resume needs the round in training, the one before it (its rows are trained on until the switch), the last one
    that passed the guard, and the last one with an influence model; and it comes through those made since once more.

    Args:
        rounds_dir: where the run's rounds are.
        output_dir: where its checkpoints are.
        number: the last finished round.

    Returns:
        Their numbers.
    """
    last = [number]
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        callbacks = read_json(Path(checkpoint) / "trainer_state.json").get("stateful_callbacks", {})
        saved = callbacks.get(STATE_KEY, {}).get("last_round")
        last += [saved["number"]] if saved else []
    needed = set(range(min(last), number + 1))
    for latest in last:
        before = round_before(rounds_dir, latest)
        if before is not None:
            needed.add(read_json(before / ROUND_FILE)["number"])
        models = (last_passed(rounds_dir, latest), last_fitted(rounds_dir, latest))
        needed.update(each for each in models if each is not None)
    return needed


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
