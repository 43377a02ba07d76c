"""Where a run's rounds go: found out, proven to take them, and locked, before the first step.

Where it is used: in `on_train_begin`, in the main process, after everything else was checked. What fails here would
otherwise fail at the first boundary, thousands of steps in.

Trade-off: free space is what the file system says. Behind a quota it may say more than it gives; a write that fails
later ends the run with the file's name, and the round is done again when the run is resumed.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.data.columns import fixed_positions
from mates_hf.disk import make_directory, write_array, written_whole
from mates_hf.engine.fragments import whole_size
from mates_hf.paths import expand_path
from mates_hf.selection.plan import RunPlan, num_candidates
from mates_hf.training.blocked import MARKS_FILE, set_removed_aside
from mates_hf.training.disk_errors import DiskError, disk_errors_named
from mates_hf.training.history import History, set_history_aside
from mates_hf.training.lock import RoundsLock, released_on_error
from mates_hf.training.refit import refit_models
from mates_hf.training.rounds_on_disk import newest_checkpoint, set_earlier_run_aside
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

_NUM_LOOKED_AT = 64  # rows of the pool whose tokens say what a probed row takes
_INFLUENCE_MODEL_BYTES = 2**26  # of an influence model that is not fitted yet: an n-gram model's tables


def run_folders(args: Any, state: Any, config: MatesConfig, trainer: Any) -> tuple[Path, Path]:
    """Where this run's checkpoints and rounds go; each trial of a search has folders of its own.

    The rounds of a trial are below `_mates`, not below the trial's checkpoints: the Trainer's upload to the Hub leaves
    out names that begin with `_` only where they are at the top of `output_dir`.

    Args:
        args: the run's `TrainingArguments`.
        state: its `TrainerState`.
        config: the run's `MatesConfig`.
        trainer: the Trainer that trains; None where it is not known.

    Returns:
        The folder of the checkpoints and that of the rounds, which need not be there.
    """
    output_dir = Path(args.output_dir)
    rounds_dir = expand_path(config.rounds_dir or output_dir / "_mates")
    if not state.is_hyper_param_search:
        return output_dir, rounds_dir
    trial = getattr(trainer, "_trial", None)
    if trial is not None:
        trial_dir = Path(trainer._get_output_dir(trial))
    elif state.trial_name:
        trial_dir = output_dir / state.trial_name
    else:
        return output_dir, rounds_dir
    name = re.sub(r"[^\w.-]", "_", trial_dir.name).lstrip(".") or "_"
    return trial_dir, rounds_dir / (name if not name.startswith("round-") else f"run-{name}")


def open_rounds(run: Run, plan: RunPlan, output_dir: Path, *, resumes: bool, step: int, owner: Any) -> RoundsLock:
    """Make sure that the run can write its rounds, keep others out, and set aside what an earlier run left.

    Called in the main process, before anything of the run is written.

    Args:
        run: the run's state.
        plan: when rounds happen.
        output_dir: where its checkpoints go.
        resumes: the run continues one that had rounds.
        step: the optimizer step it starts after.
        owner: who holds the lock.

    Returns:
        The lock on the folder.

    Raises:
        DiskError: the folder cannot be made or written to, or has less room than a round takes.
        LockedError: another run that lives writes to it.
    """
    rounds_dir = run.rounds_dir
    with disk_errors_named(rounds_dir, any_of_them=True):
        make_directory(rounds_dir)
        lock = RoundsLock(rounds_dir, owner)
    try:
        with disk_errors_named(rounds_dir):
            _try_to_write(rounds_dir)
            check_room(run, plan, step)
            if resumes:
                refit_models(run)
            else:
                _start_anew(rounds_dir, output_dir, step)
                (rounds_dir / MARKS_FILE).unlink(missing_ok=True)
    except BaseException:
        lock.release()
        raise
    return lock


def leave_marks(run: Run, history: History, lock: RoundsLock | None) -> None:
    """Write what a run leaves beside its rounds, once nothing refuses it any more.

    Args:
        run: the run, in its main process.
        history: that of its `train()` call.
        lock: that of its folder, which is let go of where this fails.

    Raises:
        DiskError: the disk refuses it.
    """
    with released_on_error(lock), disk_errors_named(run.rounds_dir):
        history.write()
        if run.blocked is not None:
            run.blocked.write(run.rounds_dir)
            if not (run.rounds_dir / MARKS_FILE).exists() and not run.num_removed:
                write_array(run.rounds_dir / MARKS_FILE, run.pool.row_marks())


def _start_anew(rounds_dir: Path, output_dir: Path, step: int) -> None:
    """Set aside what an earlier run left; where that could have been resumed, say so."""
    earlier = newest_checkpoint(output_dir) if not step else None
    set_earlier_run_aside(rounds_dir, output_dir)
    set_history_aside(rounds_dir)
    set_removed_aside(rounds_dir)
    if earlier is not None:
        logger.warning(
            "`%s` is of a run with rounds, and this run starts anew: that run's rounds are set aside as `.stale`. To "
            "continue it, stop this run and call `trainer.train(resume_from_checkpoint=%r)`.",
            earlier, str(earlier),
        )  # fmt: skip


def _try_to_write(rounds_dir: Path) -> None:
    """Make, write, flush and delete a file, as rounds will."""
    path = rounds_dir / ".written"
    with written_whole(path) as file:
        file.write(bytes(4096))
    path.unlink()


def check_room(run: Run, plan: RunPlan, step: int) -> None:
    """Compare the free space with what a round takes, and with what all rounds that stay take.

    Args:
        run: the run's state.
        plan: when rounds happen.
        step: the optimizer step the run starts after.

    Raises:
        DiskError: not even one round fits; says what it is made of.
    """
    num_left = sum(planned.boundary_step > step for planned in plan.rounds)
    if not num_left:
        return
    free = shutil.disk_usage(run.rounds_dir).free
    passing, staying = round_bytes(run, plan)
    needed = sum(passing.values()) + sum(staying.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in {**staying, **passing}.items() if size)
    if free < needed:
        raise DiskError(
            f"`{run.rounds_dir}` must have {_size(needed)} free for a round ({parts}), got {_size(free)}. Free some "
            "space, set `rounds_dir` to a larger disk, or lower `num_probes`."
        )
    kept = num_left if run.config.keep_rounds is None else min(num_left, run.config.keep_rounds + 2)
    total = sum(passing.values()) + kept * sum(staying.values())
    if free < total:
        logger.warning(
            "`%s` has %s free, and the %d rounds that will be there take about %s (a round: %s). Set `keep_rounds` "
            "or `rounds_dir`, or the disk is full before the run ends.",
            run.rounds_dir, _size(free), kept, _size(total), parts,
        )  # fmt: skip


def round_bytes(run: Run, plan: RunPlan) -> tuple[dict[str, int], dict[str, int]]:
    """About how much disk the largest round of a run takes, by its parts.

    With P probed rows of t trained tokens, M candidates, k selected rows and N pool rows:

    - probe shards: 8 P t, the losses at either side in float32; deleted when the round's labels are there
    - running means: two of the trainable parameters (the last checkpoint's and the one in the making), in the mean's
      type, where a checkpoint may fall into the averaging window
    - labels: 40 P, of which 4 are what the last round's model predicts, and 4 P t for the derivatives of tokens
    - scores: 16 M, of which 8 are the candidate's number
    - order: 8 k
    - ledger: 2 N / 8, a bit a row for those trained on and those probed; where passes may follow, 3 N / 8
    - influence model: as large as the largest that is there, 64 MiB where none is

    Args:
        run: the run's state.
        plan: when rounds happen.

    Returns:
        Bytes that only a round in the making takes, and bytes that stay, by part.
    """
    pool, config = run.pool, run.config
    num_selected = max(planned.num_rows for planned in plan.rounds)
    scored = len(pool) if config.candidate_scope == "pool" else num_candidates(num_selected, config.selection_ratio)
    looked_at = fixed_positions(len(pool), _NUM_LOOKED_AT)
    rows = pool.candidates(looked_at) if pool.beyond_text else pool.token_rows(looked_at)
    targets = float(rows.num_targets.mean())
    probed_tokens = int(config.num_probes * targets)
    mean = sum(
        whole_size(parameter) * max(parameter.element_size(), 4)
        for parameter in run.model.parameters()
        if parameter.requires_grad
    )
    passing = {"probe shards": 8 * probed_tokens, "running means": 2 * mean if config.window_steps else 0}
    staying = {
        "labels": 40 * config.num_probes + 4 * probed_tokens,
        "scores": 16 * min(scored, len(pool)),
        "order": 8 * num_selected,
        "ledger": (2 if config.max_passes == 1 else 3) * -(-len(pool) // 8),
        "influence model": _largest_model(run.rounds_dir) or _INFLUENCE_MODEL_BYTES,
    }
    return passing, staying


def _largest_model(rounds_dir: Path) -> int:
    """Bytes of the largest influence model of a round that is there; 0 without one."""
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in rounds_dir.glob("round-????/influence_model")
    ]
    return max(sizes, default=0)


def _size(num_bytes: float) -> str:
    """Bytes for a sentence."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
