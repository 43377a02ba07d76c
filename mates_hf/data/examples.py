"""Rows of any modality: examples that a collator turns into a batch, and what tells two of them apart.

Where it is used: a `ReferenceTask` holds passages of text (`TokenRows`) or examples (`ExampleRows`); `pool` asks
`beyond_text` whether its rows are more than text, and knows such rows by the bytes of what the model gets.

Trade-off: each example is collated once when a task is made of it, and again whenever it is run. Images decoded by
thousands would not fit into memory.

Shapes: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import IGNORED
from mates_hf.data.collated import Collator, collate, drawn_row
from mates_hf.records import IntArray

LABELS = ("labels", "label", "label_ids")  # what collators of transformers make labels of


@dataclasses.dataclass(frozen=True)
class ExampleRows:
    """N examples of a dataset, not fed to a model yet.

    Attributes:
        dataset: A map-style dataset, or a list of rows.
        collate_fn: Makes a batch of rows; None for the collator of the run.
        ids: (N,) rows of the dataset.
        digests: (N, 32) uint8, SHA-256 of all inputs and labels of each: bytes, types and shapes.
        num_targets: (N,) int32 labels of each that are not -100; 1 where there are no labels.
    """

    dataset: Any
    collate_fn: Collator | None
    ids: IntArray
    digests: npt.NDArray[np.uint8]
    num_targets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, dataset: Any, collate_fn: Collator | None, ids: IntArray) -> ExampleRows:
        """Look at each example once: as the collator makes it, or as the dataset has it where there is none."""
        digests, counts = np.zeros((len(ids), 32), np.uint8), np.zeros(len(ids), np.int32)
        for number, i in enumerate(ids.tolist()):
            row = drawn_row(dataset, i) if collate_fn is None else collate(dataset, collate_fn, [i])
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"An example must be a dict, got {type(row).__name__} as row {i}. Give rows such as "
                    "`{'pixel_values': ..., 'labels': ...}`, or the `data_collator` that makes a batch of yours."
                )
            digests[number] = np.frombuffer(hashlib.sha256(content_of(row)).digest(), np.uint8)
            labels = next((row[name] for name in LABELS if row.get(name) is not None), None)
            counts[number] = 1 if labels is None else int((np.asarray(labels) != IGNORED).sum())
        return cls(dataset, collate_fn, ids, digests, counts)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ExampleRows: {len(self):,} examples, {int(self.num_targets.sum()):,} labels"

    def take(self, index: npt.NDArray[Any]) -> ExampleRows:
        """Some examples: `index` is (M,) int row numbers or an (N,) bool mask; order and repeats are kept."""
        return dataclasses.replace(
            self, ids=self.ids[index], digests=self.digests[index], num_targets=self.num_targets[index]
        )

    def digest(self) -> str:
        """SHA-256 of all examples in their order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


def examples_of(dataset: Any, data_collator: Any, limit: int | None) -> ExampleRows:
    """The examples of a dataset that a reference task is made of.

    Args:
        dataset: A map-style dataset or a list whose rows are dicts.
        data_collator: Makes a batch of rows, or None.
        limit: Number of first rows to take; None takes all.

    Returns:
        The examples that have a label.

    Raises:
        TypeError: something else than a dataset with numbered rows, or a collator that cannot be called.
        ValueError: no row, or a limit below 1.
    """
    if isinstance(dataset, (Mapping, str)) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"`dataset` must have numbered rows (`len(dataset)`, `dataset[i]`), got {type(dataset).__name__}. Of a "
            "stream take some rows first: `list(stream.take(1024))`."
        )
    if data_collator is not None and not callable(data_collator):
        raise TypeError(f"`data_collator` must be a function of a list of rows, got {type(data_collator).__name__}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 example, got {limit}.")
    num = len(dataset) if limit is None else min(limit, len(dataset))
    if not num:
        raise ValueError("`dataset` must have rows, got an empty dataset.")
    rows = ExampleRows.of(dataset, data_collator, np.arange(num))
    return rows.take(rows.num_targets > 0)


def beyond_text(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Inputs of a batch that are no text: pixels, sound, measurements.

    Args:
        batch: Of one row.

    Returns:
        Names in order. With token ids: numbers that are no whole ones, and whole ones of one byte (pixels), unless
        they are a row's or a token's, or say which token belongs to which (XLNet's `target_mapping`). Without token
        ids: every input but the labels.
    """
    names = []
    ids = batch.get("input_ids")
    for key, value in batch.items():
        shape, dtype = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
        if not shape or "mask" in str(key) or key in ("labels", "shift_labels"):
            continue
        if ids is None or (("float" in dtype or dtype.endswith("uint8")) and not _is_of_tokens(value, ids)):
            names.append(str(key))
    return tuple(sorted(names))


def _is_of_tokens(value: Any, ids: Any) -> bool:
    """Whether an input has numbers for each row or token (a teacher's logits), or 0 and 1 for pairs of them."""
    shape, num = tuple(value.shape), ids.shape[-1]
    if len(shape) < 2 or (len(shape) < 4 and shape[:2] == tuple(ids.shape)):  # a picture has four, whatever its sizes
        return True
    are_pairs = len(shape) == 3 and shape[0] == ids.shape[0] and shape[1] <= num == shape[2]
    return are_pairs and bool(((value == 0) | (value == 1)).all())


def content_hash(batch: Mapping[str, Any], *, with_labels: bool) -> bytes:
    """SHA-256 of a batch: of bytes, types and shapes of what is in it, with the labels or without."""
    kept = {key: value for key, value in batch.items() if with_labels or key not in ("labels", "shift_labels")}
    return hashlib.sha256(content_of(kept)).digest()


def content_of(value: Any) -> bytes:
    """Bytes that are equal for equal values, of whatever rows and batches are made of.

    Args:
        value: Arrays, tensors, pictures, texts, numbers, and lists and dicts of these.

    Returns:
        The bytes; arrays and pictures by their digest.

    Raises:
        TypeError: something else.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass")
    if hasattr(value, "detach"):  # a tensor; numpy has not all of its types
        import torch

        whole = value.detach().cpu().contiguous()
        return _array_content(str(whole.dtype), tuple(whole.shape), whole.reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        whole = np.ascontiguousarray(value)
        return _array_content(str(whole.dtype), whole.shape, whole)
    if isinstance(value, Mapping):
        parts = [content_of(str(key)) + content_of(value[key]) for key in sorted(value, key=str)]
        return b"{" + b"".join(parts) + b"}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return b"[" + b"".join(content_of(part) for part in value) + b"]"
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a picture of PIL
        return _array_content(f"picture {value.mode}", tuple(value.size), np.frombuffer(value.tobytes(), np.uint8))
    raise TypeError(
        f"An example must be made of arrays, tensors, pictures, texts and numbers, got {type(value).__name__}. Pass "
        "the `data_collator` that makes a batch of tensors of it."
    )


def _array_content(kind: str, shape: tuple[int, ...], values: npt.NDArray[Any]) -> bytes:
    return f"{kind}{shape}".encode() + hashlib.sha256(values.tobytes()).digest()
