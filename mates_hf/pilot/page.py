"""The pilot on one page: for the person who decides, as text and as one HTML file without any request.

Where it is used: `run_pilot`, at its end. `page_data` makes plain values of the figures, and both forms show nothing
else. What speaks against the verdict is on the page as sentences that are computed, next to the known error of small
pilots.

Trade-off: a picture of three lines and a few tables; who wants more reads `result.json`.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mates_hf.pilot.estimates import Estimate
from mates_hf.pilot.filters import NAMES
from mates_hf.pilot.schedule import Schedule
from mates_hf.pilot.settings import PilotSettings
from mates_hf.pilot.summary import POOL, Summary
from mates_hf.pilot.verdict import Verdict, interval_text
from mates_hf.reporting.payback import SelectionPlan

_TEMPLATE = "page.html.jinja"
_WIDTH = 110  # characters of a line of text
_PLOT = (640, 270, 54, 10, 10, 38)  # width, height, margins: left, right, top, bottom
_TENTH, _HUNDREDTH = 12.0, 120.0  # with some room
DATADECIDE = (
    "In DataDecide (arXiv:2504.11393) the order of two corpora at one small size, 150 million parameters, was that at "
    "a billion in about 80 percent of the pairs. So about one in five such pilots points the wrong way, however "
    "narrow its interval is."
)


def page_data(
    settings: PilotSettings,
    schedule: Schedule,
    plan: SelectionPlan,
    summary: Summary,
    verdict: Verdict,
    *,
    facts: Mapping[str, Any],
    tuned: Mapping[str, Any],
    seeds_asked: list[int],
) -> dict[str, Any]:
    """Everything that a page shows.

    Args:
        settings: How the pilot was run.
        schedule: Its steps.
        plan: The planned run.
        summary: What came out.
        verdict: What follows.
        facts: What was read.
        tuned: The filter's settings: losses, and the best one.
        seeds_asked: Every number of seeds that was asked for.

    Returns:
        JSON values.
    """
    names = {"random": "random rows", "filter": NAMES[settings.static_filter], "ours": "mates_hf"}
    return {
        "verdict": verdict.to_dict(),
        "arms": [_arm(arm, names[arm], summary, schedule, settings) for arm in names],
        "names": names,
        "groups": _groups(settings, summary, facts),
        "curves": dict(summary.curves),
        "plot": _plot(summary, schedule, settings, names),
        "money": _money(settings, plan, summary),
        "worries": list(_worries(settings, plan, summary, seeds_asked)),
        "plan": list(plan.lines()),
        "known_error": DATADECIDE,
        "tuned": dict(tuned),
        "facts": dict(facts),
        "seeds_asked": seeds_asked,
        "settings": settings.to_dict(),
        "schedule": {
            "start": schedule.start, "steps": schedule.steps, "longest": schedule.longest, "config": schedule.config,
        },
        "summary": summary.to_dict(),
    }  # fmt: skip


def _arm(arm: str, name: str, summary: Summary, schedule: Schedule, settings: PilotSettings) -> dict[str, Any]:
    """A row of the table of arms."""
    against = summary.against_filter.get(arm)
    if arm == "filter":
        tokens = "1"
    elif (found := summary.tokens_to_filter[arm]) is not None:
        tokens = interval_text(found, ".2f")
    else:
        most = schedule.longest if arm == "random" else schedule.steps
        tokens = f"over {(schedule.start + most) / schedule.end:.2f}"
    pool = None if arm == "random" else summary.harm[arm][POOL]
    return {
        "arm": arm, "name": name, "loss": interval_text(summary.losses[arm], ".3f"),
        "against_filter": "0" if against is None else interval_text(against), "tokens": tokens,
        "pool": "0" if pool is None else interval_text(pool), "seconds": summary.seconds[arm] / settings.seeds,
        "choosing_seconds": summary.choosing_seconds.get(arm, 0.0) / settings.seeds,
    }  # fmt: skip


def _groups(settings: PilotSettings, summary: Summary, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a group: its share of the pool, and how much worse it is than with random rows."""
    rows = []
    for name in summary.harm["ours"]:
        is_pool = name == POOL
        rows.append({
            "name": "the pool's own text" if is_pool else name, "share": 1.0 if is_pool else facts["groups"].get(name),
            "protected": name in settings.protected, "ours": interval_text(summary.harm["ours"][name]),
            "filter": interval_text(summary.harm["filter"][name]), "mean": summary.harm["ours"][name].mean,
        })  # fmt: skip
    return rows[:1] + sorted(rows[1:], key=lambda row: -float(row["mean"]))


def _money(settings: PilotSettings, plan: SelectionPlan, summary: Summary) -> dict[str, Any]:
    """What the pilot cost, what rounds would, and what is saved at the lower end of the gain over the filter."""
    gain = summary.findings.log_gain
    hours = sum(summary.seconds.values()) / 3600
    machine = None if settings.price is None else hours * settings.price
    found: dict[str, Any] = {
        "pilot_hours": hours, "pilot_flops": summary.flops, "pilot_price": machine, "labour": settings.labour,
        "training_hours": plan.training_hours, "training_price": plan.price_of_training,
        "rounds_hours": plan.device_hours + plan.idle_hours, "rounds_price": plan.price_of_rounds,
        "flops_share": plan.cost.share_of_training, "break_even": plan.break_even,
        "gain": _times(gain), "gain_low": None if gain.low is None else math.exp(gain.low),
    }  # fmt: skip
    if gain.low is not None:
        one = plan.at_gain(math.exp(gain.low))
        found |= {"saved_share": one.saved_share, "saved_hours": one.saved_hours, "saved_money": one.saved_money}
        if one.saved_money is not None and one.saved_money > 0:
            found["runs_until_paid"] = math.ceil(((machine or 0.0) + settings.labour) / one.saved_money)
    return found


def _times(gain: Estimate) -> str:
    """The gain in tokens, with its interval."""
    if gain.low is None or gain.high is None:
        return f"{math.exp(gain.mean):.2f} times (one seed: no interval)"
    return f"{math.exp(gain.mean):.2f} times ({math.exp(gain.low):.2f} to {math.exp(gain.high):.2f})"


def _worries(settings: PilotSettings, plan: SelectionPlan, summary: Summary, seeds_asked: list[int]) -> Iterator[str]:
    """What speaks against the verdict, in sentences."""
    found = summary.findings
    if found.smaller > _TENTH:
        yield (
            f"The pilot's model is {found.smaller:,.0f} times smaller than the planned one, where a tenth of its size "
            "was meant. That is further than any pilot whose error is known."
        )
    if found.shorter > _HUNDREDTH:
        yield f"Its arms are {found.shorter:,.0f} times shorter than the planned run, where a hundredth was meant."
    if len(seeds_asked) > 1:
        yield (
            f"Seeds were added after a look at the result ({', '.join(map(str, seeds_asked))}). Each look makes an "
            "interval that leaves out zero by chance more likely."
        )
    if settings.static_filter != "moore-lewis":
        yield (
            f"The rival is {NAMES[settings.static_filter]}. Log-odds (`static_filter=moore-lewis`) gained more than "
            "fastText where the library was measured."
        )
    if not settings.protected:
        yield "No group is protected, so nothing here stops a run that makes a group worse. Read the table of groups."
    worse = [name for name, one in summary.harm["ours"].items() if one.low is not None and one.low > 0]
    if worse:
        yield f"Worse than with random rows, interval above 0: {', '.join(worse)}."
    ours = summary.losses["ours"].mean - summary.losses["random"].mean
    if ours >= 0:
        yield f"Ours is no better than random rows on the held-out passages ({ours:+.3f} nats/token)."
    if summary.pilot_share > 2 * plan.cost.share_of_training:
        yield (
            f"Rounds took {summary.pilot_share:.0%} of the FLOPs of this pilot's training, for "
            f"{plan.cost.share_of_training:.2%} in the planned run. With its own rounds counted, ours minus the "
            f"filter is {interval_text(summary.at_pilot_flops)} nats/token."
        )  # fmt: skip
    yield from (f"Of the plan: {text}." for text in plan.warnings)


def render_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The page as text.

    Args:
        data: What `page_data` made.

    Yields:
        Lines.
    """
    verdict, money = data["verdict"], data["money"]
    yield from _wrapped(f"{verdict['decision'].upper()}: {verdict['reason']}")
    yield ""
    yield f"{'arm':<46}{'held-out loss':<28}{'minus the filter':<28}{'tokens to its loss'}"
    for arm in data["arms"]:
        yield f"{arm['name']:<46}{arm['loss']:<28}{arm['against_filter']:<28}{arm['tokens']}"
    yield f"Best of {len(data['tuned']['losses'])} settings of the filter: {data['tuned']['best']}."
    yield ""
    for one in verdict["criteria"]:
        yield from _wrapped(f"[{one['state']}] {one['question']} {one['value']}; limit: {one['threshold']}", 4)
    yield ""
    yield "Loss against random rows at equal tokens, nats/token, above 0 is worse"
    yield f"{'':<34}{'share':>7}   {'mates_hf':<30}{data['names']['filter']}"
    for row in data["groups"]:
        mark = " (protected)" if row["protected"] else ""
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        yield f"{row['name'] + mark:<34}{share:>7}   {row['ours']:<30}{row['filter']}"
    yield ""
    yield f"gain over the filter {money['gain']}; break-even of the planned run {money['break_even']:.3f} times"
    yield from _wrapped(
        f"pilot: {money['pilot_hours']:.2f} device hours{price(money['pilot_price'])}; planned run: "
        f"{money['training_hours']:,.1f} hours{price(money['training_price'])}, rounds "
        f"{money['rounds_hours']:.2f} hours{price(money['rounds_price'])}"
    )
    yield from _wrapped(saved_text(money))
    yield ""
    for text in (*data["worries"], data["known_error"]):
        yield from _wrapped(f"- {text}", 2)


def price(money: float | None) -> str:
    """`, price 1,234`, or nothing."""
    return "" if money is None else f", price {money:,.2f}" if money < 100 else f", price {money:,.0f}"


def saved_text(money: Mapping[str, Any]) -> str:
    """What the lower end of the gain would save or lose.

    Args:
        money: The part of `page_data` about costs.

    Returns:
        One or two sentences.
    """
    if money["gain_low"] is None:
        return "What it would save is not said: one seed has no interval."
    verb = "save" if money["saved_share"] >= 0 else "lose"
    text = (
        f"At the lower end of the gain ({money['gain_low']:.2f} times) selecting would {verb} "
        f"{abs(money['saved_share']):.1%} of the planned run, {abs(money['saved_hours']):,.1f} hours"
        f"{price(None if money['saved_money'] is None else abs(money['saved_money']))}, against the filter."
    )
    runs = money.get("runs_until_paid")
    return text if runs is None else f"{text} The pilot is paid after {runs} run{'s' * (runs != 1)}."


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent)


def _plot(summary: Summary, schedule: Schedule, settings: PilotSettings, names: Mapping[str, str]) -> dict[str, Any]:
    """Points of the curves of loss over tokens, and ticks, in the units of an SVG."""
    width, height, left, right, top, bottom = _PLOT
    curves = summary.curves
    losses = [loss for curve in curves.values() for loss in curve["losses"]]
    last = max(curve["steps"][-1] for curve in curves.values())
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0

    def x(step: float) -> float:
        return round(left + (step - schedule.start) / (last - schedule.start) * (width - left - right), 1)

    def y(loss: float) -> float:
        return round(top + (high - loss) / spread * (height - top - bottom), 1)

    def tokens(step: float) -> str:
        number = step * settings.batch_rows * settings.row_tokens
        return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"

    lines = [
        {
            "arm": arm, "name": names[arm], "x": x(curve["steps"][-1]), "y": y(curve["losses"][-1]),
            "points": " ".join(f"{x(s)},{y(v)}" for s, v in zip(curve["steps"], curve["losses"], strict=True)),
        }
        for arm, curve in curves.items()
    ]  # fmt: skip
    ticks = [low + spread * share for share in (0.0, 0.5, 1.0)]
    return {
        "width": width, "height": height, "left": left, "right": width - right, "bottom": height - bottom,
        "lines": lines,
        "end": x(schedule.end), "y": [{"at": y(loss), "text": f"{loss:.2f}"} for loss in ticks],
        "x": [{"at": x(step), "text": tokens(step)} for step in (schedule.start, schedule.end, last)],
    }  # fmt: skip


def render_page(data: Mapping[str, Any]) -> str:
    """The page as HTML that makes no request; all that it prints is escaped.

    Args:
        data: What `page_data` made.

    Returns:
        HTML that can be written as UTF-8.

    Raises:
        ImportError: jinja2 is not installed.
    """
    page: str = template().render(data, price=price, saved=saved_text(data["money"]))
    return page.encode("utf-8", "replace").decode("utf-8")  # a name may hold half of a surrogate pair


@functools.cache
def template() -> Any:
    """The template of the page.

    Returns:
        A template of jinja2 that escapes all that it prints.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            'A pilot must have jinja2, which is not installed: `pip install "mates-hf[pilot]"`.'
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(_TEMPLATE)
