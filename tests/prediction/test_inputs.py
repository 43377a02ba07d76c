"""The ridge on small copies of inputs times labels: equal to the product built, without a pass, over all rounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mates_hf.data.batches import ModelBatch
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.errors import InfluenceError, MatesError, UnsupportedSettingError
from mates_hf.prediction.feature_model import FeatureInfluenceModel
from mates_hf.prediction.features import inputs as inputs_module
from mates_hf.prediction.features.inputs import NUM_CODES, Inputs, fit_inputs, small_copy
from mates_hf.prediction.ridge import PENALTIES, leave_one_out_errors, ridge_coefficients
from tests.prediction.test_features import Digits, labels_of, pixels
from tests.prediction.test_features import digits as unread_digits

__all__ = ["unread_digits"]  # a fixture
FACTORED = 1e-6  # of float64 sums in another order


class NotRun(torch.nn.Module):
    """A model that must not be run."""

    def forward(self, **_: Any) -> Any:
        raise AssertionError("run")


@pytest.fixture(scope="module")
def digits(unread_digits: Digits) -> Digits:
    """Digits whose model was asked once how it reads a row; nothing after that runs it."""
    pool = CandidatePool(unread_digits.pool.dataset, unread_digits.pool.collate_fn)
    with pytest.raises(ValueError, match=r"How the rows of a pool are trained on must be known.*Pass it once"):
        FeatureInfluenceModel("inputs").fit(pool, unread_digits.labels)
    FeatureInfluenceModel("inputs", unread_digits.model).fit(pool, unread_digits.labels)
    assert pool.reading is not None
    return unread_digits._replace(pool=pool)


@pytest.fixture(scope="module")
def fitted(digits: Digits) -> FeatureInfluenceModel:
    return FeatureInfluenceModel("inputs", NotRun()).fit(digits.pool, digits.labels)


def batch_of(labels: Any, **given: Any) -> ModelBatch:
    return ModelBatch(given, torch.as_tensor(labels), shifted=False)


def product(found: Inputs) -> Any:
    """(N, (D + 1) V) the features, built."""
    mean, divisor = found.scaling()
    numbers = np.concatenate([(found.numbers - mean) / divisor, np.ones((len(found.numbers), 1))], 1)
    return np.einsum("nd,nv->ndv", numbers, found.bags()).reshape(len(numbers), -1)


# --- what is learned, with its sign ---


def test_held_out_labels_are_predicted_without_a_pass(digits: Digits, fitted: FeatureInfluenceModel) -> None:
    assert fitted.report.spearman > 0.4
    assert fitted.weights is None
    shown = FeatureInfluenceModel(lambda model, batch: pixels(model, batch)[:, :64], digits.model)
    assert shown.fit(digits.pool, digits.labels).report.spearman < fitted.report.spearman - 0.1
    flipped = FeatureInfluenceModel("inputs").fit(digits.pool, labels_of(-digits.labels.influence_per_token))
    np.testing.assert_allclose(flipped.predict(digits.pool), -fitted.predict(digits.pool), atol=1e-6)
    per_token = fitted.predict_per_token(digits.pool)
    np.testing.assert_allclose(fitted.predict(digits.pool), per_token * digits.labels.step_size, rtol=1e-5)


def test_flops_are_those_of_reading_and_not_of_a_pass(digits: Digits, fitted: FeatureInfluenceModel) -> None:
    passed = FeatureInfluenceModel(model=digits.model).fit(digits.pool, digits.labels).report.flops
    assert 0 < float(fitted.report.flops or 0.0) < float(passed or 0.0) / 1_000


def test_the_fit_is_the_ridge_on_the_product_built(digits: Digits) -> None:
    found = Inputs.read(digits.pool.candidates().take(np.arange(80)))
    rng = np.random.default_rng(0)
    target = rng.normal(size=80)
    line = fit_inputs(found, target)
    built = product(found)
    centred = built - built.mean(0)
    penalty = min(zip(leave_one_out_errors(centred, target, PENALTIES), PENALTIES, strict=True))[1]
    coefficient = ridge_coefficients(centred, target, penalty)
    np.testing.assert_allclose(line.z_scores(found), target.mean() + centred @ coefficient, atol=FACTORED)


def test_numbers_count_alike_whatever_their_unit_and_shift() -> None:
    rng = np.random.default_rng(1)
    pictures, measured = rng.normal(size=(60, 3, 12, 12)), rng.normal(size=(60, 5))
    target, labels = rng.normal(size=60), rng.integers(0, 4, 60)

    def scores(first: float, second: float) -> Any:
        given = {"pixel_values": torch.tensor(first * pictures), "measured": torch.tensor(second * measured + 7)}
        found = Inputs.of(batch_of(labels, **given))
        return fit_inputs(found, target).z_scores(found)

    np.testing.assert_allclose(scores(1, 1), scores(100, 0.01), atol=1e-4)
    still = Inputs.of(batch_of(labels, pixel_values=torch.ones(60, 3, 8, 8)))  # pictures that are all the same
    assert np.isfinite(fit_inputs(still, target).z_scores(still)).all()


# --- what is read ---


@pytest.mark.parametrize(
    ("shape", "width"),
    [((4, 7), 7), ((4, 1000), 1000), ((4, 16000), 64), ((4, 80, 3000), 256), ((4, 1, 8, 8), 64),
     ((4, 3, 224, 224), 192), ((4, 8, 3, 32, 32), 256), ((4, 8, 16), 128), ((4,), 1)],
)  # fmt: skip
def test_a_small_copy_has_some_hundred_numbers(shape: tuple[int, ...], width: int) -> None:
    values = torch.randn(shape)
    copy = small_copy(values)
    assert copy.shape == (4, width)
    if len(shape) > 2 and shape[-1] <= 8:
        assert torch.equal(copy, values.flatten(1))
    assert torch.equal(small_copy(values[2:3]), copy[2:3])


def test_a_wave_is_kept_by_its_loudness() -> None:
    time = torch.arange(16000) / 16000
    loud_late = torch.sin(2000 * time) * time
    copy = small_copy(torch.stack([loud_late, -loud_late]))
    torch.testing.assert_close(copy[0], copy[1])
    assert bool((copy[0, 1:] > copy[0, :-1] - 0.05).all())
    assert copy[0, -1] > 10 * copy[0, 0]


def test_labels_count_by_token_and_by_token_and_place() -> None:
    sounds = torch.zeros(4, 3, 8)
    labels = [[5, 6, -100], [6, 5, -100], [5, 6, 7], [-100, 5, 6]]
    bags = Inputs.of(batch_of(labels, input_features=sounds)).bags()
    assert bags.shape == (4, NUM_CODES)
    np.testing.assert_allclose(bags.sum(1), 1.5, rtol=1e-6)  # labels, and what all have
    same = bags @ bags.T
    assert same[0, 0] == same[0, 3] > same[0, 1] > 0.25  # places count from a row's first label
    classes = Inputs.of(batch_of([1, 2, 1, 3], pixel_values=torch.zeros(4, 1, 4, 4))).bags()
    assert np.allclose(classes @ classes.T, np.where(np.array([1, 2, 1, 3])[:, None] == [1, 2, 1, 3], 1.25, 0.25))


def test_pairs_of_images_and_texts_are_told_by_their_texts() -> None:
    given = {"input_ids": torch.tensor([[1, 4, 2], [1, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    found = Inputs.of(batch_of([], pixel_values=torch.zeros(2, 3, 4, 4), **given))
    assert np.bincount(found.owners).tolist() == [7, 5]  # each token twice, and one for all


def test_measured_labels_are_numbers() -> None:
    found = Inputs.of(batch_of(torch.tensor([0.5, 2.0]), measured=torch.zeros(2, 3)))
    assert found.numbers.tolist() == [[0, 0, 0, 0.5], [0, 0, 0, 2]]
    assert found.codes.tolist() == [NUM_CODES - 1] * 2


def test_rows_alone_and_together_are_read_alike(digits: Digits) -> None:
    rows = digits.pool.candidates().take(np.arange(70))
    one, other = Inputs.read(rows), [Inputs.of(rows.batch(np.array([i]), "cpu")) for i in range(70)]
    assert np.array_equal(one.numbers, np.concatenate([part.numbers for part in other]))
    assert np.array_equal(one.codes, np.concatenate([part.codes for part in other]))


@pytest.mark.parametrize("kept", [np.arange(6) % 2 == 0, np.zeros(6, bool), np.ones(6, bool)])
def test_some_candidates_keep_their_codes(kept: Any) -> None:
    rng = np.random.default_rng(2)
    found = Inputs.of(batch_of(rng.integers(0, 9, (6, 5)), pixel_values=torch.randn(6, 1, 4, 4)))
    some = found.take(kept)
    assert np.array_equal(some.bags(), found.bags()[kept])
    assert np.array_equal(some.joined(found).bags(), np.concatenate([found.bags()[kept], found.bags()]))


# --- rounds ---


def test_labels_of_earlier_rounds_are_fitted_along(digits: Digits, fitted: FeatureInfluenceModel) -> None:
    values = digits.labels.influence_per_token
    first, second = (
        labels_of(values[ids] * unit + shift, ids=ids)
        for ids, unit, shift in ((np.arange(0, 200), 40.0, 3.0), (np.arange(200, 215), 1.0, 0.0))
    )
    rest = digits.labels.take(np.arange(215, len(values)))
    before = FeatureInfluenceModel("inputs").fit(digits.pool, first)
    built = FeatureInfluenceModel("inputs").fit(digits.pool, second, previous=before)
    alone = FeatureInfluenceModel("inputs").fit(digits.pool, second)
    assert built.evaluate(digits.pool, rest).spearman > alone.evaluate(digits.pool, rest).spearman
    # Labels of other units are no other labels, and the predictions have the unit of the newest.
    plain = FeatureInfluenceModel("inputs").fit(digits.pool, digits.labels.take(np.arange(200)))
    again = FeatureInfluenceModel("inputs").fit(digits.pool, second, previous=plain)
    np.testing.assert_allclose(built.predict(digits.pool), again.predict(digits.pool), atol=1e-6)


def test_the_newest_labels_are_kept(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "MOST_LABELS", 100)
    found = Inputs.read(digits.pool.candidates().take(np.arange(120)))
    line, rng = None, np.random.default_rng(3)
    for start in (0, 40, 80):
        line = fit_inputs(
            found.take((np.arange(120) >= start) & (np.arange(120) < start + 40)), rng.normal(size=40), line
        )
        assert line.values[-1] != 0
    assert line is not None
    assert len(line.values) == 100
    assert np.array_equal(line.seen.numbers, found.numbers[20:])
    many = fit_inputs(found, rng.normal(size=120), line)  # more than that at once: all of them, and no earlier one
    assert np.array_equal(many.seen.numbers, found.numbers)


# --- files ---


def test_what_is_saved_predicts_the_same_and_goes_on(digits: Digits, tmp_path: Path, fitted: Any) -> None:
    fitted.save_pretrained(tmp_path)
    loaded = FeatureInfluenceModel.from_pretrained(tmp_path)
    assert (loaded.features, loaded.weights, loaded.report) == ("inputs", None, fitted.report)
    assert np.array_equal(loaded.predict(digits.pool), fitted.predict(digits.pool))
    some = digits.labels.take(np.arange(50))
    one, other = (FeatureInfluenceModel("inputs").fit(digits.pool, some, previous=model) for model in (loaded, fitted))
    assert np.array_equal(one.predict(digits.pool), other.predict(digits.pool))
    assert np.array_equal(fitted.load_fitted(tmp_path).predict(digits.pool), fitted.predict(digits.pool))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", None), ("values", lambda x: x[1:]), ("divisor", lambda x: x * 0),
        ("seen.codes", lambda x: x + NUM_CODES), ("seen.owners", lambda x: x - 1),
        ("seen.numbers", lambda x: x * np.nan), ("seen.widths", lambda x: x + 1),
        ("coefficient", lambda x: x[:-1]), ("mean", lambda x: x + np.inf), ("seen.shares", lambda x: x[1:]),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(name: str, change: Any, tmp_path: Path, fitted: Any) -> None:
    fitted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(found))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MatesError):
        FeatureInfluenceModel.from_pretrained(tmp_path)


# --- bad input ---


def test_bad_input_is_named(digits: Digits, fitted: Any) -> None:
    text = TokenRows.from_lists([[3, 4, 5 + i] for i in range(30)])
    with pytest.raises(UnsupportedSettingError, match=r"and the rows have none.*For text use `NgramInfluenceModel`"):
        FeatureInfluenceModel("inputs").fit(text, labels_of(np.arange(30.0), text.num_targets))
    with pytest.raises(InfluenceError, match="must be finite numbers, got NaN"):
        Inputs.of(batch_of([1], pixel_values=torch.full((1, 3, 8, 8), torch.nan)))
    other = CandidatePool([{"pixel_values": torch.zeros(1, 4, 4), "labels": 1}] * 3, digits.pool.collate_fn)
    other.reading = digits.pool.reading
    with pytest.raises(ValueError, match=r"candidates like those of its fit, of \(64,\) numbers, got \(16,\)"):
        fitted.predict(other)
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match=r"`previous` must have been fitted on candidates like these"):
        fit_inputs(Inputs.of(batch_of([1, 2], x=torch.randn(2, 9))), rng.normal(size=2), fitted._line)
    hidden = FeatureInfluenceModel("hidden", digits.model).fit(digits.pool, digits.labels)
    with pytest.raises(ValueError, match=r"`previous` must be .* with the same features \('inputs'\), got 'hidden'"):
        FeatureInfluenceModel("inputs").fit(digits.pool, digits.labels, previous=hidden)


def test_inputs_of_several_widths_are_refused_and_of_several_sizes_are_not() -> None:
    def pool(*shapes: tuple[int, ...]) -> Any:
        rows = [{"x": torch.randn(shape), "labels": 1} for shape in shapes]

        @dataclasses.dataclass
        class Rows:
            one_by_one = True

            def __len__(self) -> int:
                return len(rows)

            def batch(self, index: Any, device: str) -> ModelBatch:
                (row,) = (rows[i] for i in index)
                return batch_of([row["labels"]], x=row["x"][None])

        return Rows()

    assert Inputs.read(pool((3, 20, 30), (3, 64, 9))).widths == (192,)
    with pytest.raises(UnsupportedSettingError, match=r"as many numbers in each candidate, got \(5,\) and \(6,\)"):
        Inputs.read(pool((5,), (6,)))
