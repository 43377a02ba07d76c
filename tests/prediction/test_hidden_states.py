"""The hidden-state ridge on a tiny Llama: whose states it reads, what it leaves as found, what is saved of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.errors import MatesError
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.records import InfluenceLabels
from tests.engine.test_preserve import assert_same, everything
from tests.prediction.test_encoder import VOCAB, make_labels, make_rows, shuffled

BATCHING = 1e-5  # padding changes the order in which float32 attention sums


@pytest.fixture(scope="module")
def live(make_tiny_model: Any) -> Any:
    return make_tiny_model(seed=3, hidden_size=64)  # as wide as the vocabulary: words can be told apart


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    return make_rows(200)


@pytest.fixture(scope="module")
def labels(rows: TokenRows) -> InfluenceLabels:
    return make_labels(rows)


@pytest.fixture(scope="module")
def fitted(live: Any, rows: TokenRows, labels: InfluenceLabels) -> HiddenStateInfluenceModel:
    return HiddenStateInfluenceModel(live).fit(rows, labels)


def states_one_by_one(model: Any, rows: TokenRows, layers: list[int]) -> np.ndarray:
    """Mean state over the targets of each row, by the slowest way: no padding, all outputs."""
    found = []
    for i in range(len(rows)):
        ids, labels = rows.row(i)
        with torch.no_grad():
            states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
        where = torch.from_numpy(labels != IGNORED)
        found.append(torch.cat([states[layer][0][where].mean(0) for layer in layers]).numpy())
    return np.array(found)


# --- what is learned, with its sign ---


def test_ranks_unseen_candidates_and_flips_with_the_labels(live: Any, rows: TokenRows, fitted: Any) -> None:
    unseen = make_rows(150, seed=1)
    truth = make_labels(unseen, noise=0.0)
    report = fitted.evaluate(unseen, truth)
    assert report.spearman > 0.7
    assert report.passes(0.5)
    assert 0.6 < report.slope < 1.5
    assert fitted.report.passes(0.3)
    flipped = HiddenStateInfluenceModel(live).fit(rows, make_labels(rows, sign=-1))
    assert flipped.evaluate(unseen, truth).spearman < -0.7


def test_shuffled_labels_do_not_pass(live: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    found = HiddenStateInfluenceModel(live).fit(rows, shuffled(labels), held_out_fraction=0.3)
    assert not found.report.passes(0.1)
    assert found.predict(rows).std() < 0.35 * labels.influence.std()


@pytest.mark.parametrize("layers", [[-1], [1], [0, -1], None])
def test_reads_the_mean_state_over_trained_tokens(layers: list[int] | None, live: Any) -> None:
    """Influence that is a line in the states of this very model and these layers is found; rows are masked."""
    plain = make_rows(150, seed=2, low=4, high=30)
    rng = np.random.default_rng(0)
    masked = [np.where(rng.random(len(plain.row(i)[0])) < 0.3, IGNORED, plain.row(i)[0]) for i in range(150)]
    rows = TokenRows.from_lists([plain.row(i)[0] for i in range(150)], masked)
    rows = rows.take(rows.num_targets > 0)
    states = states_one_by_one(live, rows, layers or [0, 1, -1])
    per_token = ((states - states.mean(0)) @ rng.normal(size=states.shape[1])).astype(np.float32)
    labels = dataclasses.replace(make_labels(rows), influence_per_token=per_token, influence=per_token, step_size=1.0)
    found = HiddenStateInfluenceModel(live, layers=layers).fit(rows, labels)
    assert found.report.spearman > 0.95  # of what rows of several lengths are worth, 30 held out
    np.testing.assert_allclose(found.predict(rows), per_token, atol=0.15 * float(per_token.std()))
    turned = dataclasses.replace(labels, influence_per_token=-per_token, influence=-per_token)
    assert np.allclose(
        HiddenStateInfluenceModel(live, layers=layers).fit(rows, turned).predict(rows), -found.predict(rows)
    )


def test_units_groups_and_rows_without_target(
    rows: TokenRows, labels: InfluenceLabels, live: Any, fitted: Any
) -> None:
    np.testing.assert_allclose(fitted.predict(rows), fitted.predict_per_token(rows) * 0.01, rtol=1e-6)
    empty = TokenRows.from_lists([[], [5], [5, 6, 7]], [[], [5], [5, IGNORED, IGNORED]])
    predicted = fitted.predict(empty)
    assert predicted == pytest.approx(np.full(3, labels.influence.mean()), abs=0.1 * float(labels.influence.std()))
    assert fitted.predict(TokenRows.from_lists([])).shape == (0,)
    grouped = HiddenStateInfluenceModel(live).fit(rows, labels, groups=np.arange(200) % 2)
    assert grouped.report.spearman_within_group is not None
    assert np.array_equal(grouped.predict(rows), fitted.predict(rows))
    tokens = datasets.Dataset.from_dict({"input_ids": [rows.row(i)[0].tolist() for i in range(len(rows))]})
    assert np.array_equal(fitted.predict(CandidatePool(tokens)), fitted.predict(rows))


def test_an_earlier_round_helps_when_labels_are_few(live: Any, fitted: Any) -> None:
    few, unseen = make_rows(20, seed=7), make_rows(120, seed=8)
    measured, truth = make_labels(few, noise=0.2, step_size=1.0), make_labels(unseen, noise=0.0, step_size=1.0)
    before = fitted.predict(unseen)
    alone = HiddenStateInfluenceModel(live).fit(few, measured).evaluate(unseen, truth)
    built = HiddenStateInfluenceModel(live).fit(few, measured, previous=fitted)
    assert built.evaluate(unseen, truth).spearman > alone.spearman + 0.03
    assert 0.3 < built.predict(unseen).std() / truth.influence.std() < 2
    assert np.array_equal(fitted.predict(unseen), before)


def test_a_prediction_does_not_depend_on_the_rows_beside_it(
    fitted: Any, live: Any, labels: InfluenceLabels, in_float32: None
) -> None:
    unseen = make_rows(40, seed=4, low=2, high=60)
    together = fitted.predict(unseen)
    alone = np.concatenate([fitted.predict(unseen.take(np.array([i]))) for i in range(40)])
    np.testing.assert_allclose(alone, together, rtol=BATCHING, atol=BATCHING * float(labels.influence.std()))


# --- the live model ---


def test_the_live_model_is_left_as_found(make_tiny_model: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    model = make_tiny_model(attention_dropout=0.3).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
    optimizer.step()
    before = everything(model, optimizer)
    found = HiddenStateInfluenceModel(model).fit(rows, labels)
    first = found.predict(rows)
    assert_same(before, everything(model, optimizer))
    assert np.array_equal(found.predict(rows), first)  # no dropout
    assert model(torch.tensor([[4, 5]]), output_hidden_states=True).hidden_states is not None
    before = everything(model, optimizer)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(found.predict(rows), first)
    bad = TokenRows.from_lists([[4, 5, VOCAB]])
    with pytest.raises(ValueError, match="0 to 63, got 4 to 64"):
        found.predict(bad)
    assert_same(before, everything(model, optimizer))


def test_the_model_is_neither_copied_nor_pickled(live: Any, rows: TokenRows, labels: InfluenceLabels) -> None:
    """A round fits a deep copy of the run's influence model."""
    model = HiddenStateInfluenceModel(live)
    twin = copy.deepcopy(model)
    assert twin.model is live
    twin.fit(rows, labels)
    with pytest.raises(MatesError, match="must be fitted first"):
        _ = model.report
    assert pickle.loads(pickle.dumps(twin)).model is None


def test_states_follow_the_model(make_tiny_model: Any, rows: TokenRows, labels: InfluenceLabels, fitted: Any) -> None:
    """The same ridge on another model's states is another prediction, and says so where it cannot be."""
    other = make_tiny_model(seed=9, hidden_size=64)
    assert not np.allclose(fitted.predict(rows, model=other), fitted.predict(rows), rtol=1e-2)
    assert np.array_equal(fitted.with_model(other).predict(rows), fitted.predict(rows, model=other))
    assert fitted.for_run(model=other) is fitted
    assert HiddenStateInfluenceModel().for_run(model=other).model is other
    narrow = make_tiny_model(hidden_size=16)
    with pytest.raises(ValueError, match="same width \\(48\\), got 192"):
        fitted.predict(rows, model=narrow)


def test_wrapped_models_are_read_through(live: Any, rows: TokenRows, fitted: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(live), peft.LoraConfig(target_modules=["q_proj"]))
    assert np.array_equal(fitted.predict(rows, model=adapted), fitted.predict(rows))  # an adapter begins at zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    assert not np.allclose(fitted.predict(rows, model=adapted), fitted.predict(rows), rtol=1e-3)


# --- files, and what is refused ---


def test_the_ridge_is_saved_and_the_model_is_not(
    tmp_path: Path, live: Any, rows: TokenRows, labels: InfluenceLabels, fitted: Any
) -> None:
    fitted.save_pretrained(tmp_path / "m")
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) < 10_000
    loaded = HiddenStateInfluenceModel.from_pretrained(tmp_path / "m")
    assert loaded.report == fitted.report
    with pytest.raises(ValueError, match="is saved without.*Pass it"):
        loaded.predict(rows)
    assert np.array_equal(loaded.predict(rows, model=live), fitted.predict(rows))
    bound = HiddenStateInfluenceModel.from_pretrained(tmp_path / "m", model=live)
    assert np.array_equal(bound.predict(rows), fitted.predict(rows))
    few = make_rows(20, seed=7)
    later = [HiddenStateInfluenceModel(live).fit(few, make_labels(few), previous=m) for m in (fitted, loaded)]
    assert np.array_equal(later[0].predict(rows), later[1].predict(rows))

    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for changes, error, match in (
        ({"intercept": "x"}, MatesError, "must hold a model as it was fitted"),
        ({"layers": "x"}, MatesError, "`layers` must be None or whole numbers"),
        ({"format_version": 99}, ValueError, "Upgrade"),
        ({"kind": "EncoderInfluenceModel"}, ValueError, "must hold a HiddenStateInfluenceModel"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=match):
            HiddenStateInfluenceModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(MatesError, match="must be as it was written"):
        HiddenStateInfluenceModel.from_pretrained(tmp_path / "m")


def test_wrong_input_is_refused_by_name(rows: TokenRows, labels: InfluenceLabels, live: Any, fitted: Any) -> None:
    with pytest.raises(ValueError, match="`layers` must be None or whole numbers, got 'last'"):
        HiddenStateInfluenceModel(layers="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`tokens_per_batch` must be a whole number of at least 1, got 0"):
        HiddenStateInfluenceModel(tokens_per_batch=0)
    with pytest.raises(TypeError, match="must be a model of transformers.*got Linear"):
        HiddenStateInfluenceModel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs the model that trains"):
        HiddenStateInfluenceModel().fit(rows, labels)
    with pytest.raises(ValueError, match=r"`layers` must be among the model's 3 hidden states \(0 to 2\), got 7"):
        HiddenStateInfluenceModel(live, layers=[0, 7]).fit(rows, labels)
    with pytest.raises(MatesError, match="must be fitted first"):
        HiddenStateInfluenceModel(live).predict(rows)
    with pytest.raises(ValueError, match="Pass the pool that was probed"):
        fitted.evaluate(make_rows(200, seed=70), labels)
    with pytest.raises(ValueError, match="`previous` must be a HiddenStateInfluenceModel, got str"):
        HiddenStateInfluenceModel(live).fit(rows, labels, previous="round-1")  # type: ignore[arg-type]


def test_selects_within_a_trainer_run(tmp_path: Path) -> None:
    from transformers import Trainer, default_data_collator

    from mates_hf.training.callback import MatesCallback
    from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config

    model = make_model()
    Trainer(
        model=model,
        args=make_arguments(tmp_path, max_steps=12),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        callbacks=[MatesCallback(make_reference(), small_config(), influence_model=HiddenStateInfluenceModel(model))],
    ).train()
    scores = np.load(tmp_path / "_mates" / "round-0001" / "scores.npy")
    assert np.isfinite(scores).all()
    assert scores.std() > 0
