"""What a selector is fitted on: model, tokenizer, rows of the pool and passages, read and checked before any step.

Where it is used: `selector_fit` calls `read_inputs` in every process, which all hold the same afterwards. Errors are
one line: what must hold, what was found, and what to do.

Trade-off: a text becomes exactly `tokenizer(text)`, truncated, as the selector will score it. So the warm-up trains on
padded rows, and not on packed ones as large runs do.

Shape suffixes: N rows, T tokens over all of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mates_hf.allow import Allow
from mates_hf.data.allowed import allowed_part, columns_with
from mates_hf.data.column_types import BESIDE, TOKENS, field_path, holds_tokens, type_at
from mates_hf.data.files import Loaded, load_rows
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.data.scored_column import find_column, unnamed_column
from mates_hf.engine.model_traits import context_length, vocabulary_size
from mates_hf.paths import expand_path
from mates_hf.training.fit.rows import as_dataset, tokens_of, trainable
from mates_hf.training.fit.settings import FitSettings

logger = logging.getLogger(__name__)

LM_EVAL = "lm-eval:"  # begins the name of a task, where a reference is no file
_PAIR = ("prompt", "completion")


@dataclasses.dataclass
class Inputs:
    """What a fit works with.

    Attributes:
        model: The causal language model, float32, on the CPU; None once it was taken.
        tokenizer: Its tokenizer; None where the pool and the reference are tokens and it has none.
        max_length: Tokens that a text is cut to.
        dataset: A `datasets.Dataset` with `input_ids` and `labels` of the N rows that can be trained on.
        reference: What the model should get better at.
        facts: What was read and left out, JSON values for the report.
    """

    model: Any
    tokenizer: Any
    max_length: int
    dataset: Any
    reference: ReferenceTask
    facts: dict[str, Any]

    def take_model(self) -> Any:
        """The model, which nobody else holds any more, so that its memory is free once it has done its work."""
        model, self.model = self.model, None
        return model


def read_inputs(
    model_name: str,
    pool: Any,
    reference: Any,
    settings: FitSettings,
    *,
    column: str | None,
    reference_column: str | None,
    tokenizer_name: str | None,
    pool_split: str,
    allow: Allow | None,
    distil: bool,
    progress: bool,
) -> Inputs:
    """Read model, pool and reference.

    Args:
        model_name: A folder or a repository on the Hub.
        pool: The pool in any form that `load_rows` takes.
        reference: Passages in any form that `load_rows` takes, `"lm-eval:TASK"`, or a `ReferenceTask`.
        settings: How the selector is fitted.
        column: The pool's column of texts, token ids or conversations; None takes `input_ids`, `text` or `messages`.
        reference_column: The same of the reference; None also takes `prompt` with `completion`.
        tokenizer_name: A folder or a repository on the Hub; None is the model's.
        pool_split: Split of a pool on the Hub.
        allow: Allowed entries by column of the pool; None allows every row.
        distil: Whether a selector of texts is wanted as well.
        progress: Whether to show progress bars.

    Returns:
        What the fit works with.

    Raises:
        OSError: something is not there.
        ValueError: something cannot be fitted with.
        TypeError: something is of another kind.
    """
    require_model(model_name)
    loaded, found_column = read_pool(pool, column, pool_split, settings, allow)
    require_texts(loaded, found_column, distil)
    tokenizer = load_tokenizer(model_name, tokenizer_name)
    if tokenizer is None and found_column != TOKENS:
        refuse_without_tokenizer(model_name, f"the pool's column `{found_column}` becomes tokens")
    task = read_reference(reference, tokenizer, settings, reference_column, model_name)
    model = load_model(model_name)
    longest = context_length(model)
    max_length = settings.max_length if longest is None else min(settings.max_length, longest)
    rows = tokens_of(loaded, found_column, tokenizer, max_length, progress)
    _require_vocabulary(model, rows, tokenizer)
    task = task.fit_to_model(vocabulary_size(model), max_length)
    kept, facts = trainable(rows, task)
    facts |= {"pool": loaded.told, "column": found_column, "mean_tokens": float(kept.lengths.mean())}
    return Inputs(model, tokenizer, max_length, as_dataset(kept), task, facts)


def read_pool(
    pool: Any, column: str | None, split: str, settings: FitSettings, allow: Allow | None = None
) -> tuple[Loaded, str]:
    """The rows of the pool that a fit reads; the same at each call.

    Args:
        pool: The pool in any form that `load_rows` takes.
        column: The pool's column, or None.
        split: Split of a pool on the Hub.
        settings: How the selector is fitted.
        allow: Allowed entries by column; rows without one are left out. None allows every row.

    Returns:
        The rows, and the column that counts.

    Raises:
        OSError: there are no such files.
        ValueError: there is no such column, or no row.
    """
    loaded = load_rows(
        pool, lambda names: columns_with(_columns(names, column, "pool", ()), names, allow), name="pool", split=split,
        num_rows=settings.pool_rows, seed=settings.seed,
    )  # fmt: skip
    if allow is not None:
        rule = "; ".join(f"{name}={','.join(entries)}" for name, entries in allow.items())
        told = f"{loaded.told}, of which those with {rule}"
        loaded = Loaded(allowed_part(loaded.dataset, allow), told)
    found = column or unnamed_column(loaded.dataset.column_names)
    assert found is not None  # `load_rows` has asked for it
    return loaded, found


def require_texts(loaded: Loaded, column: str, distil: bool) -> None:
    """Refuse a pool of tokens where a selector of texts is to be distilled from it."""
    if distil and holds_tokens(type_of(loaded.dataset, column)):
        raise ValueError(
            f"`distil` must have a pool of texts or conversations, and the column `{column}` holds tokens. Name the "
            "column of texts (`column`), or leave `distil` out."
        )


def type_of(dataset: Any, column: str) -> Any:
    """`pyarrow.DataType` of a dataset's column, nested or not; that of nulls where there is none."""
    import pyarrow as pa

    schema = dataset.features.arrow_schema
    path = field_path(schema, column)
    return pa.null() if path is None else type_at(schema, path)


def load_tokenizer(model_name: str, tokenizer_name: str | None) -> Any:
    """The tokenizer, or None where the model has none and no other one was named."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_place(tokenizer_name or model_name), trust_remote_code=False)
    except Exception as error:  # whatever is missing or cannot be read
        if tokenizer_name is not None:
            raise ValueError(
                f"`tokenizer` must be a folder or a repository on the Hub that holds one, and {tokenizer_name!r} "
                f"cannot be read ({_first_line(error)})."
            ) from error
        return None


def require_model(name: str) -> None:
    """Refuse what holds no model, before anything that takes long.

    Args:
        name: A folder or a repository on the Hub.

    Raises:
        ValueError: it has no config that can be read.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:
        raise _no_model(name, error) from error


def load_model(name: str) -> Any:
    """A causal language model in float32, which AdamW needs: a step of 1e-4 is lost in bfloat16.

    Args:
        name: A folder or a repository on the Hub.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: there is none that can be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(_place(name), dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # of another kind, damaged, or code of its own that is not run
        raise _no_model(name, error) from error


def _no_model(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"`model` must be a folder or a repository on the Hub with a causal language model of transformers, and "
        f"{name!r} cannot be read ({_first_line(error)})."
    )


def read_reference(
    reference: Any, tokenizer: Any, settings: FitSettings, column: str | None, model_name: str | None
) -> ReferenceTask:
    """What the model should get better at.

    Args:
        reference: Passages in any form that `load_rows` takes, `"lm-eval:TASK"`, or a `ReferenceTask`.
        tokenizer: The model's tokenizer, or None.
        settings: How the selector is fitted.
        column: Column of the passages, or None.
        model_name: Name of the model, for errors; None where none is named.

    Returns:
        The task.

    Raises:
        OSError: there are no such files.
        ValueError: there are no passages, or no such column.
    """
    if isinstance(reference, ReferenceTask):
        return reference
    if isinstance(reference, str) and reference.startswith(LM_EVAL):
        if tokenizer is None:
            refuse_without_tokenizer(model_name, "the reference is a task of texts")
        task = reference.removeprefix(LM_EVAL)
        limit = settings.reference_limit
        return ReferenceTask.from_lm_eval(
            task, tokenizer, limit=limit, max_length=settings.max_length, loss_on=settings.loss_on
        )
    loaded = load_rows(
        reference, lambda names: _columns(names, column, "reference", _PAIR), name="reference",
        num_rows=settings.reference_limit, seed=settings.seed,
    )  # fmt: skip
    names = loaded.dataset.column_names
    form: dict[str, Any] = {"max_length": settings.max_length}
    found = column or unnamed_column(names)
    if found is None:
        form |= {"prompt_column": _PAIR[0], "completion_column": _PAIR[1], "loss_on": settings.loss_on}
    elif found == TOKENS:
        form |= {"input_ids_column": TOKENS, "labels_column": "labels" if "labels" in names else None}
    if tokenizer is None and found != TOKENS:
        refuse_without_tokenizer(model_name, "the passages become tokens")
    dataset: Any = loaded.dataset
    if found is not None and found != TOKENS:
        scored = find_column(dataset.features.arrow_schema, found, tokenizer, None)
        ids = scored.open(dataset).rows(np.arange(len(dataset)))
        assert isinstance(ids, TokenRows)
        dataset = [{TOKENS: ids.row(i)[0].tolist()} for i in range(len(ids))]
        form |= {"input_ids_column": TOKENS}
    return ReferenceTask.from_dataset(dataset, tokenizer, name="passages", **form)


def _columns(names: Sequence[str], column: str | None, name: str, pair: Sequence[str]) -> list[str]:
    """The columns to read of those that there are."""
    root = column if column is None or column in names else column.partition(".")[0]
    found = unnamed_column(names) if root is None else root
    if found is None and pair and set(pair) <= set(names):
        return list(pair)
    if found is None or found not in names:
        wanted = f"`{column}`" if column else "`input_ids`, `text` or `messages`"
        if not column and pair:
            wanted += ", or `prompt` and `completion`"
        argument = "column" if name == "pool" else f"{name}_column"
        raise ValueError(
            f"`{name}` must have a column {wanted}, got the columns {list(names)}. Name the one that holds the text, "
            f"the tokens or the conversation: `{argument}`."
        )
    return [found, *(one for one in BESIDE if found == TOKENS and one in names)]


def _require_vocabulary(model: Any, rows: TokenRows, tokenizer: Any) -> None:
    """Refuse tokens that the model does not know."""
    size = vocabulary_size(model)
    largest = int(rows.values.max(initial=0))
    if size is None or (largest < size and (not len(rows.values) or rows.values.min() >= 0)):
        return
    by = "the pool's token ids were" if tokenizer is None else f"the tokenizer has {len(tokenizer):,} ids, which were"
    raise ValueError(
        f"`tokenizer` must be the model's own: the model knows {size:,} ids, and the id {largest:,} is in the pool; "
        f"{by} made for another model. Leave `tokenizer` out, or tokenise the pool anew."
    )


def refuse_without_tokenizer(model_name: str | None, why: str) -> None:
    """Raise a `ValueError` that says why tokens are needed, and who has none."""
    if model_name is None:
        raise ValueError(
            f"`tokenizer` must be named where no model is, because {why}: a folder or a repository that holds the one "
            "of the model that will be trained."
        )
    raise ValueError(
        f"`model` must have a tokenizer, because {why}, and {model_name!r} has none that can be read. Name a "
        "folder or a repository that holds it: `tokenizer`."
    )


def _place(name: str) -> str:
    """The folder that a name stands for, or the name where it is one of the Hub's."""
    folder = expand_path(name)
    return str(folder) if folder.exists() else name


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
