"""The guard: labels that turn round, labels that rank nothing, and what it says of the one condition that failed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from mates_hf import DirectionalProbe, MatesCallback, NgramInfluenceModel, load_round
from mates_hf.disk import read_json
from mates_hf.errors import InfluenceError, WeakSignalError
from mates_hf.evaluation.agreement import bootstrap_interval, rank_correlation
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.training.guard import Judged, decide
from mates_hf.training.verify import verify_run
from tests.training.kit import Result, make_arguments, make_pool, make_reference, run, small_config


@dataclasses.dataclass(frozen=True)
class Changed:
    """Labels of another probe, changed after some optimizer steps."""

    probe: DirectionalProbe
    from_step: int
    how: str

    def for_run(self, settings):
        return dataclasses.replace(self, probe=self.probe.for_run(settings))

    def measure(self, model, optimizer, reference, candidates) -> InfluenceLabels:
        labels = self.probe.measure(model, optimizer, reference, candidates)
        step = int(next(iter(optimizer.state.values()))["step"])
        if step < self.from_step:
            return labels
        if self.how == "negative":
            found = {
                name: -getattr(labels, name) for name in ("influence", "influence_per_token", "token_derivatives")
            }
            return dataclasses.replace(labels, **found)
        if self.how == "shuffled":
            moved = labels.take(np.random.default_rng(step).permutation(len(labels)))
            return dataclasses.replace(moved, candidate_id=labels.candidate_id)
        value = np.full(len(labels), float(self.how), np.float32)
        return dataclasses.replace(labels, influence=value, influence_per_token=value, token_derivatives=None)


SIZES = {"selection_ratio": 0.7, "num_probes": 80, "held_out_fraction": 0.4}


def train(path: Path, how: str, from_step: int = 12, resume: Any = None, **config: Any) -> Result:
    # Rounds of 6 steps, the first at step 6; labels change with the second.
    settings = {"max_steps": 36, "save_strategy": "steps", "save_steps": 15}
    callback = MatesCallback(
        make_reference(),
        small_config(**{"on_weak_signal": "own_order", "switch_lead_steps": 2, **SIZES, **config}),
        probe=Changed(DirectionalProbe(), from_step, how),
        influence_model=NgramInfluenceModel(num_buckets=256),
    )
    return run(make_arguments(path, **settings), [callback], make_pool(640), resume=resume)


def guards(path: Path) -> list[dict[str, Any]]:
    folders = sorted(folder for folder in (path / "_mates").glob("round-*") if folder.suffix == "")
    return [dict(load_round(folder).info["guard"]) for folder in folders]


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("turned")
    return path, train(path, "negative")


def test_labels_that_turn_round_keep_the_previous_model_then_the_own_order_then_are_believed(turned):
    path, result = turned
    found = guards(path)
    assert [guard["decision"] for guard in found[:4]] == ["select", "keep_previous", "own_order", "select"]
    assert [guard["reversed"] for guard in found[:4]] == [False, True, True, False]
    assert [guard["failed"] for guard in found[:4]] == [None, "reversed", "reversed", None]
    assert "previous_spearman" not in found[0]
    # Of rounds of one length the gap is recorded, and decides nothing; after a round in the own order there is none.
    infos = [load_round(path / f"_mates/round-000{number}").info for number in (1, 2, 3, 4)]
    assert [info["gap"] and info["gap"]["gap"] < 0 for info in infos] == [None, True, True, None]
    assert {info["round_steps"] for info in infos} == {6}
    assert not any("last_round_steps" in info or "num_rows_drawn_for" in info for info in infos)
    assert "first_round_steps" not in read_json(path / "_mates/round-0001/key.json")["config"]
    for guard in found[1:4]:
        assert guard["previous_spearman"] < guard["previous_interval"][1] < 0
    assert found[2]["spearman"] > 0.3  # predicted as well as ever: the held-out report alone would have let it pass
    logged = [entry for entry in result.trainer.state.log_history if "mates/reversed" in entry]
    assert [entry["mates/reversed"] for entry in logged][:4] == [0, 1, 1, 0]
    assert [entry["mates/previous_spearman"] for entry in logged[1:4]] == [g["previous_spearman"] for g in found[1:4]]
    assert verify_run(path).problem is None


def test_what_is_kept_chooses_what_the_old_labels_call_best(turned):
    record = load_round(turned[0] / "_mates" / "round-0002")
    like_reference = np.asarray(record.candidates) % 3 == 0
    assert np.asarray(record.scores)[like_reference].mean() > np.asarray(record.scores)[~like_reference].mean()
    chosen = np.isin(record.candidates, record.selection)
    assert chosen[like_reference].mean() > chosen[~like_reference].mean()
    assert record.info["stages"]["guard"]["flops"] > 0


def test_a_run_resumed_between_reversals_goes_on_exactly(turned, tmp_path):
    path, whole = turned
    rest = train(tmp_path, "negative", resume=str(path / "checkpoint-15"), rounds_dir=str(path / "_mates"))
    assert rest.rows == whole.rows[15 * 4 :]
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())


def test_one_warning_names_the_reversal_and_both_numbers(tmp_path, caplog):
    train(tmp_path, "negative")
    lines = [record.getMessage() for record in caplog.records if "is kept" in record.getMessage()]
    assert len(lines) == 1
    assert "the reverse of what the previous influence model predicts (Spearman -0." in lines[0]
    assert "min_spearman" not in lines[0]
    assert "includes 0" not in lines[0]


def test_a_reversal_ends_the_run_where_weak_signals_do_and_is_recorded_where_they_are_ignored(tmp_path):
    with pytest.raises(WeakSignalError, match="the reverse of what the previous"):
        train(tmp_path / "a", "negative", on_weak_signal="error")
    train(tmp_path / "b", "negative", on_weak_signal="select")
    found = guards(tmp_path / "b")
    assert {guard["decision"] for guard in found} == {"select"}
    assert found[1]["reversed"]
    assert found[1]["previous_spearman"] < 0


def test_noise_is_no_reversal_however_few_the_probes(tmp_path):
    train(tmp_path, "shuffled", num_probes=12)
    assert not any(guard["reversed"] for guard in guards(tmp_path))
    hits = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(2, 12))
        report = FitReport(
            num_labels=9, num_held_out=12, spearman=rank_correlation(*noise), interval=bootstrap_interval(*noise, seed)
        )
        hits += Judged(fresh=report).contradicted
    assert hits <= 12  # 5 of 200 expected (one end of a 95 % interval); more than 12 has a probability of 0.2 %


# --- labels that rank nothing ---


@pytest.mark.quick("own_order-all-zero", "select-all-equal")
@pytest.mark.parametrize("how", ["0", "0.25"], ids=["all-zero", "all-equal"])
@pytest.mark.parametrize("setting", ["own_order", "select"])
def test_labels_that_rank_nothing_leave_the_round_in_the_own_order(tmp_path, how, setting, caplog):
    train(tmp_path, how, on_weak_signal=setting)
    found = guards(tmp_path)
    assert [guard["decision"] for guard in found[:3]] == ["select", "own_order", "own_order"]
    assert [guard["failed"] for guard in found[:3]] == [None, "labels", "labels"]
    assert "the labels rank no candidate" in caplog.text
    assert not (tmp_path / "_mates" / "round-0002" / "influence_model").exists()
    assert verify_run(tmp_path).problem is None


def test_a_pool_of_one_repeated_row_is_trained_on_and_resumes(tmp_path):
    rows = [[1, 2, *range(32, 42)]] * 400
    pool = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def again(resume: Any = None) -> Result:
        callback = MatesCallback(make_reference(), small_config(switch_lead_steps=2))
        args = make_arguments(tmp_path, save_strategy="steps", save_steps=9)
        return run(args, [callback], pool, resume=resume)

    whole = again()
    assert [guard["decision"] for guard in guards(tmp_path)] == ["own_order"] * 2
    rest = again(str(tmp_path / "checkpoint-9"))
    assert rest.losses == whole.losses
    assert verify_run(tmp_path).problem is None


def test_a_round_after_one_that_ranked_nothing_selects_again_and_resumes(tmp_path):
    callback = MatesCallback(make_reference(), small_config(switch_lead_steps=2), probe=EqualOnce(DirectionalProbe()))
    args = make_arguments(tmp_path, max_steps=30, save_strategy="steps", save_steps=13)
    whole = run(args, [callback])
    assert [guard["decision"] for guard in guards(tmp_path)] == ["select", "own_order", "select", "select"]
    rest = run(args, [callback], resume=str(tmp_path / "checkpoint-13"))
    assert rest.rows == whole.rows[13 * 4 :]
    assert verify_run(tmp_path).problem is None


@dataclasses.dataclass(frozen=True)
class EqualOnce(Changed):
    from_step: int = 12
    how: str = "0"

    def measure(self, model, optimizer, reference, candidates):
        late = int(next(iter(optimizer.state.values()))["step"]) > 12
        return (self.probe if late else super()).measure(model, optimizer, reference, candidates)


def test_labels_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(InfluenceError, match="must be finite"):
        train(tmp_path, "nan", from_step=0)


def test_labels_that_rank_nothing_end_the_run_where_weak_signals_do(tmp_path):
    with pytest.raises(WeakSignalError, match="the labels rank no candidate"):
        train(tmp_path, "0", from_step=0, on_weak_signal="error")


# --- what it says ---


def verdict(caplog, spearman: float, interval: tuple[float, float], held_out: int = 8, probes: int = 40, **more: Any):
    report = FitReport(
        num_labels=probes - held_out, num_held_out=held_out, spearman=spearman, interval=interval, **more
    )
    state = SimpleNamespace(
        config=small_config(on_weak_signal="own_order", num_probes=probes),
        trusted_model=None,
        last_decision=None,
        last_reversed=False,
        last_rises={},
    )
    caplog.clear()
    guard, _ = decide(state, Judged(fitted=SimpleNamespace(report=report)))
    return guard, caplog.text


def test_the_message_names_the_one_condition_that_failed_and_a_number_that_would_do(caplog):
    guard, text = verdict(caplog, 0.762, (-0.111, 1.0))  # as a user met it: told of both, and advised 41 for 40
    assert guard["failed"] == "interval"
    assert "but its 95 % interval (-0.111 to 1.000) includes 0" in text
    assert "min_spearman" not in text
    needed = int(re.search(r"about ([\d,]+) probes would do \(`num_probes` is 40\)", text)[1].replace(",", ""))
    assert needed >= 60
    guard, text = verdict(caplog, 0.05, (0.01, 0.09), held_out=400, probes=2_000)
    assert guard["failed"] == "min_spearman"
    assert "held-out Spearman is 0.050, below `min_spearman`=0.1; about 8,000 probes" in text
    assert "interval" not in text
    guard, text = verdict(caplog, -0.2, (-0.4, 0.1))
    assert "no number of probes is known to do (`num_probes` is 40)" in text
    guard, text = verdict(caplog, 0.5, (0.2, 0.7))
    assert guard["failed"] is None
    assert not text


# --- documents ---


class Sees(NgramInfluenceModel):
    """Keeps the documents that it was told."""

    seen: list[np.ndarray]

    def fit(self, candidates, labels, **kwargs):
        type(self).seen.append(np.asarray([labels.candidate_id, kwargs["documents"]]))
        return super().fit(candidates, labels, **kwargs)


@pytest.mark.parametrize("column", [None, "source"])
def test_a_round_splits_by_the_documents_that_a_column_tells(tmp_path, column):
    pool = make_pool().add_column("source", [f"page {i // 40}" for i in range(400)])

    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    Sees.seen = []
    callback = MatesCallback(
        make_reference(), small_config(document_column=column), influence_model=Sees(num_buckets=256)
    )
    run(make_arguments(tmp_path, remove_unused_columns=False), [callback], pool, collator=collate)
    for ids, documents in Sees.seen:
        expected = ids // 40 if column else ids
        assert len(set(documents)) == len(set(expected)) == len(set(zip(documents, expected, strict=True)))
    if column:  # ten documents of which two or three are held out, and not 8 rows of 40
        held_out = [load_round(path).info["fit"]["num_held_out"] for path in (tmp_path / "_mates").glob("round-000?")]
        assert held_out != [8] * len(held_out)


def test_a_document_column_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="`document_column` must be a column of the pool, got 'source'"):
        run(
            make_arguments(tmp_path),
            [MatesCallback(make_reference(), small_config(document_column="source"))],
            make_pool().add_column("source", ["a"] * 400),  # which the Trainer removes
        )
    assert not (tmp_path / "_mates").exists()
