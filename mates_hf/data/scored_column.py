"""The one column of a dataset that is scored: which it is, what it holds, and how its rows become tokens.

Where it is used: scoring decides once, from a dataset's schema, which column counts (`find_column`). After that
nothing asks again what the column holds. A dataset, an Arrow table of a batch and a batch of a stream are all read
through it. Trade-off: a text becomes exactly `tokenizer(text)`, truncated, never packed, so a score says what the text
alone is worth, and nothing of where a run that packs its texts would cut it.

Shape suffix: N rows.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mates_hf.data.arrow import physical_rows
from mates_hf.data.column_types import (
    TOKENS,
    check_types,
    find_path,
    holds_texts,
    holds_tokens,
    is_conversation,
    is_json,
    is_list,
    is_null,
    names_beside,
    type_at,
)
from mates_hf.data.conversations import check_chat_template, render_conversations
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.data.text_spans import TextSpans
from mates_hf.data.token_columns import TokenColumns, read_batch, read_lists
from mates_hf.records import IntArray

SPAN_TARGETS = 32  # of a row are explained together
_LOOKED_FOR = (TOKENS, "text", "messages")  # columns that are read without being named, the first there is


def unnamed_column(names: Sequence[str]) -> str | None:
    """The column that is read where none is named: `input_ids`, else `text`, else `messages`; None without any."""
    return next((found for found in _LOOKED_FOR if found in names), None)


def find_column(schema: Any, column: str | None, tokenizer: Any = None, max_length: int | None = None) -> ScoredColumn:
    """Decide which column is scored, and as what.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: Name of the column, with dots where it is nested (`meta.text`); None takes `input_ids`, else `text`,
            else `messages`.
        tokenizer: Tokenizer of the influence model's tokens, or None.
        max_length: Number of tokens that a text is cut to, or None.

    Returns:
        The column.

    Raises:
        ValueError: there is no such column (names those there are), or no tokenizer or chat template for it; or
            `labels` or `attention_mask` next to `input_ids` cannot count as what they are called.
        TypeError: the column holds neither texts, nor conversations, nor integer tokens.
    """
    name, path = find_path(schema, column, _LOOKED_FOR, "tokens, the text or the conversation")
    names = list(schema.names)
    kind = type_at(schema, path)
    is_chat = is_conversation(kind, name)
    if is_chat or holds_texts(kind) or (is_null(kind) and name == "text"):
        if tokenizer is None:
            raise ValueError(
                f"Column `{name}` holds {'conversations' if is_chat else 'texts'}, and no tokenizer is recorded with "
                "this influence model. Pass the training tokenizer: `MatesSelector.from_pretrained(path, "
                "tokenizer=tokenizer)`."
            )
        if is_chat:
            check_chat_template(tokenizer, name)
        return (Conversations if is_chat else Texts)(name, path, tokenizer, max_length)
    if not holds_tokens(kind) and not (is_null(kind) and name == TOKENS):
        raise TypeError(
            f"Column `{name}` must hold texts (string) or token ids (a list of integers), or conversations (lists of "
            f"`role` and `content`), got {kind}. Pass the one that does as `column=`; the columns are {names}."
        )
    check_types(schema, names_beside(names, name))
    return TokenIds(name, path, tokenizer, max_length)


class OpenRows(Protocol):
    """Rows of a dataset or of a table, opened once."""

    def parts(
        self, begin: int, end: int, *, in_place: bool
    ) -> Iterator[tuple[int, TokenRows | TokenSpans | TextSpans]]:
        """The rows from `begin` to before `end`, some at a time, each part with what errors call its first row."""

    def rows(self, ids: IntArray) -> TokenRows | TextSpans:
        """The rows `ids`, copied where they are tokens."""

    def content(self, ids: IntArray) -> bytes:
        """What the rows `ids` hold, for a key."""

    def row_bytes(self, begin: int, end: int) -> list[bytes]:
        """What each of the rows from `begin` to before `end` holds; no text is tokenised."""


@dataclasses.dataclass(frozen=True)
class ScoredColumn(abc.ABC):
    """A column to score; what it holds is its class.

    Attributes:
        name: Name of the column, with dots where it is nested.
        path: Names from the row down to the column.
        tokenizer: Tokenizer of the tokens that the model was fitted on; None where it is not known.
        max_length: Number of tokens that a text is cut to; None leaves it whole.
    """

    name: str
    path: tuple[str, ...]
    tokenizer: Any = None
    max_length: int | None = None

    @abc.abstractmethod
    def depends_on(self) -> list[Any]:
        """Plain JSON values: all but the rows and the influence model that a prediction depends on."""

    @abc.abstractmethod
    def open(self, dataset: Any, batch_size: int = 1000) -> OpenRows:
        """The rows of a `datasets.Dataset`, whatever its format; texts are tokenised `batch_size` at a time."""

    @abc.abstractmethod
    def open_table(self, table: Any, first_row: int = 0) -> OpenRows:
        """The rows of a `pyarrow.Table`, a null one as an empty one; errors call the first `first_row`."""

    @abc.abstractmethod
    def read_batch(self, batch: Mapping[str, Any]) -> TokenRows | TextSpans:
        """The rows of a batch as `datasets` hands it out of a stream: lists of plain Python values by column."""

    def names_among(self, names: Sequence[str]) -> list[str]:
        """Those of a dataset's columns that are read."""
        return [name for name in names if name == self.path[0] or name in names_beside(names, self.name)]

    def identities(self, batch: Mapping[str, Any]) -> list[bytes]:
        """What the rows of a stream's batch are known by, wherever they stand in it."""
        return [b"" if value is None else self._bytes_of(value) for value in values_at(batch, self.path)]

    def check_ids(self, rows: TokenRows, first_row: int = 0) -> None:
        """Refuse ids outside the vocabulary, for models that would look them up unchecked.

        Args:
            rows: Rows that were read from this column.
            first_row: Number of the first of them, for errors.

        Raises:
            ValueError: an id is negative, or not one of the tokenizer's.
        """
        limit = 2**63 if self.tokenizer is None else len(self.tokenizer)
        if len(rows.values) and (rows.values.min() < 0 or int(rows.values.max()) >= limit):
            where = int(np.flatnonzero((rows.values < 0) | (rows.values >= limit))[0])
            row = int(np.searchsorted(rows.offsets, where, side="right")) - 1
            raise ValueError(
                f"Token ids must be from 0 to below {limit}, got {int(rows.values[where])} in row {row + first_row}. "
                "They were made with another tokenizer than the influence model's, or untrained tokens are masked in "
                "`input_ids` instead of `labels`."
            )

    def stretches(self, dataset: Any, row: int) -> tuple[TokenRows | TextSpans, list[str | None]]:
        """One row in stretches of 32 targets at most; each begins with the token before its first target.

        Args:
            dataset: The `datasets.Dataset`.
            row: Number of the row.

        Returns:
            The stretches as rows, and the text of each; None without a tokenizer.
        """
        rows = self.open(dataset).rows(np.array([row]))
        assert isinstance(rows, TokenRows)
        ids, labels = rows.row(0)
        parts = [slice(cut, cut + SPAN_TARGETS + 1) for cut in range(0, max(len(ids) - 1, 0), SPAN_TARGETS)]
        found = TokenRows.from_lists([ids[part].tolist() for part in parts], [labels[part].tolist() for part in parts])
        if self.tokenizer is None:
            return found, [None] * len(parts)
        shown = [ids[part][0 if i == 0 else 1 :].tolist() for i, part in enumerate(parts)]
        return found, [self.tokenizer.decode(part) for part in shown]

    @abc.abstractmethod
    def _bytes_of(self, value: Any) -> bytes:
        """A value of the column that is not null."""


class TokenIds(ScoredColumn):
    """Lists of token ids; next to `input_ids`, columns `labels` and `attention_mask` count as in training."""

    def depends_on(self) -> list[Any]:
        """See `ScoredColumn`; a tokenizer only bounds the ids, and a large one takes 0.3 s to read."""
        return [self.name, False, self._num_tokens, self.max_length]

    def open(self, dataset: Any, batch_size: int = 1000) -> TokenColumns:
        """The rows where they lie on disk; all threads may read them."""
        return self._columns(dataset.data, physical_rows(dataset))

    def open_table(self, table: Any, first_row: int = 0) -> TokenColumns:
        """See `ScoredColumn`."""
        return self._columns(table, None, first_row)

    def read_batch(self, batch: Mapping[str, Any]) -> TokenRows:
        """See `ScoredColumn`."""
        return read_batch({**batch, self.name: values_at(batch, self.path)}, self.name)

    def _columns(self, table: Any, indices: IntArray | None, first_row: int = 0) -> TokenColumns:
        if len(self.path) > 1:  # set free of the structs around it
            import pyarrow as pa

            table = pa.table({self.name: column_at(table, self.path)})
        return TokenColumns(table, self.name, indices, first_row, self._num_tokens)

    @property
    def _num_tokens(self) -> int | None:
        return None if self.tokenizer is None else len(self.tokenizer)

    def _bytes_of(self, value: Any) -> bytes:
        return np.asarray(value, np.int64).tobytes()


class Texts(ScoredColumn):
    """Texts; each becomes exactly `tokenizer(text)`, truncated, and None an empty row."""

    def depends_on(self) -> list[Any]:
        """See `ScoredColumn`."""
        return [self.name, True, None if self.tokenizer is None else tokenizer_digest(self.tokenizer), self.max_length]

    def open(self, dataset: Any, batch_size: int = 1000) -> OpenTexts:
        """See `ScoredColumn`."""
        return OpenTexts(self, dataset.with_format("arrow", columns=[self.path[0]]), batch_size)

    def open_table(self, table: Any, first_row: int = 0) -> OpenTexts:
        """See `ScoredColumn`; the table is a batch."""
        return OpenTexts(self, table, max(1, table.num_rows), first_row)

    def read_batch(self, batch: Mapping[str, Any]) -> TokenRows:
        """See `ScoredColumn`."""
        return self.tokens_of(values_at(batch, self.path))

    def tokens_of(self, values: Sequence[Any], first_row: int = 0) -> TokenRows:
        """The tokens of values of the column; errors call the first one `first_row`."""
        texts = self._texts_of(values, first_row)
        where = [i for i, text in enumerate(texts) if text is not None]
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        found: list[list[int]] = [[] for _ in texts]
        if where:
            encoded = self.tokenizer([texts[i] for i in where], return_attention_mask=False, **cut, **self._written())
            for i, ids in zip(where, encoded["input_ids"], strict=True):
                found[i] = ids
        tokens, offsets, _ = read_lists(found, TOKENS, lambda i: f"row {i} of a batch")
        return TokenRows(values=tokens, offsets=offsets)

    def _texts_of(self, values: Sequence[Any], first_row: int) -> Sequence[str | None]:
        return values

    def _written(self) -> dict[str, Any]:
        """Arguments of the tokenizer that follow from how the texts were made."""
        return {}

    def _bytes_of(self, value: Any) -> bytes:
        return bytes(value.encode())

    def stored(self, values: Sequence[Any]) -> list[bytes]:
        """What each value is known by, a null apart from an empty text."""
        return [b"" if value is None else b"t" + value.encode() for value in values]


class Conversations(Texts):
    """Lists of messages; each becomes the text that the tokenizer's chat template makes of it."""

    def depends_on(self) -> list[Any]:
        """See `ScoredColumn`; the template counts too."""
        return [*super().depends_on(), json.dumps(self.tokenizer.chat_template)]

    def stored(self, values: Sequence[Any]) -> list[bytes]:
        """What each value is known by."""
        return [json.dumps(value, default=str).encode() for value in values]

    def _texts_of(self, values: Sequence[Any], first_row: int) -> Sequence[str | None]:
        return render_conversations(values, self.tokenizer, self.name, first_row)

    def _written(self) -> dict[str, Any]:
        return {"add_special_tokens": False}  # the template has written them

    def _bytes_of(self, value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, default=str).encode() if value else b""


class OpenTexts:
    """Rows of texts or conversations, tokenised when they are asked for.

    Args:
        column: The column that is read.
        source: A `pyarrow.Table`, or a dataset that gives such tables.
        batch_size: Number of rows that are tokenised at once.
        first_row: Number of the first row, for errors.
    """

    def __init__(self, column: Texts, source: Any, batch_size: int, first_row: int = 0) -> None:
        self._column, self._source, self._batch_size, self._first_row = column, source, batch_size, first_row

    def parts(self, begin: int, end: int, *, in_place: bool) -> Iterator[tuple[int, TokenRows | TokenSpans]]:
        """See `OpenRows`; texts are always tokenised first, never read in place."""
        for start in range(begin, end, self._batch_size):
            values = self._values(slice(start, min(start + self._batch_size, end)))
            yield self._first_row + start, self._column.tokens_of(values, self._first_row + start)

    def rows(self, ids: IntArray) -> TokenRows:
        """See `OpenRows`."""
        return self._column.tokens_of(self._values(ids.tolist()))

    def content(self, ids: IntArray) -> bytes:
        """See `OpenRows`."""
        return json.dumps(self._values(ids.tolist()), default=str).encode()

    def row_bytes(self, begin: int, end: int) -> list[bytes]:
        """See `OpenRows`."""
        return self._column.stored(self._values(slice(begin, end)))

    def _values(self, rows: slice | list[int]) -> list[Any]:
        return python_values(column_at(self._source[rows], self._column.path))


def column_at(table: Any, path: Sequence[str]) -> Any:
    """`pyarrow.ChunkedArray` of the column at a path; null where a struct above it is."""
    import pyarrow.compute as pc

    found = table.column(path[0])
    for name in path[1:]:
        found = pc.struct_field(found, name)
    return found


def python_values(column: Any) -> list[Any]:
    """Plain values of an Arrow column, with what `datasets` keeps as JSON (values of several types) read back."""
    values: list[Any] = column.to_pylist()
    return [_read_json(value, column.type) for value in values] if _has_json(column.type) else values


def _has_json(kind: Any) -> bool:
    import pyarrow as pa

    if is_list(kind):
        return _has_json(kind.value_type)
    return is_json(kind) or (pa.types.is_struct(kind) and any(_has_json(field.type) for field in kind))


def _read_json(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if is_json(kind):
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    if is_list(kind):
        return [_read_json(one, kind.value_type) for one in value]
    if isinstance(value, Mapping):
        return {field.name: _read_json(value[field.name], field.type) for field in kind}
    return value


def values_at(batch: Mapping[str, Any], path: Sequence[str]) -> list[Any]:
    """The column at a path of a batch of plain Python values."""
    found = list(batch[path[0]])
    for name in path[1:]:
        found = [None if value is None else value.get(name) for value in found]
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of how a tokenizer makes ids of a text, the same after saving and loading, and after any call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # what the last call set
            content.pop(state, None)
    else:
        content = {"vocab": tokenizer.get_vocab(), "special": tokenizer.all_special_ids}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
