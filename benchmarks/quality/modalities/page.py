"""The page of `modalities`, made from its JSON and nothing else.

Sign: a difference below 0 means that the arm named first has the lower loss.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.lab.statistics import mean_interval
from benchmarks.lab.tables import interval, markdown, table, title

OURS, RANDOM = "ours", "random"
WAYS = {
    "": "as it trains", "running statistics held": "the same, its running statistics held",
    "running statistics in the step": "running statistics in the step, too",
}  # fmt: skip
Document = dict[str, Any]
Unit = dict[str, Any]


def page(document: Document) -> str:
    """The Markdown page."""
    parts: dict[str, list[Unit]] = {}
    for unit in document["units"].values():
        parts.setdefault(unit["part"], []).append(unit)
    return markdown(
        *_settings(document),
        *_labels(parts.get("labels", []), document["settings"]["sizes"]),
        *_speed(parts.get("speed", [])),
        *_training(parts.get("training", []), document["settings"]),
        *_tuning(parts.get("tune", []), document["settings"]),
    )


def loss_at(arm: Unit, *, steps: float = 0.0, flops: float = 0.0) -> float:
    """Loss of an arm at so many steps, or where it has spent so many FLOPs, between two points of its curve."""
    key, value = ("flops", flops) if flops else ("step", steps)
    for before, after in zip(arm["curve"], arm["curve"][1:], strict=False):
        if after[key] >= value:
            share = (value - before[key]) / (after[key] - before[key])
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    return float(arm["curve"][-1]["loss"])


def _settings(document: Document) -> list[str]:
    settings = document["settings"]
    missing = f" {settings['missing']} units are missing." if settings["missing"] else ""
    return [
        title("modalities", settings["quick"]),
        f"Python {settings['python']}, torch {settings['torch']}, transformers {settings['transformers']}, one thread "
        f"a unit, models of 5,000 to 40,000 parameters.{missing}",
    ]


def _labels(units: list[Unit], sizes: dict[str, Any]) -> list[str]:
    if not units:
        return []
    rows = []
    for kind in dict.fromkeys(unit["kind"] for unit in units):
        own = [unit for unit in units if unit["kind"] == kind]
        for way in own[0]["agreement"]:
            cells = []
            for label in ("directional", "one_step"):
                values = [unit["agreement"][way][label]["spearman"] for unit in own]
                cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
            rows.append([kind, f"{own[0]['parameters']:,}", WAYS[way], *cells])
    return [
        "## Labels",
        "Spearman of labels with the change of the reference loss when a candidate takes the place of a row of a real "
        f"batch of 32: mean over {sizes['truth_batches']} batches, {sizes['candidates']} candidates, after "
        f"{sizes['label_steps']} steps; mean over seeds, and each seed. CLIP trains on the pairs of its batch; labels "
        "and the reference loss are against a bank of 32 pairs.",
        table(["model", "parameters", "the real step", "directional", "one-step oracle"], rows),
    ]


def _speed(units: list[Unit]) -> list[str]:
    if not units:
        return []
    rows, refused = [], {unit["kind"]: unit["at_once_refused"] for unit in units if unit["at_once_refused"]}
    for unit in units:
        rates = {
            way: statistics.median(unit["num"][way] / seconds for seconds in turns)
            for way, turns in unit["turns"].items()
        }
        ours = rates["directional"]
        ratios = [f"{ours / rates[way]:.2g}" if way in rates else "" for way in
                  ("one_step", "gradients", "gradients at once")]  # fmt: skip
        rows.append([unit["kind"], f"{ours:,.0f}", *ratios])
    some = next(iter(units))
    return [
        "## Speed of labels",
        f"Candidates a second of CPU time with the directional probe, {some['num']['directional']} in one call, and "
        "how many times that is of the other ways: the one-step oracle, a gradient for each candidate in a loop, and "
        "`torch.func.vmap` over gradients (64 at once). All read the reference examples themselves. Medians of turns. "
        "The probe's time has what it does for any dataset: collating rows one by one, comparing its losses with the "
        "model's, and choosing ε. The gradients are taken from tensors that are there, without any of that.",
        table(
            ["model", "directional, candidates/s", "× oracle", "× gradients in a loop", "× gradients at once"], rows
        ),
        *([f"Not at once: {', '.join(f'{kind} ({why})' for kind, why in refused.items())}."] if refused else []),
    ]


def _training(units: list[Unit], settings: dict[str, Any]) -> list[str]:
    if not units:
        return []
    sizes, losses, pairs = settings["sizes"], [], []
    for setup in dict.fromkeys(unit["setup"] for unit in units):
        own = sorted((unit for unit in units if unit["setup"] == setup), key=lambda unit: unit["seed"])
        ends = {arm: [arm_ends(unit, arm, sizes) for unit in own] for arm in own[0]["arms"]}
        for arm, values in ends.items():
            equal_steps, equal_flops = (f"{statistics.mean(column):.4f}" for column in zip(*values, strict=True))
            wanted = statistics.mean(unit["arms"][arm]["wanted"] for unit in own)
            curves = [(unit["arms"][arm]["curve"], _last(unit, sizes)) for unit in own]
            spent = [next(point["flops"] for point in curve if point["step"] == last) for curve, last in curves]
            cost = f"{statistics.mean(spent) / 1e9:.1f}"
            losses.append([setup, arm, equal_steps, equal_flops, cost, f"{wanted:.1%}"])
        for arm in ends:
            if arm != OURS:
                differences = [
                    [a - b for a, b in zip(ours, theirs, strict=True)]
                    for ours, theirs in zip(ends[OURS], ends[arm], strict=True)
                ]
                cells = [_judged([values[i] for values in differences]) for i in range(2)]
                pairs.append([setup, f"ours minus {arm}", len(own), *cells])
    return [
        "## Training",
        f"Loss on {sizes['judged']} judged examples (nats a label), at a running mean of the weights. All arms share "
        f"random steps of {sizes['batch']} rows, then choose for {sizes['steps'] - sizes['first']} (equal steps). "
        "Random rows and those by loss go on until they have spent the FLOPs of ours, choosing counted (equal FLOPs). "
        "Ours: rounds with 100 probes (where the table does not say otherwise) along a path and a "
        "`FeatureInfluenceModel`, which train on the best part of each slice by prediction. It reads the head's "
        "gradient in a pass of the model for each row, or inputs alone without one. By loss: a part of each slice, by "
        "the live model at each step.",
        "Of the pool's labels 20 % are wrong, and the reference is clean and of one half of the kinds: digits 0 to 4 "
        "(a ViT), texts of the first letters, which are three tenths of the pool (a Whisper), pictures of the first "
        "kinds (a Llava). In set-ups called mislabelled the reference is of all kinds, and 40 % of the pool's texts "
        "are wrong. Each row is offered once.",
        table(
            ["set-up", "random steps before", "learning rate", "ours", "rows by loss"],
            [
                [setup, sizes["first"] + one["later"], f"{one['learning rate']:g}", one["ours"], one["rival"]]
                for setup, one in settings["chosen"].items()
            ],
        ),
        table(
            ["set-up", "rows", "loss, equal steps", "loss, equal FLOPs", "GFLOPs at equal steps", "wanted rows"],
            losses,
        ),
        table(["set-up", "paired difference", "seeds", "equal steps (95 %)", "equal FLOPs (95 %)"], pairs),
        "Wanted rows: share of the chosen rows with a right label, and of the kinds of the reference.",
    ]


def arm_ends(unit: Unit, arm: str, sizes: dict[str, Any]) -> tuple[float, float]:
    """Loss of an arm at the steps, and where it has spent the FLOPs of ours."""
    found, flops = unit["arms"][arm], sum(unit["arms"][OURS]["flops"].values())
    return loss_at(found, steps=_last(unit, sizes)), loss_at(found, flops=flops)


def _last(unit: Unit, sizes: dict[str, Any]) -> int:
    """The step at which arms are compared at equal steps."""
    return int(unit["arms"][OURS].get("steps", sizes["steps"]))


def _judged(values: list[float]) -> str:
    mean, half = mean_interval(values)
    verdict = "" if not half < abs(mean) else ", better" if mean < 0 else ", **worse**"
    return interval(values) + verdict


def _tuning(units: list[Unit], settings: dict[str, Any]) -> list[str]:
    if not units:
        return []
    ends: dict[tuple[str, str, str, float], list[float]] = {}
    for unit in sorted(units, key=lambda unit: (unit["setup"], unit["arm"], unit["choice"], unit["lr"], unit["seed"])):
        choice = "" if unit["arm"] == RANDOM else unit["choice"]
        ends.setdefault((unit["setup"], unit["arm"], choice, unit["lr"]), []).append(unit["curve"][-1]["loss"])
    rows = [
        [setup, arm, choice, f"{lr:g}", f"{statistics.mean(losses):.4f}", ", ".join(f"{loss:.3f}" for loss in losses)]
        for (setup, arm, choice, lr), losses in ends.items()
    ]
    seeds = ", ".join(map(str, settings["sizes"]["tuning_seeds"]))
    return [
        "## Tuning",
        f"Seeds {seeds}, which no result above has. All arms end where they have spent what random rows take for "
        f"{settings['sizes']['tuned']:g} times the steps, choosing counted. The learning rate is the best one of "
        "random rows. The way to choose is the best one of ours, and of rows by loss.",
        table(["set-up", "rows", "chosen", "learning rate", "mean loss", "each seed"], rows),
    ]
