"""A finished round in memory, and what there is to say of it in a few facts: for `repr` and the command line.

`round_files.load_round` makes it from a directory. Large labels are summarised from an even sample of a million, so
that printing never costs a pass over all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.display import card, cut, html_card, interval, number, spread
from mates_hf.records import FloatArray, InfluenceLabels, IntArray

FIDELITY_FINE = 0.5  # rank correlation of labels with real steps, where its interval is above 0
MAX_FLOPS_SHARE = 0.25  # of the training FLOPs; a round that costs more is short for its probes
_MAX_WORD = 20  # characters of a token
_DECISIONS = {
    "select": "OK",
    "keep_previous": "OK, by the previous influence model",
    "own_order": "kept the Trainer's own order",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """A finished round as read from its directory.

    Attributes:
        path: the round directory.
        info: `round.json`.
        labels: `probes.parquet`, with the per-token derivatives of `token_derivatives.npy`.
        candidates: (M,) int64 pool rows that were scored, or None.
        scores: (M,) float32 predicted influence of `candidates`, or None.
        selection: (k,) int64 pool rows in training order, or None where the guard kept the Trainer's own order.
    """

    path: Path
    info: Mapping[str, Any]
    labels: InfluenceLabels
    candidates: IntArray | None
    scores: FloatArray | None
    selection: IntArray | None

    def __repr__(self) -> str:
        return card(f"RoundRecord: {round_title(self)}", round_facts(self))

    def _repr_html_(self) -> str:
        return html_card(f"RoundRecord: {round_title(self)}", round_facts(self))


def _part(info: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside of `round.json`, or an empty one."""
    found = info.get(name)
    return found if isinstance(found, Mapping) else {}


def round_seconds(info: Mapping[str, Any]) -> float | None:
    """Wall-clock of a round's stages, or None where none was recorded."""
    stages = [stage.get("seconds") for stage in _part(info, "stages").values() if isinstance(stage, Mapping)]
    known = [float(seconds) for seconds in stages if isinstance(seconds, (int, float))]
    return sum(known) if known else None


def decision_text(info: Mapping[str, Any]) -> str:
    """What came of a round, in a few words."""
    decision = _part(info, "guard").get("decision")
    text = _DECISIONS.get(str(decision), str(decision or "no decision recorded"))
    return "selected below the guard" if decision == "select" and not _passes(info) else text


def _passes(info: Mapping[str, Any]) -> bool:
    """True where the guard's condition holds, or was not recorded."""
    guard, least = _part(info, "guard"), _part(info, "config").get("min_spearman")
    if guard.get("decision") in ("own_order", "keep_previous"):
        return False
    bounds, spearman = guard.get("interval"), guard.get("spearman")
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2 or not isinstance(spearman, (int, float)):
        return True
    low = bounds[0] if _is_number(bounds[0]) else 0
    return bool(spearman >= (least if isinstance(least, (int, float)) else -1) and low > 0)


def round_title(record: RoundRecord) -> str:
    """First line of a round: which, when, how many rows, and what came of it."""
    return f"{round_head(record)} · {decision_text(record.info)}"


def round_head(record: RoundRecord) -> str:
    """Which round, when, and how many rows it chose."""
    info = record.info
    which = info.get("number", record.path.name.removeprefix("round-").lstrip("0") or "0")
    step = f" · step {info['step']}" if "step" in info else ""
    if record.selection is None:
        chosen = "selected nothing"
    elif isinstance(num := info.get("num_candidates"), int) and num >= len(record.selection) > 0:
        share = 100 * len(record.selection) / num
        chosen = f"selected {len(record.selection):,} of {num:,} candidates ({share:.3g}%)"
    else:
        chosen = f"selected {len(record.selection):,} rows"
    return f"round {which}{step} · {chosen}"


def round_facts(record: RoundRecord) -> dict[str, str]:
    """Signal, labels, machinery check, cost and chosen rows of a round, each with what is good."""
    return {name: ": ".join(filter(None, parts)) for name, parts in round_parts(record).items()}


def round_parts(record: RoundRecord) -> dict[str, tuple[str, str]]:
    """The facts of a round, each as what was found and what to think of it; the second may be empty.

    Args:
        record: The round.

    Returns:
        Two texts for each of `signal`, `labels`, `cost` and `chosen`.
    """
    return {
        "signal": _signal(record),
        "labels": _labels(record),
        "cost": _cost(record),
        "chosen": _chosen(record),
    }


def _signal(record: RoundRecord) -> tuple[str, str]:
    """Held-out rank correlation, the guard's view of it, and whether the last round's choice still holds."""
    info = record.info
    guard = _part(info, "guard")
    if not isinstance(guard.get("spearman"), (int, float)):
        return "not recorded", ""
    held_out = _part(info, "fit").get("num_held_out")
    on = f" on {held_out:,} labels" if isinstance(held_out, int) else ""
    least = _part(info, "config").get("min_spearman")
    rule = f"({least}, interval above 0)" if isinstance(least, (int, float)) else ""
    side = "above" if _passes(info) else "below"
    found = f"held-out Spearman {guard['spearman']:.2f} {interval(guard.get('interval'))}".rstrip() + on
    gap = gap_text(info)
    text = f"{side} the guard {rule}".rstrip()
    text += f"; the last choice against the rest {gap}" if gap else ""
    return found, f"{text}; the reference loss rose{rise_text(info)}" if guard.get("failed") == "loss_rose" else text


def rise_text(info: Mapping[str, Any]) -> str:
    """By how much the reference loss rose since the last round, or when it did."""
    rise = _part(info, "rise")
    if not _is_number(rise.get("rise")):
        return " in the rounds that selected last"
    bounds = rise.get("interval")
    within = ""
    if isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(map(_is_number, bounds)):
        within = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    than = ", against the own order before" if rise.get("beyond_own_order") else ""
    return f" by {rise['rise']:.3f}{within} nats/token{than}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def gap_text(info: Mapping[str, Any]) -> str:
    """What the last round bought against the rest by the fresh labels, above 0 is good; empty where it is not told."""
    gap = _part(info, "gap") or info
    if not isinstance(gap.get("gap"), (int, float)):
        return ""
    return f"{gap['gap']:+.2f} {interval(gap.get('interval'))}".rstrip() + " sd"


def bought_text(info: Mapping[str, Any]) -> str:
    """What rows that the round chose have more often than its candidates, in words; empty where nothing stands out."""
    found = info.get("bought_most")
    texts = [part.get("text") for part in found or () if isinstance(part, Mapping)] if isinstance(found, list) else []
    words = [f'"{cut(text, _MAX_WORD)}"' for text in texts[:3] if isinstance(text, str) and text]
    return f"above all rows with {', '.join(words)}" if words else ""


def groups_text(info: Mapping[str, Any]) -> str:
    """The groups whose share of the choice differs most from that of the candidates; empty where none are recorded."""
    found = {
        str(name): (facts["candidates"], facts["chosen"])
        for name, facts in _part(info, "groups").items()
        if isinstance(facts, Mapping) and all(_is_number(facts.get(key)) for key in ("candidates", "chosen"))
    }
    every, taken = (sum(counts[i] for counts in found.values()) for i in (0, 1))
    if len(found) < 2 or not every or not taken:
        return ""
    boosts = {name: (got / taken) / (num / every) for name, (num, got) in found.items() if num}
    most = sorted(boosts, key=lambda name: (-abs(found[name][1] / taken - found[name][0] / every), name))[:3]
    return ", ".join(f"{cut(name, _MAX_WORD)} {boosts[name]:.2f}×" for name in most)


def _labels(record: RoundRecord) -> tuple[str, str]:
    """How many labels, their standard deviation, and whether derivatives agree with real steps."""
    labels, fidelity = record.labels, _part(record.info, "fidelity")
    probed = f"{len(labels):,} probed, sd {number(spread(labels.influence).get('std'))}"
    if not isinstance(fidelity.get("spearman"), (int, float)):
        return probed, ""
    bounds = fidelity.get("interval")
    low = bounds[0] if isinstance(bounds, (list, tuple)) and bounds and isinstance(bounds[0], (int, float)) else 0.0
    verdict = "fine" if fidelity["spearman"] >= FIDELITY_FINE and low > 0 else "low"
    few = fidelity.get("num_candidates", "few")
    return f"{probed}; {few} real steps agree at {fidelity['spearman']:.2f} {interval(bounds)}", verdict


def _cost(record: RoundRecord) -> tuple[str, str]:
    """Seconds, and FLOPs as a share of the training that follows."""
    info = record.info
    seconds = round_seconds(info)
    text = "seconds not recorded" if seconds is None else f"{seconds:.1f} s"
    stages = [stage for stage in _part(info, "stages").values() if isinstance(stage, Mapping)]
    flops = sum(float(stage["flops"]) for stage in stages if isinstance(stage.get("flops"), (int, float)))
    parameters = _part(info, "flop_parameters").get("stages")
    rows = 0 if record.selection is None else len(record.selection)
    if not flops or not isinstance(parameters, int) or not rows or not len(record.labels):
        return text, ""
    # Six FLOPs a parameter and token: two of them forward, four backward; rows as long as those that were probed.
    training = 6.0 * parameters * rows * float(np.mean(record.labels.num_tokens, dtype=np.float64))
    if not training:
        return text, ""
    share = 100 * flops / training
    judged = "much: its rows are few for its probes" if share > 100 * MAX_FLOPS_SHARE else ""
    return f"{text}, {f'about {share:,.0f}' if share >= 1 else 'below 1'}% of the training FLOPs of its rows", judged


def _chosen(record: RoundRecord) -> tuple[str, str]:
    """What the chosen rows have more often than all candidates, else their mean predicted influence against theirs."""
    if record.selection is None:
        return "nothing; the run went on in the Trainer's own order", ""
    mean = mean_of_selected(record)
    if mean is None or record.scores is None:
        return f"{len(record.selection):,} rows, not scored in this round", ""
    every = float(np.nanmean(record.scores, dtype=np.float64))
    by_group = f"{groups_text(record.info)} their share" if groups_text(record.info) else ""
    text = f"predicted influence {mean:+.2e} on average, {every:+.2e} over all candidates"
    return bought_text(record.info) or text, by_group


def mean_of_selected(record: RoundRecord) -> float | None:
    """Mean predicted influence of the selection, or None where its rows were not scored in this round."""
    if record.selection is None or record.candidates is None or record.scores is None or not len(record.selection):
        return None
    selected = np.isin(record.candidates, record.selection) & np.isfinite(record.scores)  # NaN: rows taken out
    return float(np.mean(record.scores[selected], dtype=np.float64)) if selected.any() else None
