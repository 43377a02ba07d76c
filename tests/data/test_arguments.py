"""What `measure`, `fit` and the callback say of an object of the wrong kind, and what a fitted model prints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.errors import MatesError
from mates_hf.influence.preconditioner import FreshOptimizerError
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels
from mates_hf.selection.selector import MatesSelector
from mates_hf.training.callback import MatesCallback

IDS = np.random.default_rng(0).integers(3, 64, (12, 8))
ROWS = TokenRows.from_lists(IDS.tolist())
DATASET = Dataset.from_dict({"input_ids": IDS.tolist()})
TASK = ReferenceTask(name="task", rows=ROWS)


def make_labels(num: int = 12) -> InfluenceLabels:
    values = np.random.default_rng(1).normal(size=num).astype(np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(num),
        influence=values,
        influence_per_token=values,
        loss=np.ones(num, np.float32),
        num_tokens=np.full(num, 7, np.int32),
        probe=np.array(["one_step"] * num),
    )


@pytest.mark.parametrize("probe", [DirectionalProbe(), OneStepProbe(), LossReductionProbe()])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": DATASET}, "`reference` must be a ReferenceTask, got Dataset.*from_dataset"),
        ({"reference": [DATASET]}, "got list"),
        ({"reference": "lambada"}, "got the text 'lambada'"),
        ({"reference": ReferenceTask}, "got the class ReferenceTask"),
        ({"reference": DATASET, "candidates": TASK}, "swapped"),
        ({"candidates": torch.tensor(IDS)}, r"got Tensor of shape \(12, 8\)\. .*input_ids"),
        ({"candidates": IDS}, "got ndarray of shape"),
        ({"candidates": IDS.tolist()}, "got list.*input_ids"),
        ({"candidates": ["a text"]}, "Tokenise the texts"),
        ({"candidates": torch.utils.data.DataLoader(DATASET)}, "dataloader.dataset"),
        ({"candidates": "path/to"}, "load_dataset"),
        ({"candidates": DATASET.to_pandas()}, "from_pandas"),
        ({"candidates": None}, "got NoneType"),
        ({"candidates": TASK}, "task.rows"),
        ({"candidates": Dataset}, "the class Dataset"),
        ({"model": "gpt2"}, "`model` must be the live model"),
        ({"model": torch.nn.Linear}, "got the class Linear"),
        ({"optimizer": None}, "`optimizer` must be the run's optimizer"),
        ({"optimizer": torch.optim.AdamW}, "got the class AdamW"),
        ({"model": "optimizer", "optimizer": "model"}, "swapped"),
    ],
)
def test_measure_says_what_it_was_given_and_how_to_make_it_right(probe, changes, message, make_tiny_model):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"model": model, "optimizer": optimizer, "reference": TASK, "candidates": DATASET, **changes}
    if changes.get("optimizer") == "model":
        given.update(model=optimizer, optimizer=model)
    with pytest.raises(TypeError, match=message):
        probe.measure(given["model"], given["optimizer"], given["reference"], given["candidates"])


@pytest.mark.parametrize("probe", [DirectionalProbe(), OneStepProbe(), LossReductionProbe()])
def test_a_fresh_optimizer_that_is_supported_is_said_to_be(probe, tiny_model):
    with pytest.raises(FreshOptimizerError, match=r"fresh RMSprop\. It is supported: train a step first"):
        probe.measure(tiny_model, torch.optim.RMSprop(tiny_model.parameters()), TASK, DATASET)


@pytest.mark.parametrize(
    ("candidates", "labels", "message"),
    [
        (DATASET, make_labels().influence, r"got ndarray of shape \(12,\)\. Pass all of `labels`"),
        (DATASET, DATASET, "got Dataset.*Make them with"),
        (DATASET, None, "got NoneType"),
        (DATASET, InfluenceLabels, "got the class InfluenceLabels"),
        (make_labels(), DATASET, "swapped"),
        (torch.tensor(IDS), make_labels(), "got Tensor"),
        (make_labels(), make_labels(), "Candidates come before labels"),
    ],
)
def test_fit_says_what_it_was_given_and_how_to_make_it_right(candidates, labels, message):
    with pytest.raises(TypeError, match=message):
        NgramInfluenceModel().fit(candidates, labels)


@pytest.mark.parametrize("few", [DATASET.select(range(5)), list(DATASET)[:5], ROWS.take(np.arange(5))])
def test_fewer_candidates_than_were_measured_are_said_to_be_others(few):
    for candidates in (few, *([CandidatePool(few)] if not isinstance(few, TokenRows) else [])):
        with pytest.raises(ValueError, match="were measured, got 5 rows for labels of rows up to 11"):
            NgramInfluenceModel().fit(candidates, make_labels())
    view = CandidatePool(DATASET).select([0, 1])  # counts in the rows of the whole pool, so it has them all
    assert NgramInfluenceModel().fit(view, make_labels()).report.num_labels


def test_an_influence_model_prints_its_arguments_and_its_fit():
    model = NgramInfluenceModel(num_buckets=2**10, labels="document")
    assert repr(model) == "NgramInfluenceModel(num_buckets=1024, labels='document')\n  not fitted"
    with pytest.raises(MatesError, match="must be fitted first"):
        model.predict(DATASET)
    assert "fitted on 10 labels, held-out Spearman" in repr(model.fit(DATASET, make_labels()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MatesCallback(TASK, probe=DirectionalProbe),
            r"class DirectionalProbe\. Call it: `Dir.*\(\)",
        ),
        (lambda: MatesCallback(TASK, probe="directional"), "`probe` must have `measure` and `for_run`"),
        (lambda: MatesCallback(TASK, probe=NgramInfluenceModel()), "got NgramInfluenceModel"),
        (lambda: MatesCallback(TASK, influence_model=NgramInfluenceModel), "the class NgramInfluenceModel"),
        (lambda: MatesCallback(TASK, influence_model="ngram"), "`fit` and `predict` and `save_pretrained`"),
        (lambda: MatesSelector(make_labels()), "`influence_model` must have `predict`.*got InfluenceLabels"),
        (lambda: MatesSelector(NgramInfluenceModel), "the class NgramInfluenceModel"),
        (lambda: MatesSelector(None), "got NoneType"),
        (lambda: ReferenceTask(name="x", rows=DATASET), "`rows` must be TokenRows, got Dataset.*from_dataset"),
        (lambda: ReferenceTask(name="x", rows=IDS.tolist()), "got list"),
        (lambda: ReferenceTask(name=3, rows=ROWS), "`name` must be a str"),
        (lambda: ReferenceTask(name="x", rows=ROWS, description="y"), "`description` a mapping"),
    ],
)
def test_classes_names_and_labels_are_refused_where_an_instance_belongs(make, message):
    with pytest.raises(TypeError, match=message):
        make()
