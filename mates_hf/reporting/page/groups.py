"""What was bought over the rounds, by group, and what became of each group's loss.

Where it is used: under `report`, for runs with a `group_column`. Trade-off: a group's loss is that of its probes in a
round, so with few probes it is noisy, and their number stands next to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.reporting.page.rounds import Facts, number, part, whole

MAX_GROUPS = 40  # that are named; the rest is one line
OTHERS = "all others"


def group_data(infos: Sequence[Mapping[str, Any]]) -> Facts | None:
    """Shares and losses of the groups of a run.

    Args:
        infos: `round.json` of its rounds, ascending.

    Returns:
        None where no round recorded groups. Else `column`; `named`, one entry a group, the largest in the pool first,
        with `share` of the newest selection, `pool_share` of the candidates before it, `boost` (their ratio),
        `loss_first`, `loss_last` and `loss_change` in nats/token (< 0 is better) and `probes` of the newest round that
        probed it; `shares`, for each round that selected its number and the share of each named group.
    """
    recorded = [(info, part(info, "groups")) for info in infos if part(info, "groups")]
    if not recorded:
        return None
    sizes: dict[str, int] = {}
    for _, groups in recorded:
        for name in groups:
            sizes[str(name)] = sizes.get(str(name), 0) + (whole(part(groups, name).get("candidates")) or 0)
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:MAX_GROUPS]
    bought = [
        {
            "round": info.get("number"),
            "pool": _shares(groups, names, "candidates"),
            "shares": shares,
        }
        for info, groups in recorded
        if (shares := _shares(groups, names, "chosen")) is not None
    ]
    return {
        "column": part(recorded[-1][0], "config").get("group_column"),
        "num_groups": len(sizes),
        "named": [_named(name, recorded, bought[-1] if bought else None) for name in names],
        "shares": bought,
    }


def _shares(groups: Mapping[str, Any], names: Sequence[str], of: str) -> dict[str, float] | None:
    """Shares of the named groups, the rest under `OTHERS`; None where nothing was counted."""
    counts = {str(name): whole(part(groups, name).get(of)) or 0 for name in groups}
    total = sum(counts.values())
    if not total:
        return None
    shares = {name: counts.get(name, 0) / total for name in names}
    rest = 1 - sum(shares.values())
    return shares | ({OTHERS: rest} if rest > 1e-9 else {})


def _named(
    name: str, recorded: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], newest: Mapping[str, Any] | None
) -> Facts:
    """One group."""
    losses = [(number(part(g, name).get("loss")), whole(part(g, name).get("probes")) or 0) for _, g in recorded]
    known = [(loss, probes) for loss, probes in losses if loss is not None]
    share = pool_share = None
    if newest is not None:
        share, pool_share = newest["shares"].get(name), (newest["pool"] or {}).get(name)
    return {
        "name": name,
        "share": share,
        "pool_share": pool_share,
        "boost": share / pool_share if share is not None and pool_share else None,
        "loss_first": known[0][0] if known else None,
        "loss_last": known[-1][0] if known else None,
        "loss_change": known[-1][0] - known[0][0] if len(known) > 1 else None,
        "probes": min(known[0][1], known[-1][1]) if known else 0,
    }
