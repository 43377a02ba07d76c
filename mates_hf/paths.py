"""Paths that a user gives: a home folder written as `~` is one, in every argument that takes a path.

Where it is used: left of all folders. Trade-off: a folder that is really called `~` must be written `./~`.
"""

from __future__ import annotations

import os
from pathlib import Path


def expand_path(path: str | os.PathLike[str]) -> Path:
    """A path that the user gave, with `~` and `~name` as the folders they stand for.

    Args:
        path: any path.

    Returns:
        The path.

    Raises:
        ValueError: there is no such home folder.
    """
    given = os.fspath(path)
    expanded = os.path.expanduser(given)
    if given.startswith("~") and expanded == given:
        raise ValueError(
            f"A path that begins with `~` must name a home folder that there is, got {given!r}. Write the folder out, "
            "or begin with `./~` where a folder has that name."
        )
    found = Path(expanded)
    # A path drops its `./`, and would be taken for one of the home folder when it is given again.
    return found.absolute() if str(found).startswith("~") else found
