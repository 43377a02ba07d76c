"""Labels against training: sets of rows over 10 to 1,000 steps, rounds of selection, and fits of influence models.

Place in the flow: the parts `horizon`, `rounds` and `fit` of `fidelity.py`. Trade-off: a plain loop instead of the
Trainer; the order of rows inside a selection is all that chance decides between two arms of one seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from fidelity_setup import BATCH_ROWS, LR, WINDOW, Ids, Paths, Point, Sizes, one_a_document, warm_point
from lab import TOKENS_PER_BATCH, Averager, Lab, spearman, without_group_means

from mates_hf.influence.losses import mean_loss
from mates_hf.influence.ngram import NgramInfluenceModel
from mates_hf.selection.choose import gumbel_top_k, uniform

# --- horizon: sets of rows, 10 to 1,000 steps ---

LABEL_KINDS: dict[str, dict[str, Any]] = {
    "all tokens, live": {"loss_on": "all", "averaged": False, "parameters": "all"},
    "all tokens, averaged": {"loss_on": "all", "averaged": True, "parameters": "all"},
    "last word, averaged": {"loss_on": "completion", "averaged": True, "parameters": "all"},
    "all tokens, averaged, blocks": {"loss_on": "all", "averaged": True, "parameters": "blocks"},
}

SETS = {
    "random": ("random",),
    "all tokens, averaged": ("deciles", "top", "middle", "bottom"),
    "last word, averaged": ("deciles", "top", "bottom"),
    "all tokens, live": ("deciles", "top"),
    "all tokens, averaged, blocks": ("deciles",),
}


def horizon(lab: Lab, sizes: Sizes, paths: Paths, *, kind: str, which: str, seed: int = 0) -> dict[str, Any]:
    """Development loss along training on the rows a label prefers (`which`: deciles, top, middle, bottom, random)."""
    point = warm_point(lab, sizes, paths, seed)
    probes = one_a_document(lab, point.rest)[: sizes.set_probes]
    rest = point.rest[~np.isin(point.rest, probes)]
    result: dict[str, Any] = {"kind": kind, "which": which, "seed": seed, "learning_rate": LR, "pool_rows": len(rest)}
    predicted = np.zeros(len(rest))
    if kind != "random":
        settings = dict(LABEL_KINDS[kind])
        with point.weights(settings.pop("averaged")):
            labels = point.measure(probes, **settings)
        model = NgramInfluenceModel(seed=seed).fit(lab.rows.take(probes), labels, groups=lab.domain[probes])
        predicted = model.predict(lab.rows.take(rest)) / model.report.label_std
        result["held_out_spearman"] = model.report.spearman
    ranked = np.argsort(-predicted, kind="stable")  # best first; the order of `rest` is random
    longest = min(sizes.horizons[-1], len(rest) // 3 // BATCH_ROWS)
    num_rows = longest * BATCH_ROWS
    middle = (len(rest) - num_rows) // 2
    sets = {
        "top": ranked[:num_rows],
        "middle": ranked[middle : middle + num_rows],
        "bottom": ranked[-num_rows:],
        "random": ranked[:num_rows],
    }
    chosen = {which: sets[which]} if which in sets else dict(enumerate(np.array_split(ranked, 10)))
    horizons = [min(h, longest) for h in sizes.horizons if which in sets or h < sizes.horizons[-1]]
    result["sets"] = []
    for number, (name, positions) in enumerate(chosen.items()):
        rng = np.random.default_rng([seed, 3, number])
        drawn = rng.permutation(positions)[: horizons[-1] * BATCH_ROWS]
        point = warm_point(lab, sizes, paths, seed)
        if not result.get("start"):
            result["start"] = point.development()
        losses = losses_along(point, rest[drawn], horizons)
        means = {h: predicted[drawn[: h * BATCH_ROWS]].mean() for h in horizons}
        mix = np.bincount(lab.domain[rest[drawn]], minlength=len(lab.domain_names)) / len(drawn)
        result["sets"].append({"set": name, "predicted_mean": means, "loss": losses, "domains": mix})
    return result


def losses_along(point: Point, ids: Ids, horizons: list[int]) -> dict[int, dict[str, dict[str, float]]]:
    """Development losses after each of `horizons` steps, at the live weights and averaged over the last third."""
    averagers = {h: Averager(point.model, h, max(1, h // 3)) for h in horizons}
    losses: dict[int, dict[str, dict[str, float]]] = {}

    def on_step(step: int) -> None:
        for h, averager in averagers.items():
            if step <= h:
                averager.update(step)
        if step in averagers:
            live = point.development()
            with averagers[step].average.swapped_in():
                losses[step] = {"live": live, "averaged": point.development()}

    point.train(ids, on_step=on_step)
    return losses


# --- rounds: steadiness, and what selection should default to ---

ARM_DEFAULTS: dict[str, Any] = {
    "averaged": True, "pooled": False, "pool_decay": 0.6, "temperature": 0.0, "scope": "slice", "loss_on": "all",
    "parameters": "all",
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "random": {"temperature": None},
    "live, top-k": {"averaged": False},
    "live, pooled, top-k": {"averaged": False, "pooled": True},
    "averaged, top-k": {},
    "averaged, pooled, top-k": {"pooled": True},
    "averaged, pooled (decay 0.9), top-k": {"pooled": True, "pool_decay": 0.9},
    "averaged, pooled, τ 0.5": {"pooled": True, "temperature": 0.5},
    "averaged, pooled, τ 1.0": {"pooled": True, "temperature": 1.0},
    "averaged, pooled, top-k, scope pool": {"pooled": True, "scope": "pool"},
    "averaged, pooled, top-k, blocks": {"pooled": True, "parameters": "blocks"},
    "averaged, pooled, top-k, last word": {"pooled": True, "loss_on": "completion"},
}
ONE_SEED_ARMS = ("averaged, pooled, top-k, last word",)
STEADINESS_ARMS = ("random", "live, top-k", "averaged, top-k", "averaged, pooled, top-k")
RATIO = 0.2


def rounds(lab: Lab, sizes: Sizes, paths: Paths, *, arm: str, seed: int) -> dict[str, Any]:
    """Rounds of a plain loop with one way of selecting; losses at every boundary."""
    settings = {**ARM_DEFAULTS, **ARMS[arm]}
    point = warm_point(lab, sizes, paths, seed)
    by_document = one_a_document(lab, point.rest)
    fixed, by_document = np.split(by_document, [sizes.fixed])
    held, by_document = np.split(by_document, [sizes.fixed])
    probes = np.split(by_document[: sizes.rounds * sizes.round_probes], sizes.rounds)
    open_rows = point.rest[~np.isin(point.rest, np.concatenate([fixed, held, *probes]))]
    num_rounds = sizes.random_rounds if arm == "random" else sizes.rounds
    steady = arm in STEADINESS_ARMS and seed == 0
    result: dict[str, Any] = {"arm": arm, "seed": seed, "learning_rate": LR, **settings, "boundaries": [], "fixed": []}
    previous = None
    for number in range(num_rounds + 1):
        step = sizes.warm + number * sizes.round_steps
        boundary: dict[str, Any] = {"step": step}
        selects = arm != "random" and number < num_rounds
        labels, fixed_labels = None, {}
        for name, averaged in (("averaged", True), ("live", False)):
            with point.weights(averaged):
                if averaged or number in (0, sizes.rounds):
                    boundary[name] = point.development()
                if number == sizes.rounds:
                    pool_loss = mean_loss(point.model, lab.rows.take(held), tokens_per_batch=TOKENS_PER_BATCH)
                    boundary[f"pool_{name}"] = pool_loss
                if steady and number < sizes.rounds:
                    fixed_labels[name] = point.measure(fixed).influence_per_token
                if selects and averaged == settings["averaged"]:
                    labels = point.measure(probes[number], settings["loss_on"], settings["parameters"])
        if steady and number < sizes.rounds:
            result["fixed"].append(fixed_labels)
        result["boundaries"].append(boundary)
        if number == num_rounds:
            break
        k = sizes.round_steps * BATCH_ROWS
        if labels is None:
            chosen, open_rows = np.split(open_rows, [k])
        else:
            model = NgramInfluenceModel(seed=seed, pool_decay=settings["pool_decay"]).fit(
                lab.rows.take(probes[number]), labels, groups=lab.domain[probes[number]],
                previous=previous if settings["pooled"] else None,
            )  # fmt: skip
            previous = model
            boundary["held_out_spearman"] = model.report.spearman
            candidates = open_rows if settings["scope"] == "pool" else open_rows[: round(k / RATIO)]
            influence = model.predict(lab.rows.take(candidates)) / model.report.label_std
            chosen = candidates[gumbel_top_k(influence, k, settings["temperature"], seed=(seed, number))]
            # A slice is passed over as a whole; in scope `pool` only what was trained on is gone.
            gone = chosen if settings["scope"] == "pool" else candidates
            open_rows = open_rows[~np.isin(open_rows, gone)]
            boundary["domains"] = np.bincount(lab.domain[chosen], minlength=len(lab.domain_names)) / k
        chosen = np.random.default_rng([seed, 4, number]).permutation(chosen)
        averager = Averager(point.model, sizes.round_steps, min(WINDOW, sizes.round_steps))
        point.train(chosen, on_step=averager.update)
        point.average = averager.average
    if steady:
        result |= {"fixed_ids": fixed, "fixed_domain": lab.domain[fixed]}
    return result


# --- fit: kinds and numbers of labels ---


def fit(lab: Lab, sizes: Sizes, paths: Paths, *, kind: str, seed: int = 0) -> dict[str, Any]:
    """Held-out agreement of the n-gram influence model, on candidates of other documents."""
    point = warm_point(lab, sizes, paths, seed)
    settings = dict(LABEL_KINDS[kind])
    num = sizes.fit_sizes[-1]
    ids = one_a_document(lab, point.rest)[: num + sizes.fit_test]
    with point.weights(settings.pop("averaged")):
        labels = point.measure(ids, **settings)
    rows, domain = lab.rows.take(ids), lab.domain[ids]
    test = np.arange(num, len(ids))
    truth = labels.influence[test].astype(np.float64)
    entries = []
    for size in sizes.fit_sizes:
        for repeat in range(sizes.fit_repeats):
            subset = np.sort(uniform(num, size, seed=(seed, repeat)))
            few = dataclasses.replace(labels.take(subset), candidate_id=np.arange(size))
            for fitted in ("token", "document", "both"):
                model = NgramInfluenceModel(labels=fitted, seed=repeat).fit(rows.take(subset), few)
                predicted = model.predict(rows.take(test)).astype(np.float64)
                residuals = [without_group_means(values, domain[test]) for values in (predicted, truth)]
                entries.append(
                    {
                        "num_labels": size, "repeat": repeat, "labels": fitted, "seconds": model.report.seconds,
                        **spearman(predicted, truth), "within": spearman(*residuals),
                    }
                )  # fmt: skip
    return {"kind": kind, "seed": seed, "learning_rate": LR, "num_test": len(test), "fits": entries}
