"""How far is `mates-hf plan` off what a real run then takes, in FLOPs and in time?

The plan is given what one knows before a run: its size, and the FLOPs a second that training reaches, measured on some
steps without rounds. It proposes the config; the run takes it as it is, rounds that grow included. `mates-hf cost`
says what the run took.

Trade-off: a small model on two cores, whose rounds are a large part of the run. There the plan is hardest to get
right, and a share that is 10 % off is some seconds. Speeds of fit and score are the plan's own assumptions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from benchmarks.lab.corpus import as_dataset, as_reference, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import seconds_of, temporary_folder
from benchmarks.lab.models import llama, trainer_of
from benchmarks.lab.tables import figure
from mates_hf import MatesCallback, MatesConfig
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.reporting.cost import run_cost
from mates_hf.reporting.forecast import RunSize
from mates_hf.reporting.payback import Machine, SelectionPlan, plan_selection

LENGTH, BATCH, NUM_PASSAGES = 128, 16, 64
MOST_FLOPS, MOST_TIME = 0.25, 0.40  # how far off it may be


def off(predicted: float, measured: float) -> float:
    """By how much a prediction is off, as a share of what was measured."""
    return abs(predicted - measured) / measured


def measured_speed(rows: Any, multiplied: int, num_steps: int, folder: Path) -> float:
    """FLOPs a second of training without rounds, by the rule of 6 a parameter and token."""

    def train(name: str, steps: int) -> float:
        trainer = trainer_of(llama(length=LENGTH), rows, folder / name, steps, BATCH)
        trainer.remove_callback(PrinterCallback)
        return seconds_of(trainer.train)

    train("warm", 5)
    return 6 * multiplied * BATCH * LENGTH * num_steps / train("speed", num_steps)


def plan_of(max_steps: int, multiplied: int, speed: float, config: MatesConfig | None) -> SelectionPlan:
    """The plan of the run, by a machine of one device of that speed."""
    size = RunSize(
        num_parameters=multiplied, num_looked_up=0, tokens_per_row=LENGTH, batch_rows=BATCH, max_steps=max_steps,
        num_passages=NUM_PASSAGES, tokens_per_passage=LENGTH,
    )  # fmt: skip
    return plan_selection(size, Machine(num_devices=1, flops_per_second=speed), config)


def run_as_planned(rows: Any, reference: Any, config: MatesConfig, max_steps: int, folder: Path) -> dict[str, Any]:
    """What `mates-hf cost` says of a run with this config."""
    trainer = trainer_of(llama(length=LENGTH), rows, folder, max_steps, BATCH)
    trainer.remove_callback(PrinterCallback)
    MatesCallback(reference, config).attach(trainer)
    trainer.train()
    trainer.save_state()
    cost = run_cost(folder)
    return {
        "training FLOPs": cost.training.flops, "round FLOPs": cost.mates.flops, "seconds": cost.seconds,
        "training seconds": cost.training.seconds, "round seconds": cost.mates.seconds, "rounds": len(cost.rounds),
        "stages": {name: dataclasses.asdict(stage) for name, stage in cost.stages.items()},
    }  # fmt: skip


def run(bench: Bench) -> dict[str, Any]:
    """Measure the speed, plan, run, and compare."""
    max_steps, num_steps = (60, 10) if bench.quick else (600, 60)
    candidates, passages = text_rows(LENGTH)
    rows, reference = as_dataset(candidates), as_reference(passages, NUM_PASSAGES)
    multiplied = count_multiplied_parameters(llama(length=LENGTH))
    given = MatesConfig(update_steps=12, num_probes=64, first_round_steps=None) if bench.quick else None
    with temporary_folder(None) as folder:
        # Kernels are compiled, and kept, before anything is timed.
        run_as_planned(rows, reference, MatesConfig(update_steps=8, num_probes=64), 20, folder / "compile")
        speed = measured_speed(rows, multiplied, num_steps, folder)
        plan = plan_of(max_steps, multiplied, speed, given)
        found = run_as_planned(rows, reference, plan.config, max_steps, folder / "run")
    rounds = {name: flops for name, flops in plan.cost.stages.items()}
    planned = {
        "training FLOPs": plan.cost.training_flops, "round FLOPs": sum(rounds.values()), "stages": rounds,
        "training seconds": 3600 * plan.training_hours,
        "round seconds": 3600 * (plan.device_hours + plan.idle_hours), "rounds": plan.cost.num_rounds,
    }  # fmt: skip
    planned["seconds"] = planned["training seconds"] + planned["round seconds"]
    all_flops = [sum(one[name] for name in ("training FLOPs", "round FLOPs")) for one in (planned, found)]
    figures = [
        figure("training reaches", speed / 1e9, "GFLOP/s"),
        figure("rounds, planned", planned["rounds"]), figure("rounds, done", found["rounds"]),
        figure("FLOPs of rounds, of training, planned", planned["round FLOPs"] / planned["training FLOPs"], "x"),
        figure("the same, by `mates-hf cost`", found["round FLOPs"] / found["training FLOPs"], "x"),
        figure("FLOPs of the run, off by", off(*all_flops), "x", most=MOST_FLOPS),
        figure("FLOPs of its rounds, off by", off(planned["round FLOPs"], found["round FLOPs"]), "x", most=MOST_FLOPS),
        figure("time of the run, planned", planned["seconds"], "s"),
        figure("time of the run, taken", found["seconds"], "s"),
        figure("time of the run, off by", off(planned["seconds"], found["seconds"]), "x", most=MOST_TIME),
        figure(
            "time of its rounds, off by", off(planned["round seconds"], found["round seconds"]), "x", most=MOST_TIME
        ),
    ]  # fmt: skip
    settings = {
        "steps": max_steps, "rows a step": BATCH, "tokens a row": LENGTH, "parameters": multiplied,
        "config": f"update_steps={plan.config.update_steps}, num_probes={plan.config.num_probes}",
    }  # fmt: skip
    return bench.figures(settings, figures, {"planned": planned, "found": found})
