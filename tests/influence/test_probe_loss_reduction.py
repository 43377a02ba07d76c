"""Labels by training on the reference task: what they are, that they last, and what is done where it diverges."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mates_hf import LossReductionProbe, NgramInfluenceModel
from mates_hf.errors import InfluenceError
from mates_hf.flops import PASSAGES_PER_STEP
from mates_hf.influence.passes import token_losses
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import MAX_RISE
from tests.engine.test_preserve import assert_same, everything
from tests.influence.test_probes import (
    Live,
    adamw,
    batch_gradient,
    chain_rows,
    join,
    make_live,  # noqa: F401
    random_rows,
    sgd,
    task,
    trained,  # noqa: F401
)


@pytest.mark.parametrize("make_optimizer", [adamw, lambda model: sgd(model, momentum=0.9)], ids=["adamw", "sgd"])
def test_labels_are_what_training_on_the_passages_by_hand_takes_off(
    make_live: Callable[..., Live],  # noqa: F811
    make_optimizer: Any,
) -> None:
    model, optimizer = make_live(make_optimizer)
    passages, candidates = random_rows(2 * PASSAGES_PER_STEP, 100), random_rows(5, 200)
    labels = LossReductionProbe(passes=1.5, max_grad_norm=0.5, seed=7).measure(
        model, optimizer, task(passages), candidates
    )

    copied, own = copy.deepcopy((model, optimizer))
    before = token_losses(copied, candidates)
    rng = np.random.default_rng(7)
    order = np.concatenate([rng.permutation(len(passages)) for _ in range(2)])[: 3 * PASSAGES_PER_STEP]
    for share in np.split(order, 3):
        gradients = batch_gradient(copied, passages.take(np.sort(share)))
        for parameter, gradient in zip(copied.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(copied.parameters(), 0.5)
        own.step()
    lost = before - token_losses(copied, candidates)
    np.testing.assert_allclose(labels.token_derivatives, lost, atol=2e-5 * np.abs(lost).max())
    starts = np.concatenate([[0], np.cumsum(candidates.num_targets)])
    means = [lost[begin:end].mean() for begin, end in zip(starts[:-1], starts[1:], strict=True)]
    np.testing.assert_allclose(labels.influence, means, atol=2e-5 * np.abs(lost).max())
    np.testing.assert_array_equal(labels.influence, labels.influence_per_token)
    assert (labels.kind, labels.info["num_steps"], labels.info["rate"]) == ("loss_reduction", 3, 1.0)
    assert labels.info["flops"] > 0
    assert labels.reference_losses is not None
    weighted = np.average(labels.reference_losses[:, 0], weights=labels.reference_losses[:, 1])
    assert weighted == pytest.approx(labels.info["reference_loss"], rel=1e-5)


def test_a_share_of_the_passages_and_a_passage_without_a_target(make_live: Callable[..., Live]) -> None:  # noqa: F811
    model, optimizer = make_live(adamw)
    passages = join(random_rows(40, 100), random_rows(1, 3, 1, 2))
    labels = LossReductionProbe(passes=0.5).measure(model, optimizer, task(passages), random_rows(5, 200))
    assert labels.info["num_steps"] == 1  # of 20 passages
    assert np.isfinite(labels.reference_losses).all()


def test_its_labels_are_fitted_and_rank_texts_that_are_like_the_reference(trained: Live) -> None:  # noqa: F811
    model, optimizer = trained
    candidates = join(chain_rows(60, 12, 1), chain_rows(60, 13, 7), random_rows(60, 14, 12, 13))
    labels = LossReductionProbe(passes=2).measure(model, optimizer, task(chain_rows(48, 9, 1)), candidates)
    assert labels.influence[:60].mean() > max(labels.influence[60:120].mean(), labels.influence[120:].mean())
    fitted = NgramInfluenceModel(seed=0).fit(candidates, labels)
    assert fitted.report.probe == "loss_reduction"
    assert spearmanr(fitted.predict(candidates), labels.influence).statistic > 0.5


def test_labels_with_a_horizon_outlast_training_on_what_they_are_of(trained: Live) -> None:  # noqa: F811
    """Those of the margin are used up: after some steps on the reference's kind they no longer are what they were."""
    candidates = join(chain_rows(48, 12, 1), chain_rows(48, 13, 7), random_rows(48, 14, 12, 13))
    reference = task(chain_rows(64, 9, 1))
    kept = {}
    for probe in (DirectionalProbe(path_steps=16), LossReductionProbe(passes=8)):
        model, optimizer = copy.deepcopy(trained)
        first = probe.measure(model, optimizer, reference, candidates).influence
        more = chain_rows(160, 21, 1)
        for begin in range(0, 160, 8):
            gradients = batch_gradient(model, more.take(np.arange(begin, begin + 8)))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        kept[type(probe)] = spearmanr(
            first, probe.measure(model, optimizer, reference, candidates).influence
        ).statistic
    assert kept[LossReductionProbe] > kept[DirectionalProbe]


@pytest.mark.parametrize(("rate", "ends"), [(5.0, "goes on"), (1e38, "is an error")])
def test_where_training_on_the_passages_diverges_it_is_tried_at_a_lower_rate(
    make_live: Callable[..., Live],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    rate: float,
    ends: str,
) -> None:
    model, optimizer = make_live(lambda model: sgd(model, momentum=0.9))
    passages, candidates = chain_rows(128, 9, 1), random_rows(5, 200)
    before = everything(model, optimizer)
    probe = LossReductionProbe(passes=4, learning_rates=(rate,))
    with caplog.at_level(logging.WARNING):
        if ends == "is an error":
            with pytest.raises(InfluenceError, match="learning rate"):
                probe.measure(model, optimizer, task(passages), candidates)
        else:
            labels = probe.measure(model, optimizer, task(passages), candidates)
            assert labels.info["rate"] < 1
            rise = np.mean(labels.info["step_losses"][-8:]) - np.mean(labels.info["start_losses"][-8:])
            assert (rise <= MAX_RISE) != ("Labels may be noise" in caplog.text)
            one = LossReductionProbe(passes=4, learning_rates=(1e-3,))
            assert labels.info["flops"] > one.measure(model, optimizer, task(passages), candidates).info["flops"]
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize(
    "wrong", [{"passes": 0}, {"passes": 65}, {"max_grad_norm": -1.0}, {"tokens_per_batch": 0}], ids=str
)
def test_what_it_is_given_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossReductionProbe(**wrong)


def test_the_gradient_is_gone_afterwards(make_live: Callable[..., Live]) -> None:  # noqa: F811
    model, optimizer = make_live(adamw)
    model.zero_grad()
    LossReductionProbe().measure(model, optimizer, task(random_rows(8, 100)), random_rows(5, 200))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(next(model.parameters()), torch.nn.Parameter)
