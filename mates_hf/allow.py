"""Which rows may be used at all, by what they have in a column: a licence, a consent, a source.

Where it is used: left of all folders; `MatesConfig.allow`, `MatesSelector.filter` and `mates-hf fit --allow` read what
a user gives through this, and `data/allowed` finds the rows. Trade-off: entries are compared as text and must be
equal, so that what is not named is not allowed, a misspelt entry included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Allow = dict[str, list[str]]

RULE = "None, a dict of lists of entries by column, or text such as 'licence=cc-by,cc0;consent=yes'"


def parse_allow(given: Any) -> Allow | None:
    """What a user gives, as one mapping.

    Args:
        given: A mapping from a column to its allowed entries, or text: columns with `;` between them, each with `=`
            and its entries with commas between them. None allows every row.

    Returns:
        The allowed entries as text, by column, each once and sorted; None where all are allowed.

    Raises:
        ValueError: it is neither, or a column has no entry.
    """
    if given is None:
        return None
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(";") if part.strip()]
        given_by_column = {name.strip(): [entry.strip() for entry in rest.split(",")] for name, _, rest in parts}
        if len(given_by_column) < len(parts):
            raise ValueError(f"`allow` must be {RULE}, got {given!r}.")
    elif isinstance(given, Mapping):
        given_by_column = dict(given)
    else:
        raise ValueError(f"`allow` must be {RULE}, got {given!r}.")
    found: Allow = {}
    for name, entries in given_by_column.items():
        fine = isinstance(name, str) and name and isinstance(entries, (list, tuple)) and entries
        if not fine or not all(isinstance(each, (str, int, bool)) and str(each) for each in entries):
            raise ValueError(f"`allow` must be {RULE}, got {given!r}.")
        found[name] = sorted({str(each) for each in entries})
    if not found:
        raise ValueError(f"`allow` must be {RULE}, got {given!r}.")
    return dict(sorted(found.items()))
