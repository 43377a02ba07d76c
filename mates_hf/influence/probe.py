"""What every probe is: a measurement of influence on the live model and optimizer that leaves no trace.

Place in the flow: the first stage of a round. The Protocol is the extension point: what has these two methods can be
passed to `MatesCallback(probe=...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import nn

from mates_hf.data.pool import read_candidates
from mates_hf.data.rows import TokenRows
from mates_hf.records import InfluenceError, InfluenceLabels, IntArray, RunSettings

if TYPE_CHECKING:
    from mates_hf.data.reference import ReferenceTask

Self = TypeVar("Self", bound="Probe")


class Probe(Protocol):
    """Measures the influence of candidates; sign: > 0 helps, higher is better."""

    def measure(self, model: nn.Module, optimizer: Any, reference: ReferenceTask, candidates: Any) -> InfluenceLabels:
        """Influence of candidates on the reference task at the model's present state, which stays as it is.

        Args:
            model: the live model, wrapped by accelerate or not.
            optimizer: its optimizer, wrapped by accelerate or not, after at least one step.
            reference: what the model should get better at.
            candidates: a dataset with `input_ids` (and `labels`), a candidate pool, or `TokenRows`.

        Returns:
            Labels of the candidates that have a trained token, in their order.
        """
        ...

    def for_run(self: Self, settings: RunSettings) -> Self:
        """The probe with what it leaves open (None) taken from the run; what was set is kept."""
        ...


def read_measurable(candidates: Any) -> tuple[IntArray, TokenRows, IntArray]:
    """Ids and rows of the candidates that have a trained token, and the ids of those that have none.

    Args:
        candidates: whatever `read_candidates` accepts.

    Returns:
        (N,) int64 ids, their N rows, and (M,) int64 ids of the candidates left out.

    Raises:
        InfluenceError: no candidate has one.
    """
    ids, rows = read_candidates(candidates)
    trained = rows.num_targets > 0
    if not trained.any():
        raise InfluenceError(
            f"`candidates` must have trained tokens, got {len(rows)} rows with none: a row needs two tokens, and a "
            "label other than -100 after its first."
        )
    if not trained.all():
        return ids[trained], rows.take(trained), ids[~trained]
    return ids, rows, np.zeros(0, np.int64)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiplied_parameters(model: nn.Module) -> int:
    """Parameters that every token is multiplied with, tied ones once; `flops` counts by these.

    All but tables that ids are looked up in; one that is the output head as well counts.
    """
    owned = [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    ]
    return sum(parameter.numel() for parameter in {id(parameter): parameter for parameter in owned}.values())
