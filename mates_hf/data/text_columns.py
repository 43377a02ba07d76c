"""Values of columns that a tokenizer reads: texts and conversations, at the top of a row or inside of a struct.

Place in the flow: `scored_column` reads through this; `column_types` has said what the column is. Trade-off: a
conversation becomes the text that the tokenizer's own chat template makes of it, every token of which counts, as TRL
trains it by default; which turns are the assistant's is not asked, because most templates do not say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.data.column_types import CONTENT, ROLE, is_json, is_list


def column_at(table: Any, path: Sequence[str]) -> Any:
    """`pyarrow.ChunkedArray` of the column at a path; null where a struct above it is."""
    import pyarrow.compute as pc

    found = table.column(path[0])
    for name in path[1:]:
        found = pc.struct_field(found, name)
    return found


def python_values(column: Any) -> list[Any]:
    """The values of an Arrow column, with what `datasets` keeps as JSON (values of several types) read back."""
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


def check_chat_template(tokenizer: Any, column: str) -> None:
    """Raise a `ValueError` unless the tokenizer has a template that makes a text of a conversation."""
    if not getattr(tokenizer, "chat_template", None) or not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise ValueError(
            f"Column `{column}` holds conversations, and the tokenizer must have a chat template, which "
            f"{type(tokenizer).__name__} has not. Set the one of the training run, `tokenizer.chat_template = ...`, "
            "or make texts of the conversations and pass their column as `column=`."
        )


def render_conversations(
    conversations: Sequence[Any], tokenizer: Any, column: str, first_row: int = 0
) -> list[str | None]:
    """Texts of conversations by the tokenizer's chat template, special tokens written out.

    Args:
        conversations: N lists of messages; None, or a list without any, has no text.
        tokenizer: with a chat template.
        column: what the errors call it.
        first_row: what the errors call the first row.

    Returns:
        N texts, None where there are no messages.

    Raises:
        ValueError: the template does not take a conversation; names the row.
    """
    texts: list[str | None] = []
    for i, value in enumerate(conversations):
        try:
            messages = _messages(value)
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)) if messages else None)
        except Exception as error:  # a template raises whatever its author or Jinja likes
            raise ValueError(
                f"Column `{column}` must hold conversations that the tokenizer's chat template takes; row "
                f"{first_row + i} is not one ({type(error).__name__}: {error})."
            ) from error
    return texts


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, without the fields that Arrow fills up with nulls."""
    if isinstance(value, Mapping):  # a dict of lists, which `datasets` makes of a sequence of dicts
        columns = {name: found or [] for name, found in value.items()}
        num = max(map(len, columns.values()), default=0)
        value = [{name: found[i] for name, found in columns.items() if i < len(found)} for i in range(num)]
    return [
        {name: _filled(found) for name, found in message.items() if found is not None or name in (ROLE, CONTENT)}
        for message in value or []
        if message is not None
    ]


def _filled(value: Any) -> Any:
    """A value of a message without the nulls that Arrow gives to a struct for the fields of other rows' structs."""
    if isinstance(value, Mapping):
        return {name: _filled(found) for name, found in value.items() if found is not None}
    return [_filled(found) for found in value] if isinstance(value, list) else value
