"""What a run spent: the ledger with money, and the course of its wall-clock for the timeline.

Where it is used: under `report`, on top of `reporting.cost`. Trade-off: a run records how long its stages took and
when they began in steps, not when each step began; so the steps between two rounds are drawn as equally long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.reporting.cost import IDLE_STAGES, RunCost
from mates_hf.reporting.page.rounds import Facts, number, part, whole

_ORDER = ("digest", "probe", "audit", "sentinel", "fit", "guard", "score", "select")
MAX_DRAWN = 24  # rounds of the timeline, the newest ones


def cost_data(cost: RunCost, price: float | None, num_devices: int) -> Facts:
    """The ledger as plain values, and in money where a price is given.

    Args:
        cost: The run's ledger.
        price: Price of one device for an hour, in any currency, or None.
        num_devices: Number of devices that the run trained on.

    Returns:
        `RunCost` as a mapping, with `price`, `num_devices` and `money`: for each line of the ledger, and for `idle`,
        what its seconds cost; None without a price or seconds.
    """
    told = dataclasses.asdict(cost)
    lines = {"training": cost.training, **cost.stages, "mates": cost.mates, "evaluation": cost.evaluation}
    seconds = {name: line.seconds for name, line in lines.items()} | {"idle": cost.idle_seconds, "run": cost.seconds}
    money = {
        name: None if price is None or known is None else known / 3600 * price * num_devices
        for name, known in seconds.items()
    }
    return told | {"run_dir": None, "price": price, "num_devices": num_devices, "money": money}


def timeline(cost: RunCost, infos: Sequence[Mapping[str, Any]], waits: Mapping[int, float]) -> Facts:
    """The wall-clock of a run as blocks, for its newest rounds.

    Args:
        cost: The run's ledger.
        infos: `round.json` of its rounds, ascending.
        waits: Seconds that training waited for a round that ran next to it, by its number.

    Returns:
        `blocks`, each with `round`, `stage`, `start` and `seconds` (wall-clock seconds from the first block) and
        `idle`, true where devices wait for the CPU; `step_seconds`, or None where training was not timed and only
        rounds are drawn; `cut`, whether older rounds are left out.
    """
    drawn = list(infos[-MAX_DRAWN:])
    timed = cost.training.seconds is not None and cost.steps and cost.training.seconds >= 0
    step_seconds = cost.training.seconds / cost.steps if timed and cost.training.seconds and cost.steps else None
    now, blocks = 0.0, []
    last = 0 if len(drawn) == len(infos) else whole(infos[-MAX_DRAWN - 1].get("step")) or 0
    for info in drawn:
        step = whole(info.get("step")) or last
        if step_seconds is not None and step > last:
            blocks.append(_block(info, "training", now, (step - last) * step_seconds))
            now += blocks[-1]["seconds"]
        last = step
        stages, hidden = part(info, "stages"), info.get("beside_training")
        hidden = hidden if isinstance(hidden, list) else []
        for name in (*_ORDER, *sorted(set(stages) - set(_ORDER))):
            seconds = number(part(stages, name).get("seconds"))
            if seconds is None or name in hidden:
                continue
            blocks.append(_block(info, name, now, seconds, idle=name in IDLE_STAGES))
            now += seconds
        wait = waits.get(whole(info.get("number")) or 0, 0.0)
        if wait > 0:  # at the switch, some steps later: drawn here, so that it stands with its round
            blocks.append(_block(info, "wait", now, wait, idle=True))
            now += wait
    if step_seconds is not None and cost.steps and cost.steps > last and drawn:
        blocks.append(_block({}, "training", now, (cost.steps - last) * step_seconds))
    return {"blocks": blocks, "step_seconds": step_seconds, "cut": len(drawn) < len(infos)}


def _block(info: Mapping[str, Any], stage: str, start: float, seconds: float, *, idle: bool = False) -> Facts:
    return {"round": info.get("number"), "stage": stage, "start": start, "seconds": seconds, "idle": idle}
