"""Runs on images, speech, and images with text: the whole way through a Trainer, and what is refused before it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import default_data_collator

from mates_hf import (
    DirectionalProbe,
    MatesCallback,
    MatesRounds,
    MatesStream,
    NgramInfluenceModel,
    ReferenceTask,
    load_round,
)
from mates_hf.answering.forget import forget_rows
from mates_hf.answering.where import where_rows
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.example_losses import contrastive_loss, seeded_loss
from mates_hf.prediction.encoder_model import EncoderInfluenceModel
from mates_hf.training.run_report import read_report, write_report
from mates_hf.training.verify import verify_run
from tests.influence.test_examples import (
    test_the_model_s_own_loss_where_there_is_no_likelihood as of_ctc,
)
from tests.launch import free_port, start_processes
from tests.training.kit import OLD_DATASETS, Stop, leave_modules_to_themselves, make_reference, small_config
from tests.training.modalities import (
    KINDS,
    PixelRidge,
    captions,
    clip,
    images,
    llava,
    pair_collator,
    pairs,
    trainer,
    vit,
)
from tests.training.settings import NO_FILE, Steps, proves

QUICK = {"num_probes": 24, "average_steps": 0}
EXAMPLES = (
    "images, speech, images with text (ViT, ResNet, Whisper, Llava) with an influence model that `reads_examples`"
)


def mates(reference: Any = None, *, probe: Any = None, influence_model: Any = None, **changes: Any) -> MatesCallback:
    task = ReferenceTask.from_examples(images(8, seed=99)) if reference is None else reference
    return MatesCallback(
        task,
        small_config(**{**QUICK, **changes}),
        probe=probe or DirectionalProbe(epsilon=1e-2),
        influence_model=influence_model or PixelRidge(),
    )


def train(path: Path, kind: str = "ViT", *, stop_at: int | None = None, resume: Any = None, rows: Any = None,
          num: int = 120, **changes: Any) -> Any:  # fmt: skip
    leave_modules_to_themselves()
    made = KINDS[kind]
    callbacks: list[Any] = [mates(made.reference(8), **changes)]
    if stop_at:
        callbacks.append(Stop(stop_at))
    run = trainer(
        made.model(), rows or made.rows(num), path, callbacks, collator=made.collator, max_steps=9,
        save_strategy="steps", save_steps=7,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return run


@proves(EXAMPLES, "a round ran and selected by what the collator makes of rows; it verifies, and says where rows went")
@pytest.mark.quick("ViT", "Llava")
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_selects(kind: str, tmp_path: Path) -> None:
    train(tmp_path, kind)
    record = load_round(tmp_path / "_mates" / "round-0001")
    info, labels = record.info, record.labels
    assert info["guard"]["decision"] == "select"
    assert info["loss"]["candidates"] == KINDS[kind].reading
    assert info["loss"]["fed"] == "collated"
    assert info["reference"]["source"] == "from_examples"
    assert set(info["pool"]["inputs"].split(", ")) <= {"pixel_values", "input_features"}
    assert np.isfinite(labels.influence).all()
    assert np.std(labels.influence) > 0
    trained = {"ViT": {1}, "ResNet": {1}, "Whisper": {6, 8}, "Llava": {2}}[kind]
    assert set(labels.num_tokens.tolist()) == trained
    assert info["fidelity"]["spearman"] > (0.2 if kind == "Llava" else 0.5)
    assert verify_run(tmp_path).problem is None
    row = int(record.selection[0])
    assert where_rows(tmp_path, [row]).uses
    page = (tmp_path / "_mates" / "report.html").read_text(encoding="utf-8")
    assert "which this page does not show" in page
    data = read_report(tmp_path)
    assert any("does not show" in line for line in data["missing"])
    assert write_report(tmp_path, tmp_path / "redacted.html", redact=True).exists()
    with pytest.raises(ValueError, match="only the run itself can show"):
        read_report(tmp_path, dataset=KINDS[kind].rows(120))


@pytest.mark.slow
@proves(EXAMPLES, "resumes exactly; a pool with another image in it is refused")
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_at=7)
    resumed = train(tmp_path / "parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    records = [load_round(tmp_path / name / "_mates" / "round-0001") for name in ("whole", "parts")]
    assert records[0].selection.tolist() == records[1].selection.tolist()
    changed = images(120)
    changed[0] = {**changed[0], "pixel_values": changed[0]["pixel_values"] + 1}  # a fixed row of the identity
    with pytest.raises(Exception, match="pool"):
        train(tmp_path / "parts", resume=True, rows=changed)


def test_a_loop_of_ones_own_selects_images_too(tmp_path: Path) -> None:
    model, rows = vit(), images(80)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rounds = MatesRounds(
        ReferenceTask.from_examples(images(8, seed=99)), rows, small_config(**QUICK), output_dir=tmp_path,
        collate_fn=default_data_collator, influence_model=PixelRidge(), probe=DirectionalProbe(epsilon=1e-2),
    )  # fmt: skip
    for _, batch in rounds.order(model, optimizer, batch_size=4, max_steps=9):
        model(**default_data_collator([rows[i] for i in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert load_round(tmp_path / "_mates" / "round-0001").info["guard"]["decision"] == "select"


@pytest.mark.slow
def test_rows_are_forgotten(tmp_path: Path) -> None:
    train(tmp_path)
    row = int(load_round(tmp_path / "_mates" / "round-0001").selection[0])
    forget_rows(tmp_path, [row], drop_models=True)
    assert verify_run(tmp_path).problem is None


def test_copies_are_rows_of_equal_inputs_whatever_their_labels(tmp_path: Path) -> None:
    rows = images(80)
    rows += [{**row, "labels": (row["labels"] + 1) % 4} for row in rows]
    train(tmp_path, rows=rows, max_copies=1, temperature=0.0)
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert len({row % 80 for row in record.selection.tolist()}) == len(record.selection)
    assert record.info["repeated_share"] > 0


def test_rows_that_are_in_the_reference_task_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, rows=[*images(8, seed=99), *images(72)], candidate_scope="pool", num_probes=10)
    assert "that share all inputs of an example with the reference task" in caplog.text
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert 0 < info["reference_overlap"]["rows"] <= 8
    assert all(row < 8 for row in info["reference_overlap"]["examples"])


@pytest.mark.quick("text")
@pytest.mark.parametrize("reference", [captions, None], ids=["examples", "text"])
def test_text_alone_may_decide_where_that_is_said(reference: Any, tmp_path: Path) -> None:
    task = make_reference(8) if reference is None else ReferenceTask.from_examples(captions(8, seed=99))
    if reference is None:  # in the small vocabulary
        rows = [[5 + i % 4, 15 + i % 4] * 3 for i in range(8)]
        task = ReferenceTask.from_dataset([{"ids": row} for row in rows], input_ids_column="ids")
    run = trainer(llava(), captions(120), tmp_path, [mates(task, influence_model=NgramInfluenceModel(text_only=True))],
                  max_steps=9)  # fmt: skip
    run.train()
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert info["measured_with"]["influence_model"]["text_only"] is True
    saved = NgramInfluenceModel.from_pretrained(tmp_path / "_mates" / "round-0001" / "influence_model")
    assert saved.text_only
    assert verify_run(tmp_path).problem is None


# --- refused before the first step -----------------------------------------------------------------------------------


def refused(path: Path, match: str, *, model: Any = None, rows: Any = None, collator: Any = None,
            error: type[Exception] = UnsupportedSettingError, **changes: Any) -> None:  # fmt: skip
    steps = Steps()
    run = trainer(
        model or vit(), rows or images(80), path, [mates(**changes), steps], collator=collator,
        max_steps=9,
    )  # fmt: skip
    with pytest.raises(error, match=match):
        run.train()
    assert steps.count == 0
    assert not (path / "_mates").exists()


@proves("influence models of text where rows are more than text, without `text_only=True`", NO_FILE, outcome="refused")
def test_an_influence_model_of_text_is_refused(tmp_path: Path) -> None:
    way = r"FeatureInfluenceModel\(\)"
    refused(tmp_path, rf"reads text, and the rows of this pool have none, but `pixel_values`. .*{way}",
            influence_model=NgramInfluenceModel())  # fmt: skip
    refused(
        tmp_path,
        "reads text, and the rows of this pool have none",
        influence_model=NgramInfluenceModel(text_only=True),
    )
    task = ReferenceTask.from_examples(captions(8))
    refused(tmp_path, rf"NgramInfluenceModel reads text alone, .* also have `pixel_values`. .*{way}.*text_only=True",
            model=llava(), rows=captions(80), reference=task, influence_model=NgramInfluenceModel())  # fmt: skip


def test_text_only_is_refused_where_all_is_text(tmp_path: Path) -> None:
    from tests.training.kit import make_model, make_pool

    refused(tmp_path, "rows of this pool are text alone", model=make_model(), rows=make_pool(80),
            reference=make_reference(8), influence_model=NgramInfluenceModel(text_only=True))  # fmt: skip


def test_a_reference_of_text_is_refused_for_classes(tmp_path: Path) -> None:
    refused(tmp_path, "ReferenceTask.from_examples", reference=make_reference(8))


def test_what_needs_text_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, r"of text for `reference_passes`.*reference_passes=0", reference_passes=1)
    task = ReferenceTask.from_examples(images(8))
    with pytest.raises(UnsupportedSettingError, match="of text for a mixture.*concatenate_datasets"):
        ReferenceTask.mixture([task, task])


@pytest.mark.skipif(OLD_DATASETS, reason="streams need datasets 4.0")
def test_a_stream_of_examples_is_refused(tmp_path: Path) -> None:
    rows = [{"pixel_values": row["pixel_values"].tolist(), "labels": row["labels"]} for row in images(80)]
    stream = MatesStream(Dataset.from_list(rows).to_iterable_dataset())
    refused(tmp_path, "its rows have `pixel_values`, and buffers of a stream are chosen from by text", rows=stream)


@proves("images of several sizes that make no batch", NO_FILE, outcome="refused")
def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    rows = images(80)
    rows = [{**row, "pixel_values": row["pixel_values"][:, : 4 if i % 5 == 4 else 8]} for i, row in enumerate(rows)]
    match = (
        r"one batch of rows of several sizes, got RuntimeError for `pixel_values` of \(3, 8, 8\) in pool row \d+ and"
    )
    refused(tmp_path, match, rows=rows)


def test_missing_labels_are_refused(tmp_path: Path) -> None:
    rows = [{"pixel_values": row["pixel_values"]} for row in images(80)]
    refused(tmp_path, "Pool rows must have `labels`", rows=rows)
    unlabelled = [{**row, "labels": -100} for row in images(8)]
    with pytest.raises(ValueError, match="An example needs `labels` of which one is not -100"):
        ReferenceTask.from_examples(unlabelled)


def test_a_collator_that_makes_no_batch_is_refused(tmp_path: Path) -> None:
    rows = [{"image": row["pixel_values"].tolist(), "kind": row["labels"]} for row in images(80)]

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}

    refused(tmp_path, r"must make a batch of pool rows, got KeyError .* keys \['image', 'kind'\]", rows=rows,
            collator=collator)  # fmt: skip


def test_a_class_that_the_model_has_no_logit_for_is_refused(tmp_path: Path) -> None:
    """A class that the reference task never shows is fine: it is worth what it does to the others."""
    examples = images(8, seed=99)
    examples[3] = {**examples[3], "labels": 9}
    task = ReferenceTask.from_examples(examples)
    match = r"must be 0 to 3, the model's logits, got 9 in example 3. .*`num_labels`"
    refused(tmp_path, match, reference=task, error=ValueError)
    few = ReferenceTask.from_examples([row for row in images(40, seed=99) if row["labels"] < 2])
    trainer(vit(), images(80), tmp_path, [mates(few)], max_steps=1).train()


@proves(
    "a loss that compares the rows of a batch (CLIP) without a bank of pairs", NO_FILE, outcome="refused",
    note="supported with `DirectionalProbe(loss=contrastive_loss(bank))`",
)  # fmt: skip
def test_a_contrastive_loss_needs_a_bank(tmp_path: Path) -> None:
    task = ReferenceTask.from_examples(pairs(8, seed=99))
    given = {"model": clip(), "rows": pairs(80), "collator": pair_collator, "reference": task}
    refused(tmp_path, r"must be a mean over its rows.*contrastive_loss\(bank\)", **given)
    bank = pair_collator(pairs(8, seed=5))
    probe = DirectionalProbe(loss=contrastive_loss(bank), epsilon=1e-2)
    run = trainer(clip(), pairs(80), tmp_path, [mates(task, probe=probe, influence_model=Pairs())],
                  collator=pair_collator, max_steps=9)  # fmt: skip
    run.train()
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert info["loss"]["candidates"] == "row by row: the loss that the probe was given"
    assert info["fidelity"]["spearman"] > 0.5


class Pairs(PixelRidge):
    """Reads rows without labels."""

    def _features(self, candidates: Any) -> np.ndarray:
        values = [candidates.batch(np.array([i]), "cpu").inputs["pixel_values"] for i in range(len(candidates))]
        return np.array([value.numpy().reshape(-1) for value in values])


class Denoiser(nn.Module):
    """Is trained to tell noise from a picture, as a diffusion model is; the noise is drawn in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 192)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = pixel_values.flatten(1)
        noise = torch.randn_like(flat)
        return {"loss": ((self.layer(flat + noise) - noise) ** 2).mean()}


@proves("random numbers in the forward pass (diffusion) without a seed of the row", NO_FILE, outcome="refused",
        note="supported with `DirectionalProbe(loss=seeded_loss())`")  # fmt: skip
def test_a_forward_pass_that_draws_is_refused_or_seeded_by_row(tmp_path: Path) -> None:
    rows = [{"pixel_values": row["pixel_values"]} for row in images(80)]
    task = ReferenceTask.from_examples(rows[:8])
    torch.manual_seed(0)
    given = {"rows": rows, "reference": task, "influence_model": Pairs()}
    refused(tmp_path, r"must be the same whenever it is computed.*seeded_loss\(\)", model=Denoiser(), **given)
    probe = DirectionalProbe(loss=seeded_loss(), epsilon=1e-2)
    run = trainer(Denoiser(), rows, tmp_path, [mates(task, probe=probe, influence_model=Pairs())], max_steps=9)
    run.train()
    labels = load_round(tmp_path / "_mates" / "round-0001").labels
    assert np.std(labels.influence) > 0


class Augmented:
    """Rows with noise that is drawn whenever one is read, from a stream of the kind that is given."""

    def __init__(self, rows: list[dict[str, Any]], draw: Any) -> None:
        self.rows, self.draw = rows, draw

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        return {**row, "pixel_values": row["pixel_values"] + self.draw()}


@proves("augmentations drawn from the usual random streams", "a row is measured as its own number draws it",
        note="one with a random stream of its own is refused")  # fmt: skip
def test_augmentations_are_fixed_by_row_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Augmented(images(120), lambda: torch.randn(3, 8, 8) / 10)
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "fixed", rows=rows)
    assert caplog.text.count("Rows are augmented at random by the dataset") == 1
    info = load_round(tmp_path / "fixed" / "_mates" / "round-0001").info
    assert info["loss"]["drawn"] == "by the dataset, on streams of the row's own number"
    assert info["loss"]["fed"] == "collated"  # what is drawn of a row does not depend on the rows beside it
    generator = np.random.default_rng(0)
    own = Augmented(images(80), lambda: torch.from_numpy(generator.normal(size=(3, 8, 8)).astype(np.float32)))
    refused(tmp_path / "own", "draws from a random stream of its own", rows=own)


@proves("a collator that mixes rows (mixup, cutmix)", NO_FILE, outcome="refused")
def test_a_collator_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    def mixup(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        order = torch.randperm(len(rows))
        return {**batch, "pixel_values": 0.7 * batch["pixel_values"] + 0.3 * batch["pixel_values"][order]}

    refused(tmp_path, r"mixes them \(mixup, cutmix\)", collator=mixup)


def test_an_encoder_of_text_may_be_told_so_as_well(tiny_tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    lengths = {"max_tokens": 32, "chunk_tokens": 32}
    assert EncoderInfluenceModel((BertModel(config), tiny_tokenizer), text_only=True, **lengths).text_only


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "ResNet", "ViT, sharded"])
@proves(EXAMPLES, "two processes share scoring and measure by the main one's batch norm", note="docs/modalities.md")
def test_two_processes_measure_and_select_as_one(kind: str, tmp_path: Path) -> None:
    """Batch norm keeps other statistics in each process: the main one's are what both measure by.

    Sharded weights are no hindrance to an influence model that runs no model.
    """
    kind, _, sharded = kind.partition(", ")
    found: dict[int, list[dict[str, Any]]] = {}
    for size in (1, 2):
        settings = {"output_dir": str(tmp_path / str(size)), "result": str(tmp_path / f"result{size}"),
                    "kind": kind, "batch_rows": 8 // size, "fsdp2_layer": "ViTLayer" if sharded else ""}  # fmt: skip
        worker = str(Path(__file__).with_name("example_worker.py"))
        processes = start_processes([worker, json.dumps(settings)], size, free_port())
        for process in processes:
            assert process.communicate(timeout=240)[1] is not None
            assert process.returncode == 0
        found[size] = [json.loads((tmp_path / f"result{size}-{rank}.json").read_text()) for rank in range(size)]
    assert found[2][0]["weights"] == found[2][1]["weights"]
    one, two = (load_round(tmp_path / str(size) / "_mates" / "round-0001") for size in (1, 2))
    assert verify_run(tmp_path / "2").problem is None
    scored = [result["scored"] for result in found[2]]
    assert min(scored) > 0  # each predicts a share
    if kind == "ViT":
        np.testing.assert_allclose(two.labels.influence, one.labels.influence, rtol=1e-2, atol=1e-5)
        assert set(two.selection.tolist()) == set(one.selection.tolist())
    else:
        first, second = (result["statistics"][5] for result in found[2])
        assert first != second  # each has normalised its own half of the batches


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "modalities.md"
BACKED_BY = {
    "image classifier (ViT)": test_a_run_selects,
    "image classifier with batch norm (ResNet)": test_a_run_selects,
    "speech to text (Whisper)": test_a_run_selects,
    "images with text (Llava)": test_a_run_selects,
    "a loss of other positions than the labels (CTC)": of_ctc,
    "a loss without logits": test_a_forward_pass_that_draws_is_refused_or_seeded_by_row,
    "a loss that compares rows (CLIP)": test_a_contrastive_loss_needs_a_bank,
    "random numbers in the forward pass (diffusion)": test_a_forward_pass_that_draws_is_refused_or_seeded_by_row,
    "augmentations that draw from the usual random streams": test_augmentations_are_fixed_by_row_or_refused,
    "augmentations with a random stream of their own": test_augmentations_are_fixed_by_row_or_refused,
    "a collator that mixes rows (mixup, cutmix)": test_a_collator_that_mixes_rows_is_refused,
    "text models on rows with images": test_text_alone_may_decide_where_that_is_said,
    "a stream of examples (`MatesStream`)": test_a_stream_of_examples_is_refused,
    "passages mixed in (`reference_passes`)": test_what_needs_text_is_refused_by_name,
    "a mixture of tasks of examples": test_what_needs_text_is_refused_by_name,
}


def test_each_line_of_the_page_has_a_test() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Which models work")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:]] == list(BACKED_BY)
