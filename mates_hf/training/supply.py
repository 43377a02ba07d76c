"""Where the rows of a run come from: a pool whose rows are known, or a stream. This is where the difference is made.

Where it is used: `callback` and `start`, which ask for a pool, a ledger and a sampler and get those of the one kind or
the other. What they are asked afterwards has the same names in both. Trade-off: a few of those answers are empty for
one kind; in exchange rounds, guard, clock, records and resume know nothing of streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.allow import parse_allow
from mates_hf.config import MatesConfig
from mates_hf.data.allowed import allowed_rows
from mates_hf.data.collated import Collator
from mates_hf.data.columns import fixed_positions
from mates_hf.data.pool import NUM_IDENTITY_ROWS, CandidatePool
from mates_hf.data.spool import Spool
from mates_hf.data.stream import LENGTH, MatesStream
from mates_hf.data.stream_pool import StreamPool
from mates_hf.disk import read_array
from mates_hf.engine.processes import Processes
from mates_hf.errors import UnsupportedSettingError
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import RunPlan
from mates_hf.selection.stream_buffers import BufferSizes, require_rows, sizes_for
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.blocked import MARKS_FILE, Blocked, read_removed
from mates_hf.training.clock import RowClock
from mates_hf.training.journal import finish_pending
from mates_hf.training.run import Run
from mates_hf.training.sampler import ScheduledSampler
from mates_hf.training.session import Session
from mates_hf.training.stream.files import stream_dir
from mates_hf.training.stream.maker import BufferMaker
from mates_hf.training.stream.sampler import StreamSampler


def open_pool(dataset: Any, collate_fn: Collator | None) -> CandidatePool:
    """The candidate pool of a run.

    Args:
        dataset: What is trained on: a map-style dataset or a `MatesStream`.
        collate_fn: The collator of the dataloader.

    Returns:
        The pool.
    """
    return (StreamPool if isinstance(dataset, MatesStream) else CandidatePool)(dataset, collate_fn)


def is_stream(pool: CandidatePool) -> bool:
    """Whether a pool is a stream."""
    return isinstance(pool, StreamPool)


def num_rows_of(pool: CandidatePool) -> int:
    """Rows that a run may train on; of a stream more than any run has."""
    return LENGTH if is_stream(pool) else len(pool)


def told_rows(session: Session) -> str:
    """The rows of a run, for a line."""
    if isinstance(session.sampler, StreamSampler):
        sizes = session.sampler.maker.sizes
        return (
            f"a stream in buffers of {sizes.rows} rows, which set {sizes.set_aside} aside to be probed and train on "
            f"{sizes.kept} where they are selected from"
        )
    return f"{len(session.run.pool)} candidates"


def make_ledger(pool: CandidatePool, seed: int, blocked: Blocked | None) -> Ledger | StreamLedger:
    """What says which rows a round may draw; never those that are blocked."""
    if is_stream(pool):
        return StreamLedger(seed)
    ledger = Ledger(len(pool), seed)
    ledger.blocked = None if blocked is None else blocked.mask
    return ledger


def blocked_rows(
    pool: CandidatePool, config: MatesConfig, rounds_dir: Path, processes: Processes, *, resumes: bool
) -> Blocked | None:
    """The rows of a pool that the run must not use. All processes must call it.

    Args:
        pool: everything that may be trained on.
        config: the run's.
        rounds_dir: where its rounds go, which say what was removed.
        processes: those that train the model together.
        resumes: whether the run continues one that had rounds; rows that were removed from another run have no
            meaning in this one.

    Returns:
        The rows; None of a stream, which `check_stream` looks at.

    Raises:
        ValueError: the pool has no such column, or no row is allowed.
        MatesError: what was removed cannot be read.
    """
    with processes.together():
        if processes.is_main:
            finish_pending(rounds_dir)
    if is_stream(pool):
        return None
    allow, removed = parse_allow(config.allow), np.zeros(0, np.int64)
    allowed = None if allow is None else allowed_rows(pool.dataset, allow)
    if resumes:
        with processes.together():
            if processes.is_main:
                removed = read_removed(rounds_dir, len(pool))
                processes.publish({"removed": len(removed)}, rows=removed)
            else:
                removed = processes.receive()[1]["rows"]
    return Blocked(len(pool), allowed, removed)


def pool_identity(
    pool: CandidatePool,
    saved: Mapping[str, Any] | None,
    blocked: Blocked | None,
    rounds_dir: Path,
    processes: Processes,
) -> dict[str, Any]:
    """What tells a run's pool from others; that of its beginning where only removed rows are other than they were.

    All processes must call it.

    Args:
        pool: everything that may be trained on.
        saved: this library's state in the checkpoint that is resumed, or None.
        blocked: the rows that the run must not use; None of a stream.
        rounds_dir: where its rounds are, and the marks of its rows.
        processes: those that train the model together.

    Returns:
        `CandidatePool.identity`, or what the checkpoint has for it.
    """
    found = pool.identity()
    began = None if saved is None else saved.get("pool")
    if blocked is None or not len(blocked.removed) or not isinstance(began, Mapping) or began == found:
        return found
    with processes.together():
        if processes.is_main:
            marks = read_array(rounds_dir / MARKS_FILE, np.uint64)
            marks = np.zeros(0, np.uint64) if marks is None else np.array(marks)
            processes.publish({}, marks=marks)
        else:
            marks = processes.receive()[1]["marks"]
    now = pool.row_marks()
    if len(marks) != len(now) or any(began.get(name) != found[name] for name in ("num_rows", "features")):
        return found
    stays = ~np.isin(fixed_positions(len(pool), NUM_IDENTITY_ROWS), blocked.removed)
    return dict(began) if np.array_equal(marks[stays], now[stays]) else found


def make_sampler(
    run: Run, own: Any, clock: RowClock, saved: Mapping[str, Any] | None, *, finished: bool
) -> ScheduledSampler | StreamSampler:
    """What gives the rows of a run.

    Args:
        run: the run's state.
        own: the sampler that was there.
        clock: steps and positions of this call.
        saved: this library's state in the checkpoint that is resumed, or None.
        finished: the run has taken all its steps.

    Returns:
        The sampler, not installed anywhere yet.
    """
    if not isinstance(run.pool, StreamPool):
        num_rows = len(run.pool)
        return ScheduledSampler(own, clock, saved, num_rows=num_rows, finished=finished, blocked=run.blocked)
    step_rows = clock.batch_rows * clock.accumulation
    sizes = _sizes(run.pool.stream, run.config, step_rows, saved)
    maker = BufferMaker(run, sizes, Spool(_spool_dir(run.pool.stream, run.rounds_dir), sizes.rows))
    return StreamSampler(maker, clock, saved, step_rows=step_rows, finished=finished)


# Columns of a pool that are read row by row, and what does as well for a stream.
_NOT_OF_STREAMS = {
    "allow": "filter the stream itself with `.filter(...)`, before it is shuffled",
    "group_column": "give each source its share with `datasets.interleave_datasets(..., probabilities=...)`",
    "score_column": "filter the stream itself by it with `.filter(...)`",
}


def check_stream(pool: CandidatePool, config: MatesConfig, influence_model: Any, plan: RunPlan, saved: Any) -> None:
    """Refuse what cannot hold for a stream, before the first step; nothing where the pool is none.

    Args:
        pool: everything that may be trained on.
        config: the run's.
        influence_model: predicts influence.
        plan: when rounds happen.
        saved: this library's state in the checkpoint that is resumed, or None.

    Raises:
        ValueError: the stream is known to have too few rows.
        UnsupportedSettingError: names the setting and the way out.
    """
    if not isinstance(pool, StreamPool):
        return
    found = []
    if pool.beyond_text:
        found.append(
            f"its rows have `{'`, `'.join(pool.beyond_text)}`, and buffers of a stream are chosen from by text: load "
            "it without streaming, or part by part"
        )
    if int(version("datasets").split(".")[0]) < 4:
        found.append("`datasets` before 4.0 does not find its place in a stream again: `pip install -U datasets`")
    if config.candidate_scope == "pool":
        found.append(
            "`candidate_scope='pool'` chooses from all rows, and those of a stream are not read yet: use 'slice', by "
            "which each buffer is chosen from"
        )
    if config.max_passes is not None and config.max_passes > 1:
        found.append(
            f"`max_passes={config.max_passes}` goes through a pool again, and a stream is read once: use 1, and "
            "`.repeat(...)` of the stream"
        )
    if config.drift_check_steps is not None:
        found.append(
            "`drift_check_steps` measures rows that are still to be trained on, and those of a stream are not read "
            "yet: use None, and shorter rounds"
        )
    if config.document_column is not None and config.document_column not in pool.stream_columns:
        found.append(f"`document_column={config.document_column!r}` is no column of the stream: name one of its own")
    found += [
        f"`{name}={getattr(config, name)!r}` is not read from a stream: leave it out, and {instead}"
        for name, instead in _NOT_OF_STREAMS.items()
        if getattr(config, name) is not None
    ]
    if not getattr(influence_model, "runs_beside_training", False):
        found.append(
            f"{type(influence_model).__name__} needs a model while rows are fetched: use an influence model that "
            "`runs_beside_training`, such as NgramInfluenceModel"
        )
    if found:
        raise UnsupportedSettingError(f"MatesCallback cannot select data from this stream: {'; '.join(found)}.")
    sizes = _sizes(pool.stream, config, plan.batch_rows, saved)
    require_rows(plan, sizes, pool.stream.num_rows)


def _sizes(stream: MatesStream, config: MatesConfig, step_rows: int, saved: Mapping[str, Any] | None) -> BufferSizes:
    """Sizes of a run's buffers, which are those that it began with."""
    if saved is not None and "stream" in saved:
        return BufferSizes(*saved["stream"]["sizes"])
    return sizes_for(stream.buffer_rows, config, step_rows)


def _spool_dir(stream: MatesStream, rounds_dir: Path) -> Path:
    """Where buffers' rows go; in a folder that the user gave, by a name that tells one run from another."""
    if stream.spool_dir is None:
        return stream_dir(rounds_dir) / "spool"
    name = hashlib.sha256(str(rounds_dir.resolve()).encode()).hexdigest()[:12]
    return stream.spool_dir / f"mates-{name}"
