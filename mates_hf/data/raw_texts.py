"""The column of texts that a model without a tokenizer scores.

Where it is used: `scored_column` is for influence models of tokens, this for one whose class says
`reads_texts = True`. Trade-off: such a model is handed the bytes where Arrow has them, so nothing is known of tokens;
their number is estimated (`TextSpans.num_targets`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mates_hf.data.column_types import find_path, holds_texts, is_null, type_at
from mates_hf.data.scored_column import SPAN_TARGETS, ScoredColumn, column_at, values_at
from mates_hf.data.text_spans import TextSpans
from mates_hf.records import IntArray

_ROWS_AT_ONCE = 2**16
_LOOKED_FOR = ("text",)  # the column that is scored without being named


def find_text_column(schema: Any, column: str | None) -> RawTexts:
    """Decide which column of texts is scored.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: Name of the column, with dots where it is nested (`meta.text`); None takes `text`.

    Returns:
        The column.

    Raises:
        ValueError: there is no such column (names those there are).
        TypeError: the column holds no texts.
    """
    name, path = find_path(schema, column, _LOOKED_FOR, "text")
    kind = type_at(schema, path)
    if not holds_texts(kind) and not is_null(kind):
        raise TypeError(
            f"Column `{name}` must hold texts (string), because a text influence model reads no tokens, got {kind}. "
            "Pass the column of texts, or score by the influence model that this one was distilled from. "
            "Conversations must be rendered first: `tokenizer.apply_chat_template(messages, tokenize=False)`."
        )
    return RawTexts(name, path)


class RawTexts(ScoredColumn):
    """Texts as they are; a null is an empty text."""

    def depends_on(self) -> list[Any]:
        """See `ScoredColumn`."""
        return [self.name, "bytes"]

    def open(self, dataset: Any, batch_size: int = 1000) -> OpenRawTexts:
        """See `ScoredColumn`; how many texts are read at once is not for the caller to say."""
        return OpenRawTexts(self, dataset.with_format("arrow", columns=[self.path[0]]))

    def open_table(self, table: Any, first_row: int = 0) -> OpenRawTexts:
        """See `ScoredColumn`."""
        return OpenRawTexts(self, table, first_row)

    def read_batch(self, batch: Mapping[str, Any]) -> TextSpans:
        """See `ScoredColumn`."""
        return TextSpans.of(values_at(batch, self.path))

    def stretches(self, dataset: Any, row: int) -> tuple[TextSpans, list[str | None]]:
        """See `ScoredColumn`; stretches of 32 words at most, which together are the text."""
        text = self.open(dataset).values(slice(row, row + 1))[0].as_py() or ""
        words = text.split(" ")
        parts = [" ".join(words[i : i + SPAN_TARGETS]) for i in range(0, len(words), SPAN_TARGETS)]
        found: list[str | None] = [*(f"{part} " for part in parts[:-1]), parts[-1]]
        return TextSpans.of(found), found

    def _bytes_of(self, value: Any) -> bytes:
        return bytes(value.encode())


class OpenRawTexts:
    """Rows of texts, opened once.

    Args:
        column: The column that is read.
        source: A `pyarrow.Table`, or a dataset that gives such tables.
        first_row: Number of the first row, for errors.
    """

    def __init__(self, column: RawTexts, source: Any, first_row: int = 0) -> None:
        self._column, self._source, self._first_row = column, source, first_row

    def parts(self, begin: int, end: int, *, in_place: bool) -> Iterator[tuple[int, TextSpans]]:
        """See `OpenRows`; texts are always read where they are."""
        for start in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, end))
            yield self._first_row + start, TextSpans.of(self.values(rows))

    def rows(self, ids: IntArray) -> TextSpans:
        """See `OpenRows`."""
        return TextSpans.of(self.values(ids.tolist()))

    def content(self, ids: IntArray) -> bytes:
        """See `OpenRows`."""
        return json.dumps(self.values(ids.tolist()).to_pylist()).encode()

    def row_bytes(self, begin: int, end: int) -> list[bytes]:
        """See `OpenRows`; a null is known apart from an empty text."""
        values = self.values(slice(begin, end)).to_pylist()
        return [b"" if value is None else b"t" + value.encode() for value in values]

    def values(self, rows: slice | list[int]) -> Any:
        """`pyarrow.ChunkedArray` of some rows' texts."""
        return column_at(self._source[rows], self._column.path)
