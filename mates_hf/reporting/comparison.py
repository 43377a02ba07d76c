"""Two runs next to each other: at equal tokens, and at equal FLOPs, which count what selecting took.

Where it is used: `mates-hf compare A B`; it reads what the Trainer logged and what rounds left, without torch. A run
without rounds is fine: it is the arm that does not select.

Trade-off: two runs are two seeds at best, so no interval here is over seeds. Each says what it is over. Passages are
what a reference task is made of, and the better of the two; evaluations of one run follow one another and are hardly
independent, so their interval is too narrow.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.disk import read_array
from mates_hf.paths import expand_path
from mates_hf.reporting.cost import newest_state
from mates_hf.reporting.lines import finite
from mates_hf.reporting.page.render import render
from mates_hf.reporting.page.rounds import Facts, number, part, read_infos, round_row
from mates_hf.reporting.page.shapes import curves_plot
from mates_hf.round_files import REFERENCE_FILE, find_rounds

NUM_EVALUATIONS = 5  # the last ones, of which an interval is made
_SAME = 0.01  # relative difference of FLOPs a step below which steps have equally many tokens
_Z_95 = 1.959964
_MAX_METRICS = 40


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run.

    Attributes:
        name: Name of its folder.
        steps: Optimizer steps of its newest state.
        history: What its Trainer logged.
        flops_per_step: Training FLOPs of a step as the Trainer counts them; None where it counted none.
        tokens_per_step: Tokens of a step, where the Trainer counted them, else None.
        infos: `round.json` of its rounds, ascending; none where it never selected.
        paths: Directories of those rounds.
    """

    name: str
    steps: int
    history: Sequence[Mapping[str, Any]]
    flops_per_step: float | None
    tokens_per_step: float | None
    infos: Sequence[Mapping[str, Any]]
    paths: Sequence[Path]

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> ComparedRun:
        """Read a run's `output_dir`.

        Args:
            run_dir: The directory, with a `trainer_state.json` in it or in a checkpoint.

        Returns:
            The run.

        Raises:
            FileNotFoundError: the Trainer left no state there.
            MatesError: a file is damaged.
        """
        path = expand_path(run_dir)
        path = path.resolve().parent if path.resolve().name == "_mates" else path
        state = newest_state(path) if path.is_dir() else None
        if state is None:
            raise FileNotFoundError(
                f"`{run_dir}` must be the `output_dir` of a run with a trainer_state.json, and has none, in no "
                "checkpoint either. The Trainer writes it with a checkpoint or in `trainer.save_state()`."
            )
        steps, rounds = int(state["global_step"]), find_rounds(path)[1]
        each = [number(state.get(name)) for name in ("total_flos", "num_input_tokens_seen")]
        flops, tokens = (value / steps if value and steps else None for value in each)
        history = [entry for entry in state.get("log_history") or () if isinstance(entry, Mapping)]
        infos = [info for info in read_infos(rounds) if (number(info.get("step")) or 0) <= steps]
        return cls(path.resolve().name, steps, history, flops, tokens, infos, list(rounds.values())[: len(infos)])

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, ascending; of several values at a step the last one."""
        found: dict[int, float] = {}
        for entry in self.history:
            value, step = number(entry.get(metric)), entry.get("step")
            if value is not None and isinstance(step, int):
                found[step] = value
        return sorted(found.items())

    def metrics(self) -> list[str]:
        """Names of what evaluations logged, losses first."""
        names = {name for entry in self.history for name in entry if str(name).startswith(("eval_", "lm_eval/"))}
        dull = ("runtime", "_per_second", "/seconds", "/tokens")
        kept = [str(name) for name in names if not str(name).endswith(dull) and self.curve(str(name))]
        return sorted(kept, key=lambda name: (not name.endswith("loss"), name != "eval_loss", name))


def compare_runs(a: str | os.PathLike[str], b: str | os.PathLike[str], *, metric: str | None = None) -> dict[str, Any]:
    """Compare two runs at equal tokens and at equal FLOPs.

    Args:
        a: The `output_dir` of a run.
        b: The `output_dir` of another.
        metric: Name of what both logged, such as `eval_loss`; None takes the first loss that both evaluated.

    Returns:
        Plain JSON values: `runs`, `metric`, `verdict`, `equal_tokens` and `equal_flops` (with `a`, `b`, `difference`
        a - b, and `at`), `evaluations` and `passages` (differences with an interval, or None with the reason in
        `notes`), `tokens_needed`, `metrics` and `notes`.

    Raises:
        FileNotFoundError: the Trainer of one left no state.
        MatesError: a file is damaged.
        ValueError: the runs have no metric in common, or not this one.
    """
    runs = (ComparedRun.read(a), ComparedRun.read(b))
    shared = [name for name in runs[0].metrics() if name in runs[1].metrics()]
    if metric is not None and not all(run.curve(metric) for run in runs):
        raise ValueError(
            f"`metric` must be what both runs logged, got {metric!r}; they share {', '.join(shared) or 'none'}."
        )
    chosen = metric or next(iter(shared), None)
    if chosen is None:
        raise ValueError(
            "Both runs must have evaluated the same thing, and share no metric. Give both Trainers an `eval_dataset` "
            "and an `eval_strategy`."
        )
    notes: list[str] = []
    unit, scale = _unit(runs, notes)
    curves = [run.curve(chosen) for run in runs]
    tokens = [_points(curve, [step * one for step, _ in curve]) for curve, one in zip(curves, scale, strict=True)]
    spent = _spent(runs, curves, notes)
    data = {
        "runs": [_about(run) for run in runs],
        "metric": chosen,
        "unit": unit,
        "equal_tokens": _at_equal(*tokens),
        "equal_flops": None if spent is None else _at_equal(*spent),
        "evaluations": _over_evaluations(tokens[0], tokens[1], notes),
        "passages": _over_passages(runs, notes),
        "tokens_needed": _needed(*tokens) if chosen.endswith("loss") else None,
        "flops_needed": _needed(*spent) if spent is not None and chosen.endswith("loss") else None,
        "metrics": _final(runs, shared, scale),
        "settings": _differences(runs),
        "curves": tokens,
        "notes": notes,
    }  # fmt: skip
    data["verdict"] = _verdict(data)
    whole: dict[str, Any] = finite(data)
    return whole


def compare_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """What `mates-hf compare` prints.

    Args:
        data: What `compare_runs` returned.

    Yields:
        Lines.
    """
    for letter, run in zip("AB", data["runs"], strict=True):
        yield f"{letter} {run['name']}: {run['steps']:,} steps, {run['num_rounds']} rounds"
    yield data["verdict"]
    yield f"{data['metric']:<32}{'A':>12}{'B':>12}{'A - B':>12}"
    for name, found in (("at equal tokens", data["equal_tokens"]), ("at equal FLOPs", data["equal_flops"])):
        if found is not None:
            yield f"  {name:<30}{found['a']:>12.4f}{found['b']:>12.4f}{found['difference']:>+12.4f}"
    for of in ("passages", "evaluations"):
        if data[of] is not None:
            yield f"  {data[of]['text']}"
    for name, what in (("tokens_needed", "tokens"), ("flops_needed", "FLOPs")):
        if data[name] is not None:
            yield f"  {data[name]['text'].format(what=what)}"
    yield from (f"note: {note}" for note in data["notes"])


def compare_html(data: Mapping[str, Any], version: str) -> str:
    """The same as a page, as `report_html` makes one.

    Args:
        data: What `compare_runs` returned.
        version: Version of this library.

    Returns:
        One HTML file.

    Raises:
        ImportError: jinja2 is not installed.
    """
    picture = curves_plot(data["curves"], [run["name"] for run in data["runs"]], data["metric"], data["unit"])
    return render("compare.html.jinja", {"data": data, "picture": picture, "version": version})


def _unit(runs: Sequence[ComparedRun], notes: list[str]) -> tuple[str, list[float]]:
    """What tokens are counted in, and how much of it a step of each run is."""
    tokens = [run.tokens_per_step for run in runs]
    if None not in tokens:
        return "tokens", [each or 0.0 for each in tokens]
    flops = [run.flops_per_step for run in runs]
    if None in flops:
        notes.append(
            "The Trainer counted neither tokens nor FLOPs: a step of A is taken for as many tokens as one of B."
        )
        return "steps", [1.0, 1.0]
    first, second = (each or 1.0 for each in flops)
    if abs(first - second) <= _SAME * max(first, second):
        return "steps", [1.0, 1.0]
    notes.append(
        "Steps of the two runs differ in FLOPs. Equal tokens are taken for equal training FLOPs, which is right for "
        "models of one size."
    )
    return "training FLOPs", [first, second]


def _points(curve: Sequence[tuple[int, float]], places: Sequence[float]) -> list[tuple[float, float]]:
    return [(place, value) for place, (_, value) in zip(places, curve, strict=True)]


def _spent(
    runs: Sequence[ComparedRun], curves: Sequence[Sequence[tuple[int, float]]], notes: list[str]
) -> list[list[tuple[float, float]]] | None:
    """The curves over all FLOPs spent: training, in the unit of stages, and rounds; None where they are not known."""
    if any(run.flops_per_step is None for run in runs):
        notes.append("The Trainer counted no FLOPs, so there is no comparison at equal FLOPs.")
        return None
    known = [part(run.infos[-1], "flop_parameters") for run in runs if run.infos]
    ratios = [k["stages"] / k["trainer"] for k in known if number(k.get("stages")) and number(k.get("trainer"))]
    ratio = ratios[0] if ratios else 1.0
    found = []
    for run, curve in zip(runs, curves, strict=True):
        rounds = [(row["step"] or 0, row["flops"]) for row in map(round_row, run.infos)]
        if any(flops is None for _, flops in rounds):
            notes.append(f"A round of {run.name} did not record all its FLOPs: equal FLOPs are in its favour.")
        spent = [
            step * (run.flops_per_step or 0.0) * ratio + sum(flops or 0.0 for at, flops in rounds if at <= step)
            for step, _ in curve
        ]
        found.append(_points(curve, spent))
    return found


def _value_at(points: Sequence[tuple[float, float]], place: float) -> float:
    return float(np.interp(place, [x for x, _ in points], [y for _, y in points]))


def _at_equal(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Facts | None:
    """Both at the last place that both reached; None where their curves do not overlap."""
    place = min(a[-1][0], b[-1][0])
    if place < max(a[0][0], b[0][0]):
        return None
    first, second = _value_at(a, place), _value_at(b, place)
    return {"at": place, "a": first, "b": second, "difference": first - second}


def _over_evaluations(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], notes: list[str]
) -> Facts | None:
    """The mean difference over the last evaluations that both made at the same place, with a t interval."""
    others = dict(b)
    pairs = [(x, y - others[x]) for x, y in a if x in others][-NUM_EVALUATIONS:]
    if len(pairs) < 3:
        notes.append("There are fewer than three evaluations at equal places, so there is no interval over them.")
        return None
    from scipy import stats

    values = np.array([value for _, value in pairs])
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    mean = float(values.mean())
    return {
        "difference": mean, "interval": [mean - half, mean + half], "num": len(values),
        "text": f"Mean of the last {len(values)} evaluations: {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}], a "
        "95% interval over evaluations, which follow one another: too narrow, and not over seeds",
    }  # fmt: skip


def _over_passages(runs: Sequence[ComparedRun], notes: list[str]) -> Facts | None:
    """The difference of the reference losses, paired by passage, at the last boundary that both have."""
    why = "There is no interval over passages: "
    if not all(run.infos for run in runs):
        notes.append(why + "a run without rounds keeps no loss of single passages.")
        return None
    digests = [part(run.infos[-1], "reference").get("digest") for run in runs]
    if digests[0] is None or digests[0] != digests[1]:
        notes.append(why + "the runs have different reference tasks.")
        return None
    places = [
        {number(info.get("step")): path for info, path in zip(run.infos, run.paths, strict=True)} for run in runs
    ]
    shared = [step for step in places[0] if step is not None and step in places[1]]
    found = [read_array(at[max(shared)] / REFERENCE_FILE, np.float32, num_dims=2) for at in places] if shared else []
    files = [file for file in found if file is not None]
    if len(files) != 2 or len(files[0]) != len(files[1]) or len(files[0]) < 2:
        notes.append(why + "the runs have no round at the same step that kept them.")
        return None
    first, second = (np.asarray(file, np.float64) for file in files)
    weights = first[:, 1] / first[:, 1].sum()
    each = first[:, 0] - second[:, 0]
    mean = float(weights @ each)
    half = _Z_95 * math.sqrt(float(np.sum((weights * (each - mean)) ** 2)) * len(each) / (len(each) - 1))
    step = int(max(shared))
    return {
        "difference": mean, "interval": [mean - half, mean + half], "num": len(each), "step": step,
        "text": f"Reference loss at step {step}: {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] nats/token, a "
        f"95% interval over {len(each)} passages, not over seeds",
    }  # fmt: skip


def _needed(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Facts | None:
    """How many times as much the run behind needs to get where the other is at the last equal place."""
    equal = _at_equal(a, b)
    if equal is None or not equal["difference"] or equal["at"] <= 0:
        return None
    ahead, behind, theirs = ("A", "B", b) if equal["difference"] < 0 else ("B", "A", a)
    goal = min(equal["a"], equal["b"])
    place = _reached(theirs, goal)
    times = None if place is None else place / equal["at"]
    if times is None:
        most = theirs[-1][0] / equal["at"]
        text = f"{behind} did not reach the {goal:.4f} of {ahead} with {most:.2f} times as many {{what}}"
    else:
        text = f"{behind} needs {times:.2f} times as many {{what}} to reach the {goal:.4f} of {ahead}"
    return {"behind": behind, "times": times, "goal": goal, "text": text}


def _reached(points: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The place where a curve first gets down to a value."""
    for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False):
        if y2 <= goal:
            return x1 + (x2 - x1) * min(1.0, (y1 - goal) / max(y1 - y2, 1e-12))
    return None


def _final(runs: Sequence[ComparedRun], shared: Sequence[str], scale: Sequence[float]) -> list[Facts]:
    """Every shared metric at equal tokens."""
    found = []
    for name in shared[:_MAX_METRICS]:
        points = [
            [(step * one, value) for step, value in run.curve(name)] for run, one in zip(runs, scale, strict=True)
        ]
        at = _at_equal(*points)
        if at is not None:
            found.append({"name": name, **at})
    return found


def _differences(runs: Sequence[ComparedRun]) -> list[Facts]:
    """Settings of `MatesConfig` in which the newest rounds of two runs differ."""
    configs = [part(run.infos[-1], "config") if run.infos else {} for run in runs]
    if not all(configs):
        return []
    names = sorted({*configs[0], *configs[1]})
    return [
        {"name": name, "a": repr(configs[0].get(name)), "b": repr(configs[1].get(name))}
        for name in names
        if configs[0].get(name) != configs[1].get(name)
    ]


def _about(run: ComparedRun) -> Facts:
    rows = [round_row(info) for info in run.infos]
    flops = [row["flops"] for row in rows if row["flops"] is not None]
    return {
        "name": run.name,
        "steps": run.steps,
        "num_rounds": len(rows),
        "num_selected": sum(row["decision"] in ("select", "keep_previous") for row in rows),
        "round_flops": sum(flops) if flops else None,
        "training_flops": None if run.flops_per_step is None else run.flops_per_step * run.steps,
    }


def _verdict(data: Mapping[str, Any]) -> str:
    """One sentence on who is ahead, for a loss."""
    if not data["metric"].endswith("loss"):
        return f"{data['metric']} is shown as it is: whether more is better is for its reader to say."
    tokens, flops = data["equal_tokens"], data["equal_flops"]
    if tokens is None:
        return "The two runs have no evaluations at equal tokens."
    ahead = "A" if tokens["difference"] < 0 else "B"
    text = f"{ahead} has the lower loss at equal tokens, by {abs(tokens['difference']):.4f}"
    if flops is None:
        return f"{text}; at equal FLOPs nothing is known."
    same = (flops["difference"] < 0) == (tokens["difference"] < 0)
    if same:
        return (
            f"{text}, and at equal FLOPs, by {abs(flops['difference']):.4f}. Two runs are no proof: repeat with seeds."
        )
    other = "B" if ahead == "A" else "A"
    return (
        f"{text}, but {other} at equal FLOPs, by {abs(flops['difference']):.4f}: selecting costs more than it gains."
    )
