"""What does a run look like: its gain, what it buys, whether its predictions are true, and what it takes away?

Five pictures of `docs/`: `loss.svg`, `bought.svg`, `prediction.svg`, `price.svg` and `boundary.svg`. It reads the
newest committed results of `selection`, `influence_models` and `boundary_wait`, and trains nothing. Intervals are 95%
t intervals over seeds; those of `prediction.svg` are over candidates.

What is left out: how the loss of each group changes, and when each stage of a whole run begins, since no committed
result has them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import harness, svg
from benchmarks.lab.plots import COLOURS
from benchmarks.lab.statistics import mean_interval, steps_to_reach
from benchmarks.lab.svg import Frame, text
from benchmarks.lab.tables import markdown, table

FOLDER = Path(__file__).resolve().parents[2] / "docs"
OURS, FILTER, RANDOM = "ours", "DSIR, tuned", "random"  # the best static filter of that setting
TABLES, WORDS = "token tables (default)", "DSIR"  # influence models; the second is told nothing but the words
MAIN = 2_000  # labels
STAGES = ("probe", "audit", "fit", "score", "select")
AFTER = "beside training"  # a key of `boundary_wait`
WIDTH = 760
LABEL_SHIFT = {OURS: 16, FILTER: -10}  # pixels, so that a label is not on the arrow

Cell = list[float]  # a mean and half the width of its interval


def cell(values: list[float]) -> Cell:
    """Mean and half the width of its interval."""
    return [float(part) for part in mean_interval(values)]


def of_lambada(document: dict[str, Any], arm: str) -> dict[int, dict[str, Any]]:
    """Trainings of an arm on LAMBADA and the mixed pool, by seed; of seeds that all arms here have."""
    units = [u for u in document["units"] if (u["task"], u["filtered"]) == ("lambada", False)]
    seeds = [{u["seed"] for u in units if u["arm"] == each} for each in (OURS, FILTER, RANDOM)]
    return {u["seed"]: u for u in units if u["arm"] == arm and u["seed"] in set.intersection(*seeds)}


def loss_points(document: dict[str, Any]) -> dict[str, Any]:
    """Loss on held-out passages by step, and when random rows get as low as ours."""
    steps = document["settings"]["sizes"]["steps"]
    found: dict[str, Any] = {"steps": steps, "curves": {}}
    for arm in (RANDOM, FILTER, OURS):
        units = of_lambada(document, arm).values()
        marks = [entry["step"] for entry in next(iter(units))["curve"]]
        losses = {m: [e["all"] for u in units for e in u["curve"] if e["step"] == m] for m in marks}
        found["curves"][arm] = [[mark, *cell(values)] for mark, values in losses.items()]
    curves = {arm: [{"step": s, "all": y} for s, y, _ in curve] for arm, curve in found["curves"].items()}
    reached = steps_to_reach(curves[RANDOM], "all", curves[OURS][-1]["all"])
    return {**found, "reached": reached}


def bought_points(document: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Share of each domain in the pool and in each round of ours."""
    names = document["labs"]["lambada"]["domains"]
    units = list(of_lambada(document, OURS).values())
    domains = np.array(models["test"]["domain"])
    pool = [float(np.mean(domains == i)) for i in range(len(names))]
    rounds = [[cell([u["rounds"][r]["domains"][i] for u in units]) for i in range(len(names))] for r in (0, 1)]
    return {"names": names, "pool": pool, "rounds": rounds}


def prediction_points(models: dict[str, Any]) -> dict[str, Any]:
    """Mean measured influence by tenth of what is predicted, of candidates that no model was fitted on."""
    influence, found = np.array(models["test"]["influence"]), {}
    for name, num in ((TABLES, MAIN), (WORDS, 0)):
        fit = next(f for f in models["fit"] if (f["name"], f["num"], f["draw"]) == (name, num, 0))
        ranks = np.frombuffer(base64.b64decode(fit["ranks"]), "<u2").astype(np.int64)
        tenths = np.array_split(np.argsort(ranks, kind="stable"), 10)
        found[name] = {"spearman": fit["spearman"], "tenths": [cell(influence[rows].tolist()) for rows in tenths]}
    return found


def price_points(document: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """What changes against random rows: nats/token of two texts, then nats/byte of the right answers of nine tasks."""
    steps = document["settings"]["sizes"]["steps"]
    random = of_lambada(document, RANDOM)
    tasks = [key for key in random[0]["final"]["zero_shot"] if key.endswith("/nll_per_byte")]
    reads: dict[str, Callable[[dict[str, Any]], float]] = {
        "text like the reference": lambda u: float(next(e["all"] for e in u["curve"] if e["step"] == steps)),
        "the pool's own text": lambda u: float(u["final"]["pool"]),
    }
    for key in tasks:
        name = key.removeprefix("mates_").removesuffix("_local/nll_per_byte").replace("_", " ")
        reads["all tasks" if name == "zero shot" else name] = lambda u, key=key: float(u["final"]["zero_shot"][key])
    found: dict[str, dict[str, Cell]] = {}
    for arm in (OURS, FILTER):
        units = {s: u for s, u in of_lambada(document, arm).items() if s in random and "zero_shot" in u["final"]}
        paired = {seed: unit for seed, unit in units.items() if "zero_shot" in random[seed]["final"]}
        found[arm] = {}
        for name, read in reads.items():
            found[arm][name] = cell([read(unit) - read(random[seed]) for seed, unit in paired.items()])
    return found


def points() -> dict[str, Any]:
    """All that is drawn."""
    selection, models = harness.newest("selection"), harness.newest("influence_models")
    waits = harness.newest("boundary_wait")["raw"]
    return {
        "loss": loss_points(selection),
        "bought": bought_points(selection, models),
        "prediction": prediction_points(models),
        "price": price_points(selection),
        "boundary": {
            name: {**{stage: found["stages"][stage] for stage in STAGES}, "waited": found["waited"]}
            for name, found in waits.items()
        },
    }


def draw_loss(found: dict[str, Any]) -> str:
    """Loss over steps, with the steps that random rows need."""
    reached, steps = found["reached"], found["steps"]
    end = 1.15 * reached
    curves = {arm: [p for p in curve if p[0] <= end] for arm, curve in found["curves"].items()}
    every = [p[1] for curve in curves.values() for p in curve]
    frame = Frame(70, 34, 560, 270, (0, end), (min(every) - 0.05, max(every) + 0.02))
    ticks = [(value / 10, f"{value / 10:g}") for value in range(47, 54)]
    lines = [text(70, 18, "Loss on held-out passages like the reference, nats/token", extra=' font-weight="bold"')]
    x_ticks = [(value, f"{value}") for value in range(0, int(end), 100)]
    lines += svg.axes(frame, x_ticks, [t for t in ticks if frame.y_range[0] < t[0] < frame.y_range[1]])
    for arm, curve in curves.items():
        low, high = ([(s, y + sign * half) for s, y, half in curve] for sign in (-1, 1))
        lines += [svg.band(frame, low, high, COLOURS[arm]), svg.line(frame, [p[:2] for p in curve], COLOURS[arm])]
    ends = [curves[arm][-1] for arm in curves]
    places = svg.spread([frame.y(p[1]) + 4 for p in ends], 15)
    for arm, point, y in zip(curves, ends, places, strict=True):
        lines.append(svg.coloured(frame.x(point[0]) + 7, y + LABEL_SHIFT.get(arm, 0), arm, COLOURS[arm]))
    x, y = frame.x(steps), frame.y(curves[OURS][-1][1])
    lines.append(f'<path class="zero" d="M{x:.1f} {y:.1f}H{frame.x(reached):.1f}m-7 -4l7 4l-7 4"/>')
    lines.append(text(frame.x(reached) - 4, y + 18, f"random gets here after {reached / steps:.1f}×", anchor="end"))
    lines.append(text(350, 340, "optimizer steps after the warm start", anchor="middle"))
    alt = f"Ours and tuned DSIR fall equally fast. Random rows need {reached / steps:.1f} times the tokens."
    return svg.picture(WIDTH, 352, "Loss over tokens", alt, lines)


def draw_bought(found: dict[str, Any]) -> str:
    """Share of each domain, pool to second round."""
    frame = Frame(60, 34, 470, 300, (0, 2), (0, 0.6))
    y_ticks = [(value / 10, f"{10 * value}%") for value in range(0, 7, 2)]
    lines = [text(60, 18, "Where the compute went: share of each domain", extra=' font-weight="bold"')]
    lines += svg.axes(frame, [(0, "pool"), (1, "round 1"), (2, "round 2")], y_ticks)
    first, second = found["rounds"]
    places = svg.spread([frame.y(c[0]) + 4 for c in second], 14, frame.top + frame.height - 2)
    for i, name in enumerate(found["names"]):
        colour = COLOURS[OURS] if second[i][0] > found["pool"][i] else COLOURS[RANDOM]
        lines.append(svg.line(frame, [(0, found["pool"][i]), (1, first[i][0]), (2, second[i][0])], colour, 1.8))
        for x, (mean, half) in ((1, first[i]), (2, second[i])):
            lines.append(svg.whisker(frame.x(x), frame.y(mean - half), frame.y(mean + half), colour))
        label = f"{name.replace('_', ' ')} {found['pool'][i]:.0%} → {second[i][0]:.0%}"
        lines.append(svg.coloured(frame.x(2) + 10, places[i], label, colour))
    alt = "Fiction gets most of what ours chooses; German fiction, legal terms, spam and the web of the pool get less."
    return svg.picture(WIDTH, 366, "What was bought", alt, lines)


def draw_prediction(found: dict[str, Any]) -> str:
    """Measured influence by tenth of predicted influence."""
    colours = {TABLES: COLOURS[OURS], WORDS: COLOURS[FILTER]}
    values = [c for each in found.values() for c in each["tenths"]]
    low, high = min(m - h for m, h in values) * 1e3, max(m + h for m, h in values) * 1e3
    frame = Frame(60, 34, 470, 250, (0.5, 10.5), (low - 0.2, high + 0.2))
    y_ticks = [(value, f"{value}") for value in range(math.ceil(low), math.floor(high) + 1)]
    lines = [text(60, 18, "Is the prediction true? Measured influence, 10⁻³ nats/token", extra=' font-weight="bold"')]
    lines += svg.axes(frame, [(i, f"{i}") for i in range(1, 11)], y_ticks)
    zero = frame.y(0)
    lines.append(f'<path class="zero" d="M{frame.left} {zero:.1f}H{frame.left + frame.width}"/>')
    ends = [frame.y(found[name]["tenths"][-1][0] * 1e3) for name in found]
    for name, place in zip(found, svg.spread(ends, 34), strict=True):
        shift, colour = (-0.06 if name == TABLES else 0.06), colours[name]
        marks = [(i + 1 + shift, mean * 1e3, half * 1e3) for i, (mean, half) in enumerate(found[name]["tenths"])]
        lines.append(svg.line(frame, [mark[:2] for mark in marks], colour))
        lines += [svg.whisker(frame.x(x), frame.y(y - half), frame.y(y + half), colour) for x, y, half in marks]
        label = f"ours, {MAIN:,} labels" if name == TABLES else "DSIR, by words"
        lines.append(svg.coloured(frame.x(10.3), place, label, colour))
        lines.append(svg.coloured(frame.x(10.3), place + 15, f"Spearman {found[name]['spearman']:.2f}", colour))
    lines.append(text(295, 320, "tenth of the candidates, by what is predicted of them", anchor="middle"))
    alt = "Measured influence rises with each tenth of what is predicted, steeper for ours than for a filter by words."
    return svg.picture(WIDTH, 332, "Is the prediction true", alt, lines)


def bars(frame: Frame, found: dict[str, dict[str, Cell]], names: list[str]) -> Iterator[str]:
    """Diverging bars of a few rows, a bar for each method."""
    row, zero = frame.height / len(names), frame.x(0)
    for place, name in enumerate(names):
        middle = frame.top + (place + 0.5) * row
        yield text(frame.left - 8, middle + 4, name, anchor="end")
        for number, (arm, cells) in enumerate(found.items()):
            mean, half = cells[name]
            x, y, height = frame.x(mean), middle - 8 + 8.5 * number, 7.5
            yield (
                f'<rect x="{min(x, zero):.1f}" y="{y:.1f}" width="{abs(x - zero):.1f}" height="{height}" '
                f'fill="{COLOURS[arm]}"/>'
            )
            interval = f"M{frame.x(mean - half):.1f} {y + height / 2:.1f}H{frame.x(mean + half):.1f}"
            yield f'<path stroke="{svg.GREY}" stroke-width="1.5" d="{interval}"/>'
    yield f'<path class="zero" d="M{zero:.1f} {frame.top:.1f}V{frame.top + frame.height:.1f}"/>'


def draw_price(found: dict[str, dict[str, Cell]]) -> str:
    """What gets better and what gets worse."""
    names = list(found[OURS])
    texts, tasks = names[:2], names[2:]
    lines = [text(20, 18, "The price: loss minus that of random rows, below 0 is better", extra=' font-weight="bold"')]
    for top, some, unit, most in (
        (40, texts, "nats/token", 0.32),
        (130, tasks, "nats/byte of the right answer", 0.56),
    ):
        frame = Frame(190, top, 430, 26 * len(some), (-most, most), (0, 1))
        lines += bars(frame, found, some)
        bottom = top + frame.height + 16
        lines += [text(frame.x(v), bottom, f"{v:+g}", anchor="middle") for v in (-most / 2, most / 2)]
        lines.append(text(frame.x(0), bottom, unit, anchor="middle"))
    lines += [svg.coloured(640, 60 + 17 * i, arm, COLOURS[arm]) for i, arm in enumerate(found)]
    alt = "Loss on text like the reference falls; loss on the pool's own text rises, for ours and for tuned DSIR."
    return svg.picture(WIDTH, 130 + 26 * len(tasks) + 30, "The price", alt, lines)


def draw_boundary(found: dict[str, dict[str, float]]) -> str:
    """One boundary on a clock: what training waits for."""
    total = max(sum(stages[stage] for stage in STAGES) for stages in found.values())
    frame = Frame(20, 60, 640, 100, (0, 1.02 * total), (0, 1))
    lines = [text(20, 18, "A boundary of a million candidates, in seconds", extra=' font-weight="bold"')]
    for row, (name, stages) in enumerate(found.items()):
        y, begin = 56 + 76 * row, 0.0
        words = "fit, score and select next to training" if name == AFTER else "while training waits"
        lines.append(text(20, y + 44, f"{words}: training stands for {standing(stages):.2f} s"))
        for stage in STAGES:
            x, end = frame.x(begin), begin + stages[stage]
            fill = "none" if name == AFTER and stage in STAGES[2:] else svg.GREY
            width = frame.x(end) - x - 3
            lines.append(text(x, y - 5, stage, extra=' class="small"'))
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" fill="{fill}" stroke="{svg.GREY}"/>'
            )
            begin = end
    note = "filled: training stands still; outlined: it continues meanwhile"
    lines.append(text(20, 208, note, extra=' class="small"'))
    alt = "Next to training, fit, score and select of a million candidates hold nothing up; probe and audit do."
    return svg.picture(WIDTH, 220, "Timeline of a boundary", alt, lines)


def standing(stages: dict[str, float]) -> float:
    """Seconds for which training stands still."""
    return sum(stages[stage] for stage in STAGES[:2]) + stages["waited"]


DRAWN = {
    "loss": draw_loss, "bought": draw_bought, "prediction": draw_prediction, "price": draw_price,
    "boundary": draw_boundary,
}  # fmt: skip


def run(bench: harness.Bench) -> harness.Document:
    """All points."""
    return points()


def page(document: harness.Document) -> str:
    """A table for each picture."""

    def shown(pair: Cell, digits: int = 3) -> str:
        return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"

    loss, bought, prediction = document["loss"], document["bought"], document["prediction"]
    ends = [[arm, curve[-1][0], shown(curve[-1][1:])] for arm, curve in loss["curves"].items()]
    shares = [
        [name, f"{pool:.1%}", *(f"{cells[i][0]:.1%} ± {cells[i][1]:.1%}" for cells in bought["rounds"])]
        for i, (name, pool) in enumerate(zip(bought["names"], bought["pool"], strict=True))
    ]
    tenths = [[name, f"{f['spearman']:.3f}", *(shown(c, 5) for c in f["tenths"])] for name, f in prediction.items()]
    price = document["price"]
    taken = [[name, *(shown(price[arm][name], 4) for arm in price)] for name in price[OURS]]
    waits = [[name, *(f"{found[s]:.2f}" for s in (*STAGES, "waited"))] for name, found in document["boundary"].items()]
    return markdown(
        "# pictures",
        "Points of `loss.svg`, `bought.svg`, `prediction.svg`, `price.svg` and `boundary.svg` in `docs/`. They are "
        "from the pages of `selection` (LAMBADA, mixed pool, seeds that all three methods have), `influence_models` "
        "and `boundary_wait`. ±: half of a 95% t interval.",
        "## loss", table(["method", "steps", "loss, nats/token"], ends),
        f"Random rows have the last loss of ours after {loss['reached']:.0f} steps; ours took {loss['steps']}.",
        "## bought", table(["domain", "pool (2,000 rows of it)", "round 1", "round 2"], shares),
        "## prediction", table(["model", "Spearman", *(f"tenth {i}" for i in range(1, 11))], tenths),
        "## price", table(["minus random, below 0 is better", *(arm for arm in price)], taken),
        "The first two rows are in nats/token, the others in nats/byte of the right answer.",
        "## boundary", table(["", *STAGES, "training waited, s"], waits),
    )  # fmt: skip


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word of a document, by where it stands."""
    if isinstance(value, (dict, list)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, f"{name}/{key}")
    else:
        yield name, value


def differences(document: harness.Document) -> Iterator[str]:
    """Whether points are those of the committed results."""
    known, told = dict(leaves(points())), dict(leaves(document))
    numbers = [name for name, value in known.items() if not isinstance(value, str)]
    same = known.keys() == told.keys() and all(known[name] == told[name] for name in known.keys() - set(numbers))
    if not same or not np.allclose([known[n] for n in numbers], [told[n] for n in numbers], rtol=1e-6, atol=1e-9):
        yield "the points are not those of `selection`, `influence_models` and `boundary_wait`"


def pictures(document: harness.Document) -> dict[Path, str]:
    """The pictures by their paths."""
    return {FOLDER / f"{name}.svg": draw(document[name]) for name, draw in DRAWN.items()}
