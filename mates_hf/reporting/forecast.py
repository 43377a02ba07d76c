"""What selection would cost a run, predicted before it starts: FLOPs, and shares of its wall-clock.

Where it is used: before a run; it needs the run's size and its `MatesConfig`, neither torch nor data. The formulas
are those that rounds record with (`mates_hf.flops`); a test holds them against a run.

Trade-off: one number a stage from the rule of 2 and 6 FLOPs a parameter and token, so attention scores are left out on
both sides of every share. Wall-clock needs speeds, which are the caller's assumption. Rounds that a drift check starts
early are not foreseen, and rounds that grow (`first_round_steps`) do so as fast as they may.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from mates_hf.config import NUM_AUDIT_PASSAGES, NUM_AUDITED, NUM_SENTINELS, MatesConfig
from mates_hf.data.mixing import PassageSchedule
from mates_hf.flops import (
    NGRAM_FIT_FLOPS,
    NGRAM_SCORE_FLOPS,
    NUM_SECOND_MOMENT_BATCHES,
    PATH_STEPS,
    checked_passages,
    directional_flops,
    forward_flops,
    gradient_flops,
    loss_reduction_flops,
    num_path_points,
    one_step_flops,
    sentinel_passages,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSize:
    """The run whose cost is asked for.

    Attributes:
        num_parameters: Parameters of the model, tied ones once.
        num_looked_up: How many of these are in tables that ids are looked up in: the input embedding, 0 where the
            output head is tied to it, and learned positions.
        tokens_per_row: tokens of a row of the pool.
        batch_rows: rows in one optimizer step, over all devices and accumulation.
        max_steps: optimizer steps.
        num_passages: passages of the reference task.
        tokens_per_passage: tokens of each, on average.
        pool_rows: rows in the pool; needed for `candidate_scope="pool"`.

    Raises:
        ValueError: a number out of its range.
    """

    num_parameters: int
    num_looked_up: int
    tokens_per_row: int
    batch_rows: int
    max_steps: int
    num_passages: int
    tokens_per_passage: float
    pool_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_row", "batch_rows", "max_steps", "num_passages", "tokens_per_passage"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        if not 0 <= self.num_looked_up < self.num_parameters:
            raise ValueError(
                f"`num_looked_up` must be at least 0 and below `num_parameters` ({self.num_parameters}), got "
                f"{self.num_looked_up!r}."
            )

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with."""
        return self.num_parameters - self.num_looked_up

    @property
    def trained_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.max_steps * self.batch_rows * self.tokens_per_row

    @property
    def reference_tokens(self) -> float:
        """Tokens of the reference task."""
        return self.num_passages * self.tokens_per_passage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder as the influence model, fine-tuned on each round's labels; the defaults are the paper's bert-base.

    Attributes:
        multiplied: parameters that a token is multiplied with: 85.6 M of bert-base's 110 M.
        num_epochs: passes over the labels, each with one over the held-out ones.
    """

    multiplied: int = 85_646_592
    num_epochs: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedCost:
    """What a run would cost; FLOPs over the whole run.

    Attributes:
        num_rounds: rounds that select; where they grow, the fewest that there may be.
        training_flops: FLOPs of the optimizer steps.
        stages: FLOPs by stage of the rounds.
        trained_tokens: tokens trained on.
        labelled_tokens: tokens of all probed candidates, which the influence model is fitted on.
        scored_tokens: tokens of all scored candidates.
        on_cpu: fit, guard and score run on the CPU while devices wait.
    """

    num_rounds: int
    training_flops: float
    stages: Mapping[str, float]
    trained_tokens: int
    labelled_tokens: float
    scored_tokens: float
    on_cpu: bool

    @property
    def share_of_training(self) -> float:
        """FLOPs of all rounds over those of training."""
        return sum(self.stages.values()) / self.training_flops

    @property
    def share_of_all(self) -> float:
        """FLOPs of all rounds over those of training and rounds together."""
        return self.share_of_training / (1 + self.share_of_training)

    def device_seconds_share(self, relative_utilisation: float) -> float:
        """Seconds that devices spend on rounds, relative to the seconds of training.

        Args:
            relative_utilisation: FLOPs a second in rounds over FLOPs a second in training; an assumption.

        Returns:
            The share; what runs on the CPU is not in it.

        Raises:
            ValueError: the utilisation is not above 0.
        """
        if not relative_utilisation > 0:
            raise ValueError(f"`relative_utilisation` must be above 0, got {relative_utilisation!r}.")
        left_out = ("fit", "guard", "score") if self.on_cpu else ()
        flops = sum(flops for name, flops in self.stages.items() if name not in left_out)
        return flops / self.training_flops / relative_utilisation

    def idle_seconds_share(
        self, *, training_tokens_per_second: float, fit_tokens_per_second: float, score_tokens_per_second: float
    ) -> float:
        """Seconds that devices wait for fit and score on the CPU, relative to the seconds of training.

        Args:
            training_tokens_per_second: Speed of the whole run, over all devices: the faster they are, the more waiting
                costs.
            fit_tokens_per_second: labelled tokens a second that the influence model is fitted on.
            score_tokens_per_second: tokens a second that it scores.

        Returns:
            The share; 0 for an influence model that runs on the devices.
        """
        if not self.on_cpu:
            return 0.0
        waiting = self.labelled_tokens / fit_tokens_per_second + self.scored_tokens / score_tokens_per_second
        return waiting * training_tokens_per_second / self.trained_tokens


def predict_cost(
    size: RunSize,
    config: MatesConfig,
    *,
    probe: Literal["directional", "one_step", "loss_reduction"] = "directional",
    second_moment: Literal["state", "batches"] = "state",
    path_steps: int = PATH_STEPS,
    passes: float = 4.0,
    epsilon_steps: int = 1,
    encoder: Encoder | None = None,
) -> PredictedCost:
    """FLOPs of training and of each stage of the rounds.

    Args:
        size: Size of the run.
        config: Config of the rounds.
        probe: `DirectionalProbe`; `OneStepProbe`, the paper's, which reads the reference task for each candidate; or
            `LossReductionProbe`. The first alone is audited.
        second_moment: Where the directional probe takes the second moment from.
        path_steps: Points of the directional probe's path.
        passes: How often the probe of loss reductions trains on each passage.
        epsilon_steps: steps the directional probe tries to find ε; 0 where it is given.
        encoder: the influence model; None is the n-gram one, on the CPU.

    Returns:
        The cost; a run too short for a round has none.

    Raises:
        ValueError: `candidate_scope="pool"` without the pool's rows.
    """
    lengths = _lengths(size, config)
    steps_done = itertools.accumulate(lengths, initial=_first_step(config))
    edges = [_pool_rows(size, config, step) for step in steps_done]
    chosen = [after - before for before, after in itertools.pairwise(edges)]
    scored = sum(_scored_rows(size, config, *rows) for rows in zip(edges, chosen, strict=False)) * size.tokens_per_row
    moment = NUM_SECOND_MOMENT_BATCHES * size.batch_rows if second_moment == "batches" else 0

    def directional(num_candidates: int, num_passages: int, steps: int = 0, points: int = path_steps) -> float:
        is_path = num_path_points(points, num_passages) > 1
        return directional_flops(
            size.multiplied,
            num_candidate_tokens=num_candidates * size.tokens_per_row,
            num_reference_tokens=num_passages * size.tokens_per_passage,
            epsilon_steps=steps,
            tokens_per_row=size.tokens_per_row,
            num_second_moment_tokens=moment * size.tokens_per_row,
            num_compared_tokens=is_path * (num_passages + checked_passages(num_passages)) * size.tokens_per_passage,
        )

    def one_step(num_candidates: int, num_passages: int) -> float:
        return one_step_flops(
            size.multiplied,
            num_candidates=num_candidates,
            num_candidate_tokens=num_candidates * size.tokens_per_row,
            num_reference_tokens=num_passages * size.tokens_per_passage,
        )

    def loss_reduction(num_candidates: int, num_passages: int) -> float:
        return loss_reduction_flops(
            size.multiplied,
            num_candidate_tokens=num_candidates * size.tokens_per_row,
            num_reference_tokens=num_passages * size.tokens_per_passage,
            num_trained_tokens=passes * num_passages * size.tokens_per_passage,
        )

    measured = {"directional": directional, "one_step": one_step, "loss_reduction": loss_reduction}[probe]
    per_round: dict[str, float] = {}
    if probe == "directional":
        per_round["probe"] = directional(config.num_probes, size.num_passages, epsilon_steps)
        if config.num_probes >= NUM_AUDITED:
            passages = min(NUM_AUDIT_PASSAGES, size.num_passages)
            per_round["audit"] = directional(NUM_AUDITED, passages, points=1) + one_step(NUM_AUDITED, passages)
    else:
        per_round["probe"] = measured(config.num_probes, size.num_passages)
    grows, num_checks = config.first_steps is not None, sum(map(len, map(config.checks_inside, lengths)))
    few = min(NUM_SENTINELS, config.num_probes)
    passages = sentinel_passages(size.num_passages, trains=probe == "loss_reduction")
    few = NUM_SENTINELS if grows else few
    once = measured(few, passages)
    if config.drift_check_steps and not grows:
        per_round["sentinel"] = once
    labelled = config.num_probes * size.tokens_per_row
    stages = {name: len(chosen) * flops for name, flops in per_round.items()}
    if num_checks:
        stages["gap checks" if grows else "drift checks"] = num_checks * once
    judged = 2.0 * labelled * max(len(chosen) - 1, 0)  # by the round before's influence model: its report, and the gap
    if encoder is None:
        stages["fit"] = NGRAM_FIT_FLOPS * labelled * float(len(chosen))
        stages["guard"] = NGRAM_SCORE_FLOPS * judged
        stages["score"] = NGRAM_SCORE_FLOPS * float(scored)
    else:
        held_out = config.held_out_fraction * labelled
        epoch = gradient_flops(encoder.multiplied, labelled - held_out) + forward_flops(encoder.multiplied, held_out)
        stages["fit"] = len(chosen) * encoder.num_epochs * epoch
        stages["guard"] = forward_flops(encoder.multiplied, judged)
        stages["score"] = forward_flops(encoder.multiplied, scored)
    return PredictedCost(
        num_rounds=len(chosen),
        training_flops=gradient_flops(size.multiplied, size.trained_tokens),
        stages=stages,
        trained_tokens=size.trained_tokens,
        labelled_tokens=float(labelled * len(chosen)),
        scored_tokens=float(scored),
        on_cpu=encoder is None,
    )


def _lengths(size: RunSize, config: MatesConfig) -> list[int]:
    """Optimizer steps of each round: each is as long as it may be, the last takes what `max_steps` leaves."""
    lengths, start, length = [], _first_step(config), config.longest_steps(None)
    while start < size.max_steps:
        lengths.append(min(start + length, size.max_steps) - start)
        start, length = start + length, config.longest_steps(length)
    return lengths


def _pool_rows(size: RunSize, config: MatesConfig, step: int) -> int:
    """Rows of the pool that are trained on up to a step; passages that are mixed in are a row each."""
    position = step * size.batch_rows
    if not config.reference_passes:
        return position
    num_rows = size.max_steps * size.batch_rows
    passes = {"num_passages": size.num_passages, "passes": config.reference_passes}
    return PassageSchedule(**passes, start=0, num_rows=num_rows, seed=0).pool_rows(position)


def _first_step(config: MatesConfig) -> int:
    """First optimizer step that trains on a selection."""
    return config.random_rounds * config.update_steps + config.lead_steps


def _scored_rows(size: RunSize, config: MatesConfig, trained: int, selected: int) -> int:
    """Candidates that a round scores, behind so many rows that are trained on before it."""
    if config.candidate_scope == "slice":
        return math.ceil(selected / Fraction(repr(float(config.selection_ratio))))
    if size.pool_rows is None:
        raise ValueError("`candidate_scope='pool'` must have `pool_rows`, the rows of the pool, got None.")
    return max(selected, size.pool_rows - trained - config.num_probes)
