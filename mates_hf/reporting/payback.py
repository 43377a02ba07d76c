"""Will selecting pay for this run? Its cost in FLOPs, hours and money, and what it must gain to be worth it.

Where it is used: before a run, by `mates-hf plan`. It needs neither torch nor data: `forecast` counts the FLOPs, and
the speed and the price of the devices make hours and money of them. Trade-off: speeds are the caller's, and those of
fit and score were measured on two CPU cores; the gain is a range, because nobody knows it before a pilot. It is held
against the best static filter and not against random rows, since a filter is what one would run instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.reporting.forecast import PredictedCost, RunSize, predict_cost

GAINS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)  # tokens of the filter over ours, for the same loss
_LENGTHS = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)  # of rounds that are proposed
_PROBES = (2_000, 1_000, 500)  # of a round, that are proposed
_CHEAP, _DEAR = 0.01, 0.05  # shares of the training's time
_FEW_ROUNDS = 3
_MANY_STEPS_A_ROUND = 4  # a proposed round is no longer than the run's steps by this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run runs on.

    Attributes:
        num_devices: Number of devices.
        flops_per_second: FLOPs a second that one device reaches in training, of the rule of 6 a parameter and token.
        price: Price of one device for an hour, in any currency; None leaves money out.
        relative_utilisation: FLOPs a second in rounds over those in training.
        fit_tokens_per_second: Labelled tokens a second that the influence model is fitted on.
        score_tokens_per_second: Tokens a second that it scores.

    Raises:
        ValueError: a number is not above 0.
    """

    num_devices: int = 8
    flops_per_second: float = 4e14
    price: float | None = None
    relative_utilisation: float = 0.8
    fit_tokens_per_second: float = 1.25e6
    score_tokens_per_second: float = 3e8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value is None and field.name == "price") and not value > 0:
                raise ValueError(f"`{field.name}` must be above 0, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Payback:
    """What one gain over the best static filter would mean.

    Attributes:
        gain: Tokens that the filter needs over those that selecting needs, for the same loss.
        saved_share: What is saved, as a share of the filter's training; below 0 it is lost.
        saved_hours: The same in hours of the whole machine.
        saved_money: The same in money; None without a price.
    """

    gain: float
    saved_share: float
    saved_hours: float
    saved_money: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionPlan:
    """What selecting would cost a run, and when it pays.

    Attributes:
        size: The run.
        machine: What it runs on.
        config: The config that the figures hold for.
        is_proposed: Whether the config is a proposal, and not the caller's.
        cost: FLOPs by stage.
        training_hours: Hours of training without rounds, of the whole machine.
        device_hours: Hours that the devices work for rounds.
        idle_hours: Hours at most that they wait for fit and score; beside training they wait less.
        overhead: Hours of rounds, waiting included, over those of training.
        break_even: Gain in tokens over the alternative from which on selecting pays.
        paybacks: What gains would mean.
        pool_tokens: Tokens that the pool must have for rounds to choose from.
        warnings: Why it may not pay.
    """

    size: RunSize
    machine: Machine
    config: MatesConfig
    is_proposed: bool
    cost: PredictedCost
    training_hours: float
    device_hours: float
    idle_hours: float
    overhead: float
    break_even: float
    paybacks: tuple[Payback, ...]
    pool_tokens: float
    warnings: tuple[str, ...]

    @property
    def price_of_rounds(self) -> float | None:
        """Money that rounds take; None without a price."""
        return self._money(self.device_hours + self.idle_hours)

    @property
    def price_of_training(self) -> float | None:
        """Money that training without rounds takes; None without a price."""
        return self._money(self.training_hours)

    def at_gain(self, gain: float) -> Payback:
        """What a gain would mean.

        Args:
            gain: Tokens that the best static filter needs over those that selecting needs, above 0.

        Returns:
            What is saved or lost against training on the filter's choice.
        """
        saved = 1 - (1 + self.overhead) / gain
        hours = saved * self.training_hours
        return Payback(gain=gain, saved_share=saved, saved_hours=hours, saved_money=self._money(hours))

    def _money(self, hours: float) -> float | None:
        price = self.machine.price
        return None if price is None else hours * price * self.machine.num_devices

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `config` holds the fields that differ from the defaults."""
        found = {
            **dataclasses.asdict(self),
            "config": _changed(self.config),
            "price_of_training": self.price_of_training,
            "price_of_rounds": self.price_of_rounds,
        }
        found["cost"]["share_of_training"] = self.cost.share_of_training
        return found

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        size, cost = self.size, self.cost
        yield (
            f"run       {_short(size.num_parameters)} parameters, {_short(size.trained_tokens)} tokens in "
            f"{size.max_steps:,} steps: {cost.training_flops:.2e} FLOPs, {_time(self.training_hours)} on "
            f"{self.machine.num_devices} devices{_priced(self.price_of_training)}"
        )
        settings = ", ".join(f"{name}={value!r}" for name, value in _changed(self.config).items())
        yield f"{'proposed' if self.is_proposed else 'config':9} MatesConfig({settings})"
        yield (
            f"rounds    {cost.num_rounds}, with {self.config.num_probes:,} probes each; the pool must have "
            f"{_short(self.pool_tokens)} tokens to choose from"
        )
        share = cost.share_of_training
        most = ", ".join(f"{name} {flops / cost.training_flops:.3%}" for name, flops in _largest(cost))
        yield f"FLOPs     {share:.2%} of the training's ({most})" if most else "FLOPs     none: there is no round"
        yield (
            f"time      {_time(self.device_hours)} of work and at most {_time(self.idle_hours)} of waiting, "
            f"{self.overhead:.2%} of the training's{_priced(self.price_of_rounds)}"
        )
        if cost.num_rounds:
            yield (
                f"pays      where the best filter you can tune needs more than {self.break_even:.3f} times our tokens "
                "for the same loss"
            )
        for one in self.paybacks:
            verb = "saves" if one.saved_share >= 0 else "loses"
            money = None if one.saved_money is None else abs(one.saved_money)
            yield (
                f"            at {one.gain:4.2f} times it {verb} {abs(one.saved_share):.1%}, "
                f"{_time(abs(one.saved_hours))}{_priced(money)}"
            )
        yield "unknown   the gain at this size: a pilot with a tuned filter beside it says (docs/decide.md)"
        yield from (f"warning   {text}" for text in self.warnings)


def plan_selection(
    size: RunSize, machine: Machine, config: MatesConfig | None = None, *, pool_tokens: float | None = None
) -> SelectionPlan:
    """Say what selecting would cost a run, and when it pays.

    Args:
        size: The run.
        machine: What it runs on.
        config: The config of the rounds; None proposes the shortest rounds that take about 1 % of the time.
        pool_tokens: Tokens of the pool, where they are known.

    Returns:
        The plan.
    """
    chosen = _proposed(size, machine) if config is None else config
    cost = predict_cost(size, chosen)
    training = cost.training_flops / (machine.flops_per_second * machine.num_devices) / 3600
    device, idle = _shares(cost, machine)
    overhead = device + idle
    needed = size.trained_tokens if not cost.num_rounds else _pool_tokens(size, chosen)
    plan = SelectionPlan(
        size=size, machine=machine, config=chosen, is_proposed=config is None, cost=cost, training_hours=training,
        device_hours=device * training, idle_hours=idle * training, overhead=overhead, break_even=1 + overhead,
        paybacks=(), pool_tokens=needed,
        warnings=tuple(_warnings(size, chosen, cost, (device, idle), needed, pool_tokens)),
    )  # fmt: skip
    gains = GAINS if cost.num_rounds else ()
    return dataclasses.replace(plan, paybacks=tuple(plan.at_gain(gain) for gain in gains))


def _shares(cost: PredictedCost, machine: Machine) -> tuple[float, float]:
    """Hours of work and of waiting at most, over those of training."""
    tokens = machine.flops_per_second * machine.num_devices * cost.trained_tokens / cost.training_flops
    idle = cost.idle_seconds_share(
        training_tokens_per_second=tokens,
        fit_tokens_per_second=machine.fit_tokens_per_second,
        score_tokens_per_second=machine.score_tokens_per_second,
    )
    return cost.device_seconds_share(machine.relative_utilisation), idle


def _proposed(size: RunSize, machine: Machine) -> MatesConfig:
    """The config with the shortest rounds that take about 1 % of the time, and fewer probes where none does."""
    found: list[tuple[float, MatesConfig]] = []
    for num_probes in _PROBES:
        for update_steps in _LENGTHS:
            if update_steps * _MANY_STEPS_A_ROUND > size.max_steps and found:
                break
            steps = min(update_steps, max(1, size.max_steps // _MANY_STEPS_A_ROUND))
            config = MatesConfig(update_steps=steps, num_probes=num_probes)
            cost = predict_cost(size, config)
            found.append((_for_each_round(cost, machine), config))
            if cost.num_rounds and found[-1][0] <= _CHEAP:
                return config
    return min(found, key=lambda one: one[0])[1]


def _for_each_round(cost: PredictedCost, machine: Machine) -> float:
    """Hours that shorter rounds cost more of, over those of training: all but scoring, which takes as long in any."""
    return sum(_shares(dataclasses.replace(cost, scored_tokens=0.0), machine))


def _pool_tokens(size: RunSize, config: MatesConfig) -> float:
    """Tokens of a pool in which every round has its whole slice; rows are drawn once."""
    cost = predict_cost(size, dataclasses.replace(config, candidate_scope="slice"))
    probed = cost.labelled_tokens
    chosen = cost.scored_tokens * config.selection_ratio
    return size.trained_tokens - chosen + cost.scored_tokens + probed


def _warnings(
    size: RunSize,
    config: MatesConfig,
    cost: PredictedCost,
    shares: tuple[float, float],
    needed: float,
    pool_tokens: float | None,
) -> Iterator[str]:
    """Why it may not pay, in sentences."""
    if not cost.num_rounds:
        first = config.random_rounds * config.update_steps + config.lead_steps
        yield (
            f"no round takes effect: the first selection would begin at step {first:,} of {size.max_steps:,}. Lower "
            "`update_steps`, or train longer"
        )
        return
    if cost.num_rounds < _FEW_ROUNDS:
        yield (
            f"the run has {cost.num_rounds} round{'s' * (cost.num_rounds > 1)}: too few to follow the model. A static "
            "filter does most of that for nothing"
        )
    if sum(shares) > _DEAR:
        yield (
            f"rounds may take {sum(shares):.1%} of the training's time. A run that is so short or so fast hardly "
            "earns it back: use longer rounds or fewer probes, or filter once with a saved selector"
        )
    if shares[1] > _CHEAP and shares[1] > shares[0]:
        yield (
            f"devices may wait {shares[1]:.1%} of the time for fit and score, which run on a few CPU cores. Beside "
            "training most of that is hidden, while the main process has cores to spare"
        )
    if pool_tokens is not None and pool_tokens < needed:
        yield (
            f"the pool has {_short(pool_tokens)} tokens and rounds want {_short(needed)}: they choose from less, and "
            "the gain shrinks with it"
        )


def _largest(cost: PredictedCost) -> list[tuple[str, float]]:
    """The stages that take most, at most three."""
    found = sorted(cost.stages.items(), key=lambda stage: -stage[1])
    return [(name, flops) for name, flops in found if flops][:3]


def _changed(config: MatesConfig) -> dict[str, Any]:
    """The fields that differ from the defaults, and the length of rounds, which has none."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "update_steps" or value != field.default:
            found[field.name] = value
    return found


def _short(number: float) -> str:
    """A large number in three figures: 405M, 26.2B."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{name}"
    return f"{number:.3g}"


def _time(hours: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if hours >= 2:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 30 else f"{3600 * hours:.0f} seconds"


def _priced(money: float | None) -> str:
    """`, price 1,234`, or nothing."""
    return "" if money is None else f", price {money:,.0f}" if money >= 100 else f", price {money:.2f}"
