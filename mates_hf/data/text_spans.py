"""Texts where Arrow has them: stretches of UTF-8 bytes in buffers that others own.

Where it is used: `TextInfluenceModel` reads its texts so, without a tokenizer and without a Python object for each.
Trade-off: how many tokens a text has is estimated at four bytes a token, about what a tokenizer makes of English.

Shape suffix: N texts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import Piece

BYTES_PER_TOKEN = 4  # an estimate, where no tokenizer is at hand


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpans:
    """N texts in buffers that are not copied.

    Attributes:
        pieces: The texts, buffer by buffer, with the UTF-8 bytes as `values`; together each of the N texts once. A
            null has length 0.
        num_rows: Number N of texts.
    """

    pieces: tuple[Piece, ...]
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_bytes(self) -> npt.NDArray[np.int64]:
        """(N,) int64 UTF-8 bytes of each text."""
        num = np.zeros(self.num_rows, np.int64)
        for piece in self.pieces:
            num[piece.where] = piece.lengths
        return num

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """(N,) int32 tokens of each text, estimated at four bytes a token and rounded up."""
        return np.asarray(-(-self.num_bytes // BYTES_PER_TOKEN), np.int32)

    def take(self, rows: npt.NDArray[Any]) -> TextSpans:
        """Some of the texts, by (M,) int64 numbers in any order, or by an (N,) bool mask."""
        wanted = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows, np.int64)
        place = np.full(self.num_rows, -1, np.int64)
        place[wanted] = np.arange(len(wanted))
        if len(np.unique(wanted)) != len(wanted):
            raise ValueError("`rows` must name each text once at most.")
        kept = []
        for piece in self.pieces:
            mine = place[piece.where] >= 0
            kept.append(Piece(piece.values, piece.starts[mine], piece.lengths[mine], place[piece.where[mine]]))
        return TextSpans(pieces=tuple(kept), num_rows=len(wanted))

    @classmethod
    def of(cls, texts: Any) -> TextSpans:
        """Texts in any of the forms that people have them in.

        Args:
            texts: `TextSpans`, a `pyarrow` array or chunked array of strings, a column of a `datasets.Dataset`, or a
                sequence of `str` and None.

        Returns:
            The texts; those of Arrow are not copied.

        Raises:
            TypeError: these are no texts; says what was found.
        """
        import pyarrow as pa

        if isinstance(texts, TextSpans):
            return texts
        chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
        if not isinstance(texts, (pa.Array, pa.ChunkedArray)):
            chunks = [pa.array(as_text_list(texts), pa.large_string())]
        pieces, num_rows = [], 0
        for chunk in chunks:
            pieces.append(_piece(_as_strings(chunk), num_rows))
            num_rows += len(chunk)
        return cls(pieces=tuple(pieces), num_rows=num_rows)


def as_text_list(texts: Any) -> list[str | None]:
    """A list of texts from a sequence of them.

    Args:
        texts: A sequence or a column of `str` and None.

    Returns:
        The list.

    Raises:
        TypeError: these are no texts; says what was found.
    """
    if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__"):
        raise TypeError(
            "`texts` must be a sequence of texts, such as a list or a column of a dataset, got "
            f"{type(texts).__name__}. Put a single text into a list."
        )
    values = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)
    wrong = next((i for i, text in enumerate(values) if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(
            f"`texts` must be of `str` and None, got {type(values[wrong]).__name__} as text {wrong}. Of a dataset "
            "pass a column, `dataset['text']`; texts as bytes must be decoded first."
        )
    return values


def _as_strings(chunk: Any) -> Any:
    """An Arrow array whose buffers are offsets and bytes."""
    import pyarrow as pa

    kind = chunk.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return chunk
    inside = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(inside) or pa.types.is_large_string(inside) or pa.types.is_null(inside)
    if not is_text and str(inside) != "string_view":
        raise TypeError(f"`texts` must be an array of strings, got {kind}. Pass the column that holds the texts.")
    return chunk.cast(pa.large_string())


def _piece(chunk: Any, first: int) -> Piece:
    """The texts of one Arrow array; the first is number `first`."""
    import pyarrow as pa

    num = len(chunk)
    where = np.arange(first, first + num)
    _, offsets, content = chunk.buffers()
    if content is None or not num:
        zero = np.zeros(num, np.int64)
        return Piece(np.zeros(0, np.uint8), zero, zero.copy(), where)
    width = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    borders = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + num + 1].astype(np.int64)
    lengths = np.diff(borders)
    if chunk.null_count:
        lengths[chunk.is_null().to_numpy(zero_copy_only=False)] = 0
    return Piece(np.frombuffer(content, np.uint8), borders[:-1], lengths, where)
