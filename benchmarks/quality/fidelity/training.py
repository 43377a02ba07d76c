"""Labels against training: sets of rows over 10 to 1,000 steps, labels from round to round, and how many are needed.

The parts `horizon`, `rounds` and `fit` of `fidelity`. Trade-off: a plain loop instead of the Trainer; the order of
rows inside a selection is all that chance decides between two arms of one seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW, Paths, Point, losses_along, one_a_document, warm_point
from benchmarks.lab.corpus import Lab
from benchmarks.lab.models import LR, TOKENS_PER_BATCH, Averager
from benchmarks.lab.statistics import Ids, spearman, without_group_means
from benchmarks.quality.fidelity.one_step import EPSILON, adam_cosine, plain_direction, tuned_difference
from benchmarks.quality.fidelity.setup import Sizes
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.difference import row_means
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels
from mates_hf.selection.choose import gumbel_top_k, uniform

# --- horizon: sets of rows, 10 to 1,000 steps ---

LABEL_KINDS: dict[str, dict[str, Any]] = {
    "all tokens, live": {"averaged": False},
    "all tokens, averaged": {},
    "all tokens, averaged, path": {"path_steps": PATH_STEPS},
    "last word, averaged": {"loss_on": "completion"},
    "all tokens, averaged, blocks": {"parameters": "blocks"},
    "one-step oracle, all tokens, averaged": {"probe": "one-step"},
    "gradient product, all tokens, averaged": {"probe": "gradient product"},
    "LESS, all tokens, averaged": {"probe": "LESS"},
    "perplexity difference, all tokens, averaged": {"probe": "perplexity difference"},
    "low loss, averaged": {"probe": "low loss"},
}

SETS = {
    "random": ("random",),
    "all tokens, averaged": ("deciles", "top", "middle", "bottom"),
    "all tokens, averaged, path": ("deciles", "top", "middle", "bottom"),
    "last word, averaged": ("deciles", "top", "bottom"),
    "all tokens, live": ("deciles", "top"),
    "all tokens, averaged, blocks": ("deciles",),
    "one-step oracle, all tokens, averaged": ("deciles", "top"),
    "gradient product, all tokens, averaged": ("deciles",),
    "LESS, all tokens, averaged": ("deciles",),
    "perplexity difference, all tokens, averaged": ("deciles",),
    "low loss, averaged": ("deciles",),
}


def measure(
    point: Point,
    sizes: Sizes,
    ids: Ids,
    *,
    averaged: bool = True,
    loss_on: str = "all",
    parameters: str = "all",
    path_steps: int = 1,
    probe: str = "directional",
) -> tuple[InfluenceLabels, Ids]:
    """Labels of one kind, and the candidates that have them: the oracle measures fewer, on fewer passages."""
    rows, reference = point.lab.rows, point.lab.reference[loss_on]
    if probe == "one-step":
        ids = ids[: sizes.oracle_probes]
        oracle = OneStepProbe(max_grad_norm=1.0, tokens_per_batch=TOKENS_PER_BATCH)
        with point.weights(averaged):
            few = reference.subset(sizes.oracle_passages)
            return oracle.measure(point.model, point.optimizer, few, rows.take(ids)), ids
    with point.weights(averaged):
        labels = point.measure(ids, loss_on, parameters, path_steps)
        if probe == "directional":
            return labels, ids
        if probe != "gradient product":
            return document_labels(point, labels, probe, reference, rows.take(ids)), ids
        direction = plain_direction(point.model, point.optimizer, reference, precondition=False)
        candidates = rows.take(ids)
        either_side = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH).directional_derivatives(
            point.model, direction, candidates, EPSILON
        )
        derivatives = direction.derivatives(*either_side, EPSILON).astype(np.float32)
    means = row_means(candidates, derivatives).astype(np.float32)
    changed = {"influence": means * labels.step_size, "influence_per_token": means, "token_derivatives": derivatives}
    return dataclasses.replace(labels, **changed), ids


def document_labels(
    point: Point, labels: InfluenceLabels, probe: str, reference: ReferenceTask, candidates: TokenRows
) -> InfluenceLabels:
    """Labels of another kind, one number a candidate; > 0 is what that kind would train on."""
    if probe == "low loss":
        values = -labels.loss
    else:
        measured = {"LESS": adam_cosine, "perplexity difference": tuned_difference}[probe]
        values = measured(point.model, point.optimizer, reference, candidates).astype(np.float32)
    return dataclasses.replace(
        labels, influence=values * labels.step_size, influence_per_token=values, token_derivatives=None
    )


def horizon(lab: Lab, sizes: Sizes, paths: Paths, *, kind: str, which: str, seed: int = 0) -> dict[str, Any]:
    """Development loss along training on the rows a label prefers (`which`: deciles, top, middle, bottom, random)."""
    point = warm_point(lab, sizes.warm, paths.work, seed)
    probes = one_a_document(lab, point.rest)[: sizes.set_probes]
    rest = point.rest[~np.isin(point.rest, probes)]
    result: dict[str, Any] = {"kind": kind, "which": which, "seed": seed, "learning_rate": LR, "pool_rows": len(rest)}
    predicted = np.zeros(len(rest))
    if kind != "random":
        labels, probes = measure(point, sizes, probes, **LABEL_KINDS[kind])
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
        point = warm_point(lab, sizes.warm, paths.work, seed)
        if not result.get("start"):
            result["start"] = point.development()
        losses = losses_along(point, rest[drawn], horizons)
        means = {h: predicted[drawn[: h * BATCH_ROWS]].mean() for h in horizons}
        mix = np.bincount(lab.domain[rest[drawn]], minlength=len(lab.domain_names)) / len(drawn)
        result["sets"].append({"set": name, "predicted_mean": means, "loss": losses, "domains": mix})
    return result


# --- rounds: do labels hold from one to the next ---

# How rows are chosen between two boundaries; the labels of fixed candidates are watched.
ARMS: dict[str, dict[str, Any]] = {
    "random": {},
    "live": {"averaged": False, "pooled": False},
    "averaged": {"averaged": True, "pooled": False},
    "averaged, pooled": {"averaged": True, "pooled": True},
}
RATIO = 0.2


def rounds(lab: Lab, sizes: Sizes, paths: Paths, *, arm: str, seed: int = 0) -> dict[str, Any]:
    """Labels of the same candidates at every boundary of a few rounds, at live and at averaged weights."""
    settings = ARMS[arm]
    point = warm_point(lab, sizes.warm, paths.work, seed)
    fixed, *probes = np.split(
        one_a_document(lab, point.rest)[: sizes.fixed + sizes.rounds * sizes.round_probes],
        sizes.fixed + sizes.round_probes * np.arange(sizes.rounds),
    )
    open_rows = point.rest[~np.isin(point.rest, np.concatenate([fixed, *probes]))]
    result: dict[str, Any] = {"arm": arm, "seed": seed, "learning_rate": LR, **settings, "fixed": []}
    previous = None
    k = sizes.round_steps * BATCH_ROWS
    for number in range(sizes.rounds):
        labels, fixed_labels = None, {}
        for name, averaged in (("averaged", True), ("live", False)):
            with point.weights(averaged):
                fixed_labels[name] = point.measure(fixed).influence_per_token
                if averaged == settings.get("averaged"):
                    labels = point.measure(probes[number])
        result["fixed"].append(fixed_labels)
        candidates = open_rows[: k if labels is None else round(k / RATIO)]
        chosen = candidates
        if labels is not None:
            previous = NgramInfluenceModel(seed=seed).fit(
                lab.rows.take(probes[number]), labels, previous=previous if settings["pooled"] else None
            )
            chosen = candidates[gumbel_top_k(previous.predict(lab.rows.take(candidates)), k, 0.0, seed=(seed, number))]
        open_rows = open_rows[len(candidates) :]
        averager = Averager(point.model, sizes.round_steps, min(WINDOW, sizes.round_steps))
        point.train(np.random.default_rng([seed, 4, number]).permutation(chosen), on_step=averager.update)
        point.average = averager.average
    return {**result, "fixed_ids": fixed, "fixed_domain": lab.domain[fixed]}


# --- fit: kinds and numbers of labels ---


def fit(lab: Lab, sizes: Sizes, paths: Paths, *, kind: str, seed: int = 0) -> dict[str, Any]:
    """Held-out agreement of the n-gram influence model, on candidates of other documents."""
    point = warm_point(lab, sizes.warm, paths.work, seed)
    num = sizes.fit_sizes[-1]
    ids = one_a_document(lab, point.rest)[: num + sizes.fit_test]
    labels, _ = measure(point, sizes, ids, **LABEL_KINDS[kind])
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
