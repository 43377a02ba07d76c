"""The rounds and running means of a run on disk: found again by a resume, set aside by a new run, pruned.

Where it is used: `session` asks for what a checkpoint needs, and has old rounds deleted where `keep_rounds` is set.

Trade-off: nothing but `keep_rounds` deletes a round, whoever made it, and what it cannot delete it leaves: a run never
ends over what it no longer needs.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mates_hf.disk import read_json, replace_path
from mates_hf.errors import MatesError
from mates_hf.records import STATE_KEY
from mates_hf.round_files import ROUND_FILE, round_path
from mates_hf.round_writer import is_set_aside, is_whole, set_aside
from mates_hf.training.checkpoints import last_complete_checkpoint

logger = logging.getLogger(__name__)

_DELETED = ".deleted"  # ends the names of directories that are being deleted
# What can go wrong where files of a run were damaged, moved or locked while it goes on.
_FAULTS = (OSError, MatesError, KeyError, TypeError, ValueError)


def require_round(rounds_dir: Path, last_round: Mapping[str, Any], step: int) -> Path:
    """Directory of the round whose rows a checkpoint was trained on.

    One that lacks only its last rename, because a power cut took that back, gets its name.

    Args:
        rounds_dir: where the run's rounds are.
        last_round: `number` and `order_sha256` of the round, from the checkpoint.
        step: the step being resumed at, for the message.

    Returns:
        The directory.

    Raises:
        MatesError: it is not there, or another attempt at the round has taken its place; names the directory that
            holds it where one does.
    """
    path = round_path(rounds_dir, last_round["number"])
    wanted = last_round["order_sha256"]
    found = _order_of(path)
    if found == wanted:
        return path
    partial = path.with_suffix(".partial")
    if is_whole(partial, wanted):
        if path.exists():
            set_aside(path)
        replace_path(partial, path)
        logger.warning("`%s` was whole but for its name, which it has now: was the power cut?", path)
        return path
    others = [other for other in sorted(rounds_dir.glob(f"{path.name}.*")) if is_set_aside(other)]
    aside = [str(other) for other in others if _order_of(other) == wanted]
    if aside:
        raise MatesError(
            f"Resuming at step {step} needs the selection that the checkpoint was trained on (SHA-256 {wanted[:12]}), "
            f"which `{aside[-1]}` holds: another start has set it aside. To continue the earlier run, move what is at "
            f"`{path}` away, if anything is, and rename `{aside[-1]}` to it. Do the same for the rounds before it "
            "that were set aside with it."
        )
    if found is None:
        raise MatesError(
            f"Resuming at step {step} needs the finished round `{path}`, which is not there. Move the `_mates` folder "
            "along with the checkpoints, or set `rounds_dir` to where it is. If `keep_rounds` had it deleted, resume "
            "from a later checkpoint."
        )
    raise MatesError(
        f"Resuming at step {step} needs the selection that the checkpoint was trained on (SHA-256 {wanted[:12]}), but "
        f"`{path}` holds another ({found[:12]}), and no directory set aside as `.stale` holds it: the run was resumed "
        "from an earlier checkpoint since, and that round was run again. Resume from a later checkpoint of that "
        "attempt."
    )


def _order_of(path: Path) -> str | None:
    """Hash of the order that a finished round decided on; None where there is no finished round."""
    if not (path / ROUND_FILE).exists():
        return None
    return str(read_json(path / ROUND_FILE).get("order_sha256", "none"))


def round_before(rounds_dir: Path, number: int) -> Path | None:
    """Directory of the last finished round before a round, where there is one."""
    paths = (round_path(rounds_dir, earlier) for earlier in range(number - 1, -1, -1))
    return next((path for path in paths if (path / ROUND_FILE).exists()), None)


def last_passed(rounds_dir: Path, number: int) -> int | None:
    """The last round on disk, up to `number`, that passed the guard; `keep_rounds` deletes others."""
    for earlier in range(number, -1, -1):
        path = round_path(rounds_dir, earlier) / ROUND_FILE
        is_there = path.exists() and (path.parent / "influence_model").exists()
        if is_there and read_json(path)["guard"]["decision"] == "select":
            return earlier
    return None


def last_fitted(rounds_dir: Path, number: int) -> int | None:
    """The last round on disk, up to `number`, that has an influence model: labels that rank nothing leave none."""
    for earlier in range(number, -1, -1):
        path = round_path(rounds_dir, earlier)
        if (path / ROUND_FILE).exists() and (path / "influence_model").exists():
            return earlier
    return None


def set_earlier_run_aside(rounds_dir: Path, output_dir: Path) -> int:
    """A run that does not resume never loads a round: rename what an earlier run left to `.stale`.

    Running means stay while the checkpoint that they belong to is there: it can still be resumed.

    Args:
        rounds_dir: where the run's rounds go.
        output_dir: where its checkpoints go.

    Returns:
        How many rounds were set aside.
    """
    left = [path for path in sorted(rounds_dir.glob("round-*")) if not is_set_aside(path) and path.suffix != _DELETED]
    for path in left:
        set_aside(path)
    prune_averages(rounds_dir, output_dir)
    if left:
        logger.info("%d rounds of an earlier run set aside in %s", len(left), rounds_dir)
    return len(left)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last complete checkpoint of a run with rounds, where there is one."""
    try:
        found = last_complete_checkpoint(output_dir)
        callbacks = None if found is None else read_json(Path(found) / "trainer_state.json").get("stateful_callbacks")
    except _FAULTS as error:  # it is only told of
        logger.warning("The checkpoints in `%s` cannot be read: %s", output_dir, error)
        return None
    if found is None:
        return None
    return Path(found) if isinstance(callbacks, Mapping) and STATE_KEY in callbacks else None


def prune_rounds(
    rounds_dir: Path, output_dir: Path, number: int, keep: int, saved: Sequence[int] | None = None
) -> None:
    """Delete rounds that are neither among the newest nor asked for by a resume; what cannot be deleted stays.

    Those that were set aside go as well, unless a checkpoint that is still there was trained on one of them.

    Args:
        rounds_dir: where the run's rounds are.
        output_dir: where its checkpoints are.
        number: the last finished round.
        keep: how many of the newest stay.
        saved: the rounds that the last checkpoints of a loop without a Trainer were trained on; None where the
            Trainer's checkpoints tell. Running means that are older than all rounds that stay are deleted as well.
    """
    try:
        needed = rounds_needed(rounds_dir, output_dir, number, saved)
        old = [path for path in sorted(rounds_dir.glob("round-*")) if _number(path) in range(number - keep + 1)]
        old = [path for path in old if _number(path) not in needed]
        aside = [path for path in old if is_set_aside(path)]
        if aside and {_order_of(path) for path in aside} & set(_orders_of_checkpoints(output_dir)):
            old = [path for path in old if path not in aside]
    except _FAULTS as error:
        logger.warning("Old rounds in `%s` are kept, since it cannot be told who needs them: %s", rounds_dir, error)
        return
    for path in [*rounds_dir.glob(f"round-*{_DELETED}"), *old]:
        _delete(path)
    if saved is not None:
        _prune_old_averages(rounds_dir, min(number - keep + 1, *needed))


def _prune_old_averages(rounds_dir: Path, first: int) -> None:
    """Delete running means of checkpoints that are older than a round: its boundary is behind them all."""
    path = round_before(rounds_dir, first + 1)
    since = 0 if path is None else int(read_json(path / ROUND_FILE)["step"])
    for average in rounds_dir.glob("average-*.safetensors"):
        step = average.name.removeprefix("average-").split(".")[0]
        if step.isdigit() and int(step) < since:
            _unlink(average)


def _delete(path: Path) -> None:
    """Delete a directory, as far as that goes; a file that is open may stay on NFS, and goes with a later try."""
    try:
        if path.is_symlink():
            path.unlink()
            return
        if path.suffix != _DELETED:
            # Out of the way first: what a kill leaves of it must not be taken for a round.
            away = path.with_name(path.name + _DELETED)
            if away.exists():
                shutil.rmtree(away)
            replace_path(path, away)
            path = away
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("`%s` cannot be deleted now, and the run does not need it: %s", path, error)


def _number(path: Path) -> int:
    """Number of a round by its directory's name, whatever it ends in; -1 where it has none."""
    digits = path.name.removeprefix("round-").split(".")[0]
    return int(digits) if digits.isdigit() else -1


def _orders_of_checkpoints(output_dir: Path) -> Iterator[str]:
    """Hashes of the orders that checkpoints were trained on."""
    for path in output_dir.glob("checkpoint-*/trainer_state.json"):
        try:
            callbacks = read_json(path).get("stateful_callbacks", {})
            last_round = callbacks.get(STATE_KEY, {}).get("last_round")
        except (OSError, MatesError, AttributeError):  # half-written, or rotated away this moment
            continue
        if last_round:
            yield str(last_round["order_sha256"])


def rounds_needed(rounds_dir: Path, output_dir: Path, number: int, saved: Sequence[int] | None = None) -> set[int]:
    """Rounds that a resume would ask for, from the last complete checkpoint or from the next one.

    A resume needs the round in training, the one before it (its rows are trained on until the switch), the last one
    that passed the guard, and the last one with an influence model; and it comes through those made since once more.

    Args:
        rounds_dir: where the run's rounds are.
        output_dir: where its checkpoints are.
        number: the last finished round.
        saved: Numbers of the last rounds that saved states of a loop of one's own name. None: a Trainer's checkpoints
            in `output_dir` say it.

    Returns:
        Their numbers.
    """
    needed_by_stream: set[int] = set()
    last = [number, *(saved or ())[-2:]]  # a loop may be killed while it writes the last checkpoint
    checkpoint = last_complete_checkpoint(output_dir) if saved is None else None
    if checkpoint is not None:
        callbacks = read_json(Path(checkpoint) / "trainer_state.json").get("stateful_callbacks", {})
        last_round = callbacks.get(STATE_KEY, {}).get("last_round")
        last += [last_round["number"]] if last_round else []
        if last_round and "stream" in callbacks[STATE_KEY]:
            needed_by_stream = rounds_of_buffer(rounds_dir, callbacks[STATE_KEY])
    needed = set(range(min(last), number + 1)) | needed_by_stream
    for latest in last:
        before = round_before(rounds_dir, latest)
        if before is not None:
            needed.add(read_json(before / ROUND_FILE)["number"])
        models = (last_passed(rounds_dir, latest), last_fitted(rounds_dir, latest))
        needed.update(each for each in models if each is not None)
    return needed


def rounds_of_buffer(rounds_dir: Path, state: Mapping[str, Any]) -> set[int]:
    """Rounds by whose models a stream's buffers are made from the one on that a checkpoint lies in.

    Args:
        rounds_dir: where the run's rounds are.
        state: this library's state in the checkpoint.

    Returns:
        Their numbers, and those of the rounds whose models they kept.
    """
    found: set[int] = set()
    path: Path | None = round_path(rounds_dir, state["last_round"]["number"])
    while path is not None and (path / ROUND_FILE).exists():
        info = read_json(path / ROUND_FILE)
        scored_by = info["stream"]["scored_by"]
        found |= {info["number"]} | ({scored_by} if scored_by is not None else set())
        if info["from_position"] <= state["stream"]["buffer"]["position"]:
            break
        path = round_before(rounds_dir, info["number"])
    return found


def average_path(rounds_dir: Path, step: int) -> Path:
    """Where the running mean of the weights is kept for the checkpoint at `step`."""
    return rounds_dir / f"average-{step}.safetensors"


def prune_averages(rounds_dir: Path, output_dir: Path, step: int | None = None) -> None:
    """Delete running means whose checkpoint is gone, and what kills left of such files.

    Args:
        rounds_dir: where they are.
        output_dir: where the run's checkpoints are.
        step: whose checkpoint is written next; None: no checkpoint is.
    """
    for path in rounds_dir.glob("average-*.safetensors*"):
        saved_step = path.name.removeprefix("average-").split(".")[0]
        if saved_step == str(step) or (path.suffix != ".tmp" and _has_checkpoint(path, saved_step, output_dir)):
            continue
        _unlink(path)


def _unlink(path: Path) -> None:
    """Delete a file, as far as that goes."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("`%s` cannot be deleted now, and the run does not need it: %s", path, error)


def _has_checkpoint(path: Path, step: str, output_dir: Path) -> bool:
    """Whether the checkpoint of a running mean is there, or may be: several runs can share a `rounds_dir`."""
    from safetensors import SafetensorError, safe_open

    if (output_dir / f"checkpoint-{step}").exists():
        return True
    try:
        with safe_open(path, framework="np") as file:
            theirs = (file.metadata() or {}).get("output_dir")
    except (SafetensorError, OSError):
        return False
    return theirs is not None and (Path(theirs) / f"checkpoint-{step}").exists()
