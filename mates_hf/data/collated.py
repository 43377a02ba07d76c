"""Dataset rows put through the collator: the exact reading, for every dataset and collator.

Where it is used: `pool` reads row by row this way wherever the Arrow columns do not say the same, `columns` compares
against it, and `feeds` makes a model's batches with it. Trade-off: one Python call a row and more, in exchange for no
assumption about what user code does. That code runs on seeded random streams which are put back afterwards: reading
changes nothing and gives the same twice.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import assemble
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.segments import document_starts, trailing_fill
from mates_hf.data.token_columns import as_array, length_refusal, one_value_refusal, whole_numbers
from mates_hf.errors import UnsupportedSettingError

Collator = Callable[[list[Any]], Mapping[str, Any]]

TOKEN_KEYS = ("input_ids", "labels", "attention_mask")


class CollatedRow(NamedTuple):
    """What a row trains on, each array (length,) int64, padding included; None where it was not given.

    Labels have the length of the ids, but for a model with two sequences or a class a row. `starts`, (length,) bool,
    says where the documents of a packed row begin.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    attention_mask: npt.NDArray[np.int64] | None
    starts: npt.NDArray[np.bool_] | None = None

    def as_one_text(self) -> CollatedRow:
        """The row without its documents, for a run in which they see each other; what is trained stays the same."""
        labels = _own_labels(self) if self.labels is None and self.starts is not None else self.labels
        return self._replace(labels=labels, starts=None)


def drawn_row(dataset: Any, i: int) -> Any:
    """Row `i`, read on random streams seeded by its number: what reading draws is the same beside any other rows."""
    with forked_rng(i):
        return dataset[i]


def collate(dataset: Any, collate_fn: Collator, ids: Sequence[int]) -> Mapping[str, Any]:
    """The batch that the collator makes of some rows, on random streams seeded by the first one's number."""
    rows = [drawn_row(dataset, i) for i in ids]
    with forked_rng(ids[0]):
        batch = collate_fn(rows)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A collator must make a dict, got {type(batch).__name__} from `{name_of(collate_fn)}`, pool row {ids[0]}."
        )
    return batch


def drew_random(dataset: Any, collate_fn: Collator, row: int) -> tuple[bool, bool]:
    """Whether reading a row draws from the random streams, and whether collating it does."""
    with forked_rng(row):
        before = rng_state()
        read = dataset[row]
        between = rng_state()
        collate_fn([read])
        return between != before, rng_state() != between


def read_row(
    row: Any,
    collate_fn: Collator | None,
    where: str,
    *,
    same_length: bool = True,
    labels_of: Callable[[Mapping[str, Any]], Any] = lambda batch: batch.get("labels"),
) -> CollatedRow:
    """What the Trainer would train on for one dataset row.

    Args:
        row: A row of the dataset, `dataset[i]`.
        collate_fn: The collator, called on the row alone; None where rows have token ids themselves.
        where: Which row it is, for errors.
        same_length: Whether labels must be as many as ids; not so for a second sequence or a class.
        labels_of: Function that takes the labels out of the batch.

    Returns:
        The row's tokens, padding included.

    Raises:
        ValueError: ids, labels or mask are no whole numbers, or not of one length; or a dataset has no `input_ids`.
        TypeError: the row or batch is no dict.
        UnsupportedSettingError: what says where documents begin is contradictory, or there are no `input_ids`.
    """
    batch = row if collate_fn is None else collate_fn([row])
    maker = "the dataset" if collate_fn is None else f"the collator `{name_of(collate_fn)}`"
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A pool row must be a dict with `input_ids`, got {type(batch).__name__} from {maker}, {where}."
        )
    if "input_ids" not in batch:
        message = f"A pool row must have `input_ids`, got the columns {sorted(map(str, batch))} from {maker}, {where}."
        if collate_fn is None:
            raise ValueError(f"{message} Tokenise the dataset, or pass the `collate_fn` that does.")
        raise UnsupportedSettingError(f"{message} Influence models read token ids: use a collator that gives those.")
    collated, source = collate_fn is not None, f"{maker}, {where}"
    values = {key: labels_of(batch) if key == "labels" else batch.get(key) for key in TOKEN_KEYS}
    found = {
        key: None if _is_left_out(value, key, collated) else _flat(value, key, collated, source, same_length)
        for key, value in values.items()
    }
    ids = np.zeros(0, np.int64) if found["input_ids"] is None else found["input_ids"]
    for key, value in found.items():
        if value is not None and len(value) != len(ids) and (same_length or key != "labels"):
            raise length_refusal(key, len(value), len(ids), where)
    starts, mask = document_starts(batch, source), found["attention_mask"]
    if starts is not None and mask is None and (fill := trailing_fill(starts, found["labels"], row)):
        mask = np.ones(len(ids), np.int64)
        mask[-fill:] = 0
    return CollatedRow(ids, found["labels"], mask, starts)


def _is_left_out(value: Any, key: str, collated: bool) -> bool:
    """True for what is not there, and for a mask of pairs of positions, which is no padding."""
    return value is None or (collated and key == "attention_mask" and getattr(value, "ndim", 2) > 2)


def _flat(value: Any, key: str, collated: bool, source: str, same_length: bool = True) -> npt.NDArray[np.int64]:
    """The (length,) whole numbers of a list, array or tensor; a collated one has a first dimension of 1."""
    if collated:
        value = as_array(value, key, source)
        may_be_class = key == "labels" and not same_length and value.dtype.kind in "iu"
        if value.shape == (1,) and not may_be_class:
            raise one_value_refusal(key, value, source)
        if value.shape != (1,) and (value.ndim != 2 or value.shape[0] != 1):
            raise UnsupportedSettingError(
                f"`{key}` of one collated row must have the shape (1, length), got {value.shape} from {source}. Use a "
                "collator that keeps one row of the dataset in one row of the batch."
            )
        value = value.reshape(-1)
    return whole_numbers(value, key, source)


def stack_rows(rows: Iterable[CollatedRow]) -> TokenRows:
    """Rows as read, flat and without padding."""
    rows = list(rows)
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64)
    if not rows:
        return TokenRows(values=np.zeros(0, np.int64), offsets=offsets)
    labels = mask = None
    if any(row.labels is not None for row in rows):
        labels = np.concatenate([_own_labels(row) if row.labels is None else row.labels for row in rows])
    if any(row.attention_mask is not None for row in rows):
        ones = [np.ones(len(row.input_ids), np.int64) for row in rows]
        masks = [row.attention_mask for row in rows]
        mask = np.concatenate([one if m is None else m for m, one in zip(masks, ones, strict=True)])
    starts = None
    if any(row.starts is not None for row in rows):
        plain = [np.zeros(len(row.input_ids), np.bool_) for row in rows]
        starts = np.concatenate([p if r.starts is None else r.starts for r, p in zip(rows, plain, strict=True)])
    return assemble(np.concatenate([row.input_ids for row in rows]), offsets, labels, mask, starts)


def _own_labels(row: CollatedRow) -> npt.NDArray[np.int64]:
    """The labels of a row without any: its tokens, but the first of each document."""
    return row.input_ids if row.starts is None else np.where(row.starts, IGNORED, row.input_ids)


def name_of(collate_fn: Any) -> str:
    """The name to call a collator by in messages."""
    return str(getattr(collate_fn, "__qualname__", type(collate_fn).__qualname__))


def rng_state() -> tuple[Any, ...]:
    """The states of the CPU streams that user code may draw from, comparable by value."""
    import torch

    # The legacy global streams are meant: they are what user code draws from.
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Run user code on streams seeded by `seed`, and put the streams of python, numpy and torch back as found."""
    import torch

    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # Only where CUDA is up already: asking would start it, and a collator on the CPU does not need it.
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
