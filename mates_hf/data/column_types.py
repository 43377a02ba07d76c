"""Which columns of a dataset hold what, decided by its Arrow types: token ids, texts, conversations.

Where it is used: before a row is read, by `columns` (a pool), `collated` (one row) and `scored_column` (scoring). A
column called `labels` or `attention_mask` next to `input_ids` counts as it does in training. One that cannot count
raises the same error, which names it, wherever it is met. Trade-off: a type says nothing of a value, so what is wrong
inside of a row is found where it is read (`token_columns`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "input_ids"
LABELS = "labels"
MASK = "attention_mask"
BESIDE = (LABELS, MASK)  # columns that say more about `TOKENS`
ROLE, CONTENT = "role", "content"  # of a message of a conversation


def names_beside(names: Collection[str], column: str) -> list[str]:
    """Those of the columns `names` that count together with the column of token ids `column`."""
    return [name for name in BESIDE if column == TOKENS and name in names]


# --- where a column is ---


def field_path(schema: Any, column: str) -> tuple[str, ...] | None:
    """Names from the row down to a column.

    Args:
        schema: `pyarrow.Schema`.
        column: A column's name, or names of nested fields with dots between them, such as `meta.text`.

    Returns:
        The names, the first of them a column; None where there is no such column.
    """
    import pyarrow as pa

    if column in schema.names:  # also one with dots in its name, as `Dataset.flatten` makes
        return (column,)
    for end in (i for i, char in enumerate(column) if char == "."):
        root, rest = column[:end], column[end + 1 :]
        if root in schema.names and pa.types.is_struct(schema.field(root).type):
            below = field_path(pa.schema(list(schema.field(root).type)), rest)
            if below is not None:
                return (root, *below)
    return None


def find_path(
    schema: Any, column: str | None, looked_for: Sequence[str], holds: str, nested: bool = True
) -> tuple[str, tuple[str, ...]]:
    """The column that is scored.

    Args:
        schema: `pyarrow.Schema` of the dataset.
        column: Name of the column, with dots where it is nested; None takes the first there is of `looked_for`.
        looked_for: Names of columns that are scored without being named.
        holds: What it must hold, for the error.
        nested: Whether the error says that a column may be inside of a struct.

    Returns:
        Its name and the names from the row down to it.

    Raises:
        ValueError: there is no such column (names those there are).
    """
    names = list(schema.names)
    name = column if column is not None else next((found for found in looked_for if found in names), None)
    path = None if name is None else field_path(schema, name)
    if name is None or path is None:
        *others, last = (f"`{found}`" for found in (looked_for if column is None else [column]))
        meant = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(
            f"The dataset must have a column {meant} to score, got the columns {names}. Pass the one that holds the "
            f"{holds} as `column=`{'; inside of a struct, `meta.text`' if nested else ''}."
        )
    return name, path


def type_at(schema: Any, path: Sequence[str]) -> Any:
    """`pyarrow.DataType` of the column at a path."""
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


# --- what counts ---


def holds_tokens(column_type: pa.DataType) -> bool:
    """True for an Arrow type that can be a column of token ids: lists of whole numbers, of any kind of list."""
    word = _value_word(column_type.value_type) if is_list(column_type) else ""
    return word in ("integers", "nulls")


def holds_texts(column_type: pa.DataType) -> bool:
    """True for every Arrow type of strings, dictionary-encoded ones included."""
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    return _value_word(column_type) == "texts"


def counts(name: str, column_type: pa.DataType) -> bool:
    """True where a column of this name and Arrow type can be read as what its name says."""
    import pyarrow as pa

    if pa.types.is_null(column_type) or holds_tokens(column_type):
        return True
    is_mask = name == MASK and is_list(column_type)
    return is_mask and _value_word(column_type.value_type) in ("booleans", "floats")


def check_types(schema: pa.Schema, names: Iterable[str]) -> None:
    """Raise a `ValueError` for the first of the columns `names` that cannot count as what it is called."""
    for name in names:
        kind = schema.field(name).type
        if not counts(name, kind):
            inner = f"lists of {_value_word(kind.value_type)}" if is_list(kind) else one_value(_value_word(kind))
            raise refusal(name, inner)


def refusal(name: str, got: str, where: str = "") -> ValueError:
    """The error for what is called like a column that counts, and cannot count.

    Args:
        name: `input_ids`, `labels` or `attention_mask`, or what the column of token ids is called.
        got: What the column holds.
        where: Which row holds it; empty where all rows do.

    Returns:
        The error, to be raised.
    """
    must = "0 or 1 a token" if name == MASK else "one whole number a token"
    fix = "Tokenise the texts, or name the column that holds the token ids."
    if name in BESIDE:
        fix = (
            "Beside `input_ids` it counts as it does in training: give it that form, or remove or rename the column "
            f"(`dataset.remove_columns('{name}')`) where it is something else."
        )
    return ValueError(f"`{name}` must be {must}, got {got}{f' ({where})' if where else ''}. {fix}")


def is_conversation(kind: Any, name: str) -> bool:
    """True where an Arrow column holds lists of messages with a role and a content, in either form of `datasets`.

    Args:
        kind: Arrow type of the column.
        name: Name of the column, which decides where every value is null.

    Returns:
        True or False.
    """
    import pyarrow as pa

    def has_both(kind: Any) -> bool:
        return bool(pa.types.is_struct(kind)) and {ROLE, CONTENT} <= {field.name for field in kind}

    if pa.types.is_null(kind):
        return name == "messages"
    if is_list(kind):
        return has_both(kind.value_type) or is_json(kind.value_type)
    return is_json(kind) or (has_both(kind) and all(is_list(field.type) for field in kind))


def is_null(column_type: pa.DataType) -> bool:
    """True where every value that was looked at is null, so that only the column's name says what it holds."""
    import pyarrow as pa

    return bool(pa.types.is_null(column_type))


def one_value(word: str) -> str:
    """What errors call a column without lists."""
    return f"one value a row ({word})"


def is_list(column_type: pa.DataType) -> bool:
    """True for every kind of list."""
    import pyarrow as pa

    is_kind = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, is_list_view)
    return any(is_one(column_type) for is_one in is_kind)


def _value_word(value_type: pa.DataType) -> str:
    """The plural of what values of an Arrow type are, the same word as `token_columns` has for arrays."""
    import pyarrow as pa

    types = pa.types
    known = {
        "integers": (types.is_integer,),
        "booleans": (types.is_boolean,),
        "floats": (types.is_floating,),
        "texts": (types.is_string, types.is_large_string, getattr(types, "is_string_view", types.is_string)),
        "nulls": (types.is_null,),
        "lists": (is_list,),
        "dicts": (types.is_struct,),
    }
    found = (word for word, kinds in known.items() if any(is_kind(value_type) for is_kind in kinds))
    return next(found, str(value_type))


def is_json(column_type: pa.DataType) -> bool:
    """True for what `datasets` keeps values of several types as."""
    return getattr(column_type, "extension_name", None) == "arrow.json"


def is_list_view(column_type: Any) -> bool:
    """True for the two list types whose rows lie anywhere in their values; older pyarrow has none."""
    import pyarrow as pa

    known = [getattr(pa.types, name, None) for name in ("is_list_view", "is_large_list_view")]
    return any(is_kind is not None and is_kind(column_type) for is_kind in known)
