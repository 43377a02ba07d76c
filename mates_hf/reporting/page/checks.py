"""What to worry about in a run: each check is a value, the threshold it is held against, and a sentence.

Where it is used: under `report`, which lists those that failed first and all of them below. Trade-off: thresholds are
rules of thumb and stand next to the values; a check says nothing where a round did not record what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mates_hf.reporting.page.rounds import Facts, number, selects
from mates_hf.round_record import FIDELITY_FINE, MAX_FLOPS_SHARE

# What is fine; the page and docs/report.md say these numbers.
WEAK_IN_A_ROW = 2  # rounds that the guard refused, one after another
MIN_HELD_OUT = 30  # labels
MIN_TOP_FIFTH = 0.25  # chance is 0.2
MAX_IDLE_SHARE = 0.05  # of the run's wall-clock
MAX_OVERLAP_SHARE = 0.01  # of the selected rows
MAX_REPEATED_SHARE = 0.2  # of the candidates
MAX_GROUP_SHARE = 0.7  # of the selection
MAX_GROUP_BOOST = 3.0  # times the share of the candidates
MAX_GROUP_LOSS = 0.05  # nats/token that a group got worse by
MIN_GROUP_PROBES = 20  # of a group in a round, for its loss to say something
_MOST_NAMED = 6  # rounds in a sentence


def find_checks(data: Mapping[str, Any]) -> list[Facts]:
    """Every check that the records of a run allow.

    Args:
        data: What `report` has read: `rounds`, `groups`, `cost`, `verify` and `leftovers`.

    Returns:
        One entry a check: `name`; `status`, "look" where it failed and "fine" where it did not; `value`, `threshold`
        and `text` in words.
    """
    rows: Sequence[Facts] = data["rounds"]
    found: list[Facts | None] = [_of_verify(data["verify"]), *(each(rows) for each in _OF_ROUNDS)]
    found += [*_of_groups(data["groups"]), *_of_cost(data["cost"])]
    known = [check for check in found if check is not None]
    return sorted(known, key=lambda check: check["status"] != "look")  # stable: what failed comes first


def _check(name: str, failed: bool, value: str, threshold: str, text: str) -> Facts:
    return {
        "name": name, "status": "look" if failed else "fine", "value": value, "threshold": threshold, "text": text,
    }  # fmt: skip


def _named(rows: Sequence[Facts]) -> str:
    """The rounds in a few words."""
    numbers = [str(row["number"]) for row in rows]
    listed = ", ".join(numbers if len(numbers) <= _MOST_NAMED else [*numbers[: _MOST_NAMED - 1], "…", numbers[-1]])
    return f"round{'s' if len(numbers) > 1 else ''} {listed}"


def _refusals(rows: Sequence[Facts]) -> Facts | None:
    refused = [row for row in rows if row["decision"] == "own_order"]
    longest = current = 0
    for row in rows:
        current = current + 1 if row["decision"] == "own_order" else 0
        longest = max(longest, current)
    failed = longest >= WEAK_IN_A_ROW
    text = (
        f"The guard refused {longest} rounds in a row. Read the reasons in the table: more probes help a weak signal, "
        "and nothing else."
        if failed
        else "The guard did not refuse two rounds in a row."
    )
    value = f"{len(refused)} of {len(rows)} refused, at most {longest} in a row"
    return _check("Refused rounds", failed, value, f"below {WEAK_IN_A_ROW} in a row", text)


def _weak(rows: Sequence[Facts]) -> Facts | None:
    judged = [row for row in rows if row["decision"] == "select" and None not in (row["low"], row["spearman"])]
    if not judged:
        return None
    weak = [row for row in judged if row["low"] <= 0 or row["spearman"] < (row["min_spearman"] or -1.0)]
    text = (
        f'Selected on a signal that may be noise: {_named(weak)}. `on_weak_signal` is "select".'
        if weak
        else "Every round that selected had a signal beyond noise."
    )
    least = min(row["low"] for row in judged)
    return _check(
        "Signal of selections", bool(weak), f"lowest end of an interval {least:.2f}", "above 0 and the guard", text
    )


def _reversals(rows: Sequence[Facts]) -> Facts | None:
    turned = [row for row in rows if row["reversed"]]
    text = (
        f"Fresh labels were the reverse of what the influence model before predicted in {_named(turned)}: what was "
        "selected before it was used up. Shorter rounds or a larger `selection_ratio` avoid it."
        if turned
        else "No round found its labels reversed."
    )
    return _check("Reversals", bool(turned), str(len(turned)), "none", text)


def _gaps(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["gap"] is not None]
    if not known:
        return None
    used_up = [row for row in known if row["gap"] <= 0]
    text = (
        f"What the round before had chosen was worth no more than the rest at {_named(used_up)}. Rounds that find "
        "their length answer by themselves (`first_round_steps`)."
        if used_up
        else "What was chosen was still worth more than the rest at each boundary."
    )
    value = f"lowest gap {min(row['gap'] for row in known):+.2f} sd"
    return _check("Choice used up", bool(used_up), value, "gap above 0", text)


def _rises(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["rise"] is not None]
    risen = [row for row in rows if row["failed"] == "loss_rose"]
    if not known and not risen:
        return None
    text = (
        f"The reference loss rose after a selection at {_named(risen)}. Look at the reference task, the probe and the "
        "learning rate."
        if risen
        else "The reference loss did not rise after a selection, beyond noise."
    )
    most = max((row["rise"] for row in known), default=0.0)
    return _check("Reference loss", bool(risen), f"largest rise {most:+.3f} nats/token", "no rise beyond noise", text)


def _machinery(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["fidelity"] is not None]
    if not known:
        return None
    low = [row for row in known if row["fidelity"] < FIDELITY_FINE or (row["fidelity_low"] or 0.0) <= 0]
    least = min(known, key=lambda row: row["fidelity"])
    text = (
        f"Labels agree badly with real optimizer steps in {_named(low)}. Each such check has about "
        f"{least['num_audited'] or 'a few'} candidates, so one alone may be chance."
        if low
        else "Labels agree with real optimizer steps."
    )
    value = f"lowest rank correlation {least['fidelity']:.2f} in round {least['number']}"
    return _check(
        "Machinery check", 2 * len(low) > len(known) or rows[-1] in low, value,
        f"at least {FIDELITY_FINE}, interval above 0, in the newest round and in half of them", text,
    )  # fmt: skip


def _held_out(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["num_held_out"] is not None]
    if not known:
        return None
    few = [row for row in known if row["num_held_out"] < MIN_HELD_OUT]
    text = (
        f"So few labels are held out in {_named(few)} that the interval is wide. Raise `num_probes`."
        if few
        else "Enough labels are held out to judge a fit by."
    )
    least = min(row["num_held_out"] for row in known)
    return _check("Held-out labels", bool(few), f"at least {least:,}", f"at least {MIN_HELD_OUT}", text)


def _top_fifth(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["top_fifth_overlap"] is not None and row["decision"] == "select"]
    if not known:
        return None
    chance = [row for row in known if row["top_fifth_overlap"] < MIN_TOP_FIFTH]
    text = (
        f"The best fifth was found no better than by chance in {_named(chance)}, though the ranking as a whole passed."
        if chance
        else "The best fifth of the held-out labels is found better than by chance."
    )
    value = f"lowest share found {min(row['top_fifth_overlap'] for row in known):.0%}"
    return _check("Best fifth found", bool(chance), value, f"at least {MIN_TOP_FIFTH:.0%}, chance is 20%", text)


def _overlap(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["overlap_share"] is not None]
    if not known:
        return None
    shared = [row for row in known if row["overlap_share"] > MAX_OVERLAP_SHARE]
    most = max(row["overlap_share"] for row in known)
    text = (
        f"Selected rows share {known[-1]['overlap_ngram'] or 'many'} tokens in a row with reference passages in "
        f"{_named(shared)}. What is measured on the reference task is then trained on."
        if shared
        else "Hardly any selected row shares a run of tokens with a reference passage."
    )
    return _check(
        "Reference overlap", bool(shared), f"most in a round {most:.2%}", f"at most {MAX_OVERLAP_SHARE:.0%}", text
    )


def _copies(rows: Sequence[Facts]) -> Facts | None:
    known = [row for row in rows if row["repeated_share"] is not None]
    if not known:
        return None
    many = [row for row in known if row["repeated_share"] > MAX_REPEATED_SHARE]
    text = (
        f"A large part of the candidates are copies of other candidates in {_named(many)}. Deduplicate the pool."
        if many
        else "Few candidates are copies of other candidates."
    )
    most = max(row["repeated_share"] for row in known)
    return _check("Copies", bool(many), f"most in a round {most:.1%}", f"at most {MAX_REPEATED_SHARE:.0%}", text)


_OF_ROUNDS: tuple[Callable[[Sequence[Facts]], Facts | None], ...] = (
    _refusals, _weak, _reversals, _gaps, _rises, _machinery, _held_out, _top_fifth, _overlap, _copies,
)  # fmt: skip


def _of_groups(groups: Mapping[str, Any] | None) -> Iterator[Facts]:
    """The largest share and boost of a group in the newest selection, and the largest rise of a group's loss."""
    if groups is None:
        return
    named = [group for group in groups["named"] if group["share"] is not None]
    if named:
        most = max(named, key=lambda group: group["share"])
        failed = most["share"] > MAX_GROUP_SHARE
        text = (
            f"One group, {most['name']}, has {most['share']:.0%} of the newest selection. `max_group_boost` bounds it."
            if failed
            else "No group has most of the newest selection."
        )
        yield _check("Largest group", failed, f"{most['share']:.0%}", f"at most {MAX_GROUP_SHARE:.0%}", text)
        boosted = [group for group in named if group["boost"] is not None]
        if boosted:
            most = max(boosted, key=lambda group: group["boost"])
            failed = most["boost"] > MAX_GROUP_BOOST
            text = (
                f"The group {most['name']} gets {most['boost']:.1f}× its share of the candidates."
                if failed
                else "No group gets a multiple of its share."
            )
            yield _check("Largest boost", failed, f"{most['boost']:.2f}×", f"at most {MAX_GROUP_BOOST:g}×", text)
    judged = [g for g in groups["named"] if g["loss_change"] is not None and g["probes"] >= MIN_GROUP_PROBES]
    if judged:
        most = max(judged, key=lambda group: group["loss_change"])
        failed = most["loss_change"] > MAX_GROUP_LOSS
        text = (
            f"The loss of the group {most['name']} is higher than at the first round that probed it."
            if failed
            else "No group with enough probes lost ground."
        )
        value = f"{most['loss_change']:+.3f} nats/token"
        yield _check("Loss of groups", failed, value, f"at most +{MAX_GROUP_LOSS:g} nats/token", text)


def _of_cost(cost: Mapping[str, Any]) -> Iterator[Facts]:
    """Idle devices, and the FLOPs of selecting."""
    idle = number(cost.get("idle_share"))
    if idle is not None:
        failed = idle > MAX_IDLE_SHARE
        text = (
            "Devices wait for the CPU while a model is fitted and rows are scored. A larger lead "
            "(`switch_lead_steps`) lets training go on meanwhile."
            if failed
            else "Devices hardly wait for the CPU."
        )
        yield _check("Idle devices", failed, f"at most {idle:.1%}", f"at most {MAX_IDLE_SHARE:.0%} of the time", text)
    share = number((cost.get("mates") or {}).get("share_of_training_flops"))
    if share is not None:
        failed = share > MAX_FLOPS_SHARE
        text = (
            "Selecting costs a large part of what training costs: rounds are short for their probes."
            if failed
            else "Selecting costs a small part of what training costs."
        )
        yield _check(
            "FLOPs of selecting", failed, f"{share:.1%}", f"at most {MAX_FLOPS_SHARE:.0%} of the training", text
        )


def _of_verify(verify: Mapping[str, Any] | None) -> Facts | None:
    """Whether the files are what the run wrote."""
    if verify is None:
        return None
    failed = not verify["ok"]
    text = (
        f"The files of the run are not as they must be: {verify['problem_text']}."
        if failed
        else "Every selection was recomputed from what the rounds left, and is the same."
    )
    return _check("Files of the run", failed, "problem" if failed else "as written", "`mates-hf verify`", text)


def last_selection(rows: Sequence[Facts]) -> Facts | None:
    """The newest round that chose rows."""
    return next((row for row in reversed(rows) if selects(row)), None)
