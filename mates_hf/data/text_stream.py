"""Whatever holds text, read as texts: strings, rows of a dataset, token rows, documents of an lm-eval task.

Place in the flow: for what compares words (`evaluation/contamination`); what is trained on and evaluated is read as
tokens, by `pool` and `reference`. Trade-off: token ids are decoded, which is slow beside reading text and gives back
only what the tokenizer kept, so a text column goes before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mates_hf.data.harness import evaluated_texts
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.texts import decode_ids


def texts_of(source: Any, argument: str, *, tokenizer: Any = None, text_column: str = "text") -> Iterator[str]:
    """The texts of a source, in their order, read as they are asked for.

    Args:
        source: strings, or rows (dicts) with `text_column`, or else with `input_ids`: a `datasets.Dataset`, a list, a
            stream; a reference task; or an lm-eval task, whose evaluated documents are read as context and gold
            target.
        argument: what the caller calls it, for the errors.
        tokenizer: decodes token ids, special tokens left out.
        text_column: Column of the rows that holds the text.

    Returns:
        An iterator over the texts; a row that is wrong raises when it is reached.

    Raises:
        TypeError: the source or a row is of the wrong kind, such as a dict of splits.
        ValueError: a row has neither column, its text is none, or there is no tokenizer for its ids.
    """
    if isinstance(source, ReferenceTask):
        passages = source.rows
        return (_decode(passages.row(i)[0], tokenizer, f"`{argument}`") for i in range(len(passages)))
    if is_lm_eval_task(source):
        return iter(evaluated_texts(source))
    rows = source
    if not hasattr(source, "__iter__") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        rows = (source[i] for i in range(len(source)))  # a plain torch dataset
    if isinstance(source, (str, bytes, Mapping)) or not hasattr(rows, "__iter__"):
        raise TypeError(
            f"`{argument}` must be texts or rows that are dicts, got {type(source).__name__}: pass a list of texts, "
            "or one split of a dataset."
        )
    return (_text_of(row, f"row {i} of `{argument}`", tokenizer, text_column) for i, row in enumerate(rows))


def is_lm_eval_task(source: Any) -> bool:
    """True for a task object of lm-eval."""
    # `eval_docs` is what is read, but to ask for it would load the documents.
    return hasattr(source, "doc_to_text") and hasattr(source, "has_test_docs")


def _text_of(row: Any, where: str, tokenizer: Any, text_column: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"A text or a dict must be in {where}, got {type(row).__name__}.")
    if text_column in row:
        text = row[text_column]
        if not isinstance(text, str):
            raise ValueError(f"Column `{text_column}` must hold texts, got {type(text).__name__} in {where}.")
        return text
    if "input_ids" in row:
        return _decode(row["input_ids"], tokenizer, where)
    raise ValueError(
        f"`text_column` must be a column, or `input_ids` must be there, got {text_column!r} and the columns "
        f"{sorted(map(str, row))} in {where}. Pass the name of the column that holds the texts."
    )


def _decode(ids: Any, tokenizer: Any, where: str) -> str:
    if not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"`tokenizer` must be the tokenizer that made the token ids of {where}, got {type(tokenizer).__name__}."
        )
    return decode_ids(ids, tokenizer)
