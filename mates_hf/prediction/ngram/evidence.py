"""Static evidence: how much likelier each n-gram is in the reference task than in the pool, before any label.

Where it is used: a fit of `NgramInfluenceModel` that is given it shrinks its effects towards a multiple of these
log-odds instead of towards 0. What the multiple is, labels decide: on a reference that words identify it is large, and
few labels do; where words say nothing it is 0, and the fit is what it is without.

What is predicted has the log-odds once more beside the fit, as large as the fit's own predictions where labels agree
with them as well. A label prices one more row now, and a few hundred labels know few words. The reference's words stay
what they are over the thousands of steps that a run goes on for (benchmark `horizon`).

The log-odds of a text, summed over its tokens, are the difference of two cross-entropies (Moore and Lewis, 2010), by
bigram models of the two, each backing off to its unigrams.

Trade-off: counts alone, so that a second's work stands beside labels that a model has to be asked for.

Shape suffixes: V vocabulary, H hash buckets, C distinct bigrams.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import WeightedRows, plain
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction.ngram import kernels
from mates_hf.prediction.ngram.tables import FloatVector, Tables, join_keys, split_keys

Passages = TokenRows | WeightedRows

UNIGRAM_PRIOR = 100.0  # pool tokens that the reference's unigrams are given beforehand
BIGRAM_PRIOR = 20.0  # tokens that a bigram model backs off with
_STEPS = 9  # in which a weight is lowered


def log_odds(
    reference: Passages, background: TokenRows, num_buckets: int, discount: float = 0.0
) -> tuple[Tables, Tables]:
    """Log-odds of n-grams, the reference task against the pool, in nats.

    Args:
        reference: The passages; a token of weight 2 counts as two.
        background: Rows drawn from the pool at random.
        num_buckets: Hash buckets of the bigram table, a power of two.
        discount: What each bigram's count in the pool is lowered by, in [0, 1]; the unigrams get it. A row that was
            counted ranks below others, because its rarest bigrams are its own. At 1 it does so half as much.

    Returns:
        Two tables, whose effects add up: the log-odds of each token alone, and what the token before it adds to them.
        Above 0 is likelier in the reference. Tokens of neither have none.
    """
    weights = [reference.weights if isinstance(reference, WeightedRows) else None, None]
    passages = plain(reference)
    assert isinstance(passages, TokenRows)
    size = int(max(passages.values.max(initial=0), background.values.max(initial=0))) + 1
    keys = [_keys(rows) for rows in (passages, background)]
    distinct = np.unique(np.concatenate(keys))
    previous, token = split_keys(distinct)
    counts = [
        np.bincount(np.searchsorted(distinct, part), weights=weight, minlength=len(distinct)).astype(float)
        for part, weight in zip(keys, weights, strict=True)
    ]
    tokens = [np.bincount(token, weights=part, minlength=size) for part in counts]
    before = [np.bincount(previous, weights=part, minlength=size) for part in counts]
    usual = (tokens[1] + 1) / (tokens[1].sum() + size)
    wanted = (tokens[0] + UNIGRAM_PRIOR * usual) / (tokens[0].sum() + UNIGRAM_PRIOR)
    unigram = np.log(wanted / usual)
    lowered = np.maximum(counts[1] - discount, 0.0)
    kinds = np.bincount(previous, weights=counts[1] - lowered, minlength=size)  # what is taken, by the token before
    chances = [
        (counted + (BIGRAM_PRIOR + taken[previous]) * alone[token]) / (begun[previous] + BIGRAM_PRIOR)
        for counted, taken, begun, alone in zip(
            (counts[0], lowered), (np.zeros(size), kinds), before, (wanted, usual), strict=True
        )
    ]
    extra = np.log(chances[0] / chances[1]) - unigram[token]
    buckets = kernels.hash_bigrams(previous.astype(np.int32), token.astype(np.int32), num_buckets)
    weight = counts[0] + counts[1]
    sums = np.bincount(buckets, weights=weight * extra, minlength=num_buckets)
    bigram = sums / np.maximum(np.bincount(buckets, weights=weight, minlength=num_buckets), 1.0)
    none = np.zeros(size)
    return Tables(unigram, none, np.zeros(num_buckets)), Tables(none, none, bigram)


def weighted_evidence(evidence: tuple[Tables, Tables], rows: TokenRows, labels: FloatVector) -> tuple[Tables, float]:
    """The sum of the parts, each times the weight of at least 0 by which their sum predicts labels best.

    Args:
        evidence: What `log_odds` returned.
        rows: N candidates.
        labels: (N,) standardised label of each.

    Returns:
        Tables in standardised units, without effect where the evidence tells nothing of the labels; and the standard
        deviation of what they say of the rows.
    """
    scores = np.stack([part.scaled(1.0).score(rows) for part in evidence], 1)
    weights = nnls(scores - scores.mean(0), labels - labels.mean())[0]
    tokens, bigrams = evidence
    nothing = Tables.zeros(len(tokens.token), len(tokens.bigram))
    weighted = nothing.plus(tokens, float(weights[0])).plus(bigrams, float(weights[1]))
    return weighted, float((scores @ weights).std())


def evidence_beside(
    evidence: tuple[Tables, Tables],
    rows: TokenRows,
    labels: FloatVector,
    predicted: FloatVector,
    least: float = 0.0,
) -> tuple[Tables, float]:
    """Log-odds to be added to what a fit predicts, so that both rank rows.

    They are given the standard deviation of the predictions, times a weight. That is 1 where labels agree with the
    log-odds as well as with the predictions, and less as they agree less. The rank correlation of the log-odds counts
    minus its standard error, so that evidence which tells nothing of the labels adds no noise.

    What a round found once counts from then on. Labels price one more row, and stop asking for the reference's own
    words once a model has seen a few thousand rows with them, though such rows teach it for far longer. Only labels
    that speak against the log-odds lower it: half of what predictions say of labels must be left.

    Args:
        evidence: What `log_odds` returned.
        rows: N candidates.
        labels: (N,) standardised label of each.
        predicted: (N,) what fits without the candidate predict.
        least: the weight that an earlier round found.

    Returns:
        Tables in the unit of `predicted`, and the weight, in [0, 1].
    """
    whole = evidence[0].plus(evidence[1])
    scores = whole.scaled(1.0).score(rows)
    told = rank_correlation(scores, labels) - 1.0 / np.sqrt(len(labels)) if scores.std() > 0 else 0.0
    found = rank_correlation(predicted, labels) if predicted.std() > 0 else 0.0
    weight = 0.0 if told <= 0 or found <= 0 else min(1.0, float(told / found))
    if weight < least:
        steps = np.linspace(least, weight, _STEPS)
        left = (_agreement(predicted, scores, labels, step) for step in steps)
        weight = next((float(step) for step, is_left in zip(steps, left, strict=True) if is_left >= found / 2), weight)
    unit = float(predicted.std() / scores.std()) if weight and scores.std() > 0 else 0.0
    return Tables.zeros(len(whole.token), len(whole.bigram)).plus(whole, weight * unit), weight


def _agreement(predicted: FloatVector, scores: FloatVector, labels: FloatVector, weight: float) -> float:
    """Rank correlation with labels of predictions and log-odds added, each in its standard deviation."""
    parts = [values / (values.std() or 1.0) for values in (predicted, scores)]
    return float(rank_correlation(parts[0] + weight * parts[1], labels))


def _keys(rows: TokenRows) -> npt.NDArray[np.int64]:
    """Keys of the bigrams at a row's targets."""
    where = np.flatnonzero(rows.target_mask)
    return join_keys(rows.values[where - 1].astype(np.int64), rows.values[where].astype(np.int64))
