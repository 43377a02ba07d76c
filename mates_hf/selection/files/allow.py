"""Which rows of a file may be used at all, by what they have in columns such as their licence.

Where it is used: before a row is scored, and again where its file is written and where its group is read, so that
these three count the same rows. Trade-off: nothing of it is kept; of Parquet the columns are read next to the scored
one, and of JSON Lines each line is read whole, as Python objects.

Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mates_hf.allow import Allow
from mates_hf.data.allowed import is_allowed, is_allowed_arrow
from mates_hf.data.column_types import field_path
from mates_hf.data.scored_column import column_at
from mates_hf.selection.files.lines import Lines, lines_of, value_at
from mates_hf.selection.files.plan import Part
from mates_hf.selection.prefix import Mask


@dataclasses.dataclass(frozen=True)
class AllowedRows:
    """The rows that may be used.

    Attributes:
        allow: Allowed entries by column, as text; nested columns with dots.
    """

    allow: Allow

    def require_columns(self, part: Part, schema: Any) -> list[tuple[str, ...]]:
        """Names from the row down to each column.

        Args:
            part: The file.
            schema: Its `pyarrow.Schema`, of JSON Lines as the first rows have it.

        Returns:
            The names, in the order of the columns.

        Raises:
            ValueError: the file has no such column.
        """
        found = []
        for column in self.allow:
            path = field_path(schema, column)
            if path is None:
                raise ValueError(
                    f"`allow` must name columns of the files, got {column!r}, and `{part.url}` has the columns "
                    f"{list(schema.names)}."
                )
            found.append(path)
        return found

    def of_table(self, table: Any, paths: Sequence[tuple[str, ...]]) -> Mask:
        """(N,) bool, which rows of a `pyarrow.Table` may be used, by columns at these paths."""
        mask = np.ones(table.num_rows, np.bool_)
        for (column, wanted), path in zip(self.allow.items(), paths, strict=True):
            mask &= is_allowed_arrow(column_at(table, path), wanted, column)
        return mask

    def of_lines(self, lines: Lines) -> tuple[Mask, dict[int, str]]:
        """Which lines may be used, and which cannot be read and so may not.

        Args:
            lines: N lines.

        Returns:
            (N,) bool, and what is wrong with a line, by its number among these.
        """
        mask, bad = np.zeros(len(lines), np.bool_), {}
        for number in range(len(lines)):
            line = lines.line(number)
            try:
                found = [(value_at(line, column), wanted, column) for column, wanted in self.allow.items()]
            except (ValueError, RecursionError) as error:
                bad[number] = f"it must be one JSON object ({error})"
            else:
                mask[number] = all(is_allowed(*one) for one in found)
        return mask, bad


def lines_among(lines: Lines, mask: Mask) -> Lines:
    """Some lines alone, in bytes of their own."""
    if mask.all():
        return lines
    ranges = zip(lines.starts[mask].tolist(), lines.nexts[mask].tolist(), strict=True)
    return lines_of(b"".join(lines.content[start:stop] for start, stop in ranges))
