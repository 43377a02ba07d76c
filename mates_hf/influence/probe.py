"""What every probe is: a measurement of influence on the live model and optimizer that leaves no trace.

Where it is used: the first stage of a round. The Protocol is the extension point: what has these two methods can be
passed to `MatesCallback(probe=...)`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import nn

from mates_hf.data.batches import Candidates, LossFunction, Reading
from mates_hf.data.feeds import TextRows
from mates_hf.data.pool import CandidatePool, open_candidates
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.fragments import whole_size
from mates_hf.engine.processes import Processes
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.influence.reading import find_reading
from mates_hf.influence.reference_feed import fed_reference
from mates_hf.influence.run_loss import MODEL_LOSS, RunLoss, counted_tokens
from mates_hf.records import InfluenceLabels, IntArray

Self = TypeVar("Self", bound="Probe")
Filled = TypeVar("Filled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a probe must know of the run that only the training loop can tell it.

    Attributes:
        learning_rates: one a parameter group, of the step to come; None reads the optimizer's own.
        max_grad_norm: clipping threshold of the run; None or 0 is off.
        batch_rows: rows in one optimizer step, over all devices and accumulation.
        rate_steps: the optimizer steps of the coming round, counted in steps at `learning_rates`: the sum of the
            learning rates scheduled for them over the present ones; None where no round is known.
        tokens_per_batch: padded tokens in one forward pass of a probe.
        seed: for whatever a probe draws.
        progress: show a progress bar.
        processes: those that train the model together and measure at the same time; None is one process.
        shards_dir: where a probe keeps what it has measured so far; None keeps nothing.
    """

    learning_rates: tuple[float, ...] | None = None
    max_grad_norm: float | None = None
    batch_rows: int = 1
    rate_steps: float | None = None
    tokens_per_batch: int = 8192
    seed: int = 0
    progress: bool = False
    processes: Processes | None = None
    shards_dir: Path | None = None


class Probe(Protocol):
    """Measures the influence of candidates; sign: > 0 helps, higher is better."""

    def measure(self, model: nn.Module, optimizer: Any, reference: ReferenceTask, candidates: Any) -> InfluenceLabels:
        """Influence of candidates on the reference task at the model's present state, which stays as it is.

        Args:
            model: the live model, wrapped by accelerate or not.
            optimizer: its optimizer, wrapped by accelerate or not, after at least one step.
            reference: what the model should get better at.
            candidates: a dataset with `input_ids` (and `labels`), `TokenRows`, or a `CandidatePool`, which examples of
                another modality need for its collator.

        Returns:
            Labels of the candidates that have a trained token, in their order.
        """
        ...

    def for_run(self: Self, settings: RunSettings) -> Self:
        """The probe with what it leaves open (None) taken from the run; what was set is kept."""
        ...


def filled(probe: Filled, settings: RunSettings) -> Filled:
    """A probe of this library with what it leaves open (None) taken from the run; what was set is kept."""
    own = {field.name for field in dataclasses.fields(probe)}  # type: ignore[arg-type]
    names = [field.name for field in dataclasses.fields(settings) if field.name in own]
    changes = {name: getattr(settings, name) for name in names if getattr(probe, name) is None}
    return dataclasses.replace(probe, **changes)  # type: ignore[type-var]


class Measurable(NamedTuple):
    """What a probe runs.

    Attributes:
        ids: (N,) int64 candidate ids of those that have a trained token.
        rows: those N candidates, as the model is fed them.
        skipped: (M,) int64 ids of the candidates without one.
        reference: the task, as the model is fed it.
        loss: the loss of a candidate's row, where it is no likelihood; None where it is.
        reading: how the run's loss follows from a batch.
        num_compared: padded tokens that were run forward to find it.
    """

    ids: IntArray
    rows: Candidates
    skipped: IntArray
    reference: ReferenceTask
    loss: LossFunction | None
    reading: Reading
    num_compared: int


def read_measurable(
    model: nn.Module,
    reference: ReferenceTask,
    candidates: Any,
    *,
    loss: LossFunction | None = None,
    reference_loss: LossFunction | None = None,
) -> Measurable:
    """What to run of candidates and reference task, after the run's loss was compared with what would be read.

    In a run `MatesCallback` has compared before the first step. Alone, the model's own loss is compared here.

    Args:
        model: the live model, unwrapped; it stays as it is.
        reference: what the model should get better at.
        candidates: whatever `read_candidates` accepts.
        loss: the loss of a candidate that the probe was given; compared with nothing.
        reference_loss: the same for the reference task.

    Returns:
        Ids, rows and losses.

    Raises:
        InfluenceError: no candidate has a trained token.
        UnsupportedSettingError: the model's own loss is none that can be measured.
    """
    pool, rows = open_candidates(candidates)
    compared = pool.reading
    with counted_tokens(model) as num_tokens:
        reading = pool.reading = compared or read_given(model, pool, loss, reference_loss)
        is_known = compared is not None and reading.is_plain_text and not reading.constants
        needs_text_fed = reference_loss is None and not is_known
        if reference.fed is None and (needs_text_fed or not reference.is_text):
            given = pool if rows is None else None
            reference = fed_reference(model, reference, reading, given, reference_loss)
    ids = pool.candidate_ids
    fed = pool.candidates() if rows is None else text_rows(rows, reading)
    trained = fed.num_targets > 0
    if not trained.any():
        raise InfluenceError(
            f"`candidates` must have trained tokens, got {len(fed)} rows with none: a row needs two tokens, and a "
            "label other than -100 after its first."
        )
    skipped = ids[~trained]
    if len(skipped):
        ids, fed = ids[trained], fed.take(trained)
    return Measurable(ids, fed, skipped, reference, reading.loss if loss is None else loss, reading, num_tokens[0])


def text_rows(rows: TokenRows, reading: Reading) -> Candidates:
    """Token rows, which are texts, in the layout that the model wants.

    Args:
        rows: candidates.
        reading: How the model reads a batch and shifts its labels.

    Returns:
        The rows themselves for a model whose loss shifts.

    Raises:
        UnsupportedSettingError: what the model wants cannot be made of a text.
    """
    if reading.likelihood == "shifted" and not reading.num_virtual:
        return rows
    if rows.segments is not None:
        raise UnsupportedSettingError(
            "`candidates` must be a `CandidatePool(dataset, collate_fn)` where rows are packed and the model does not "
            "read them as texts, got token rows. Pass the dataset with the collator of the run."
        )
    if reading.likelihood == "shifted":
        return TextRows(rows, reading)
    if reading.likelihood == "classes" or reading.encoder_decoder or (reading.looks_ahead and rows.labels is None):
        raise UnsupportedSettingError(
            "`candidates` must be a `CandidatePool(dataset, collate_fn)` for a model that is not trained to predict "
            "the next token, got token rows. Pass the dataset with the collator of the run."
        )
    return TextRows(rows, reading)


def read_given(
    model: nn.Module,
    pool: CandidatePool,
    loss: LossFunction | None,
    reference_loss: LossFunction | None,
    run_loss: RunLoss = MODEL_LOSS,
) -> Reading:
    """How the run's loss follows from the pool's rows; a loss that the probe was given is taken as it is.

    Args:
        model: the live model, unwrapped; it stays as it is.
        pool: rows and their collator.
        loss: the loss of a candidate that the probe was given.
        reference_loss: the same for the reference task.
        run_loss: what the run trains with.

    Returns:
        The reading. Where the probe was given both losses, nothing is compared.
    """
    if loss is None:
        return find_reading(model, pool, run_loss)
    given = RunLoss(loss, "the loss that the probe was given", reads_all=True)
    if reference_loss is not None:  # the model need not even give logits
        plain = pool.collate_fn is None
        return Reading(loss=loss, loss_name=given.name, feed="plain" if plain else "row")
    return find_reading(model, pool, given, is_given=True)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(whole_size(parameter) for parameter in model.parameters())


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
    return sum(whole_size(parameter) for parameter in {id(parameter): parameter for parameter in owned}.values())
