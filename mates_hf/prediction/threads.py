"""How many threads scoring may use: one a core, or fewer where workers share the cores.

Trade-off: the limit is a context variable and no argument, because a scorer that a user plugs in need not know of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

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
