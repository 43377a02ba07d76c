from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.errors import InfluenceError, MatesError
from mates_hf.prediction import ngram_model as ngram
from mates_hf.prediction import threads
from mates_hf.prediction.ngram import kernels, search
from mates_hf.prediction.ngram.additive import Choice, Penalties, TokenDesign
from mates_hf.prediction.ngram.tables import Statistics
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels

VOCAB = 64
BUCKETS = 2**12
CONVERGED = 1e-6  # a dozen Gauss-Seidel sweeps against an exact solve, of effects near 1
FLOAT32 = 2e-5

Effects = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_rows(num: int, seed: int = 0, length: int = 40, vocab: int = VOCAB, masked: bool = False) -> TokenRows:
    """Rows whose unigram frequencies differ, as topics do, so that candidates differ too."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(vocab, 0.5), size=num)
    rows = [rng.choice(vocab, size=rng.integers(length // 2, length + 1), p=p) for p in weights]
    labels = [np.where(rng.random(len(row)) < 0.3, IGNORED, row) for row in rows] if masked else None
    return TokenRows.from_lists(rows, labels)


def pairs(rows: TokenRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Previous token, target and row of each target, by the slowest way."""
    found = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        found += [(ids[j - 1], labels[j], i) for j in range(1, len(ids)) if labels[j] != IGNORED]
    previous, token, owner = np.array(found).T
    return previous, token, owner


def make_labels(
    rows: TokenRows, effects: Effects, noise: float = 0.5, seed: int = 0, step_size: float = 1.0
) -> InfluenceLabels:
    previous, token, owner = pairs(rows)
    derivative = effects(previous, token) + noise * np.random.default_rng(seed).normal(size=len(token))
    derivative = derivative.astype(np.float32)
    num_tokens = rows.num_targets
    per_token = (np.bincount(owner, derivative, minlength=len(rows)) / num_tokens).astype(np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(len(rows)),
        influence=per_token * np.float32(step_size),
        influence_per_token=per_token,
        loss=np.ones(len(rows), np.float32),
        num_tokens=num_tokens,
        probe=np.full(len(rows), "made"),
        step_size=step_size,
        token_derivatives=derivative,
    )


def token_effects(previous: np.ndarray, token: np.ndarray) -> np.ndarray:
    table = np.random.default_rng(99).normal(size=(2, VOCAB))
    return table[0, token] + 0.5 * table[1, previous]


def model(**arguments: object) -> NgramInfluenceModel:
    return NgramInfluenceModel(**{"num_buckets": BUCKETS, **arguments})


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    return make_rows(200)


@pytest.fixture(scope="module")
def labels(rows: TokenRows) -> InfluenceLabels:
    return make_labels(rows, token_effects, step_size=0.01)


@pytest.fixture(scope="module")
def fitted(rows: TokenRows, labels: InfluenceLabels) -> NgramInfluenceModel:
    return model().fit(rows, labels)


# --- what is learned, with its sign ---


@pytest.mark.parametrize("kind", ["token", "document", "both"])
def test_ranks_unseen_candidates_and_flips_with_the_labels(
    kind: str, rows: TokenRows, labels: InfluenceLabels
) -> None:
    unseen = make_rows(150, seed=1)
    truth = make_labels(unseen, token_effects, noise=0.0, step_size=0.01)
    report = model(labels=kind).fit(rows, labels).evaluate(unseen, truth)
    assert report.spearman > 0.6
    assert report.passes(0.5)
    flipped = dataclasses.replace(
        labels,
        influence=-labels.influence,
        influence_per_token=-labels.influence_per_token,
        token_derivatives=-labels.token_derivatives,
    )
    assert model(labels=kind).fit(rows, flipped).evaluate(unseen, truth).spearman < -0.6


def test_token_labels_beat_document_labels_when_few() -> None:
    few, unseen = make_rows(60, seed=5), make_rows(300, seed=6)
    measured = make_labels(few, token_effects)
    truth = make_labels(unseen, token_effects, noise=0.0)
    token, document = (model(labels=kind).fit(few, measured).evaluate(unseen, truth) for kind in ("token", "document"))
    assert token.spearman > document.spearman + 0.05


@pytest.mark.parametrize("pooled", [False, True])
def test_penalties_of_some_candidates_serve_all(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise so strong that the weakest shrinkage costs much."""
    rows, unseen = make_rows(600, seed=3), make_rows(300, seed=4)
    labels = make_labels(rows, token_effects, noise=8.0)
    truth = make_labels(unseen, token_effects, noise=0.0)
    earlier = model().fit(make_rows(300, seed=7), make_labels(make_rows(300, seed=7), token_effects, noise=8.0))
    previous = earlier if pooled else None
    whole = model().fit(rows, labels, previous=previous)
    monkeypatch.setattr(search, "SEARCH_CANDIDATES", 600)
    assert (model().fit(rows, labels, previous=previous).predict(unseen) == whole.predict(unseen)).all()
    monkeypatch.setattr(search, "SEARCH_CANDIDATES", 200)
    some = model().fit(rows, labels, previous=previous)
    assert not (some.predict(unseen) == whole.predict(unseen)).all()
    monkeypatch.setattr(ngram, "search_penalties", lambda *_: Penalties(30.0, 10.0, 3.0))
    least = model().fit(rows, labels, previous=previous)
    agreement = [found.evaluate(unseen, truth).spearman for found in (whole, some, least)]
    assert agreement[1] > agreement[0] - 0.1
    assert agreement[1] > agreement[2] + 0.1


def test_folds_side_by_side_give_the_same_bits(
    rows: TokenRows, labels: InfluenceLabels, fitted: NgramInfluenceModel
) -> None:
    with threads.at_most_threads(1):
        alone = model().fit(rows, labels)
    assert (alone.predict(rows) == fitted.predict(rows)).all()
    assert alone.report.spearman == fitted.report.spearman


def test_planted_bigram_ranks_first() -> None:
    rows = make_rows(300, seed=2)
    for sign, side in ((1, "raises"), (-1, "lowers")):
        previous, token, _ = pairs(rows)
        counts = np.bincount(previous * VOCAB + token, minlength=VOCAB**2)
        common = int(np.argsort(counts)[-20])
        planted = [common // VOCAB, common % VOCAB]

        def effects(p: np.ndarray, t: np.ndarray, planted: list[int] = planted, sign: int = sign) -> np.ndarray:
            return 5.0 * sign * ((p == planted[0]) & (t == planted[1]))

        found = model().fit(rows, make_labels(rows, effects)).explain(k=5)
        first = found[side][0]
        assert (first["kind"], first["ids"]) == ("bigram", planted)
        assert first["count"] == counts[common]
        assert sign * first["effect"] > 1
        assert planted not in [entry["ids"] for entry in found["lowers" if sign > 0 else "raises"]]


def test_planted_token_and_tokenizer_text(rows: TokenRows) -> None:
    class Decoder:
        def decode(self, ids: list[int]) -> str:
            return "<" + " ".join(map(str, ids)) + ">"

    found = model().fit(rows, make_labels(rows, lambda p, t: -3.0 * (t == 7) + 1.0 * (p == 9))).explain(3, Decoder())
    assert (found["lowers"][0]["kind"], found["lowers"][0]["text"]) == ("token", "<7>")
    assert (found["raises"][0]["kind"], found["raises"][0]["ids"]) == ("previous", [9])
    assert all(len(entries) <= 3 for entries in found.values())


@pytest.mark.parametrize("kind", ["token", "document", "both"])
def test_shuffled_labels_do_not_pass(kind: str, rows: TokenRows, labels: InfluenceLabels) -> None:
    """Token labels are shuffled over all targets, document labels over candidates."""
    rng = np.random.default_rng(3)
    derivative = rng.permutation(labels.token_derivatives)
    per_token = rng.permutation(labels.influence_per_token)
    if kind != "document":
        sums = np.bincount(pairs(rows)[2], derivative)
        per_token = (sums / labels.num_tokens).astype(np.float32)
    shuffled = dataclasses.replace(
        labels,
        influence=per_token * np.float32(labels.step_size),
        influence_per_token=per_token,
        token_derivatives=derivative,
    )
    report = model(labels=kind).fit(rows, shuffled).report
    assert report.interval[0] < 0 < report.interval[1]
    assert not report.passes(0.1)


def test_predictions_are_calibrated() -> None:
    rows = make_rows(400, seed=8)
    for kind in ("token", "document", "both"):
        found = model(labels=kind).fit(rows, make_labels(rows, token_effects, noise=1.5, step_size=0.01))
        unseen = make_rows(400, seed=9)
        report = found.evaluate(unseen, make_labels(unseen, token_effects, noise=1.5, seed=1, step_size=0.01))
        assert report.slope == pytest.approx(1, abs=0.35)
        pairs_of_means = np.array(report.calibration)
        assert abs(pairs_of_means.mean(0) @ [1, -1]) < 0.3 * report.label_std


def test_groups_are_only_reported(rows: TokenRows, labels: InfluenceLabels, fitted: NgramInfluenceModel) -> None:
    grouped = model().fit(rows, labels, groups=np.arange(200) % 2)
    assert grouped.report.spearman_within_group is not None
    assert fitted.report.spearman_within_group is None
    assert np.array_equal(grouped.predict(rows), fitted.predict(rows))


# --- units ---


def test_influence_is_per_token_times_step_size(rows: TokenRows, labels: InfluenceLabels) -> None:
    found = model().fit(rows, labels)
    per_token, influence = found.predict_per_token(rows), found.predict(rows)
    assert per_token.dtype == influence.dtype == np.float32
    np.testing.assert_allclose(influence, per_token * 0.01, rtol=1e-6)
    assert per_token.std() == pytest.approx(labels.influence_per_token.std(), rel=0.3)
    assert found.report.label_std == pytest.approx(labels.influence.std(), rel=1e-5)
    tenfold = dataclasses.replace(labels, step_size=0.1, influence=labels.influence * 10)
    again = model().fit(rows, tenfold)
    assert np.array_equal(again.predict_per_token(rows), per_token)
    np.testing.assert_allclose(again.predict(rows), influence * 10, rtol=1e-5)
    assert again.report.label_std == pytest.approx(10 * found.report.label_std, rel=1e-5)
    assert again.report.calibration[0] == pytest.approx(np.multiply(found.report.calibration[0], 10), rel=1e-4)


def test_rows_without_targets_get_the_intercept(fitted: NgramInfluenceModel) -> None:
    empty = TokenRows.from_lists([[], [5], [1, 2, 3]], [[], [5], [1, IGNORED, IGNORED]])
    unseen = TokenRows.from_lists([[VOCAB + 7, VOCAB + 8, 10**6]])
    predicted = fitted.predict(empty)
    assert (predicted == predicted[0]).all()
    assert np.isfinite(predicted[0])
    assert fitted.predict(unseen)[0] == predicted[0]
    assert fitted.predict(TokenRows.from_lists([])).shape == (0,)


# --- the fit against a dense solve ---


def dense_solution(
    token: np.ndarray, previous: np.ndarray, slot: np.ndarray, y: np.ndarray, weight: np.ndarray, penalties: np.ndarray
) -> np.ndarray:
    """Weighted ridge with an unpenalised mean: the fitted value of each row of the design, without the mean."""
    blocks = [np.eye(column.max() + 1)[column] for column in (token, previous, slot)]
    blocks[2] = blocks[2][:, 1:]
    design = np.hstack([np.ones((len(y), 1)), *blocks])
    ridge = np.concatenate([[0.0], *[np.full(b.shape[1], p) for b, p in zip(blocks, penalties, strict=True)]])
    solution = np.linalg.solve(design.T @ (weight[:, None] * design) + np.diag(ridge), design.T @ (weight * y))
    return design[:, 1:] @ solution[1:]


def test_backfitting_reaches_the_ridge_solution() -> None:
    rng = np.random.default_rng(0)
    num = 120
    token, previous, slot = (rng.integers(size, size=num).astype(np.int32) for size in (8, 8, 20))
    y, weight = rng.normal(size=num), rng.uniform(0.5, 3, size=num)
    penalties = np.array([3.0, 5.0, 2.0])
    tables = (np.zeros(8), np.zeros(8), np.zeros(20))
    kernels.backfit(weight, weight * y, token, previous, slot, penalties, tables, 300)
    got = tables[0][token] + tables[1][previous] + tables[2][slot]
    np.testing.assert_allclose(got, dense_solution(token, previous, slot, y, weight, penalties), atol=CONVERGED)


def test_document_ridge_is_the_closed_form() -> None:
    rows = make_rows(20, seed=4, length=12, vocab=10)
    previous, token, owner = pairs(rows)
    z = np.random.default_rng(1).normal(size=20)
    design = TokenDesign(rows, BUCKETS, z, None, earlier=Statistics.empty(), prior=None, document=True)
    members = np.ones(20, bool)
    choice = Choice(Penalties(document=0.3), np.zeros(20), 0.0, np.zeros(20), np.zeros(20, int))
    _, document = design.solve(members, choice)
    assert document is not None
    keys, counts = np.unique(previous * 10 + token, return_counts=True)
    buckets = kernels.hash_bigrams(keys // 10, keys % 10, BUCKETS)
    used = np.unique(buckets[counts >= 2])
    features = np.zeros((20, 20 + len(used)))
    for p, t, i in zip(previous, token, owner, strict=True):
        features[i, t] += 1
        features[i, 10 + p] += 1
        if counts[keys == p * 10 + t][0] >= 2:
            bucket = kernels.hash_bigrams(np.array([p]), np.array([t]), BUCKETS)[0]
            features[i, 20 + np.searchsorted(used, bucket)] += 1
    features /= rows.num_targets[:, None]
    centred = features - features.mean(0)
    alpha = 0.3 * (centred**2).sum() / 20
    weights = centred.T @ np.linalg.solve(centred @ centred.T + alpha * np.eye(20), z - z.mean())
    np.testing.assert_allclose(document.token[:10], weights[:10], atol=CONVERGED)
    np.testing.assert_allclose(document.previous[:10], weights[10:20], atol=CONVERGED)
    np.testing.assert_allclose(document.bigram[used], weights[20:], atol=CONVERGED)


# --- scoring ---


def brute_force(found: NgramInfluenceModel, rows: TokenRows) -> np.ndarray:
    tables = found._tables
    assert tables is not None
    out = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        total, num = 0.0, 0
        for j in range(1, len(ids)):
            if labels[j] == IGNORED:
                continue
            bucket = kernels.hash_bigrams(ids[j - 1 : j], labels[j : j + 1], BUCKETS)[0]
            total += float(tables.token[labels[j]]) + float(tables.previous[ids[j - 1]]) + float(tables.bigram[bucket])
            num += 1
        out.append(found._intercept + (total / num if num else 0))
    return np.array(out)


@pytest.mark.parametrize("masked", [False, True])
def test_prediction_is_the_mean_over_trained_targets(fitted: NgramInfluenceModel, masked: bool) -> None:
    rows = make_rows(30, seed=7, masked=masked)
    np.testing.assert_allclose(fitted.predict_per_token(rows), brute_force(fitted, rows), rtol=FLOAT32, atol=1e-6)


def test_untrained_tokens_do_not_count(fitted: NgramInfluenceModel) -> None:
    """A masked row predicts as its trained part, and fitting on masked rows sees trained targets alone."""
    ids = make_rows(1, seed=12).values
    masked = TokenRows.from_lists([ids], [[IGNORED] * 10 + list(ids[10:])])
    alone = TokenRows.from_lists([ids[9:]])
    assert fitted.predict(masked)[0] == fitted.predict(alone)[0]
    rows = make_rows(80, seed=13, masked=True)
    found = model(labels="token").fit(rows, make_labels(rows, token_effects))
    assert found._statistics.counts.sum() == rows.num_targets.sum()
    assert found.report.spearman > 0.3


def test_each_row_is_scored_alone(fitted: NgramInfluenceModel) -> None:
    rows = make_rows(50, seed=14)
    together = fitted.predict(rows)
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(fitted.predict(rows.take(order)), together[order])
    assert np.array_equal(np.concatenate([fitted.predict(rows.take(np.array([i]))) for i in range(50)]), together)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_parallel_and_serial_kernels_agree_to_the_bit(dtype: type) -> None:
    rng = np.random.default_rng(0)
    tables = tuple(rng.normal(size=size).astype(np.float32) for size in (50, 50, BUCKETS))
    lengths = rng.integers(0, 200, size=500)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, 60, size=offsets[-1]).astype(dtype)
    values.flags.writeable = dtype is np.int64  # Arrow hands over int32 that is read-only
    serial, parallel = (kernels.score_rows(values, offsets, None, tables, parallel=p) for p in (False, True))
    assert np.array_equal(serial, parallel)
    assert serial.std() > 0
    assert np.array_equal(kernels.score_rows(values, offsets[100:201], None, tables, parallel=True), serial[100:200])


def test_dataset_is_read_like_its_rows(fitted: NgramInfluenceModel, rows: TokenRows, labels: InfluenceLabels) -> None:
    table = datasets.Dataset.from_dict({"input_ids": [rows.row(i)[0].tolist() for i in range(len(rows))]})
    assert np.array_equal(fitted.predict(table), fitted.predict(rows))
    assert np.array_equal(model().fit(table, labels).predict(rows), fitted.predict(rows))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_scores_after_the_parent_ran_the_parallel_kernel(fitted: NgramInfluenceModel) -> None:
    rows = make_rows(50, seed=15)
    expected = fitted.predict(rows)
    tables = fitted._tables
    assert tables is not None
    arrays = (tables.token, tables.previous, tables.bigram)
    kernels.score_rows(rows.values, rows.offsets, None, arrays, parallel=True)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if np.array_equal(fitted.predict(rows), expected) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0


def test_scoring_leaves_torch_its_number_of_threads(fitted: NgramInfluenceModel) -> None:
    # numba's own threads share torch's OpenMP runtime: scoring with them changed how fast, and how, training summed
    before = torch.get_num_threads()
    rows = make_rows(50, seed=16)
    tables = fitted._tables
    assert tables is not None
    kernels.score_rows(rows.values, rows.offsets, None, (tables.token, tables.previous, tables.bigram), parallel=True)
    assert torch.get_num_threads() == before


# --- pooling of rounds ---


def second_round(labels: InfluenceLabels, scale: float, shift: float) -> InfluenceLabels:
    per_token = labels.influence_per_token * np.float32(scale) + np.float32(shift)
    derivative = labels.token_derivatives * np.float32(scale) + np.float32(shift)
    return dataclasses.replace(
        labels, influence=per_token, influence_per_token=per_token, token_derivatives=derivative, step_size=1.0
    )


def table_of(statistics: Statistics) -> dict[int, tuple[float, float]]:
    return {
        int(key): (float(n), float(y))
        for key, n, y in zip(statistics.keys, statistics.counts, statistics.sums, strict=True)
    }


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_pooled_statistics_are_the_weighted_sum_of_rounds_on_one_scale(decay: float) -> None:
    first_rows, second_rows = make_rows(40, seed=20), make_rows(40, seed=21)
    first_labels = make_labels(first_rows, token_effects, seed=1)
    second_labels = second_round(make_labels(second_rows, token_effects, seed=2), scale=50.0, shift=-300.0)
    first = model(pool_decay=decay).fit(first_rows, first_labels)
    pooled = model(pool_decay=decay).fit(second_rows, second_labels, previous=first)
    expected: dict[int, list[float]] = {}
    for rows, labels, weight in ((first_rows, first_labels, decay), (second_rows, second_labels, 1.0)):
        y = labels.token_derivatives.astype(np.float64)
        y = (y - y.mean()) / labels.influence_per_token.astype(np.float64).std()
        previous, token, _ = pairs(rows)
        for p, t, value in zip(previous, token, y, strict=True):
            cell = expected.setdefault((int(p) << 32) | int(t), [0.0, 0.0])
            cell[0] += weight
            cell[1] += weight * value
    got = table_of(pooled._statistics)
    assert got.keys() == expected.keys()
    for key, (count, total) in got.items():
        assert count == pytest.approx(expected[key][0], rel=1e-5)
        assert total == pytest.approx(expected[key][1], rel=1e-3, abs=1e-3)


def test_fitting_pooled_statistics_is_fitting_all_rounds_at_once() -> None:
    """Decay 1 and rounds of equal mean and deviation: the tables are those of the concatenated rounds."""
    parts = [make_rows(40, seed=22), make_rows(40, seed=23)]
    joined = TokenRows(
        values=np.concatenate([part.values for part in parts]),
        offsets=np.concatenate([parts[0].offsets, parts[0].offsets[-1] + parts[1].offsets[1:]]),
    )
    rng = np.random.default_rng(0)
    y = [rng.normal(size=part.num_targets.sum()) for part in parts]
    y = [values - values.mean() for values in y]
    everyone = np.ones(40, bool)
    choice = Choice(Penalties(), np.zeros(40), 0.0, np.zeros(40), np.zeros(40, int))

    def design(rows: TokenRows, values: np.ndarray, earlier: Statistics) -> TokenDesign:
        return TokenDesign(rows, BUCKETS, np.zeros(len(rows)), values, earlier=earlier, prior=None, document=False)

    first = design(parts[0], y[0], Statistics.empty()).statistics()
    pooled, _ = design(parts[1], y[1], first).solve(everyone, choice)
    once, _ = design(joined, np.concatenate(y), Statistics.empty()).solve(np.ones(80, bool), choice)
    for got, expected in zip(vars(pooled).values(), vars(once).values(), strict=True):
        np.testing.assert_allclose(got, expected, atol=FLOAT32)


@pytest.mark.parametrize(("kind", "noise"), [("token", 3.0), ("document", 1.5), ("both", 3.0)])
def test_pooled_rounds_rank_better_than_one(kind: str, noise: float) -> None:
    unseen = make_rows(300, seed=30)
    truth = make_labels(unseen, token_effects, noise=0.0)
    single = pooled = None
    for number in range(4):
        rows = make_rows(60, seed=40 + number)
        labels = second_round(
            make_labels(rows, token_effects, noise=noise, seed=number), scale=3.0**number, shift=10.0 * number
        )
        single = model(labels=kind).fit(rows, labels)
        pooled = model(labels=kind).fit(rows, labels, previous=pooled)
        forgetful = model(labels=kind, pool_decay=0.0).fit(rows, labels, previous=pooled)
        assert np.array_equal(forgetful.predict(unseen), single.predict(unseen))
    assert single is not None
    assert pooled is not None
    assert pooled.evaluate(unseen, truth).spearman > single.evaluate(unseen, truth).spearman + 0.05
    # In the unit of the last round, which is 27 times the first's.
    assert 0.15 < pooled.predict(unseen).std() / labels.influence.std() < 1.5


def test_previous_model_is_left_as_it_was(fitted: NgramInfluenceModel, rows: TokenRows) -> None:
    before = fitted.predict(rows)
    other = make_rows(60, seed=50, vocab=VOCAB + 9)
    found = model().fit(other, make_labels(other, lambda p, t: (t % 5) - (p % 3)), previous=fitted)
    assert np.array_equal(fitted.predict(rows), before)
    assert found.vocab_size == VOCAB + 9
    with pytest.raises(ValueError, match="`previous` must have the same `num_buckets` \\(4096\\), got 8192"):
        model().fit(
            other,
            make_labels(other, token_effects_of_any),
            previous=model(num_buckets=8192).fit(other, make_labels(other, token_effects_of_any)),
        )


def token_effects_of_any(previous: np.ndarray, token: np.ndarray) -> np.ndarray:
    return (token % 5) - (previous % 3)


# --- files ---


@pytest.mark.parametrize("kind", ["token", "both"])
def test_loaded_model_predicts_and_pools_to_the_bit(
    kind: str, tmp_path: Path, rows: TokenRows, labels: InfluenceLabels
) -> None:
    saved = model(labels=kind, seed=3, pool_decay=0.5).fit(rows, labels)
    saved.save_pretrained(tmp_path / "m")
    loaded = NgramInfluenceModel.from_pretrained(tmp_path / "m")
    assert np.array_equal(loaded.predict(rows), saved.predict(rows))
    assert loaded.report == saved.report
    assert (loaded.seed, loaded.pool_decay, loaded.labels) == (3, 0.5, kind)
    assert loaded.explain(5) == saved.explain(5)
    other = make_rows(60, seed=60)
    later = [model(labels=kind).fit(other, make_labels(other, token_effects), previous=m) for m in (saved, loaded)]
    assert np.array_equal(later[0].predict(rows), later[1].predict(rows))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "fit.json", "model.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path, fitted: NgramInfluenceModel) -> None:
    def saved(name: str) -> Path:
        fitted.save_pretrained(tmp_path / name)
        return tmp_path / name

    def edit_config(path: Path, **values: object) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    path = saved("cut")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(MatesError, match="model.safetensors.*must be as it was written"):
        NgramInfluenceModel.from_pretrained(path)
    (path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(MatesError, match="must be as it was written"):
        NgramInfluenceModel.from_pretrained(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(MatesError, match="is missing"):
        NgramInfluenceModel.from_pretrained(path)

    path = saved("report")
    (path / "fit.json").write_text((path / "fit.json").read_text().replace('"spearman": 0', '"spearman": 1'))
    with pytest.raises(MatesError, match="fit.json"):
        NgramInfluenceModel.from_pretrained(path)

    path = saved("config")
    edit_config(path, num_buckets=BUCKETS * 2)
    with pytest.raises(MatesError, match="`num_buckets`"):
        NgramInfluenceModel.from_pretrained(path)
    edit_config(path, num_buckets=BUCKETS, format_version=99, library_version="9.9")
    with pytest.raises(ValueError, match=r"written by mates-hf 9\.9\. Upgrade"):
        NgramInfluenceModel.from_pretrained(path)
    edit_config(path, kind="EncoderInfluenceModel")
    with pytest.raises(ValueError, match="got a EncoderInfluenceModel"):
        NgramInfluenceModel.from_pretrained(path)
    (path / "config.json").write_text('{"kind": "Ngram')
    with pytest.raises(MatesError, match="whole JSON object"):
        NgramInfluenceModel.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="holds no influence model"):
        NgramInfluenceModel.from_pretrained(tmp_path / "nowhere")


# --- what is refused ---


def test_wrong_input_is_refused_by_name(rows: TokenRows, labels: InfluenceLabels, fitted: NgramInfluenceModel) -> None:
    with pytest.raises(ValueError, match="`num_buckets` must be a power of two"):
        NgramInfluenceModel(num_buckets=1000)
    with pytest.raises(ValueError, match=r"`pool_decay` must be in \[0, 1\], got 1.5"):
        NgramInfluenceModel(pool_decay=1.5)
    with pytest.raises(MatesError, match="must be fitted first"):
        NgramInfluenceModel().predict(rows)
    with pytest.raises(ValueError, match="Token ids must not be negative.*row 1 holds -5"):
        fitted.predict(TokenRows.from_lists([[1, 2], [3, -5, 4]]))
    with pytest.raises(ValueError, match="Pass the pool that was probed"):
        fitted.evaluate(make_rows(200, seed=70), labels)
    with pytest.raises(ValueError, match="`groups` must have one entry a label"):
        model().fit(rows, labels, groups=np.zeros(3))
    with pytest.raises(ValueError, match="needs the derivative at each token"):
        model(labels="token").fit(rows, dataclasses.replace(labels, token_derivatives=None))
    broken = labels.influence.copy()
    broken[4] = np.nan
    with pytest.raises(InfluenceError, match="first candidate_id \\[4\\]"):
        model().fit(rows, dataclasses.replace(labels, influence=broken))
    with pytest.raises(InfluenceError, match="zero"):
        model().fit(rows, dataclasses.replace(labels, influence=np.zeros(200, np.float32)))


def test_labels_without_derivatives_are_fitted_as_documents(rows: TokenRows, labels: InfluenceLabels) -> None:
    plain = dataclasses.replace(labels, token_derivatives=None)
    assert np.array_equal(
        model().fit(rows, plain).predict(rows), model(labels="document").fit(rows, labels).predict(rows)
    )


def test_subset_of_the_pool_in_any_order(rows: TokenRows, labels: InfluenceLabels) -> None:
    """`candidate_id` says which rows the labels belong to."""
    order = np.random.default_rng(0).permutation(200)[:120]
    part = labels.take(order)
    direct = model().fit(rows.take(order), dataclasses.replace(part, candidate_id=np.arange(120)))
    assert np.array_equal(model().fit(rows, part).predict(rows), direct.predict(rows))
