"""How long the arms of a pilot are, when they are judged, and how many rows of the pool that takes.

Where it is used: `run_pilot` makes it before the first step, and refuses a pool that is too small there. Ours has the
config that `mates-hf plan` proposes for a run of the pilot's size. All arms share a start in random order, as long as
the first round of ours, so that they part from the same weights.

Trade-off: rounds of a short run are few and dear. What they would cost the planned run is predicted for that run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.pilot.settings import PilotSettings
from mates_hf.reporting.forecast import RunSize, predict_cost
from mates_hf.reporting.payback import Machine, plan_selection

# Widths, layers and heads of the models there are; the one whose size is nearest is taken.
SHAPES = (
    (32, 1, 2), (64, 2, 2), (96, 2, 3), (96, 3, 3), (128, 3, 4), (192, 4, 6), (256, 4, 4), (384, 6, 6), (512, 8, 8),
    (640, 10, 10), (768, 12, 12), (1024, 16, 16), (1280, 20, 20), (1536, 24, 24), (2048, 24, 32),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a pilot.

    Attributes:
        start: Optimizer steps in random order that all arms have in common.
        steps: Steps behind them, in which arms differ.
        longest: The same of the random arm, which is longer.
        marks: Steps at which an arm is judged, counted from the first; the last one is of equal tokens.
        batch_rows: Rows of a step.
        config: The rounds of ours, as a mapping of fields.
        num_candidates: Rows that ours and the filter choose from.
        rows_needed: Rows that the pool must have.
    """

    start: int
    steps: int
    longest: int
    marks: tuple[int, ...]
    batch_rows: int
    config: dict[str, Any]
    num_candidates: int
    rows_needed: int

    @property
    def end(self) -> int:
        """The step at which arms have trained on equal tokens."""
        return self.start + self.steps

    @property
    def later_marks(self) -> tuple[int, ...]:
        """Steps behind `end` at which the random arm is judged."""
        gap = self.marks[-1] - self.marks[-2]
        return tuple(range(self.end + gap, self.start + self.longest + 1, gap))


def intermediate_size(width: int) -> int:
    """Width of the feed-forward layers of a Llama, a multiple of 32."""
    return 32 * max(1, round(8 * width / 3 / 32))


def shape_for(num_parameters: float, vocab_size: int) -> tuple[int, int, int]:
    """Width, layers and heads of the model whose size is nearest, by ratio; the output head is tied."""

    def size(shape: tuple[int, int, int]) -> float:
        width, layers, _ = shape
        return vocab_size * width + layers * (4 * width**2 + 3 * width * intermediate_size(width))

    return min(SHAPES, key=lambda shape: abs(math.log(size(shape) / num_parameters)))


def make_schedule(settings: PilotSettings, *, multiplied: int, num_passages: int, passage_tokens: float) -> Schedule:
    """The steps of a pilot.

    Args:
        settings: How the pilot is run.
        multiplied: Parameters of the pilot's model that a token is multiplied with.
        num_passages: Pieces of passages that labels read.
        passage_tokens: Tokens of each, on average.

    Returns:
        The schedule.

    Raises:
        ValueError: an arm has too few steps for rounds.
    """
    each = settings.evaluations
    steps = math.ceil(settings.pilot_tokens / (settings.batch_rows * settings.row_tokens))
    steps = math.ceil(steps / each) * each
    size = RunSize(
        num_parameters=multiplied, num_looked_up=0, tokens_per_row=settings.row_tokens,
        batch_rows=settings.batch_rows, max_steps=steps, num_passages=num_passages,
        tokens_per_passage=max(1.0, passage_tokens),
    )  # fmt: skip
    one_device = dataclasses.replace(planned_machine(settings), num_devices=1)
    proposed = plan_selection(size, one_device).config
    config: dict[str, Any] = {
        "update_steps": settings.update_steps or proposed.update_steps,
        "num_probes": settings.num_probes or proposed.num_probes,
        "selection_ratio": settings.selection_ratio, "random_share": settings.random_share,
    }  # fmt: skip
    start = config["update_steps"]
    size = dataclasses.replace(size, max_steps=start + steps)
    num_rounds = predict_cost(size, MatesConfig(**config)).num_rounds
    if num_rounds < 2:
        raise ValueError(
            f"A pilot must have at least two rounds, and {steps} steps have {num_rounds} of {start} steps. Raise "
            "`pilot_tokens`, or lower `batch_rows` or `update_steps`."
        )
    candidates = math.ceil(steps * settings.batch_rows / settings.selection_ratio)
    longest = math.ceil(settings.longer * each) * steps // each
    rows = settings.batch_rows * start + max(
        candidates + (num_rounds + 1) * config["num_probes"], longest * settings.batch_rows
    )
    return Schedule(
        start=start, steps=steps, longest=longest, batch_rows=settings.batch_rows, config=config,
        marks=tuple(start + steps * k // each for k in range(each + 1)), num_candidates=candidates, rows_needed=rows,
    )  # fmt: skip


def require_rows(schedule: Schedule, settings: PilotSettings, num_rows: int) -> None:
    """Refuse a pool in which an arm would come to the end.

    Args:
        schedule: The steps.
        settings: How the pilot is run.
        num_rows: Rows of the pool.

    Raises:
        ValueError: says how many tokens would fit.
    """
    if num_rows >= schedule.rows_needed:
        return
    fits = settings.pilot_tokens * max(0.0, num_rows / schedule.rows_needed) * 0.9
    raise ValueError(
        f"`pool` must have {schedule.rows_needed:,} rows of {settings.row_tokens} tokens for arms of "
        f"{schedule.steps:,} steps, so that none is trained on twice, and has {num_rows:,}. Raise `pool_documents` if "
        f"it has more, or take about `pilot_tokens={fits:.0f}`."
    )


def planned_machine(settings: PilotSettings) -> Machine:
    """What the planned run runs on; the pilot has one device of it."""
    return Machine(num_devices=settings.devices, flops_per_second=settings.device_flops, price=settings.price)


def planned_size(settings: PilotSettings, *, num_passages: int, passage_tokens: float) -> RunSize:
    """The planned run, with the pilot's reference.

    Args:
        settings: How the pilot is run.
        num_passages: Passages that labels read.
        passage_tokens: Tokens of each, on average.

    Returns:
        Its size.
    """
    row = round(settings.planned_row_tokens)
    rows = max(1, round(settings.batch_tokens / row))
    return RunSize(
        num_parameters=int(settings.params), num_looked_up=int(settings.looked_up), tokens_per_row=row,
        batch_rows=rows, max_steps=max(1, int(settings.tokens / (rows * row))), num_passages=num_passages,
        tokens_per_passage=max(1.0, passage_tokens),
    )  # fmt: skip
