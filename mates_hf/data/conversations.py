"""Conversations as texts, by the tokenizer's own chat template.

Where it is used: `scored_column` makes texts of conversations through this, before it tokenises them. Trade-off:
every token of the text counts, as TRL trains it by default; which turns are the assistant's is not asked, because most
templates do not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.data.column_types import CONTENT, ROLE


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
        tokenizer: A tokenizer with a chat template.
        column: Name of the column, for errors.
        first_row: Number of the first row, for errors.

    Returns:
        N texts, None where there are no messages.

    Raises:
        ValueError: the template does not take a conversation; names the row.
    """
    texts: list[str | None] = []
    for i, value in enumerate(conversations):
        try:
            messages = messages_of(value)
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)) if messages else None)
        except Exception as error:  # a template raises whatever its author or Jinja likes
            raise ValueError(
                f"Column `{column}` must hold conversations that the tokenizer's chat template takes; row "
                f"{first_row + i} is not one ({type(error).__name__}: {error})."
            ) from error
    return texts


def messages_of(value: Any) -> list[dict[str, Any]]:
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
