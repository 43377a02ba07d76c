"""Rows as a model is fed them: through the run's own collator, or passages in the layout that a model wants.

Where it is used: `pool` makes `CollatedRows` where token ids, labels and mask are not all there is, so that every
input that training gets reaches the probe as well: token types, loss masks, pixels. The reference task becomes
`TextRows`, or rows of the same collator. `as_text` is the way back, to what influence models read.

Trade-off: a collator costs one Python call a batch and one more a candidate, to learn how many tokens it trains.
Without it a probe would assume what a batch holds.

Shapes: N rows, B rows of a batch padded to L positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import IGNORED, LossFunction, ModelBatch, Reading, RowsAround
from mates_hf.data.collated import Collator, collate, name_of
from mates_hf.data.examples import beyond_text, content_hash
from mates_hf.data.rows import TokenRows
from mates_hf.data.segments import document_starts, is_packing_key, positions
from mates_hf.errors import MatesError
from mates_hf.records import IntArray

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class CollatedRows:
    """Rows of a dataset, fed as the run's collator makes them.

    Attributes:
        dataset: A map-style dataset, or a list of rows.
        collate_fn: The collator of the run.
        reading: How the run's loss follows from a batch.
        ids: (N,) rows of the dataset.
        lengths: (N,) int64 positions of each row alone.
        num_targets: (N,) int32 trained labels of each row: tokens, or one class.
        highest: (N,) int64 the largest of them; -1 without any.
        hashes: (N,) uint64 of the bytes of all inputs of each row, without its labels.
        loss: the loss of a row where no likelihood of its labels is one; None elsewhere.
    """

    dataset: Any
    collate_fn: Collator
    reading: Reading
    ids: IntArray
    lengths: IntArray
    num_targets: npt.NDArray[np.int32]
    highest: IntArray
    hashes: npt.NDArray[np.uint64]
    loss: LossFunction | None = None

    @property
    def one_by_one(self) -> bool:
        """True where a row's loss depends on the rows beside it or is a number a row, or where the collator draws."""
        return self.reading.feed == "row" or self.loss is not None

    @classmethod
    def of(cls, dataset: Any, collate_fn: Collator, reading: Reading, ids: IntArray) -> CollatedRows:
        """Collate each row alone, once, to learn its length, its trained labels and what tells it from others."""
        lengths, counts = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int32)
        highest, hashes = np.full(len(ids), -1, np.int64), np.zeros(len(ids), np.uint64)
        for number, i in enumerate(ids.tolist()):
            collated = collate(dataset, collate_fn, [i])
            batch = model_batch(collated, reading)
            lengths[number] = _num_positions(batch, reading)
            hashes[number] = int.from_bytes(content_hash(collated, with_labels=False)[:8], "little")
            if not batch.labels.numel():  # a loss that needs no labels: of every token but the first, else of the row
                counts[number] = max(_text_positions(batch) - 1, 0) if "input_ids" in batch.inputs else 1
            elif batch.labels.is_floating_point():  # a number a row, or several of one
                counts[number] = 1
            else:
                found = batch.targets()
                counts[number], highest[number] = len(found.labels), found.highest if len(found.labels) else -1
        return cls(dataset, collate_fn, reading, ids, lengths, counts, highest, hashes)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: npt.NDArray[Any]) -> CollatedRows:
        """Some rows: `index` is (M,) int row numbers or an (N,) bool mask; order and repeats are kept."""
        names = ("ids", "lengths", "num_targets", "highest", "hashes")
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})

    def batch(self, index: IntArray, device: torch.device | str) -> ModelBatch:
        """The rows `index` as the run's collator makes them, on a device.

        Args:
            index: (B,) row numbers.
            device: Device that the tensors are moved to.

        Returns:
            One batch.

        Raises:
            MatesError: the collator trains another number of tokens than it did of the rows alone.
        """
        batch = model_batch(
            collate(self.dataset, self.collate_fn, self.ids[np.asarray(index)].tolist()), self.reading, device
        )
        if self.reading.loss is not None or self.loss is not None:
            return batch
        found, wanted = len(batch.targets()[0]), int(self.num_targets[index].sum())
        if found != wanted:
            raise MatesError(
                f"A batch must train the tokens that its rows train alone, {wanted} for {len(index)} rows, got "
                f"{found} from the collator `{name_of(self.collate_fn)}`, first pool row {int(self.ids[index][0])}. "
                "Use a collator that makes of a row the same whatever rows are beside it."
            )
        return batch


@dataclasses.dataclass(frozen=True)
class TextRows(RowsAround):
    """Passages of tokens in the layout that a model wants which `TokenRows` alone does not give.

    Attributes:
        rows: the passages; label t is predicted from the tokens before it.
        reading: How it is read. A causal model whose loss does not shift gets tokens 0 to L - 2 with labels of tokens
            1 to L - 1; one that looks ahead gets tokens and labels as they are. Constant inputs are added.
    """

    rows: TokenRows
    reading: Reading

    def take(self, index: npt.NDArray[Any]) -> TextRows:
        """Some passages: `index` is (M,) int numbers or an (N,) bool mask; order and repeats are kept."""
        return TextRows(self.rows.take(index), self.reading)

    def batch(self, index: IntArray, device: torch.device | str) -> ModelBatch:
        """The passages `index`, padded on the right, on a device."""
        import torch

        ids_BL, here_BL, labels_BL = self.rows.take(index).padded()
        if self.reading.likelihood == "unshifted" and not self.reading.looks_ahead and ids_BL.shape[1] > 1:
            ids_BL, here_BL, labels_BL = ids_BL[:, :-1], here_BL[:, 1:], labels_BL[:, 1:]
        inputs = {"input_ids": torch.from_numpy(np.ascontiguousarray(ids_BL))}
        inputs["attention_mask"] = torch.from_numpy(here_BL.astype(np.int64))
        for name, value in self.reading.constants.items():
            inputs[name] = value * inputs["attention_mask"]
        labels = torch.from_numpy(np.ascontiguousarray(labels_BL))
        shifted = self.reading.likelihood == "shifted"
        return ModelBatch(inputs, labels, shifted, self.reading.num_virtual).to(device)


def model_batch(batch: Mapping[str, Any], reading: Reading, device: torch.device | str = "cpu") -> ModelBatch:
    """A collated batch as the model's forward gets it.

    Args:
        batch: A batch as the collator made it.
        reading: Which labels count, and whether they are shifted.
        device: Device that the tensors are moved to; other values stay as they are.

    Returns:
        Every key but `labels`.
    """
    import torch

    labels = reading.labels_of(batch)
    if labels is None:
        labels = torch.zeros((1, 0), dtype=torch.int64)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    shifted = reading.likelihood == "shifted"
    return ModelBatch(inputs, torch.as_tensor(labels), shifted, reading.num_virtual).to(device)


@dataclasses.dataclass(frozen=True)
class StackedColumns:
    """A collator for rows of which no collator is known: their columns as they are, stacked.

    Attributes:
        names: the columns; where a row has no `labels`, every token but the first of a document is its own. Rows that
            say where their documents begin get positions that begin anew there, and no mask, which would hide it.
    """

    names: tuple[str, ...]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of rows of one length; `ValueError` where their lengths differ."""
        import torch

        full, names = [dict(row) for row in rows], [*self.names, "labels"]
        for row in full:
            starts = document_starts(row, "the dataset")
            if row.get("labels") is None:
                ids = np.asarray(row["input_ids"])
                row["labels"] = ids if starts is None else np.where(starts, IGNORED, ids)
            if any(is_packing_key(key) for key in row):
                row["position_ids"] = positions(len(row["input_ids"]), starts)
        if any("position_ids" in row for row in full) and all(np.all(row.get("attention_mask", 1)) for row in full):
            names = [name for name in names if name != "attention_mask"] + ["position_ids"]
        present = [name for name in names if all(row.get(name) is not None for row in full)]
        stacked = {name: np.stack([np.asarray(row[name]) for row in full]) for name in dict.fromkeys(present)}
        batch: dict[str, Any] = {
            name: torch.as_tensor(value.astype(np.int64) if value.dtype.kind in "iub" else value)
            for name, value in stacked.items()
        }
        # With a cache transformers lets the documents of a row see each other, whatever their positions.
        return {**batch, "use_cache": False} if "position_ids" in batch else batch


def as_text(
    ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None, reading: Reading
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """What influence models read of a row: its text, with each trained token behind the one before it.

    Args:
        ids: (L,) the row's token ids, without padding.
        labels: The row's labels: (L,) at the positions that predict them, another length for an encoder-decoder, (1,)
            or () for a class; None where every token is its own.
        reading: How the model reads a batch and shifts its labels.

    Returns:
        Ids and labels of one length in the layout of `TokenRows`, which never trains a row's first token. As many
        tokens are trained, in the same order.
    """
    if labels is None or (reading.likelihood == "shifted" and not reading.num_virtual):
        return ids, labels
    if reading.likelihood == "shifted":
        return np.concatenate([ids[:1], ids]), np.concatenate([np.full(min(1, len(ids)), IGNORED), labels])
    if reading.likelihood == "classes":
        marked = np.full(len(ids), IGNORED, np.int64)
        marked[-1:] = ids[-1:]
        return ids, marked
    if reading.encoder_decoder:
        kept = labels[labels != IGNORED]
        first = ids if len(ids) else np.zeros(1, np.int64)
        return np.concatenate([first, kept]), np.concatenate([np.full(len(first), IGNORED), kept])
    untrained = ids if reading.looks_ahead else np.concatenate([ids[1:], ids[-1:]])
    return (
        np.concatenate([ids[:1], np.where(labels == IGNORED, untrained, labels)]),
        np.concatenate([np.full(min(1, len(ids)), IGNORED), labels]),
    )


def _num_positions(batch: ModelBatch, reading: Reading) -> int:
    """Positions of a batch of one row, by which micro-batches are sized: of its tokens, or of what is no text."""
    others = sum(int(batch.inputs[name].numel()) for name in beyond_text(batch.inputs))
    return max(_text_positions(batch), math.ceil(others / reading.values_per_position))


def _text_positions(batch: ModelBatch) -> int:
    """The longest of a row's token inputs and labels."""
    ids = batch.inputs.get("input_ids")
    sizes = [part.shape[1] for part in (ids, batch.labels) if part is not None and part.dim() > 1]
    return max(sizes, default=1)
