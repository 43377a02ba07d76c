"""Rounds fitted to a pool that is small for the run: whole epochs, and corpora that are gone through several times.

`num_train_epochs=1` trains on as many rows as the pool has, and three epochs on three times as many. Rows come back
then, in a new pass (`Ledger`). A round still needs candidates that it can pass over: with the default settings it
chooses from five times the rows that it trains on. Where one pass does not suffice, a round may choose from half of
the pool at most, and `update_steps` is lowered to what that allows. So each pass has several rounds, and trains on
about half of the pool.

Where it is used: `start.prepare` asks before a run is opened. Trade-off: `update_steps` is the one setting that is
changed, with a warning, and only where `max_passes` is None. What else stands in the way is refused with settings that
work. A run that resumes keeps what it began with, whatever its pool, batch or length would give now.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mates_hf.config import MatesConfig
from mates_hf.engine.processes import Processes
from mates_hf.errors import RoundMismatchError
from mates_hf.selection.plan import RunPlan

logger = logging.getLogger(__name__)

SHARE_OF_POOL = 2  # a round chooses from one in so many of the pool's rows, at most
_PROBES = (1_000, 500, 200, 100, 50, 20, 10)  # tried in an advice
_RATIOS = (0.3, 0.5, 0.8, 1.0)


class Settled(NamedTuple):
    """The config that a run goes by.

    Attributes:
        config: The config.
        asked: the fields that were given otherwise, with the values that were given; empty where there are none.
    """

    config: MatesConfig
    asked: Mapping[str, Any]


def settle(plan: RunPlan, saved: Mapping[str, Any] | None, look_ahead_steps: int = 0) -> Settled:
    """Fit the rounds of a run to its pool, where the pool is small and rows may come back.

    Args:
        plan: The run by the config that was given.
        saved: this library's state in the checkpoint that is resumed; None where there is none.
        look_ahead_steps: Optimizer steps whose rows the dataloader fetches ahead, for the advice.

    Returns:
        The config that the run goes by.

    Raises:
        ValueError: not even rounds of one step fit, or none as long as another setting needs; says settings that do.
        RoundMismatchError: a run that resumes is given another `update_steps` than it was started with.
    """
    config = plan.config
    if saved is not None:
        return _as_begun(config, saved)
    if config.max_passes is not None or config.update_steps <= _wanted_steps(plan) or _suffices_once(plan):
        return Settled(config, {})
    steps = fitted_steps(plan)
    if steps is None:
        if plan.rounds:
            raise ValueError(_refusal(plan, look_ahead_steps))
        return Settled(config, {})  # it stays in its own order, which is told
    fitted = _with(plan, update_steps=steps)
    if not plan.rounds and not _comes_to_select(fitted):
        return Settled(config, {})
    if Processes.of_run().is_main and steps < config.update_steps:
        logger.warning(
            "Rounds are fitted to the pool: `update_steps` is %d in place of %d. The pool's %d rows are few for %d "
            "steps of %d rows, so rows come back in new passes, and a round should choose from half of the pool at "
            "most. With `max_passes=1` no row is trained on twice.",
            steps, config.update_steps, plan.num_rows, plan.max_steps, plan.batch_rows,
        )  # fmt: skip
    return Settled(fitted.config, {"update_steps": config.update_steps} if steps < config.update_steps else {})


def fitted_steps(plan: RunPlan) -> int | None:
    """The `update_steps` that fits a small pool.

    A round chooses from half of the pool; from more where another setting needs longer rounds, or from less where so
    many rows are probed that others are too few.

    Args:
        plan: The run by the config that was given.

    Returns:
        Optimizer steps; None where none fit.
    """
    most, least = _most_steps(plan), plan.config.least_update_steps
    return max(_wanted_steps(plan), least) if most >= least else None


def _most_steps(plan: RunPlan) -> int:
    """The longest round that finds its candidates and probes in the whole pool."""
    return plan.update_steps_within(max(plan.num_rows - plan.config.num_probes, 0))


def _wanted_steps(plan: RunPlan) -> int:
    """The longest round that chooses from half of the pool at most, and finds its probes in the rest."""
    return min(plan.update_steps_within(plan.num_rows // SHARE_OF_POOL), _most_steps(plan))


def _with(plan: RunPlan, **changes: Any) -> RunPlan:
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **changes))


def _suffices_once(plan: RunPlan) -> bool:
    """Whether the run has rounds, and one pass has rows enough for them."""
    try:
        _with(plan, max_passes=1).check()
    except ValueError:
        return False
    return bool(plan.rounds)


def _comes_to_select(fitted: RunPlan) -> bool:
    """Whether a run that has no round as it was given has some, and goes through the pool more than once for them.

    One that asks for several rounds in its own order has them, and one that is too short for its rounds in a large
    pool is told so.
    """
    return bool(fitted.rounds) and fitted.config.random_rounds == 1 and not _suffices_once(fitted)


def _as_begun(config: MatesConfig, saved: Mapping[str, Any]) -> Settled:
    """What a run that resumes was fitted to."""
    asked, began_with = saved.get("asked"), saved.get("config")
    if not isinstance(asked, Mapping) or not isinstance(began_with, Mapping):
        return Settled(config, {})  # it was not fitted, or `resume.check_same_run` says what is wrong
    given = {name: getattr(config, name, None) for name in asked}
    fitted: dict[str, Any] = {name: began_with.get(name) for name in asked}
    if given == fitted:
        return Settled(config, asked)
    if given != asked:
        raise RoundMismatchError(
            f"A resumed run must have the config it was started with, which was {asked}, fitted to the pool as "
            f"{fitted}, got {given}. Use the same config, or start a new run in another `output_dir`."
        )
    return Settled(dataclasses.replace(config, **fitted), asked)


def _refusal(plan: RunPlan, look_ahead_steps: int) -> str:
    """Why no round fits, and what would."""
    config = plan.config
    changes = next((each for each in _ways_out(config, look_ahead_steps) if _fits(plan, each)), None)
    way_out = "Enlarge the pool, or make the batch smaller"
    if changes is not None:
        way_out = "Set " + " and ".join(f"`{name}={value}`" for name, value in changes.items())
    return (
        f"The pool must have rows enough for rounds of {config.least_update_steps} optimizer steps or more, but of "
        f"its {plan.num_rows} rows {config.num_probes} are probed (`num_probes`), and the others suffice for "
        f"{_most_steps(plan)} steps of {plan.batch_rows} rows, a share of {config.selection_ratio} of those that a "
        f"round chooses from (`selection_ratio`). {way_out}."
    )


def _ways_out(config: MatesConfig, look_ahead_steps: int) -> Iterator[dict[str, Any]]:
    """Changes of a config, from small to large, of which one may fit."""
    shorter = {name: None for name in ("average_steps", "drift_check_steps") if getattr(config, name)}
    lead = max(look_ahead_steps, 1)
    more: dict[str, Any] = {**shorter, **({"switch_lead_steps": lead} if config.lead_steps > lead else {})}
    probes = [config.num_probes, *(num for num in _PROBES if num < config.num_probes)]
    ratios = [config.selection_ratio, *(each for each in _RATIOS if each > config.selection_ratio)]
    for ratio in ratios:
        for further in ({}, more):
            for num in probes:
                changes = {"num_probes": num, "selection_ratio": ratio}
                yield {**{name: value for name, value in changes.items() if value != getattr(config, name)}, **further}


def _fits(plan: RunPlan, changes: Mapping[str, Any]) -> bool:
    """Whether a run with these changes has rounds that fit."""
    changed = _with(plan, **changes)
    steps = fitted_steps(changed)
    return steps is not None and bool(_with(changed, update_steps=min(steps, plan.config.update_steps)).rounds)


def tell_no_round(plan: RunPlan) -> None:
    """Warn that a run is too short for its rounds, with settings that would let it select.

    Args:
        plan: has no round.
    """
    ahead = max(plan.max_steps - plan.first_step, 1)
    tried = [{"update_steps": max(ahead // part, 1)} for part in (10, 20, 50, 5, 3, 2)]
    tried += [{**changes, "random_rounds": 1} for changes in tried]
    fewer = [num for num in (500, 200, 100, 50, 20, 10) if num < plan.config.num_probes]
    tried += [{**changes, "num_probes": num} for num in fewer for changes in tried]
    found = next((changes for changes in tried if _selects(plan, changes)), None)
    way_out = "Train longer, or on a larger pool,"
    if found is not None:
        way_out = "Set " + " and ".join(f"`{name}={value}`" for name, value in found.items())
    logger.warning(
        "No round takes effect: the first selection would be trained on from step %d, and the run ends at step %d. It "
        "stays in its own order. %s to have data selected.", plan.first_from_step, plan.max_steps, way_out,
    )  # fmt: skip


def _selects(plan: RunPlan, changes: Mapping[str, Any]) -> bool:
    """Whether a run with these changes of its config has a round, and rows for all of them."""
    try:
        other = dataclasses.replace(plan, config=dataclasses.replace(plan.config, **changes))
        other.check()
    except ValueError:  # what else the config asks for, or the pool
        return False
    return bool(other.rounds)
