"""Static evidence: what it is, that labels weigh it, and that it changes nothing where it says nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mates_hf.data.rows import TokenRows
from mates_hf.data.weighted import WeightedRows
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction.ngram.evidence import (
    BIGRAM_PRIOR,
    UNIGRAM_PRIOR,
    evidence_beside,
    log_odds,
    weighted_evidence,
)
from mates_hf.prediction.ngram.kernels import hash_bigrams
from mates_hf.prediction.ngram.tables import Tables
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from tests.prediction.test_ngram import BUCKETS, VOCAB, make_labels, make_rows, model, pairs

REFERENCE = TokenRows.from_lists([np.random.default_rng(i).integers(0, VOCAB // 4, 50) for i in range(20)])
BACKGROUND = make_rows(400, seed=5)


@pytest.fixture(scope="module")
def evidence() -> tuple[Tables, Tables]:
    return log_odds(REFERENCE, BACKGROUND, BUCKETS)


def test_a_token_of_weight_two_counts_as_two() -> None:
    twice = REFERENCE.take(np.concatenate([np.arange(20), np.arange(5)]))
    weights = np.repeat(np.where(np.arange(20) < 5, 2.0, 1.0), REFERENCE.num_targets).astype(np.float32)
    weighted = log_odds(WeightedRows(REFERENCE, weights), BACKGROUND, BUCKETS)
    for found, wanted in zip(weighted, log_odds(twice, BACKGROUND, BUCKETS), strict=True):
        assert np.allclose(found.token, wanted.token)
        assert np.allclose(found.bigram, wanted.bigram)


def test_a_row_scores_the_difference_of_two_cross_entropies() -> None:
    reference, background = make_rows(5, seed=1, masked=True), make_rows(9, seed=2, vocab=VOCAB // 2)
    unigram, bigram = log_odds(reference, background, 2**20)
    count = [np.zeros((VOCAB, VOCAB)) for _ in range(2)]
    for counts, rows in zip(count, (reference, background), strict=True):
        previous, token, _ = pairs(rows)
        np.add.at(counts, (previous, token), 1)
    usual = (count[1].sum(0) + 1) / (count[1].sum() + VOCAB)
    wanted = (count[0].sum(0) + UNIGRAM_PRIOR * usual) / (count[0].sum() + UNIGRAM_PRIOR)
    after = [
        (counts + BIGRAM_PRIOR * alone) / (counts.sum(1, keepdims=True) + BIGRAM_PRIOR)
        for counts, alone in zip(count, (wanted, usual), strict=True)
    ]
    assert np.allclose(unigram.token, np.log(wanted / usual))
    assert not unigram.bigram.any()
    for before, token in [(0, 1), (3, 2), *np.argwhere(count[0] > 0)[:5].tolist()]:
        if count[0][before, token] + count[1][before, token]:
            bucket = hash_bigrams(np.array([before], np.int32), np.array([token], np.int32), 2**20)
            expected = np.log(after[0][before, token] / after[1][before, token] / wanted[token] * usual[token])
            assert np.isclose(bigram.bigram[bucket[0]], expected)


def test_few_labels_do_where_words_tell_and_none_is_lost_where_they_do_not(evidence) -> None:
    rows, others = make_rows(60, seed=3), make_rows(400, seed=4)
    known = np.where(np.arange(VOCAB) < VOCAB // 4, 1.0, 0.0)

    def like_reference(previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        return known[token]

    def spearman(effects: object, **more: object) -> float:
        fitted = model().fit(rows, make_labels(rows, effects, noise=2.0), **more)
        return rank_correlation(fitted.predict(others), make_labels(others, effects, noise=0.0).influence)

    assert spearman(like_reference) < 0.75
    assert spearman(like_reference, evidence=evidence) > 0.95

    def otherwise(previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        return (token % 2) * 4.0

    assert spearman(otherwise, evidence=evidence) > spearman(otherwise) - 0.05


def test_evidence_against_the_labels_has_no_weight_and_changes_no_bit(evidence) -> None:
    rows = make_rows(80, seed=6)
    parts = [part.scaled(1.0).score(rows) for part in evidence]
    weighted, told = weighted_evidence(evidence, rows, 2 * parts[0] + 3 * parts[1])
    assert told == pytest.approx((2 * parts[0] + 3 * parts[1]).std())
    assert np.allclose(weighted.token, 2 * evidence[0].token, atol=1e-3)
    assert np.allclose(weighted.bigram, 3 * evidence[1].bigram, atol=1e-3)
    tokens = (evidence[0], Tables.zeros(VOCAB, BUCKETS))
    labels = make_labels(rows, lambda previous, token: -evidence[0].token[token], noise=0.0)
    weighted, told = weighted_evidence(tokens, rows, labels.influence_per_token.astype(float))
    assert not weighted.token.any()
    assert told == 0
    plain, given = model().fit(rows, labels), model().fit(rows, labels, evidence=tokens)
    assert np.array_equal(plain.predict(rows), given.predict(rows))


def test_statistics_that_later_rounds_pool_are_of_the_labels_alone(evidence, tmp_path) -> None:
    rows = make_rows(80, seed=7)
    labels = make_labels(rows, lambda previous, token: (token < VOCAB // 4) * 1.0)
    plain, given = model().fit(rows, labels), model().fit(rows, labels, evidence=evidence)
    assert not np.array_equal(plain.predict(rows), given.predict(rows))
    for name in ("keys", "counts", "sums"):
        assert np.allclose(getattr(plain._statistics, name), getattr(given._statistics, name), atol=1e-5)
    again = model().fit(rows, labels, previous=given, evidence=evidence)
    again.save_pretrained(tmp_path)
    loaded = NgramInfluenceModel.from_pretrained(tmp_path)
    assert np.array_equal(loaded.predict(BACKGROUND), again.predict(BACKGROUND))
    assert model(labels="document").fit(rows, labels, evidence=evidence).report.spearman == (
        model(labels="document").fit(rows, labels).report.spearman
    )


def test_evidence_counts_beside_labels_as_much_as_labels_agree_with_it(evidence) -> None:
    rows = make_rows(400, seed=8)
    scores = evidence[0].plus(evidence[1]).scaled(1.0).score(rows)
    rng = np.random.default_rng(0)
    labels = (scores - scores.mean()) / scores.std() + rng.normal(0, 1, 400)
    tables, weight = evidence_beside(evidence, rows, labels, 0.3 * labels)
    agreement = rank_correlation(scores, labels)
    assert weight == pytest.approx(agreement - 1 / 20)
    assert tables.score(rows).std() == pytest.approx(weight * 0.3 * labels.std(), rel=1e-5)
    assert evidence_beside(evidence, rows, labels, scores)[1] == pytest.approx(1 - 1 / 20 / agreement)
    # Evidence that says nothing of the labels or contradicts them, labels that nothing predicts, evidence of no words.
    for others, predicted in [(rng.normal(0, 1, 400), labels), (-labels, labels), (labels, np.zeros(400))]:
        assert evidence_beside(evidence, rows, others, predicted)[1] <= 0.05
    noise = rng.normal(0, 1, 400)
    assert evidence_beside(evidence, rows, noise, noise, 0.4)[1] == 0.4  # which an earlier round found
    against = evidence_beside(evidence, rows, -labels, 0.1 * noise - labels, 1.0)[1]  # as far as half of it is left
    assert 0 < against < 1
    nothing = (Tables.zeros(VOCAB, BUCKETS), Tables.zeros(VOCAB, BUCKETS))
    for least in (0.0, 0.4):
        tables, weight = evidence_beside(nothing, rows, labels, labels, least)
        assert weight == least
        assert not tables.token.any()


def test_what_labels_once_said_of_the_evidence_counts_in_later_rounds(evidence, tmp_path) -> None:
    """Labels price one more row, and stop asking for words that the model has just been trained on."""
    rows, later, others = make_rows(300, seed=11), make_rows(300, seed=12), make_rows(300, seed=13)
    alike = make_labels(rows, lambda previous, token: (token < VOCAB // 4) * 1.0, noise=1.0)
    otherwise = make_labels(later, lambda previous, token: 2.0 * (token % 2), noise=1.0)
    against = make_labels(later, lambda previous, token: (token >= VOCAB // 4) * 1.0, noise=1.0)
    first = model().fit(rows, alike, evidence=evidence)
    first.save_pretrained(tmp_path)
    kept = model().fit(later, otherwise, evidence=evidence, previous=NgramInfluenceModel.from_pretrained(tmp_path))
    assert kept.report.evidence_weight == first.report.evidence_weight > 0.5
    alone = model(evidence_weight=0.0).fit(later, otherwise, evidence=evidence, previous=first)
    told = evidence[0].plus(evidence[1]).scaled(1.0).score(others)
    assert rank_correlation(kept.predict(others), told) > rank_correlation(alone.predict(others), told) + 0.2
    assert rank_correlation(kept.predict(others), alone.predict(others)) > 0.3  # labels count as well
    # Labels that turn round are believed all the same, as far as half of what they say is left.
    turned = model().fit(later, against, evidence=evidence, previous=first)
    assert turned.report.evidence_weight < first.report.evidence_weight
    # Not where labels are not pooled, nor where the model before had none.
    assert model(pool_decay=0.0).fit(later, against, evidence=evidence, previous=first).report.evidence_weight == 0
    nobody = model(evidence_weight=0.0).fit(rows, alike, evidence=evidence)
    assert model().fit(later, against, evidence=evidence, previous=nobody).report.evidence_weight == 0


def test_what_is_predicted_is_both_and_stays_so_after_saving(evidence, tmp_path) -> None:
    rows, others = make_rows(300, seed=9), make_rows(300, seed=10)
    labels = make_labels(rows, lambda previous, token: (token < VOCAB // 4) + 2.0 * (token % 2), noise=1.0)
    alone, both, more = (
        model(evidence_weight=weight).fit(rows, labels, evidence=evidence) for weight in (0.0, 1.0, 3.0)
    )
    assert alone.report.evidence_weight is None
    assert 0 < both.report.evidence_weight == more.report.evidence_weight <= 1
    told = evidence[0].plus(evidence[1]).scaled(1.0).score(others)
    agreement = [rank_correlation(fitted.predict(others), told) for fitted in (alone, both, more)]
    assert agreement[0] < agreement[1] < agreement[2]
    assert both.report.spearman > 0.3
    assert both.report.slope == pytest.approx(1.0, abs=0.4)  # predictions stay in the labels' unit
    given = model(evidence_weight=3.0).fit(rows, labels, evidence=evidence, evidence_weight=0.0)
    assert np.array_equal(given.predict(others), alone.predict(others))
    more.save_pretrained(tmp_path)
    loaded = NgramInfluenceModel.from_pretrained(tmp_path)
    assert loaded.evidence_weight == 3.0
    assert loaded.report == more.report
    assert np.array_equal(loaded.predict(others), more.predict(others))
    with pytest.raises(ValueError, match="`evidence_weight` must be a finite number of at least 0, got -1"):
        NgramInfluenceModel(evidence_weight=-1)


def test_a_model_saved_before_evidence_counted_beside_labels_is_read_as_that(tmp_path) -> None:
    rows = make_rows(80, seed=6)
    fitted = model().fit(rows, make_labels(rows, lambda previous, token: token * 1.0))
    fitted.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["evidence_weight"]
    path.write_text(json.dumps(settings))
    (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
    assert NgramInfluenceModel.from_pretrained(tmp_path).evidence_weight == 0.0
