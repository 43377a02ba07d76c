"""How many threads scoring may use, and how work is spread over them.

One thread a core, or fewer where workers share the cores. Trade-off: the limit is a context variable and no argument,
because a scorer that a user plugs in need not know of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mates_hf.data.rows import Piece

_PARTS_PER_THREAD = 8

_thread_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("mates_hf_thread_limit", default=None)


@contextlib.contextmanager
def at_most_threads(num: int | None) -> Iterator[None]:
    """Score with so many threads at most inside the `with`; None changes nothing. Workers that share cores want 1."""
    token = _thread_limit.set(_thread_limit.get() if num is None else num)
    try:
        yield
    finally:
        _thread_limit.reset(token)


def num_threads() -> int:
    """Threads that scoring uses here: `at_most_threads`, else one a core, as `NUMBA_NUM_THREADS` says."""
    import numba

    return _thread_limit.get() or int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def spread(
    work: Callable[[Piece], None], pieces: tuple[Piece, ...], parallel: bool | None = None, *, small: int, part: int
) -> None:
    """Do the pieces' work on threads where it is worth them, in parts of about equal size.

    Args:
        work: What is done with a piece; it lets go of the interpreter.
        pieces: Rows in buffers.
        parallel: True uses one thread a core, False one; None decides by `small`.
        small: Values, of all pieces together, below which threads are not worth starting.
        part: Values below which handing a part to a thread costs more than it saves.
    """
    threads = num_threads()
    total = sum(int(piece.lengths.sum()) for piece in pieces)
    if parallel is None:
        parallel = threads > 1 and total >= small
    if not parallel:
        for piece in pieces:
            work(piece)
        return
    goal = max(total // (_PARTS_PER_THREAD * threads), part)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [cut for piece in pieces for cut in _cut(piece, goal)]))


def _cut(piece: Piece, goal: int) -> list[Piece]:
    """A piece in parts of about so many values."""
    done = np.cumsum(piece.lengths)
    cuts = np.searchsorted(done, np.arange(goal, int(done[-1]) if len(done) else 0, goal))
    bounds = [0, *np.unique(cuts[cuts > 0]).tolist(), len(done)]
    parts = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        starts, lengths, where = (of_rows[begin:end] for of_rows in piece[1:])
        parts.append(Piece(piece.values, starts, lengths, where))
    return parts
