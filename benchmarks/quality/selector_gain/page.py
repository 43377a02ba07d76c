"""The page of `selector_gain`, made from its JSON and nothing else.

Sign: a difference below 0 means that the arm named first has the lower loss.
"""

from __future__ import annotations

from typing import Any

from benchmarks.lab.statistics import mean_interval, steps_to_reach
from benchmarks.lab.tables import markdown, table, title

SELECTED, RANDOM, SAME_KINDS = "selected", "random", "random, same kinds"
PAIRS = ((SELECTED, RANDOM), (SELECTED, SAME_KINDS), (SAME_KINDS, RANDOM))
LOSSES = ("held_out", "own")

Document = dict[str, Any]
Units = dict[tuple[str, int], dict[str, Any]]


def page(document: Document) -> str:
    """The Markdown page."""
    units = {(unit["arm"], unit["seed"]): unit for unit in document["units"]}
    return markdown(
        *_settings(document),
        _losses(units),
        _differences(units),
        _kinds(document),
        "Shares are of tokens. Below 0 the arm named first is better. `selected needs`: share of the steps "
        "after which the selected arm has the held-out loss that the random arm ends with.",
    )


def at_end(unit: dict[str, Any]) -> dict[str, float]:
    """The evaluation after the steps that all arms have."""
    return next(entry for entry in unit["curve"] if entry["step"] == unit["num_steps"])


def paired(units: Units, arm: str, other: str, key: str) -> list[float]:
    """Differences of a loss at the end, arm minus other, nats/token, seed by seed."""
    seeds = sorted({seed for name, seed in units if name == arm} & {seed for name, seed in units if name == other})
    return [at_end(units[arm, seed])[key] - at_end(units[other, seed])[key] for seed in seeds]


def _settings(document: Document) -> list[str]:
    settings, selector = document["settings"], document["selector"]
    return [
        title("selector_gain", settings["quick"]),
        f"Demo: {settings['demo_steps']} steps, pool {settings['demo_pool']}, reference {settings['reference']}. "
        f"Selector: its round {selector['number']} (of step {selector['step']}), held-out Spearman "
        f"{selector['spearman']:.3f}. Other corpus ({settings['corpus']}): {settings['corpus_rows']:,} rows, "
        f"{settings['corpus_tokens'] / 1e6:.2f} M tokens, after {settings['dropped']:,} that share a 13-gram with the "
        f"demo's pool, reference or held-out passages were dropped. `filter(ratio={settings['ratio']})` kept "
        f"{settings['kept_rows']:,} rows, {settings['kept_tokens'] / 1e6:.2f} M tokens.",
        f"Fresh models of the demo's shape, learning rate {settings['learning_rate']:g} (constant after "
        f"{settings['warm_up']} steps), AdamW, {settings['batch_rows']} rows of {settings['block']} tokens, "
        f"{settings['steps']:,} steps: {settings['epochs']} epochs over what was kept or drawn. Held-out: "
        f"{settings['held_out_passages']} passages like the reference. Own: passages of the other corpus itself. "
        f"nats/token, token-weighted, at the mean of the last {settings['window']} steps' weights. Python "
        f"{settings['python']}, torch {settings['torch']}, transformers {settings['transformers']}.",
    ]


def _losses(units: Units) -> str:
    arms = [arm for arm in (SELECTED, RANDOM, SAME_KINDS) if any(name == arm for name, _ in units)]
    heads = [f"{arm}: {key.replace('_', '-')}" for key in LOSSES for arm in arms]
    rows = []
    for seed in sorted({seed for _, seed in units}):
        ends = [at_end(units[arm, seed]) if (arm, seed) in units else {} for arm in arms]
        cells = [f"{end[key]:.4f}" if end else "" for key in LOSSES for end in ends]
        rows.append([str(seed), *cells, _catch_up(units, seed)])
    return table(["seed", *heads, "selected needs"], rows)


def _catch_up(units: Units, seed: int) -> str:
    if (SELECTED, seed) not in units or (RANDOM, seed) not in units:
        return ""
    ours, theirs = units[SELECTED, seed], units[RANDOM, seed]
    reached = steps_to_reach(ours["curve"], "held_out", at_end(theirs)["held_out"])
    return "more" if reached is None else f"{reached / ours['num_steps']:.0%}"


def _differences(units: Units) -> str:
    rows = []
    for arm, other in PAIRS:
        cells = []
        for key in LOSSES:
            values = paired(units, arm, other, key)
            if values:
                mean, half = mean_interval(values)
                cells.append(f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})")
        if cells:
            rows.append([f"{arm} minus {other}", str(len(values)), *cells])
    return table(["paired difference", "seeds", "held-out (95 % interval)", "own (95 % interval)"], rows)


def _kinds(document: Document) -> str:
    rows = [[name, f"{of['corpus']:.1%}", f"{of['kept']:.1%}"] for name, of in document["kinds"].items()]
    return table(["kind", "share of the corpus", "share of what was kept"], rows)
