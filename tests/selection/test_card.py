"""The card of a published influence model: what it claims, what the Hub reads of it, and names that mean harm."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard

from mates_hf.data.rows import TokenRows
from mates_hf.disk import sha256_of
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.ridge import FitTarget
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.selection.card import write_card
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import fit_model, make_lists

REPORT = FitReport(num_labels=80, num_held_out=20, spearman=0.41237, interval=(0.1, 0.6), probe="path")
HOSTILE = [
    "a | b",
    "trailing \\",
    "pipe \\| escaped",
    "line\nbreak\r\nand | more",
    "---\n---\nlicense: mit",
    "`; closed ``` fences",
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](http://127.0.0.1/pixel)",
    'yes: "no" # {*&!%@} - ? [',
    "!!python/object/apply:os.system ['true']",
    "\ud800\x00\x1b[31m\u202e",
    "x" * 10_000,
    " ",
    "~",
]


def rows_of(card: str) -> dict[str, str]:
    """Cells of the card's table by their names; a row of another width is an error."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in card.splitlines() if line.startswith("|")]
    assert {len(row) for row in cells} == {2}
    return {name.strip(): value.strip() for name, value in cells[2:]}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_means_harm_is_text(name: str) -> None:
    """In front it is one value of its own key; in the text it stays inside of its cell, as code."""
    origin: dict[str, Any] = {"model": {"name": name}, "license": name, "step": name, "num_probed": name}
    origin |= {"datasets": [name, "allenai/c4"], "reference": {"task": name, name: 1}}
    origin |= {"fidelity": {"spearman": 0.5, "truth": name}}
    text = write_card(name, REPORT, origin, name)
    text.encode("utf-8")
    card = ModelCard(text)
    plain = write_card("Kind", REPORT, {**origin, "model": "A", "license": "mit", "datasets": None}, None)
    head = card.data.to_dict()
    assert set(head) - {"datasets"} == set(ModelCard(plain).data.to_dict())
    assert (head["license"], head["datasets"], head["library_name"]) == ("other", ["allenai/c4"], "mates_hf")
    assert head["model-index"][0]["name"] == name
    assert "base_model" not in head
    assert len(text.split("\n---\n")) == 2  # the front matter ends once
    table = rows_of(text)
    assert table.keys() == rows_of(plain).keys()
    for row in ("Influence model", "Base model", "Reference task", "Tokenizer", "Probe against real steps"):
        outside = re.sub(r"`[^`]*`", "", table[row])
        assert re.fullmatch(r"[\w ,:.()/]*", outside), (row, outside)
        assert len(table[row]) < 1_000
    assert (table["Optimizer steps at the fit"], table["Candidates probed"]) == ("not recorded", "not recorded")


def test_the_hub_reads_what_the_model_was_made_of_and_how_well_it_predicts() -> None:
    origin = {
        "model": {"name": "EleutherAI/pythia-160m"}, "datasets": "allenai/c4", "license": "apache-2.0",
        "reference": {"task": "lambada_openai", "digest": "abc"},
    }  # fmt: skip
    data = ModelCard(write_card("NgramInfluenceModel", REPORT, origin, None)).data
    assert (data.base_model, data.datasets, data.license) == ("EleutherAI/pythia-160m", ["allenai/c4"], "apache-2.0")
    assert data.tags == ["data-selection", "mates", "pretraining"]
    assert data.metrics == ["spearmanr"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("spearmanr", 0.4124)
    assert result.dataset_name == "20 held-out labels, reference task: lambada_openai"
    # A model that came from a folder is known by its class, which is no repository; nothing is made up.
    for report in (None, dataclasses.replace(REPORT, spearman=float("nan"))):
        bare = ModelCard(write_card("Own", report, {"model": {"name": "LlamaForCausalLM"}}, None)).data.to_dict()
        assert bare.keys() == {"library_name", "tags"}


@pytest.mark.parametrize(
    ("probe", "unit", "labels", "measured"),
    [
        ("path", None, "path labels give an order", "`DirectionalProbe` along a path"),
        ("one_step, path", None, "path labels give an order", "`OneStepProbe`, `DirectionalProbe` along a path"),
        ("directional", None, "one optimizer step", "`DirectionalProbe` at one point"),
        ("one_step", None, "one optimizer step", "`OneStepProbe`"),
        ("loss_reduction", None, "loss reductions give an order", "`LossReductionProbe`"),
        ("mine", None, "not recorded", "`mine`"),
        (None, None, "not recorded", "probe not recorded"),
        (None, "order", "path labels give an order", "probe not recorded"),
        ("one_step", "order", "path labels give an order", "`OneStepProbe`"),  # what the round recorded counts
    ],
)
def test_what_a_prediction_means_follows_from_the_probe_of_its_labels(
    probe: str | None, unit: str | None, labels: str, measured: str
) -> None:
    origin = {} if unit is None else {"label_unit": unit}
    table = rows_of(write_card("Kind", dataclasses.replace(REPORT, probe=probe), origin, "Tokenizer"))
    assert labels in table["Labels"]
    assert table["Labels measured by"] == measured


def labels_of(rows: TokenRows, probe: str, **info: Any) -> InfluenceLabels:
    per_token = np.random.default_rng(0).normal(size=len(rows)).astype(np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(len(rows)), influence=per_token, influence_per_token=per_token,
        loss=np.ones(len(rows), np.float32), num_tokens=rows.num_targets, probe=np.full(len(rows), probe), info=info,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("probe", "info", "kind"),
    [
        ("directional", {"path_points": 32}, "path"),
        ("directional", {}, "path"),
        ("directional", {"path_points": 1}, "directional"),
        ("one_step", {}, "one_step"),
        ("mine", {"path_points": 8}, "mine"),
    ],
)
def test_a_fit_records_the_probe_of_its_labels(probe: str, info: dict[str, Any], kind: str, tmp_path: Path) -> None:
    rows = TokenRows.from_lists(make_lists(60))
    labels = labels_of(rows, probe, **info)
    model = NgramInfluenceModel(labels="document", num_buckets=2**10).fit(rows, labels)
    assert model.report.probe == kind
    assert model.evaluate(rows, labels).probe == kind
    target = FitTarget.of(labels, labels.num_tokens > 0, groups=None, held_out_fraction=0.2, seed=0)
    predicted = target.values[target.held_out]
    assert target.report(predicted, num_labels=1, seed=0).probe == kind
    MatesSelector(model).save_pretrained(tmp_path)
    assert MatesSelector.from_pretrained(tmp_path).influence_model.report.probe == kind


@pytest.fixture(scope="module")
def fitted() -> NgramInfluenceModel:
    return fit_model()


def of_probe(fitted: NgramInfluenceModel, probe: str | None, folder: Path) -> MatesSelector:
    """The same model, saved with labels of another probe; None: as it was saved before probes were recorded."""
    fitted.save_pretrained(folder)
    about = json.loads((folder / "fit.json").read_text())
    found = json.loads((folder / "config.json").read_text())
    if probe is None:
        del about["probe"]
    else:
        about["probe"] = probe
    (folder / "fit.json").write_text(json.dumps(about))
    found["sha256"]["fit.json"] = sha256_of(folder / "fit.json")
    (folder / "config.json").write_text(json.dumps(found))
    return MatesSelector.from_pretrained(folder)


@pytest.mark.parametrize(
    ("probe", "warns"), [("path", True), ("one_step, path", True), ("one_step", False), (None, False)]
)
def test_a_threshold_on_an_order_is_warned_of(
    probe: str | None, warns: bool, fitted: NgramInfluenceModel, tmp_path: Path, caplog: Any
) -> None:
    selector = of_probe(fitted, probe, tmp_path)
    rows = Dataset.from_dict({"input_ids": make_lists(20, seed=1)})
    stream: IterableDataset = rows.to_iterable_dataset()
    caplog.set_level(logging.WARNING)
    ways = {
        "select": lambda **budget: selector.select(rows, **budget),
        "filter": lambda **budget: selector.filter(rows, **budget),
        "rethreshold": lambda **budget: selector.select(rows, k=3).rethreshold(**budget),
        "stream": lambda **budget: selector.select(stream, **budget),
    }
    for name, keep in ways.items():
        caplog.clear()
        keep(threshold=0.0)
        told = [record.getMessage() for record in caplog.records if "`threshold` has no" in record.getMessage()]
        assert len(told) == int(warns), name
        caplog.clear()
        keep(ratio=0.5)
        assert "`threshold`" not in caplog.text
    assert ("an order" in repr(selector)) is warns
    assert ("probe not recorded" in repr(selector)) is (probe is None)
