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
from mates_hf.data.rows import TokenRows
from mates_hf.data.token_columns import as_array, length_refusal, one_value_refusal, whole_numbers
from mates_hf.errors import UnsupportedSettingError

Collator = Callable[[list[Any]], Mapping[str, Any]]

# Inputs by which several texts may share a row.
PACKING_KEYS = ("position_ids", "cu_seq_lens", "cu_seqlens", "seq_idx")
TRL_WITHOUT_PACKING = (
    'With TRL\'s SFTTrainer set `packing=True, packing_strategy="wrapped", padding_free=False` to keep packing (texts '
    "are cut into blocks), or `packing=False, padding_free=False` to train one text a row; the packing strategies "
    "`bfd`, `bfd_split` and `bfd-requeue` always make packed batches."
)


class CollatedRow(NamedTuple):
    """What a row trains on, each array (length,) int64, padding included; None where it was not given.

    Labels have the length of the ids, but for a model with two sequences or a class a row.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    attention_mask: npt.NDArray[np.int64] | None


def collate(dataset: Any, collate_fn: Collator, ids: Sequence[int]) -> Mapping[str, Any]:
    """The batch that the collator makes of some rows, on random streams seeded by the first one's number."""
    with forked_rng(ids[0]):
        batch = collate_fn([dataset[i] for i in ids])
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A collator must make a dict, got {type(batch).__name__} from `{name_of(collate_fn)}`, pool row {ids[0]}."
        )
    return batch


def drew_random(dataset: Any, collate_fn: Collator, row: int) -> bool:
    """True where reading and collating a row draws from the random streams."""
    with forked_rng(row):
        before = rng_state()
        collate_fn([dataset[row]])
        return rng_state() != before


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
        UnsupportedSettingError: the collator packs, or makes no `input_ids`.
    """
    batch = row if collate_fn is None else collate_fn([row])
    maker = "the dataset" if collate_fn is None else f"the collator `{name_of(collate_fn)}`"
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A pool row must be a dict with `input_ids`, got {type(batch).__name__} from {maker}, {where}."
        )
    refuse_packing(batch, maker, None if collate_fn is None else lambda: collate_fn([row, row]))
    if "input_ids" not in batch:
        message = f"A pool row must have `input_ids`, got the columns {sorted(map(str, batch))} from {maker}, {where}."
        if collate_fn is None:
            raise ValueError(f"{message} Tokenise the dataset, or pass the `collate_fn` that does.")
        raise UnsupportedSettingError(f"{message} Influence models read token ids: use a collator that gives those.")
    collated, source = collate_fn is not None, f"{maker}, {where}"
    values = {key: labels_of(batch) if key == "labels" else batch.get(key) for key in CollatedRow._fields}
    found = {
        key: None if _is_left_out(value, key, collated) else _flat(value, key, collated, source, same_length)
        for key, value in values.items()
    }
    ids = np.zeros(0, np.int64) if found["input_ids"] is None else found["input_ids"]
    for key, value in found.items():
        if value is not None and len(value) != len(ids) and (same_length or key != "labels"):
            raise length_refusal(key, len(value), len(ids), where)
    return CollatedRow(ids, found["labels"], found["attention_mask"])


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
        labels = np.concatenate([row.input_ids if row.labels is None else row.labels for row in rows])
    if any(row.attention_mask is not None for row in rows):
        ones = [np.ones(len(row.input_ids), np.int64) for row in rows]
        masks = [row.attention_mask for row in rows]
        mask = np.concatenate([one if m is None else m for m, one in zip(masks, ones, strict=True)])
    return assemble(np.concatenate([row.input_ids for row in rows]), offsets, labels, mask)


def refuse_packing(batch: Mapping[str, Any], maker: str, pair: Callable[[], Mapping[str, Any]] | None = None) -> None:
    """Refuse a row that several texts share, and a collator that makes one row of several.

    Args:
        batch: One row, collated or as the dataset has it.
        maker: Name of what made it, for the error.
        pair: Function that makes a batch of the row and itself; called where the batch has keys that packed rows need.

    Raises:
        UnsupportedSettingError: positions begin anew inside the row, or two rows become another number of rows.
    """
    keys = [key for key in batch if str(key).startswith(PACKING_KEYS) and batch[key] is not None]
    shared = [key for key in keys if _has_several_texts(str(key), batch[key], batch.get("attention_mask"))]
    num = 2 if pair is None or not keys or shared else len(pair().get("input_ids", ()))
    if shared or num != 2:
        found = f"of 2 rows {maker} makes {num}" if num != 2 else "several texts share a row"
        raise UnsupportedSettingError(
            f"A candidate must be one text a row; {maker} gives `{'`, `'.join(map(str, shared or keys))}`: {found}. "
            "Use a collator that pads instead of packing (transformers' `DataCollatorForLanguageModeling` or "
            f"`default_data_collator`), and leave such columns out of the dataset. {TRL_WITHOUT_PACKING}"
        )


def _has_several_texts(key: str, value: Any, mask: Any) -> bool:
    """True where a packing key of one row says that positions begin anew inside it."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "iu" or array.ndim > 2 or not array.size:
        return False  # positions of several axes, as vision models have them
    array = array.reshape(-1)
    if key.startswith("cu_seq"):
        return array.size > 2
    if key.startswith("seq_idx"):
        return bool((array != array[0]).any())
    if mask is not None:
        kept = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
        array = array[kept.reshape(-1) != 0] if kept.size == array.size else array
    return bool((np.diff(array) != 1).any())


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
