"""What arms of `horizon` choose by besides the run's own tables: static filters, an encoder, sets and tokens.

Trade-off: an encoder of 20 times the model's size reads some thousands of rows, and tables that are fitted to what it
says rank the slices: it would itself take ten times as long as a training.

Sign: higher is better.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas
import torch
from scipy.sparse import csr_matrix
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from benchmarks.lab import rivals
from benchmarks.lab.checkpoint import BATCH_ROWS
from benchmarks.lab.corpus import as_rows
from benchmarks.lab.machine import written_once
from benchmarks.lab.models import row_losses, train_steps
from benchmarks.lab.statistics import Ids
from benchmarks.quality.horizon.arms import TRIED, Arm
from benchmarks.quality.horizon.settings import ROW_TOKENS, Lab
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.flops import forward_flops, gradient_flops, num_path_points
from mates_hf.influence.probe import Probe, count_multiplied_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.ngram.evidence import log_odds
from mates_hf.prediction.ngram.tables import Tables
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels

CHUNKS = 20  # in which a set is chosen
KINDS, KIND_SIZE = 32, 64  # kinds of text, and the size of the states that they are clusters of
COUNTED, BUCKETS = 8_000, 2**20  # pool rows and hash buckets of log-odds
FEW = (25, 50, 100, 250)  # labels

Live = tuple[nn.Module, torch.optim.Optimizer]
Start = Callable[[], Live]


def reference_of_round(lab: Lab, arm: Arm, num: int, others: Ids, seed: tuple[int, int]) -> ReferenceTask:
    """The reference passages that a round of this `seed` (run, round) reads, `num` at most.

    Where an arm keeps pool text, tokens of rows drawn from `others` come on top.
    """
    task = lab.reference["all"]
    if not arm.weighted:
        task = dataclasses.replace(task, weights=None)
    if arm.apart:
        task = task.take(np.arange(1, len(task), 2))
    task = task.subset(num, seed=seed[1])
    if not arm.keep:
        return task
    kept = np.random.default_rng([seed[0], 7, seed[1]]).permutation(others)
    kept = kept[: round(arm.keep * len(task.rows.values) / ROW_TOKENS)]
    return ReferenceTask.mixture([task, ReferenceTask(name="pool", rows=lab.rows.take(kept))], [1, arm.keep])


def counted(lab: Lab, background: Ids) -> tuple[Tables, Tables]:
    """Log-odds of n-grams, the reference against these pool rows."""
    return log_odds(lab.reference["all"].weighted_rows, lab.rows.take(background), BUCKETS)


def earlier(arm: Arm, tables: NgramInfluenceModel | None) -> NgramInfluenceModel | None:
    """What the model of the round before leaves to a fit."""
    if tables is None or not arm.pooled:
        return None
    if arm.evidence_kept:
        return tables
    found = copy.copy(tables)
    found._report = dataclasses.replace(tables.report, evidence_weight=None)
    return found


def static_filter(lab: Lab, arm: Arm, seed: int, cache: Path, start: Start, num_encoded: int) -> rivals.StaticFilter:
    """The filter of an arm, fitted on the reference passages.

    `start` gives the warm start. Where an encoder reads rows, it reads `num_encoded`, once for all seeds (`cache`).
    """
    rank, name, passages = arm.rank, arm.filter, lab.reference["all"].rows
    if rank == "CoLoR":  # what a row's loss loses when the model trains on the passages
        (prior, _), (conditional, optimizer) = start(), start()
        rng = np.random.default_rng([seed, 9])
        order = np.concatenate([rng.permutation(len(passages)) for _ in range(TRIED[rank][name]["passes"])])
        size = lab.tokens_per_batch
        train_steps(conditional, optimizer, passages, order, batch_rows=BATCH_ROWS, tokens_per_batch=size)
        num = count_multiplied_parameters(prior)
        return rivals.StaticFilter(
            lambda rows: row_losses(prior, rows, size) - row_losses(conditional, rows, size),
            lambda rows: forward_flops(num, 2 * len(rows.values)),
            gradient_flops(num, int(passages.lengths[order].sum())),
        )
    if rank == "log-odds":
        tokens, bigrams = counted(lab, np.random.default_rng([seed, 8]).permutation(len(lab.rows))[:COUNTED])
        return rivals.StaticFilter(tokens.plus(bigrams).scaled(1.0).score)
    score = rivals.text_ranking(rank, name, lab.tokenizer, lab.rows, passages, seed)
    if rank != "similarity":
        return rivals.StaticFilter(score)
    sample = lab.rows.take(np.random.default_rng(8).permutation(len(lab.rows))[:num_encoded])
    path = cache / f"encoder-{name.replace(' ', '-')}-{len(lab.rows)}.npy"
    similarity = np.load(written_once(path, lambda file: np.save(file, score(sample))))
    tables = distilled(sample, similarity, seed)
    read = rivals.encoder_flops([*rivals.texts_of(sample, lab.tokenizer), *rivals.texts_of(passages, lab.tokenizer)])
    each = tables.report.flops_per_token or 0.0
    return rivals.StaticFilter(
        tables.predict, lambda rows: each * len(rows.values), read + (tables.report.flops or 0.0)
    )


def distilled(rows: TokenRows, values: Any, seed: int) -> NgramInfluenceModel:
    """Tables that stand for what gave these rows their values."""
    values = np.asarray(values, np.float32)
    labels = InfluenceLabels(
        candidate_id=np.arange(len(rows)), influence=values, influence_per_token=values, loss=np.zeros_like(values),
        num_tokens=rows.num_targets, probe=np.full(len(rows), "encoder"),
    )  # fmt: skip
    return NgramInfluenceModel(seed=seed, labels="document").fit(rows, labels)


def encoder_tables(
    lab: Lab, probes: TokenRows, labels: InfluenceLabels, ahead: TokenRows, seed: int
) -> tuple[NgramInfluenceModel, float, float]:
    """Tables that stand for an encoder fine-tuned on labels, its held-out Spearman, and the FLOPs of it all."""
    encoder = rivals.encoder_model(lab.tokenizer, seed).fit(probes, labels)
    tables = distilled(ahead, encoder.predict(ahead), seed)
    fitted, asked = (rivals.encoder_flops(rivals.texts_of(rows, lab.tokenizer)) for rows in (probes, ahead))
    flops = 3 * encoder.num_epochs * fitted + asked + (tables.report.flops or 0.0)
    return tables, encoder.report.spearman, flops


def measured(
    lab: Lab, arm: Arm, live: Live, reference: ReferenceTask, rows: TokenRows, passages: int, seed: tuple[int, int]
) -> InfluenceLabels:
    """Labels of rows where model and optimizer (`live`) are now, of the kind that an arm has, by so many passages."""
    size = {"tokens_per_batch": lab.tokens_per_batch}
    probe: Probe = DirectionalProbe(path_steps=num_path_points(arm.path_steps, passages), path_rate=0.5, **size)
    if arm.reduction:
        probe = LossReductionProbe(passes=arm.reduction, max_grad_norm=1.0, seed=seed[1], **size)
    elif arm.rank == "MATES":
        probe = OneStepProbe(max_grad_norm=1.0, **size)
    return probe.measure(*live, reference, rows)


def few_labels(rows: TokenRows, labels: InfluenceLabels, evidence: tuple[Tables, Tables], seed: int) -> list[Any]:
    """How well the later half of the labels is predicted from a few of the first half, without and with evidence.

    Of each number of labels: it, then Spearman and mean label of the best fifth in standard deviations, of both.
    """
    half, worth, found = len(rows) // 2, labels.influence_per_token, []
    test = (worth[half:] - worth[half:].mean()) / worth[half:].std()
    for num in (num for num in FEW if num <= half):
        some: list[Any] = [num]
        for given in (None, evidence):
            model = NgramInfluenceModel(seed=seed).fit(rows, labels.take(np.arange(num)), evidence=given)
            predicted = model.predict(rows.take(np.arange(half, len(rows))))
            best = np.argsort(-predicted, kind="stable")[: len(test) // 5]
            some += [rank_correlation(predicted, test), float(test[best].mean())]
        found.append(some)
    return found


def spread_top_k(values: npt.NDArray[Any], rows: TokenRows, k: int, penalty: float) -> Ids:
    """(k,) rows of high value whose tokens together are like the rows' own: greedy, in chunks.

    A row's value in standard deviations loses `penalty` times the mean over its tokens of the log of how much likelier
    a token is among what is chosen than among all rows; a chunk of usual rows counts as chosen. Rows have one length.
    """
    ids = rows.values.reshape(len(rows), -1)
    usual = np.bincount(rows.values) + 1.0
    chosen, counts = np.zeros(len(rows), bool), usual * (k / CHUNKS / len(rows))
    for part in np.array_split(np.arange(k), CHUNKS):
        excess = np.log(counts / counts.sum()) - np.log(usual / usual.sum())
        worth = np.where(chosen, -np.inf, values / values.std() - penalty * excess[ids].mean(1))
        best = np.argsort(-worth, kind="stable")[: len(part)]
        chosen[best] = True
        counts += np.bincount(ids[best].reshape(-1), minlength=len(counts))
    return np.flatnonzero(chosen)


def capped_top_k(values: npt.NDArray[Any], kind: Ids, k: int, most: float) -> Ids:
    """(k,) rows of high value, of each kind at most `most` times its share of all rows; `kind` is (N,) from 0 on."""
    order = np.argsort(-values, kind="stable")
    kinds = pandas.Series(kind[order])
    within = kinds.groupby(kinds).cumcount() < np.ceil(most * k * np.bincount(kind)[kind[order]] / len(kind))
    return np.concatenate([order[within], order[~within]])[:k]


def find_kinds(rows: TokenRows, vocab_size: int, seed: int) -> Callable[[TokenRows], Ids]:
    """Kinds of text found in these rows without a label: k-means of random projections of their token counts.

    A token counts by how rare it is. What is returned gives the kind of each row, from 0 to `KINDS` - 1.
    """
    usual = np.bincount(rows.values, minlength=vocab_size) + 1.0
    drawn = np.random.default_rng([seed, 10]).standard_normal((vocab_size, KIND_SIZE))
    projection = (drawn * np.log(usual.sum() / usual)[:, None]).astype(np.float32)

    def states(some: TokenRows) -> Any:
        counts = (np.ones(len(some.values), np.float32), some.values, some.offsets)
        return csr_matrix(counts, (len(some), vocab_size)) @ projection

    found = states(rows)
    centre, spread = found.mean(0), found.std(0)
    means = MiniBatchKMeans(KINDS, batch_size=4_096, n_init=3, random_state=seed).fit((found - centre) / spread)
    return lambda some: means.predict((states(some) - centre) / spread)


def near_border(predicted: npt.NDArray[Any], num: int, ratio: float) -> Ids:
    """(num,) rows whose predicted influence is nearest the least that would be chosen of them."""
    return np.argsort(np.abs(predicted - np.quantile(predicted, 1 - ratio)), kind="stable")[:num]


def best_tokens(rows: TokenRows, tables: NgramInfluenceModel) -> TokenRows:
    """Rows with the loss on the half of each row's tokens whose effect is higher by the tables; of one length."""
    ids = rows.values.reshape(len(rows), -1)
    pairs = as_rows(np.stack([ids[:, :-1], ids[:, 1:]], 2), 2)
    effects = tables.predict(pairs).reshape(len(rows), -1)
    labels = ids.astype(np.int64)
    labels[:, 1:][effects < np.median(effects, 1, keepdims=True)] = IGNORED
    return dataclasses.replace(rows, labels=labels.reshape(-1))
