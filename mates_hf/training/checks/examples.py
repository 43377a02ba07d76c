"""What can be known of rows that are more than text before the first optimizer step: images, speech, measurements.

Where it is used: `start` calls `check_examples` before any of them is run. Trade-off: 64 fixed rows are collated once
more. What a rarer row is made of shows where it is probed or trained on.
"""

from __future__ import annotations

from typing import Any

from mates_hf.data.collated import collate, name_of
from mates_hf.data.columns import fixed_positions
from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.errors import UnsupportedSettingError

NUM_ROWS = 64


def check_examples(pool: CandidatePool, reference: ReferenceTask, influence_model: Any, *, rows_together: int) -> None:
    """Refuse rows that fit no batch, and an influence model or a task of text where rows are more than text.

    Args:
        pool: Everything that may be trained on.
        reference: What the model should get better at.
        influence_model: Predicts influence.
        rows_together: Rows that are collated together in the run.

    Raises:
        UnsupportedSettingError: names what stands in the way, and the way out.
    """
    if not pool.beyond_text:
        _refuse_text_only(influence_model)
        if not reference.is_text and pool.collate_fn is None:
            raise UnsupportedSettingError(
                f"The reference task `{reference.name}` is of examples, which the collator of the run must make a "
                "batch of, got none. Pass the loop's `collate_fn`, or make the task with `from_dataset`."
            )
        return
    _check_reader(pool, influence_model)
    _check_shapes(pool, rows_together)


def _refuse_text_only(influence_model: Any) -> None:
    if getattr(influence_model, "text_only", False):
        raise UnsupportedSettingError(
            "`text_only=True` must be given where rows have text and other inputs, and the rows of this pool are text "
            "alone. Leave it out."
        )


def _check_reader(pool: CandidatePool, influence_model: Any) -> None:
    """Refuse an influence model that would leave out what rows have besides text, unless it was told to."""
    if getattr(influence_model, "reads_examples", False):
        return
    kind, inputs = type(influence_model).__name__, "`, `".join(pool.beyond_text)
    way = "Pass `influence_model=FeatureInfluenceModel()`, which reads what the model itself makes of a row"
    if not pool.has_text:
        raise UnsupportedSettingError(
            f"{kind} reads text, and the rows of this pool have none, but `{inputs}`. {way}."
        )
    if not getattr(influence_model, "text_only", False):
        raise UnsupportedSettingError(
            f"{kind} reads text alone, and the rows of this pool also have `{inputs}`. {way}; or let the text alone "
            "decide: `NgramInfluenceModel(text_only=True)`, `EncoderInfluenceModel(text_only=True)`."
        )


def _check_shapes(pool: CandidatePool, rows_together: int) -> None:
    """Refuse rows of several sizes that the collator makes no batch of."""
    if rows_together < 2:
        return
    assert pool.collate_fn is not None
    first: dict[str, tuple[int, tuple[int, ...]]] = {}
    for i in pool.candidate_ids[fixed_positions(len(pool), NUM_ROWS)].tolist():
        batch = collate(pool.dataset, pool.collate_fn, [i])
        for name in pool.beyond_text:
            shape = tuple(getattr(batch.get(name), "shape", ()))[1:]
            other, before = first.setdefault(name, (i, shape))
            if shape != before:
                _require_batch(pool, [other, i], name, (before, shape))
                first[name] = (i, shape)


def _require_batch(pool: CandidatePool, rows: list[int], name: str, shapes: tuple[Any, Any]) -> None:
    assert pool.collate_fn is not None
    try:
        collate(pool.dataset, pool.collate_fn, rows)
    except Exception as error:
        raise UnsupportedSettingError(
            f"The collator `{name_of(pool.collate_fn)}` must make one batch of rows of several sizes, got "
            f"{type(error).__name__} for `{name}` of {shapes[0]} in pool row {rows[0]} and {shapes[1]} in row "
            f"{rows[1]}. Let an image processor or feature extractor bring all to one size (in `dataset.map`, or in "
            "`dataset.set_transform` with `remove_unused_columns=False`), or use a collator that pads."
        ) from error
