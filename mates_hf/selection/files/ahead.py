"""Reading one batch while another is worked on.

Where it is used: where a part is scored and where it is written. Trade-off: one batch more in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made on another thread while the one before it is worked on.

    Args:
        items: What is read.

    Yields:
        The items, in their order.
    """
    nothing = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, nothing)
        while (item := following.result()) is not nothing:
            following = pool.submit(next, items, nothing)
            yield item  # type: ignore[misc]
