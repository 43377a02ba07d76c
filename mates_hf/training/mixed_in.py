"""Passages of the reference task mixed into a run (`MatesConfig.reference_passes`): what is refused, and the schedule.

Where it is used: `start` asks before a run's plan is made, and gives the clock the schedule; `own_order` puts the
`MixedDataset` into the dataloader; a round records its share.

Trade-off: passages that a run trains on are training data. What evaluates on them says nothing of the model any more,
so a reference task that lm-eval would evaluate is refused, where it is known to be one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mates_hf.config import MatesConfig
from mates_hf.data.batches import Reading
from mates_hf.data.mixing import PassageSchedule
from mates_hf.data.passage_layout import lay_out
from mates_hf.data.passage_rows import MixedDataset, PassageRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.training.clock import RowClock

logger = logging.getLogger(__name__)


class MixedIn(NamedTuple):
    """The passages of a run.

    Attributes:
        rows: The passages as rows.
        schedule: where they stand among the rows of the run.
        dataset: the pool with the passages behind it.
    """

    rows: PassageRows
    schedule: PassageSchedule
    dataset: MixedDataset

    def identity(self) -> dict[str, Any]:
        """What tells these passages and their places from others, JSON values."""
        return {**dataclasses.asdict(self.schedule), "sha256": self.rows.digest()}


def mix_in(
    config: MatesConfig,
    reference: ReferenceTask,
    pool: CandidatePool,
    clock: RowClock,
    max_steps: int,
    *,
    separator: int | None,
    saved: Mapping[str, Any] | None,
) -> MixedIn:
    """Lay the passages out and spread them over the run, before its first step.

    Args:
        config: How often passages are trained on, and the seed of their order.
        reference: The passages, cut to the model's context.
        pool: Rows and collator of the run.
        clock: Steps and rows of the run, without passages.
        max_steps: Optimizer steps of the run.
        separator: The tokenizer's end token; None without one.
        saved: this library's state in the checkpoint that is resumed, whose schedule goes on; None where there is
            none.

    Returns:
        The passages.

    Raises:
        UnsupportedSettingError: lm-eval evaluates on them, or no batch takes pool rows and passages together.
        MatesError: The checkpoint's schedule cannot be read.
    """
    reference.text(
        "`reference_passes`", "Set `reference_passes=0`, and add the examples to the pool as rows of its own."
    )
    _refuse_evaluated(reference)
    if clock.batch_rows * clock.accumulation < 2:
        raise UnsupportedSettingError(
            "With `reference_passes` an optimizer step must have 2 rows at least, of which one may be a passage, got "
            "1. Raise `per_device_train_batch_size` or `gradient_accumulation_steps`, or set `reference_passes=0`."
        )
    rows = lay_out(reference, pool, separator)
    begun = None if saved is None else saved.get("passages")
    given = {"num_passages": len(rows), "passes": config.reference_passes, "seed": config.selection_seed}
    end = clock.position(max_steps)
    try:
        start = clock.start_position if begun is None else begun["start"]
        num_rows = max(end - start, 0) if begun is None else begun["num_rows"]
        schedule = PassageSchedule(**given, start=start, num_rows=num_rows)
    except (TypeError, KeyError, ValueError) as error:
        raise MatesError(
            f"The checkpoint's state of mates_hf must say where the passages stand, got {begun!r}: the checkpoint was "
            "changed. Resume from another checkpoint."
        ) from error
    _warn(schedule, end, resumes=begun is not None)
    return MixedIn(rows, schedule, MixedDataset(pool.trained_from, rows))


def _refuse_evaluated(reference: ReferenceTask) -> None:
    split = reference.description.get("split")
    if reference.is_evaluated or split == "test":
        raise UnsupportedSettingError(
            f"With `reference_passes` the run trains on the reference task, but `{reference.name}` is made of the "
            f"split {split!r}, which lm-eval evaluates: a result on it would say nothing. Make it of another split "
            "(`from_lm_eval(split='train')`) or of passages of your own, or set `reference_passes=0`."
        )


def _warn(schedule: PassageSchedule, end: int, *, resumes: bool) -> None:
    """Say which passages are left out: what is more than half of the rows, and what a shorter run does not reach."""
    if not Processes.of_run().is_main:
        return
    asked, num = schedule.num_passages * schedule.passes, schedule.num_slots
    if num < asked and not resumes:
        logger.warning(
            "At most half of a run's rows are passages: of %d passes over %d rows of them (`reference_passes`), %d of "
            "%d are left out, so each is trained on %.2f times on average.",
            schedule.passes, schedule.num_passages, asked - num, asked, num / schedule.num_passages,
        )  # fmt: skip
    if resumes and schedule.before(end) < num:
        logger.warning(
            "The run is shorter than when it began, and ends before %d of its %d passages are trained on.",
            num - schedule.before(end), num,
        )  # fmt: skip


def require_text(reading: Reading) -> None:
    """Refuse passages in a run whose rows are no text for a causal model.

    Args:
        reading: How the run's loss follows from a batch.

    Raises:
        UnsupportedSettingError: names what the run trains.
    """
    if reading.likelihood != "shifted" or reading.encoder_decoder:
        kind = "one label a row" if reading.likelihood == "classes" else "labels that stand at their own positions"
        kind = "a second sequence" if reading.encoder_decoder else kind
        raise UnsupportedSettingError(
            f"`reference_passes` needs a run that trains each token from those before it, got one with {kind}. Set "
            "`reference_passes=0`, and add the passages to the pool as rows of its own."
        )


def passage_facts(clock: Any, from_step: int, to_step: int) -> dict[str, int]:
    """What `round.json` says of the passages between the rows of a round; nothing without passages.

    Args:
        clock: The run's.
        from_step: First optimizer step of the round.
        to_step: First optimizer step behind it.

    Returns:
        The position of the round's first row, passages included, and the number of passages up to its end.
    """
    schedule = getattr(clock, "passages", None)
    if schedule is None:
        return {}
    start, stop = clock.position(from_step), clock.position(to_step)
    return {"row_position": start, "num_passage_rows": schedule.before(stop) - schedule.before(start)}


def replace_dataset(dataloader: Any, dataset: Any) -> Callable[[], None]:
    """Let a prepared dataloader read its rows from another dataset; returns what undoes it.

    Args:
        dataloader: The dataloader, as accelerate prepared it.
        dataset: answers every id that the dataloader's sampler will give.

    Returns:
        A function that gives it the dataset it had.

    Raises:
        UnsupportedSettingError: the dataloader reads from elsewhere.
    """
    holders: list[Any] = []
    found = dataloader
    while found is not None and all(found is not holder for holder in holders):
        holders.append(found)
        found = vars(found).get("base_dataloader", vars(found).get("_loader"))
    holders = [holder for holder in holders if "dataset" in vars(holder)]
    before = [(holder, vars(holder)["dataset"]) for holder in holders]

    def put(values: list[tuple[Any, Any]]) -> None:
        for holder, value in values:
            vars(holder)["dataset"] = value  # torch refuses to set it as an attribute
            if vars(holder).get("_iterator") is not None:
                vars(holder)["_iterator"] = None  # workers that persist would go on with the other one

    put([(holder, dataset) for holder in holders])
    if not holders or dataloader.dataset is not dataset:
        put(before)
        raise UnsupportedSettingError(
            "With `reference_passes` the training dataloader must read passages too, but where "
            f"{type(dataloader).__name__} has its dataset is not known. Train with the dataloader that "
            "`Trainer.get_train_dataloader` makes, or set `reference_passes=0`."
        )
    return lambda: put(before)
