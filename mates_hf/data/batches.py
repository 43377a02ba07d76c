"""What the live model is fed, and how the run's loss follows from it: the contract of everything that measures.

Where it is used: everything that runs the model runs a `ModelBatch`. `influence/passes` gets it from
`Candidates`: token rows that pad themselves (`rows`), or rows that the run's own collator makes (`feeds`), of any
modality. A `Reading` says how the run's loss follows from a batch; `influence/reading` finds it by comparing with
that loss.

Trade-off: three kinds of rows behind one Protocol, so that the fast one need not know of the others.

Shapes: N rows, T trained tokens over all of them, B rows of a batch padded to L positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mates_hf.records import IntArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100  # label of a token that is not trained, as everywhere in transformers

LossFunction = Callable[[Any, "dict[str, Any]"], "Tensor"]
"""`loss(model, batch)`: mean loss, nats/token, of one row. `batch` has whatever the run's collator makes of the row,
on the model's device; where no collator says otherwise `input_ids`, `attention_mask` and `labels`, all (1, L) int64,
labels unshifted with -100 where not trained."""

Likelihood = Literal["shifted", "unshifted", "classes"]
Feed = Literal["plain", "collated", "row"]


class Targets(NamedTuple):
    """Where a batch is trained, worked out on the host, so that no device is asked and waited for.

    Attributes:
        positions: (T,) int64 positions in the flattened logits that predict a trained label.
        labels: (T,) int64 those labels.
        lowest: the smallest of them; 0 without any.
        highest: the largest of them; 0 without any.
    """

    positions: Tensor
    labels: Tensor
    lowest: int
    highest: int


class ModelBatch(NamedTuple):
    """One batch as the model's forward gets it.

    Attributes:
        inputs: arguments of the forward pass, labels left out.
        labels: (B, L) int64, -100 where not trained; (B,) for a class a row; no element where a batch has no labels.
        shifted: True where the logits at position t - 1 predict label t, False where those at t do.
        num_virtual: positions that the model puts before each row.
        known: what `targets` gives, where it was found before the labels went to a device.
    """

    inputs: dict[str, Any]
    labels: Tensor
    shifted: bool = True
    num_virtual: int = 0
    known: Targets | None = None

    def targets(self) -> Targets:
        """Where the batch is trained: positions in the flattened logits, and the labels that they predict.

        Logits have `num_virtual` positions before those of a row.
        """
        if self.known is not None:
            return self.known
        import torch

        labels = (self.labels if self.labels.device.type == "cpu" else self.labels.cpu()).numpy()
        if self.num_virtual:
            before = np.full((len(labels), self.num_virtual), IGNORED, labels.dtype)
            labels = np.concatenate([before, labels], 1)
        if self.shifted and labels.ndim > 1:
            given, labels = labels, np.full_like(labels, IGNORED)
            labels[:, :-1] = given[:, 1:]
        flat = labels.reshape(-1)
        index = np.flatnonzero(flat != IGNORED)
        wanted = flat[index]
        lowest, highest = (int(wanted.min()), int(wanted.max())) if len(wanted) else (0, 0)
        return Targets(torch.from_numpy(index), torch.from_numpy(wanted), lowest, highest)

    def to(self, device: torch.device | str) -> ModelBatch:
        """The batch on a device, its targets found before; copies to a GPU do not wait, and nothing waits for them."""
        import torch

        where, known = torch.device(device), self.known
        if self.labels.dtype == torch.int64 and self.labels.dim() in (1, 2):  # others are a loss of the run's own
            known = self.targets()
            known = known._replace(positions=moved_to(known.positions, where), labels=moved_to(known.labels, where))
        inputs = {name: moved_to(value, where) for name, value in self.inputs.items()}
        return self._replace(inputs=inputs, labels=moved_to(self.labels, where), known=known)

    def with_labels(self) -> dict[str, Any]:
        """The batch as training gets it: the inputs, and the labels where there are any."""
        return {**self.inputs, "labels": self.labels} if self.labels.numel() else dict(self.inputs)


def moved_to(value: Any, device: torch.device) -> Any:
    """A tensor on a device, from memory that a GPU reads by itself, so that the host does not wait for the copy.

    Args:
        value: a tensor; anything else is returned as it is.
        device: where it goes.

    Returns:
        The tensor on the device.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    on_host = value.device.type == "cpu" and value.layout == torch.strided and value.numel() > 0
    pins = on_host and device.type == "cuda"
    return (value.pin_memory() if pins else value).to(device, non_blocking=pins)


class Candidates(Protocol):
    """Rows that a probe can run: `TokenRows`, `CollatedRows` and `TextRows` have it."""

    @property
    def lengths(self) -> IntArray:
        """(N,) int64 positions of each row alone."""
        ...

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """(N,) int32 trained tokens of each row."""
        ...

    @property
    def one_by_one(self) -> bool:
        """True where a batch must have one row."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, index: npt.NDArray[Any]) -> Candidates:
        """Some rows: `index` is (M,) int row numbers or an (N,) bool mask; order and repeats are kept."""
        ...

    def batch(self, index: IntArray, device: torch.device | str) -> ModelBatch:
        """The rows `index` in one batch on a device; their trained tokens come row after row."""
        ...


@dataclasses.dataclass(frozen=True)
class RowsAround:
    """What rows that are fed in another way, or count in another way, have of the rows inside of them.

    Attributes:
        rows: the N rows.
    """

    rows: Candidates

    @property
    def lengths(self) -> IntArray:
        """(N,) int64 positions of each row alone."""
        return self.rows.lengths

    @property
    def num_targets(self) -> npt.NDArray[np.int32]:
        """(N,) int32 trained tokens of each row."""
        return self.rows.num_targets

    @property
    def one_by_one(self) -> bool:
        """True where a batch must have one row."""
        return self.rows.one_by_one

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How the run's loss follows from a batch, as it was found by comparing the two.

    Attributes:
        likelihood: Which logits predict a label: `"shifted"` those one position before it, `"unshifted"` those at its
            own position, `"classes"` one label a row. Where the loss is the run's own, the likelihood that comes
            nearest to it, which the reference task is measured by.
        mask_key: Name of an input that is 0 where a label is not trained, in addition to -100; None without one.
        loss: The run's own loss row by row, where no likelihood equals it; None elsewhere.
        loss_name: Name of that loss in messages and records.
        feed: `"plain"` rows are padded by this library, `"collated"` they are put through the run's collator several
            at a time, `"row"` one at a time.
        num_virtual: virtual tokens that the model puts before a row (prompt tuning); the last of them predicts the
            row's first token.
        has_shift_labels: True where the collator gives labels that are shifted already, as `shift_labels`.
        looks_ahead: True where a position's logits depend on later tokens (a masked language model).
        encoder_decoder: True where labels are a second sequence.
        packed: How documents that share a batch row are trained: `"apart"` where none sees another, so that each is
            measured alone; `"together"` where they do, so that a packed row is one text; None where no row is packed.
        constants: inputs that had one value at every token of every row looked at, such as token types of 0; passages
            of the reference task get them, rows of the pool what their collator gives.
        values_per_position: how many input values that are no text (pixels, sound) cost the model as much as one
            token position, by the multiplications of a forward pass.
        compared: The numbers that were compared, for the record: the run's loss, the loss as read, the number of rows.
    """

    likelihood: Likelihood = "shifted"
    mask_key: str | None = None
    loss: LossFunction | None = None
    loss_name: str = "the model's own loss"
    feed: Feed = "plain"
    num_virtual: int = 0
    has_shift_labels: bool = False
    looks_ahead: bool = False
    encoder_decoder: bool = False
    packed: Literal["apart", "together"] | None = None
    constants: Mapping[str, int] = dataclasses.field(default_factory=dict)
    values_per_position: float = 256.0
    compared: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_plain_text(self) -> bool:
        """True where a row's labels are those of its tokens from the second on, as `TokenRows` has them."""
        return self.likelihood == "shifted" and not self.mask_key and not self.num_virtual

    def to_dict(self) -> dict[str, Any]:
        """What `round.json` records of it, as plain JSON values."""
        return {
            "candidates": self.likelihood if self.loss is None else f"row by row: {self.loss_name}",
            "reference": self.likelihood,
            **({"mask": self.mask_key} if self.mask_key else {}),
            "fed": {"plain": "padded", "collated": "collated", "row": "collated, a row at a time"}[self.feed],
            **({"documents": self.packed} if self.packed else {}),
            **({"constant_inputs": dict(self.constants)} if self.constants else {}),
            **self.compared,
        }

    def labels_of(self, batch: Mapping[str, Any]) -> Any:
        """The labels of a collated batch: `shift_labels` where there are any, else `labels`, masked; None without."""
        shifted = batch.get("shift_labels")
        labels = batch.get("labels") if shifted is None else shifted
        if labels is None or self.mask_key is None or batch.get(self.mask_key) is None:
            return labels
        return labels.masked_fill(batch[self.mask_key] == 0, IGNORED)


PLAIN = Reading()
