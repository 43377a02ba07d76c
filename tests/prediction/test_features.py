"""The ridge on hidden state times label error: equal to the product built, on every head, and without a trace."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.engine.digest import live_digest
from mates_hf.errors import InfluenceError, MatesError, UnsupportedSettingError
from mates_hf.influence.reading import find_reading
from mates_hf.prediction.feature_model import FeatureInfluenceModel
from mates_hf.prediction.features.gradient import Errors, HeadFeatures, HeadLine, fit_head
from mates_hf.prediction.features.head import OutputHead, find_head
from mates_hf.prediction.features.rows import Passes
from mates_hf.prediction.ridge import PENALTIES, leave_one_out_errors, ridge_coefficients
from mates_hf.records import InfluenceLabels
from tests.engine.test_preserve import assert_same, everything
from tests.prediction.test_encoder import make_rows

FACTORED = 1e-6  # of float64 sums in another order
BATCHING = 1e-4  # a batch of another size sums float32 in another order
NUM = 420


def labels_of(values: Any, num_tokens: Any = None, ids: Any = None, step_size: float = 0.01) -> InfluenceLabels:
    per_token = np.asarray(values, np.float32)
    num = len(per_token)
    return InfluenceLabels(
        candidate_id=np.arange(num) if ids is None else np.asarray(ids),
        influence=per_token * np.float32(step_size),
        influence_per_token=per_token,
        loss=np.zeros(num, np.float32),
        num_tokens=np.ones(num, np.int32) if num_tokens is None else np.asarray(num_tokens, np.int32),
        probe=np.array(["directional"] * num),
        step_size=step_size,
    )


class Digits(NamedTuple):
    """A ViT amid its training on digits of which a fifth has a wrong label, and labels measured there."""

    model: Any
    optimizer: Any
    pool: CandidatePool
    labels: InfluenceLabels


def tiny_vit(**settings: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes, **settings)
    )


@pytest.fixture(scope="module")
def digits() -> Digits:
    from sklearn.datasets import load_digits
    from transformers import default_data_collator

    rng = np.random.default_rng(0)
    images, classes = load_digits(return_X_y=True)
    order = rng.permutation(len(classes))
    images = torch.tensor(images[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    classes = classes[order]
    wrong = rng.random(NUM) < 0.2
    given = torch.tensor(np.where(wrong, (classes[:NUM] + rng.integers(1, 10, NUM)) % 10, classes[:NUM]))
    wanted = np.flatnonzero((classes < 5) & (np.arange(len(classes)) >= 1300))
    model = tiny_vit(hidden_dropout_prob=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        batch = torch.from_numpy(rng.choice(NUM, 32, replace=False))
        optimizer.zero_grad()
        model(images[batch], labels=given[batch]).loss.backward()
        optimizer.step()
    rows = [{"pixel_values": images[i], "labels": int(given[i])} for i in range(NUM)]
    reference = (images[wanted], torch.tensor(classes[wanted]))
    labels = labels_of(derivatives(model, optimizer, reference, (images[:NUM], given)))
    return Digits(model, optimizer, CandidatePool(rows, default_data_collator), labels)


def derivatives(model: Any, optimizer: Any, reference: Any, candidates: Any, epsilon: float = 1e-3) -> Any:
    """What a directional probe measures: the slope of each candidate's loss along Adam's step on the reference."""
    import copy

    twin = copy.deepcopy(model).eval()
    twin(reference[0], labels=reference[1]).loss.backward()
    pairs = list(zip(twin.parameters(), model.parameters(), strict=True))
    moves = [p.grad / (optimizer.state[own]["exp_avg_sq"].sqrt() + 1e-8) for p, own in pairs if own in optimizer.state]
    length = epsilon * (sum((p**2).sum() for p, _ in pairs) / sum((m**2).sum() for m in moves)).sqrt()
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            for (p, _), move in zip(pairs, moves, strict=True):
                p += sign * length * move
            sides.append(functional.cross_entropy(twin(candidates[0]).logits, candidates[1], reduction="none"))
    return ((sides[0] - sides[1]) / (2 * length)).detach().numpy()


@pytest.fixture(scope="module")
def fitted(digits: Digits) -> FeatureInfluenceModel:
    return FeatureInfluenceModel(model=digits.model).fit(digits.pool, digits.labels)


# --- what is learned, with its sign ---


def test_the_heads_gradient_predicts_held_out_labels_of_images(digits: Digits, fitted: Any) -> None:
    assert fitted.report.spearman > 0.85
    assert fitted.report.passes(0.8)
    assert 0.6 < fitted.report.slope < 1.4
    hidden = FeatureInfluenceModel("hidden", digits.model).fit(digits.pool, digits.labels)
    assert 0.3 < hidden.report.spearman < fitted.report.spearman
    predicted = fitted.predict(digits.pool)
    assert np.corrcoef(predicted, digits.labels.influence)[0, 1] > 0.9
    np.testing.assert_allclose(predicted, fitted.predict_per_token(digits.pool) * 0.01, rtol=1e-6)
    values = digits.labels.influence_per_token
    flipped = FeatureInfluenceModel(model=digits.model).fit(digits.pool, labels_of(-values))
    np.testing.assert_allclose(flipped.predict(digits.pool), -predicted, atol=1e-6 * float(np.abs(predicted).max()))
    again = np.random.default_rng(1).permutation(values)
    shuffled = FeatureInfluenceModel(model=digits.model).fit(digits.pool, labels_of(again))
    assert not shuffled.report.passes(0.2)
    assert shuffled.predict(digits.pool).std() < 0.35 * digits.labels.influence.std()


def test_a_prediction_does_not_depend_on_the_rows_beside_it(digits: Digits, fitted: Any) -> None:
    predicted = fitted.predict(digits.pool)
    order = np.random.default_rng(0).permutation(NUM)
    np.testing.assert_allclose(
        fitted.predict(digits.pool.select(order)), predicted[order], atol=BATCHING * float(predicted.std())
    )
    alone = [fitted.predict(digits.pool.select([i]))[0] for i in range(5)]
    np.testing.assert_allclose(alone, predicted[:5], atol=BATCHING * float(predicted.std()))
    part = digits.labels.take(order[:200])  # candidate ids that are not in order, of a pool and of its rows
    ones = [
        FeatureInfluenceModel(model=digits.model).fit(rows, part) for rows in (digits.pool, digits.pool.candidates())
    ]
    assert np.array_equal(ones[0].predict(digits.pool), ones[1].predict(digits.pool))
    small = FeatureInfluenceModel(model=digits.model, tokens_per_batch=3).fit(digits.pool, digits.labels)
    np.testing.assert_allclose(small.predict(digits.pool), predicted, atol=BATCHING * float(predicted.std()))


@pytest.mark.parametrize("several", [False, True])
def test_the_factored_ridge_is_the_ridge_on_the_product(several: bool) -> None:
    """Of candidates with one target, and with several, whose product is a mean; also on top of an earlier round."""
    rng = np.random.default_rng(3)
    num, width, classes = 60, 7, 5
    owner = np.repeat(np.arange(num), rng.integers(1, 4, num) if several else 1)
    states = rng.normal(1.0, 2.0, (len(owner), width)).astype(np.float32)
    errors = rng.normal(size=(len(owner), classes)).astype(np.float32)
    counts = np.bincount(owner).astype(np.float32)

    def mean(values: Any) -> Any:
        found = np.zeros((num, *values.shape[1:]), np.float32)
        np.add.at(found, owner, values)
        return found / counts.reshape(-1, *[1] * (values.ndim - 1))

    products = mean(states[:, :, None] * errors[:, None, :])
    features = HeadFeatures(mean(states), mean(states**2), mean(errors), products if several else None)
    centre = features.states.mean(0, dtype=np.float64)
    spread = np.sqrt(features.squares.mean(0, dtype=np.float64) - centre**2)
    scaled = np.concatenate([(states - centre) / spread, np.ones((len(owner), 1))], 1)
    built = np.zeros((num, (width + 1) * classes))
    np.add.at(built, owner, (scaled[:, :, None] * errors[:, None, :]).reshape(len(owner), -1))
    built /= counts[:, None]
    target = built @ rng.normal(size=built.shape[1]) + rng.normal(size=num) * 3
    target = (target - target.mean()) / target.std()

    centred = built - built.mean(0)
    penalty = min(zip(leave_one_out_errors(centred, target, PENALTIES), PENALTIES, strict=True))[1]
    wanted = centred @ ridge_coefficients(centred, target, penalty) + target.mean()
    line = fit_head(features, target, classes)
    got = features.scores(line.matrix, line.mean) + line.line.intercept
    np.testing.assert_allclose(got, wanted, atol=FACTORED)
    np.testing.assert_allclose(
        features.gram(centre, spread), built @ built.T, atol=FACTORED * np.abs(built).max() ** 2 * 40
    )

    elsewhere = HeadLine(line.line, line.mean + 0.5, classes)  # an earlier round, whose states were centred elsewhere
    score = features.scores(elsewhere.matrix, elsewhere.mean)
    score -= score.mean()
    weight = np.clip(score @ target / (score @ score), 0, 1)
    left = target - weight * score
    penalty = min(zip(leave_one_out_errors(centred, left, PENALTIES), PENALTIES, strict=True))[1]
    wanted = centred @ ridge_coefficients(centred, left, penalty) + weight * score + target.mean()
    built_on = fit_head(features, target, classes, elsewhere)
    got = features.scores(built_on.matrix, built_on.mean) + built_on.line.intercept
    np.testing.assert_allclose(got, wanted, atol=10 * FACTORED)


def test_projected_errors_keep_inner_products_on_average() -> None:
    torch.manual_seed(0)
    said, labels = torch.softmax(3 * torch.randn(200, 3_000), -1), torch.randint(0, 3_000, (200,))
    whole = Errors(3_000, 3_000).of(said.clone(), labels)
    gap = {}
    for width in (64, 1_024):
        part = Errors(3_000, width).of(said.clone(), labels)
        assert part.shape == (200, width)
        off = (part @ part.T - whole @ whole.T).numpy()
        gap[width] = float(off.std())
        assert abs(off.mean()) < 0.02
    assert gap[64] == pytest.approx(1 / 8, rel=0.25)  # errors have a length of about 1: 1 / sqrt(64)
    assert gap[1_024] == pytest.approx(1 / 32, rel=0.25)
    assert torch.equal(Errors(3_000, 64).of(said.clone(), labels), Errors(3_000, 64).of(said.clone(), labels))


# --- heads of other models ---


def whisper() -> tuple[Any, list[dict[str, Any]], str]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=16,
        max_target_positions=16, suppress_tokens=[], begin_suppress_tokens=[], **sizes, **ids,
    )  # fmt: skip
    rows = [{"input_features": torch.randn(8, 32), "labels": torch.randint(3, 40, (6,))} for _ in range(60)]
    return WhisperForConditionalGeneration(config), rows, "proj_out"


def llava() -> tuple[Any, list[dict[str, Any]], str]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=39,
        image_seq_length=4,
    )
    rows = []
    for _ in range(60):
        ids = torch.cat([torch.full((4,), 39), torch.randint(3, 39, (4,))])
        labels = torch.where(torch.arange(8) < 5, IGNORED, ids)
        rows.append({"input_ids": ids, "pixel_values": torch.randn(3, 8, 8), "labels": labels})
    return LlavaForConditionalGeneration(config), rows, "lm_head"


def resnet() -> tuple[Any, list[dict[str, Any]], str]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    )
    rows = [{"pixel_values": torch.randn(1, 16, 16), "labels": int(torch.randint(0, 6, ()))} for _ in range(60)]
    return ResNetForImageClassification(config), rows, "classifier.1"


@pytest.mark.parametrize("make", [whisper, llava, resnet])
def test_reads_the_head_of_any_model(make: Any) -> None:
    """Influence that is a line in the head's own gradient, as autograd has it, is found, and no trace is left."""
    from transformers import default_data_collator

    torch.manual_seed(1)
    model, rows, name = make()
    pool = CandidatePool(rows, default_data_collator)
    pool.reading = find_reading(model, pool)
    fed = pool.candidates()
    model.eval()
    head = model.get_submodule(name)
    passes = Passes(model, fed, 100)
    assert find_head(model, passes.first()) is head
    weight = head.weight.detach().clone().requires_grad_()
    given: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    gradients = []
    for row in rows:
        model(**default_data_collator([row]))
        labels = torch.as_tensor(row["labels"]).reshape(-1)
        states = given[-1].reshape(-1, weight.shape[1])
        states, labels = (states[:-1], labels[1:]) if name == "lm_head" else (states, labels)
        logits = states @ weight.T + (0 if head.bias is None else head.bias.detach())
        loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        gradients.append(torch.autograd.grad(loss, weight)[0].T.numpy())
    handle.remove()
    found = OutputHead(model, passes.first())
    read = HeadFeatures.read(found, passes, Errors(len(weight), len(weight)), np.asarray(fed.num_targets, np.int64))
    products = read.states[:, :, None] * read.errors[:, None, :] if read.products is None else read.products
    np.testing.assert_allclose(products, gradients, atol=1e-5 * float(np.abs(gradients).max()) + 1e-7)

    slopes = (np.array(gradients) * np.random.default_rng(0).normal(size=gradients[0].shape)).sum((1, 2))
    labels = labels_of(slopes, fed.num_targets)
    optimizer = torch.optim.SGD(model.train().parameters())
    before = everything(model, optimizer)
    fitted = FeatureInfluenceModel(model=model).fit(pool, labels, held_out_fraction=0.3)
    predicted = fitted.predict(fed)
    assert_same(before, everything(model, optimizer))
    assert np.corrcoef(predicted, slopes)[0, 1] > 0.85  # it has seen them
    assert FeatureInfluenceModel(model=model, head=head).fit(pool, labels).head == name


def test_reads_texts_with_and_without_the_run(make_tiny_model: Any) -> None:
    model = make_tiny_model(seed=3, hidden_size=32)
    rows = make_rows(400, seed=2, low=4, high=30)
    rng = np.random.default_rng(0)
    ids = [rows.row(i)[0] for i in range(400)]
    rows = TokenRows.from_lists(ids, [np.where(rng.random(len(one)) < 0.3, IGNORED, one) for one in ids])
    rows = rows.take(rows.num_targets > 0)
    along = model.model(torch.arange(4, 60)[None]).last_hidden_state[0].mean(0).detach()
    direction, slopes = torch.outer(torch.from_numpy(rng.normal(size=64)).float(), along), []
    for i in range(len(rows)):
        one, wanted = (torch.from_numpy(part) for part in rows.row(i))
        states = model.model(one[None]).last_hidden_state[0, :-1].detach()
        weight = model.lm_head.weight.detach().clone().requires_grad_()
        loss = functional.cross_entropy(states @ weight.T, wanted[1:], ignore_index=IGNORED)
        slopes.append(float((torch.autograd.grad(loss, weight)[0] * direction).sum()))
    labels = labels_of(slopes, rows.num_targets)
    whole = FeatureInfluenceModel(model=model).fit(rows, labels)
    projected = FeatureInfluenceModel(model=model, num_errors=16).fit(rows, labels)
    assert whole.report.spearman > 0.5
    assert projected.report.spearman < whole.report.spearman
    empty = TokenRows.from_lists([[], [5], [5, 6, 7]], [[], [5], [5, IGNORED, IGNORED]])
    np.testing.assert_allclose(whole.predict(empty), labels.influence.mean(), atol=0.3 * labels.influence.std())
    assert whole.predict(TokenRows.from_lists([])).shape == (0,)
    pool = CandidatePool([{"input_ids": rows.row(i)[0], "labels": rows.row(i)[1]} for i in range(len(rows))])
    assert np.array_equal(whole.predict(pool), whole.predict(rows))
    mixed = rng.permutation(len(rows))  # a run hands over one row a label, in the labels' order
    fitted = FeatureInfluenceModel().for_run(model=model).fit(rows.take(mixed), labels.take(mixed))
    np.testing.assert_allclose(fitted.predict(rows), whole.predict(rows), atol=BATCHING * labels.influence.std())
    few = labels.take(np.arange(30))
    built = FeatureInfluenceModel(model=model).fit(rows, few, previous=whole)
    alone = FeatureInfluenceModel(model=model).fit(rows, few)
    rest = labels.take(np.arange(30, len(rows)))
    assert built.evaluate(rows, rest).spearman > alone.evaluate(rows, rest).spearman


def test_documents_of_a_packed_row_are_read_apart(make_tiny_model: Any) -> None:
    """A packed candidate has the mean over its targets, whatever document they are in."""
    model = make_tiny_model(seed=3, hidden_size=32)
    one, two = make_rows(2, seed=5, low=5, high=9).row(0)[0], make_rows(2, seed=6, low=10, high=14).row(0)[0]
    from mates_hf.data.pool import read_candidates

    packed = [{"input_ids": np.concatenate([one, two]), "seq_lengths": [len(one), len(two)]}]
    rows = read_candidates(packed)[1]
    plain = make_rows(60, seed=2, low=4, high=30)
    slopes = np.random.default_rng(0).normal(size=60)
    found = FeatureInfluenceModel(model=model).fit(plain, labels_of(slopes, plain.num_targets))
    each = found.predict(TokenRows.from_lists([one, two]))
    counts = np.array([len(one) - 1, len(two) - 1])
    np.testing.assert_allclose(found.predict(rows), [(each * counts).sum() / counts.sum()], rtol=1e-3, atol=1e-6)


# --- the live model, files, and what is refused ---


def test_the_live_model_is_left_as_found(digits: Digits) -> None:
    model, optimizer = digits.model.train(), digits.optimizer
    before = everything(model, optimizer)
    found = FeatureInfluenceModel(model=model).fit(digits.pool, digits.labels)
    first = found.predict(digits.pool)
    assert_same(before, everything(model, optimizer))
    assert np.array_equal(found.predict(digits.pool), first)  # no dropout
    assert pickle.loads(pickle.dumps(found)).model is None
    bad = CandidatePool([{**digits.pool.dataset[0], "labels": 77}], digits.pool.collate_fn)
    bad.reading = digits.pool.reading
    with pytest.raises(ValueError, match="Labels must be -100 or 0 to 9"):
        found.predict(bad)
    assert_same(before, everything(model, optimizer))


def test_predictions_at_other_weights_are_told_once(
    digits: Digits, fitted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import copy

    assert fitted.weights == live_digest(digits.model)
    other = copy.deepcopy(digits.model)
    with torch.no_grad():
        other.classifier.bias[3] += 1e-3
    with caplog.at_level(logging.WARNING):
        fitted.predict(digits.pool)
        fitted.evaluate(digits.pool, digits.labels, model=other)
        fitted.for_run(model=digits.model).predict(digits.pool, model=other)  # its guard judges that
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        fitted.predict(digits.pool, model=other)
        fitted.predict(digits.pool, model=other)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "A FeatureInfluenceModel predicts by a model whose weights are others than those it was fitted at"
    ]
    with pytest.raises(ValueError, match=r"states of width 32 and 10 classes, got 32 and 4\. Fit it again"):
        fitted.predict(digits.pool.select([int(np.flatnonzero(digits.labels.num_tokens)[0])]), model=tiny_vit_of(4))


def tiny_vit_of(num_labels: int) -> Any:
    model = tiny_vit()
    model.classifier = nn.Linear(32, num_labels)
    return model


@pytest.mark.parametrize("features", ["head_gradient", "hidden", "function"])
def test_what_is_saved_predicts_the_same(features: str, digits: Digits, tmp_path: Path) -> None:
    function = pixels if features == "function" else None
    model = FeatureInfluenceModel(function or features, digits.model, head="classifier").fit(
        digits.pool, digits.labels
    )
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "fit.json", "model.safetensors"]
    loaded = FeatureInfluenceModel.from_pretrained(tmp_path, features=function)
    assert (loaded.report, loaded.weights, loaded.head) == (model.report, model.weights, "classifier")
    with pytest.raises(ValueError, match=r"is saved without it\. Pass it"):
        loaded.predict(digits.pool)
    again = model.load_fitted(tmp_path).with_model(digits.model)
    for one in (loaded.with_model(digits.model), again):
        assert np.array_equal(one.predict(digits.pool), model.predict(digits.pool))
    if function:
        with pytest.raises(ValueError, match="must be the function that it was fitted with"):
            FeatureInfluenceModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, match in (({"num_classes": "x"}, "matrix"), ({"intercept": "x"}, "as it was fitted")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        if features == "head_gradient" or "intercept" in changes:
            with pytest.raises(MatesError, match=match):
                FeatureInfluenceModel.from_pretrained(tmp_path, features=function)


def pixels(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Features that a user could write: what is in an image, and its class."""
    assert not model.training
    return torch.cat([batch["pixel_values"].flatten(1), functional.one_hot(batch["labels"], 10)], 1)


def test_a_function_of_ones_own_is_taken_at_its_word(digits: Digits) -> None:
    found = FeatureInfluenceModel(pixels, digits.model).fit(digits.pool, digits.labels)
    assert found.report.spearman > 0.2
    for wrong, error, match in (
        (lambda model, batch: batch["pixel_values"], TypeError, r"one row a candidate, B = 420, got \(420, 1, 8, 8\)"),
        (lambda model, batch: 3, TypeError, "got int"),
        (lambda model, batch: torch.full((len(batch["labels"]), 2), torch.nan), InfluenceError, "finite numbers"),
    ):
        with pytest.raises(error, match=match):
            FeatureInfluenceModel(wrong, digits.model).fit(digits.pool, digits.labels)


class ConvHead(nn.Module):
    """Logits that no linear layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, pixel_values: Any, labels: Any = None) -> Any:
        logits = self.conv(self.layer(pixel_values.flatten(1))[:, None])[:, 0]
        return {"logits": logits, "loss": None if labels is None else functional.cross_entropy(logits, labels)}


def test_wrong_input_is_refused_by_name(digits: Digits, fitted: Any, make_tiny_model: Any) -> None:
    for arguments, match in (
        (
            {"features": "logits"},
            "`features` must be 'head_gradient', 'hidden', 'inputs', a function, or an encoder .*, got 'logits'",
        ),
        ({"num_errors": 0}, "`num_errors` must be a whole number of at least 1, got 0"),
        ({"tokens_per_batch": 1.5}, "`tokens_per_batch` must be"),
        ({"max_seconds": -1}, "`max_seconds` must be a number above 0, or None, got -1"),
        ({"seed": -1}, "`seed` must be"),
    ):
        with pytest.raises(ValueError, match=match):
            FeatureInfluenceModel(**arguments)
    with pytest.raises(TypeError, match="must be the live model"):
        FeatureInfluenceModel(model="vit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the model that trains"):
        FeatureInfluenceModel().fit(digits.pool, digits.labels)
    with pytest.raises(MatesError, match="must be fitted first"):
        FeatureInfluenceModel(model=digits.model).predict(digits.pool)
    with pytest.raises(
        ValueError, match=r"`head` must be a layer of the model.*got head\. Its last linear layers are"
    ):
        FeatureInfluenceModel(model=digits.model, head="head").fit(digits.pool, digits.labels)
    with pytest.raises(ValueError, match=r"`previous` must be a FeatureInfluenceModel with the same features"):
        FeatureInfluenceModel("hidden", digits.model).fit(digits.pool, digits.labels, previous=fitted)
    with pytest.raises(ValueError, match="Pass the pool that was probed"):
        fitted.evaluate(digits.pool, dataclasses.replace(digits.labels, num_tokens=2 * digits.labels.num_tokens))
    pool = CandidatePool(digits.pool.dataset, digits.pool.collate_fn)
    with pytest.raises(
        UnsupportedSettingError, match=r"no linear layer of ConvHead.*FeatureInfluenceModel\(features="
    ):
        FeatureInfluenceModel(model=ConvHead()).fit(pool, digits.labels)
    own = FeatureInfluenceModel(pixels, ConvHead()).fit(pool, digits.labels)  # the way out
    assert own.report.spearman > 0.2


def test_says_how_long_scoring_would_take(digits: Digits, fitted: Any) -> None:
    rows = digits.pool.candidates()
    short, long = (fitted.seconds_to_score(rows, num) for num in (1_000, 1_000_000))
    assert 0 < 50 * short < long
