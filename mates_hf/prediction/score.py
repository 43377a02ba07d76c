"""Scoring a corpus: from a column of texts or tokens to each row's predicted influence.

Place in the flow: between a fitted influence model and `selection/`. A `Scorer` is the model with its tokenizer and
one column, small enough to be sent to worker processes. Trade-off: token columns are read where Arrow has them, so
that the n-gram model scores at the speed of memory; models that want rows of their own get a copy, a batch at a time.

Every row is scored alone: neither its neighbours, nor the batch, nor the number of threads or processes changes a bit
of an n-gram prediction. Sign: > 0 helps, higher is better.

Shape suffixes: N rows, T tokens over all rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.columns import physical_rows, stretches
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.data.text_columns import (
    column_at,
    field_path,
    is_conversation,
    python_values,
    render_conversations,
    type_at,
    values_at,
)
from mates_hf.data.token_columns import (
    TOKENS,
    TokenColumns,
    check_types,
    holds_texts,
    holds_tokens,
    names_beside,
    read_batch,
    read_lists,
)
from mates_hf.errors import InfluenceError
from mates_hf.prediction.artifacts import model_digest
from mates_hf.prediction.threads import at_most_threads
from mates_hf.records import FloatArray, IntArray

_VERSION = 1  # of what a score is; raised when the same model gives other numbers, so that no cache is stale
_TOKENS_AT_ONCE = 1 << 22  # 9 to 23 bytes each
_LOOKED_FOR = ("input_ids", "text", "messages")  # columns that are scored without being named, the first there is


class Predictions(NamedTuple):
    """What was predicted of N rows.

    Attributes:
        influence: (N,) float32 predicted influence in the unit of the labels, higher is better; the model's intercept
            where a row has no target.
        num_targets: (N,) int32 trained tokens of each row.
    """

    influence: FloatArray
    num_targets: npt.NDArray[np.int32]


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


def find_column(schema: Any, column: str | None) -> tuple[str, bool]:
    """Which column to score.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: its name, that of a nested one with dots (`meta.text`); None takes `input_ids`, else `text`, else
            `messages`.

    Returns:
        The name, and True where it holds texts or conversations.

    Raises:
        ValueError: there is no such column; names those there are. Or `labels` or `attention_mask` beside `input_ids`
            cannot count as what they are called.
        TypeError: the column holds neither texts, nor conversations, nor integer tokens.
    """
    import pyarrow as pa

    names = list(schema.names)
    name = column if column is not None else next((found for found in _LOOKED_FOR if found in names), None)
    path = None if name is None else field_path(schema, name)
    if name is None or path is None:
        meant = "`input_ids`, `text` or `messages`" if column is None else f"`{column}`"
        raise ValueError(
            f"The dataset must have a column {meant} to score, got the columns {names}. Pass the one that holds the "
            "tokens, the text or the conversation as `column=`; inside of a struct, `meta.text`."
        )
    kind = type_at(schema, path)
    is_null = pa.types.is_null(kind)  # every row that was looked at is: only the name says what it holds
    if holds_texts(kind) or is_conversation(kind, name) or (is_null and name == "text"):
        return name, True
    if not holds_tokens(kind) and not (is_null and name == TOKENS):
        raise TypeError(
            f"Column `{name}` must hold texts (string) or token ids (a list of integers), or conversations (lists of "
            f"`role` and `content`), got {kind}. Pass the one that does as `column=`; the columns are {names}."
        )
    check_types(schema, names_beside(names, name))
    return name, False


@dataclasses.dataclass(frozen=True)
class Scorer:
    """An influence model, the tokenizer of its tokens, and the column to score: all that a worker process needs.

    Attributes:
        model: fitted; anything with `predict(TokenRows)`. One whose class says `reads_spans = True` gets `TokenSpans`.
        column: name of the column, with dots where it is nested.
        is_text: True where the column holds texts or conversations.
        tokenizer: Tokenizer of the tokens the model was fitted on; None where it is not known.
        max_length: tokens a text is cut to; None leaves it whole.
        num_threads: at most; None is one a core.
        is_chat: True where the column holds conversations.
        path: names from the row down to the column; empty where it is not nested.
    """

    model: Any
    column: str
    is_text: bool
    tokenizer: Any = None
    max_length: int | None = None
    num_threads: int | None = None
    is_chat: bool = False
    path: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names from the row down to the column."""
        return self.path or (self.column,)

    def digest(self) -> str:
        """SHA-256 of everything but the rows that a prediction depends on."""
        tokens: str | int | None = None
        if self.tokenizer is not None:  # of a token column it only bounds the ids, and a large one takes 0.3 s to read
            tokens = tokenizer_digest(self.tokenizer) if self.is_text else len(self.tokenizer)
        parts = [_VERSION, model_digest(self.model), self.column, self.is_text, tokens, self.max_length]
        if self.is_chat:
            parts.append(json.dumps(self.tokenizer.chat_template))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def predict(self, rows: TokenRows | TokenSpans, first_row: int = 0) -> Predictions:
        """Predict rows of tokens.

        Args:
            rows: N rows.
            first_row: what errors call the first of them.

        Returns:
            The predictions.

        Raises:
            ValueError: an id is negative, or outside the tokenizer's vocabulary.
            InfluenceError: the model predicts what is not finite.
        """
        num_targets = rows.num_targets
        if not len(num_targets):
            return Predictions(np.zeros(0, np.float32), num_targets)
        if isinstance(rows, TokenRows):
            self._check_ids(rows, first_row)
        with at_most_threads(self.num_threads):
            influence = np.asarray(self.model.predict(rows), np.float32)
        if influence.shape != num_targets.shape:
            raise ValueError(
                f"`predict` of {type(self.model).__name__} must return one number a row ({len(num_targets)}), got "
                f"shape {influence.shape}."
            )
        bad = np.flatnonzero(~np.isfinite(influence))
        if len(bad):
            raise InfluenceError(
                f"Predicted influence must be finite; that of {len(bad)} of {len(influence)} rows is not, first row "
                f"{int(bad[0]) + first_row}. Look at these rows, and at the influence model."
            )
        return Predictions(influence, num_targets)

    def predict_table(self, table: Any, first_row: int = 0) -> Predictions:
        """Predict the rows of an Arrow table; a null row is an empty one.

        Args:
            table: `pyarrow.Table` with the column. Beside `input_ids`, list columns `labels` and `attention_mask`
                count as they do in training.
            first_row: what errors call the first row.

        Returns:
            The predictions.

        Raises:
            ValueError: a token is null, negative or outside the vocabulary.
        """
        if self.is_text:
            return self.predict_texts(python_values(column_at(table, self.names)), first_row)
        return self._predict_ids(self._token_columns(table), np.arange(table.num_rows), first_row)

    def open(self, dataset: Any, batch_size: int = 1000) -> Callable[[int, int], Predictions]:
        """A function that predicts the rows from one number to before another of a `datasets.Dataset`.

        Tokens are read where they lie on disk, texts tokenised a batch at a time. For token columns and a model that
        `reads_spans`, several threads may call it.

        Args:
            dataset: with the column; a format or transform of it is not applied.
            batch_size: texts tokenised at once.

        Returns:
            The function; it raises as `predict_table` does.
        """
        if not self.is_text:
            tokens = self._token_columns(dataset.data, physical_rows(dataset))
            return lambda begin, end: self._predict_ids(tokens, np.arange(begin, end), begin)
        view = dataset.with_format("arrow", columns=[self.names[0]])

        def predict(begin: int, end: int) -> Predictions:
            starts = range(begin, end, batch_size)
            parts = [self.predict_table(view[start : min(start + batch_size, end)], start) for start in starts]
            return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

        return predict

    def columns_of(self, names: Sequence[str]) -> list[str]:
        """Those of a dataset's columns that a prediction may read."""
        beside = names_beside(names, self.column)
        return [name for name in names if name == self.names[0] or name in beside]

    def content(self, dataset: Any, ids: IntArray) -> bytes:
        """What the rows `ids` of a `datasets.Dataset` hold in the columns that a prediction reads."""
        if not self.is_text:
            return self._token_columns(dataset.data, physical_rows(dataset)).content(ids)
        return json.dumps(self._texts(dataset, ids), default=str).encode()

    def row_bytes(self, table: Any) -> list[bytes]:
        """What each row of an Arrow table holds in the columns that a prediction reads; no text is tokenised."""
        if self.is_text:
            values = python_values(column_at(table, self.names))
            if self.is_chat:
                return [json.dumps(value, default=str).encode() for value in values]
            return [b"" if value is None else b"t" + value.encode() for value in values]
        rows = self._token_columns(table).rows(np.arange(table.num_rows))
        columns = [rows.values] if rows.labels is None else [rows.values, rows.labels]
        is_short = all(-(2**31) <= column.min(initial=0) and column.max(initial=0) < 2**31 for column in columns)
        kind = np.dtype("<i4" if is_short else "<i8")  # not the column's own, which a cast changes
        flat = [column.astype(kind).tobytes() for column in columns]
        ends = (rows.offsets * kind.itemsize).tolist()
        return [b"".join(column[begin:end] for column in flat) for begin, end in zip(ends[:-1], ends[1:], strict=True)]

    def rows_of(self, dataset: Any, ids: IntArray) -> TokenRows:
        """The rows `ids` of a `datasets.Dataset` as they are predicted, copied."""
        if not self.is_text:
            return self._token_columns(dataset.data, physical_rows(dataset)).rows(ids)
        return rows_of_lists(self.tokenize(self._texts(dataset, ids)))

    def _texts(self, dataset: Any, ids: IntArray) -> list[Any]:
        """Texts or conversations of the rows `ids`."""
        table = dataset.with_format("arrow", columns=[self.names[0]])[ids.tolist()]
        return python_values(column_at(table, self.names))

    def _token_columns(self, table: Any, indices: IntArray | None = None) -> TokenColumns:
        """The token column, opened; a nested one is set free of the structs around it."""
        if len(self.names) > 1:
            import pyarrow as pa

            table = pa.table({self.column: column_at(table, self.names)})
        return TokenColumns(table, self.column, indices)

    def _predict_ids(self, tokens: TokenColumns, ids: IntArray, first_row: int) -> Predictions:
        """Predict rows of a token column, so many tokens at a time that any row length fits in memory."""
        parts = [
            self._predict_piece(tokens, ids[span], first_row + span.start)
            for span in stretches(tokens.lengths(ids), _TOKENS_AT_ONCE)
        ]
        if len(parts) == 1:
            return parts[0]
        empty = Predictions(np.zeros(0, np.float32), np.zeros(0, np.int32))
        return Predictions(*(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True)))

    def _predict_piece(self, tokens: TokenColumns, ids: IntArray, first_row: int) -> Predictions:
        """Predict rows of a token column, in place where the model can and nothing beside it says otherwise."""
        spans = tokens.spans(ids, first_row) if getattr(self.model, "reads_spans", False) else None
        if spans is None:
            return self.predict(tokens.rows(ids, first_row), first_row)
        vocab_size = None if self.tokenizer is None else len(self.tokenizer)
        return self.predict(dataclasses.replace(spans, first_row=first_row, vocab_size=vocab_size), first_row)

    def predict_texts(self, texts: Sequence[Any], first_row: int = 0) -> Predictions:
        """Predict texts: each exactly `tokenizer(text)`, truncated; conversations likewise; None is an empty one."""
        return self.predict(rows_of_lists(self.tokenize(texts, first_row)), first_row)

    def predict_batch(self, batch: Mapping[str, Any]) -> Predictions:
        """Predict rows as `datasets` hands them out of a stream: lists by column."""
        column = self.values_of(batch)
        if self.is_text:
            return self.predict_texts(column)
        return self.predict(read_batch({**batch, self.column: column}, self.column))

    def values_of(self, batch: Mapping[str, Any]) -> list[Any]:
        """The scored column of a batch of plain Python values."""
        return values_at(batch, self.names)

    def tokenize(self, texts: Sequence[Any], first_row: int = 0) -> list[list[int]]:
        """Token ids of each text, or of each conversation as the tokenizer's chat template writes it."""
        if self.is_chat:
            texts = render_conversations(texts, self.tokenizer, self.column, first_row)
        where = [i for i, text in enumerate(texts) if text is not None]
        cut: dict[str, Any] = {}
        if self.max_length is not None:
            cut = {"truncation": True, "max_length": self.max_length}
        if self.is_chat:  # the template has written them
            cut["add_special_tokens"] = False
        found: list[list[int]] = [[] for _ in texts]
        if where:
            encoded = self.tokenizer([texts[i] for i in where], return_attention_mask=False, **cut)["input_ids"]
            for i, ids in zip(where, encoded, strict=True):
                found[i] = ids
        return found

    def _check_ids(self, rows: TokenRows, first_row: int) -> None:
        """Refuse ids outside the vocabulary, for models that would look them up unchecked."""
        limit = 2**63 if self.tokenizer is None else len(self.tokenizer)
        if len(rows.values) and (rows.values.min() < 0 or int(rows.values.max()) >= limit):
            where = int(np.flatnonzero((rows.values < 0) | (rows.values >= limit))[0])
            row = int(np.searchsorted(rows.offsets, where, side="right")) - 1
            raise ValueError(
                f"Token ids must be from 0 to below {limit}, got {int(rows.values[where])} in row {row + first_row}. "
                "They were made with another tokenizer than the influence model's, or untrained tokens are masked in "
                "`input_ids` instead of `labels`."
            )


def rows_of_lists(lists: Iterable[Any]) -> TokenRows:
    """Rows of lists of ids; None is an empty row.

    Args:
        lists: one a row.

    Returns:
        The rows.

    Raises:
        ValueError: a row is no list of integers.
    """
    values, offsets, _ = read_lists(lists, TOKENS, lambda i: f"row {i} of a batch")
    return TokenRows(values=values, offsets=offsets)
