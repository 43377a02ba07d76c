"""The callback in a real Trainer: the order of rows, bit-identity, resume, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from mates_hf import MatesCallback, NgramInfluenceModel, load_round
from mates_hf.config import MatesConfig
from mates_hf.errors import MatesError, RoundMismatchError, UnsupportedSettingError
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.training.kit import (
    LENGTH,
    VOCAB,
    Stop,
    assert_same,
    make_arguments,
    make_pool,
    make_reference,
    run,
    small_config,
)

CHANCE = 0.2  # four standard deviations of a share of 0.3 among the 72 rows after the switch

LOADERS = [
    pytest.param({}, id="no-workers"),
    pytest.param({"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}, id="workers"),
    pytest.param(
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True},
        id="persistent-workers",
    ),
]


def mates(**changes: object) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(**{"switch_lead_steps": 3, **changes}))


def selections(output_dir: Path) -> dict[int, np.ndarray]:
    folders = sorted(path for path in (output_dir / "_mates").glob("round-*") if path.suffix == "")
    return {load_round(path).info["number"]: np.asarray(load_round(path).selection) for path in folders}


@pytest.mark.quick("1-workers", "2-no-workers")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_never_selects_is_the_run_without_the_callback(tmp_path, loader, accumulation):
    settings = {**loader, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "max_steps": -1}
    pool = make_pool(42)  # ragged: 42 rows in batches of 4, so that an epoch's end is crossed with a short batch
    plain = run(make_arguments(tmp_path / "a", **settings), [], pool, dropout=0.1)
    ours = run(make_arguments(tmp_path / "b", **settings), [mates(random_rounds=99)], pool, dropout=0.1)
    assert plain.rows == ours.rows
    assert_same(plain, ours)
    assert not (tmp_path / "b" / "_mates").exists()


def test_the_first_round_is_the_trainers_own_order(tmp_path):
    plain = run(make_arguments(tmp_path / "a"), [], dropout=0.1)
    ours = run(make_arguments(tmp_path / "b"), [mates()], dropout=0.1)
    before = (6 + 3) * 4
    assert plain.rows[:before] == ours.rows[:before]
    assert plain.losses[:9] == ours.losses[:9]  # probing at step 6 changed nothing of steps 7 to 9, with dropout on
    assert plain.rows[before:] != ours.rows[before:]


@pytest.mark.quick("slice-workers", "pool-no-workers")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("scope", ["slice", "pool"])
def test_rows_trained_are_the_selections_in_order(tmp_path, loader, scope):
    pool = make_pool().shuffle(seed=3).select(range(20, 380))
    result = run(make_arguments(tmp_path, **loader), [mates(candidate_scope=scope)], pool)
    numbers = np.array([row[0] * 32 + row[1] for row in pool["input_ids"]])
    chosen = selections(tmp_path)
    assert list(chosen) == [1, 2]
    trained = np.array(result.rows)
    assert np.array_equal(trained[36:60], numbers[chosen[1]])
    assert np.array_equal(trained[60:80], numbers[chosen[2]])  # the last round's k is what max_steps leaves
    assert len(set(result.rows)) == len(result.rows) == 80
    for number in chosen:
        record = load_round(tmp_path / "_mates" / f"round-{number:04d}")
        assert not set(record.labels.candidate_id) & set(record.selection)
        assert not set(numbers[record.labels.candidate_id]) & set(trained[: 36 if number == 1 else 60])
        assert set(record.selection) <= set(record.candidates)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["workers", "accumulation"],
)
def test_the_order_does_not_depend_on_how_it_is_loaded(tmp_path, changes):
    one = run(make_arguments(tmp_path / "a"), [mates()])
    other = run(make_arguments(tmp_path / "b", **changes), [mates()])
    if "gradient_accumulation_steps" in changes:  # sums in another order: rows until the first selection are the same
        assert one.rows[:36] == other.rows[:36]
    else:
        assert one.rows == other.rows
        assert_same(one, other)


@pytest.mark.parametrize("loader", LOADERS[:2])
@pytest.mark.quick("6-no-workers", "11-workers")
@pytest.mark.parametrize("stop", [4, 6, 8, 11, 15])
def test_a_stopped_run_goes_on_exactly(tmp_path, loader, stop):
    settings = {**loader, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    whole = run(make_arguments(tmp_path / "whole", **settings), [mates()], dropout=0.1)
    first = run(make_arguments(tmp_path / "part", **settings), [mates(), Stop(stop)], dropout=0.1)
    (tmp_path / "part").rename(tmp_path / "moved")  # no absolute path may be needed
    args = make_arguments(tmp_path / "moved", **settings)
    rest = run(args, [mates()], dropout=0.1, resume=str(tmp_path / "moved" / f"checkpoint-{stop}"))
    assert first.rows + rest.rows == whole.rows
    assert rest.losses == whole.losses
    for name, value in whole.weights.items():
        assert torch.equal(value, rest.weights[name]), name
    for number, rows in selections(tmp_path / "whole").items():
        assert np.array_equal(rows, selections(tmp_path / "moved")[number])


def test_a_checkpoint_folder_moved_elsewhere_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = run(make_arguments(tmp_path / "whole", **settings), [mates()])
    run(make_arguments(tmp_path / "part", **settings), [mates(), Stop(10)])
    shutil.move(tmp_path / "part" / "checkpoint-10", tmp_path / "elsewhere")
    rest = run(make_arguments(tmp_path / "part", **settings), [mates()], resume=str(tmp_path / "elsewhere"))
    assert rest.losses == whole.losses
    assert rest.rows == whole.rows[40:]


def test_own_order_over_several_epochs_before_the_first_selection(tmp_path):
    pool = make_pool(160)  # 40 steps an epoch; the selection begins in the second one
    config = {"update_steps": 50, "num_probes": 10, "switch_lead_steps": 2}
    args = {"max_steps": 60, "save_strategy": "steps", "save_steps": 55}
    plain = run(make_arguments(tmp_path / "a", max_steps=60), [], pool)
    ours = run(make_arguments(tmp_path / "b", **args), [mates(**config)], pool)
    assert ours.rows[: 52 * 4] == plain.rows[: 52 * 4]
    assert sorted(ours.rows[:160]) == list(range(160))
    second_pass = ours.rows[160:]
    assert len(set(second_pass)) == len(second_pass) == 80
    rest = run(
        make_arguments(tmp_path / "b", **args), [mates(**config)], pool, resume=str(tmp_path / "b" / "checkpoint-55")
    )
    assert rest.rows == ours.rows[55 * 4 :]
    assert rest.losses == ours.losses


def test_an_epoch_ends_inside_the_lead(tmp_path):
    pool = make_pool(100)  # 25 steps an epoch, between the boundary at 24 and the switch at 27
    config = {"update_steps": 24, "num_probes": 10, "switch_lead_steps": 3, "selection_ratio": 0.5}
    ours = run(make_arguments(tmp_path, max_steps=34), [mates(**config)], pool)
    assert len(set(ours.rows[100:])) == len(ours.rows[100:]) == 36


@pytest.mark.parametrize("attach", [False, True])
def test_metrics_reach_the_log(tmp_path, attach):
    seen: list[str] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.extend(logs)

    result = run(make_arguments(tmp_path), [mates(), Reporter()], attach=attach)
    entries = [entry for entry in result.trainer.state.log_history if "mates/spearman" in entry]
    assert [entry["step"] for entry in entries] == [8, 14]  # where the selections of steps 6 and 12 are needed
    assert "mates/spearman" in seen


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [({"update_steps": 20}, {"update_steps": 2}), ({"random_rounds": 99}, {"update_steps": 2, "random_rounds": 1}),
     ({"random_rounds": 9}, {"update_steps": 2}), ({"update_steps": 30, "switch_lead_steps": 9}, {"update_steps": 10}),
     ({"update_steps": 30, "switch_lead_steps": 19}, None)],
)  # fmt: skip
def test_a_run_without_rounds_says_so_once_and_its_advice_works(tmp_path, caplog, changes, way_out):
    run(make_arguments(tmp_path / "a"), [MatesCallback(make_reference(), small_config(**changes))])
    told = [record.getMessage() for record in caplog.records if "No round takes effect" in record.getMessage()]
    assert len(told) == 1
    assert "the run ends at step 20" in told[0]
    assert not (tmp_path / "a" / "_mates").exists()
    if way_out is None:
        assert "Train longer" in told[0]
        return
    assert "Set " + " and ".join(f"`{name}={value}`" for name, value in way_out.items()) in told[0]
    run(make_arguments(tmp_path / "b"), [MatesCallback(make_reference(), small_config(**{**changes, **way_out}))])
    assert selections(tmp_path / "b")


def test_text_pool_with_a_tokenising_collator(tmp_path):
    pool = make_pool()
    texts = Dataset.from_dict({"text": [" ".join(map(str, row)) for row in pool["input_ids"]]})

    def tokenise(rows):
        ids = torch.tensor([[int(word) for word in row["text"].split()] for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}

    settings = {"remove_unused_columns": False}
    plain = run(make_arguments(tmp_path / "a"), [mates()], pool)
    text = run(make_arguments(tmp_path / "b", **settings), [mates()], texts, collator=tokenise)
    assert plain.rows == text.rows
    assert plain.losses == text.losses


def test_the_guard_keeps_the_own_order_and_consumes_once(tmp_path):
    rng = np.random.default_rng(0)
    noise = [[i // 32, i % 32, *rng.integers(32, VOCAB, LENGTH - 2)] for i in range(400)]
    pool = Dataset.from_dict({"input_ids": noise, "labels": noise})
    config = {"on_weak_signal": "own_order", "min_spearman": 0.99}
    settings = {"save_strategy": "steps", "save_steps": 10}
    result = run(make_arguments(tmp_path, **settings), [mates(**config)], pool)
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["guard"]["decision"] == "own_order"
    assert record.selection is None
    assert len(set(result.rows)) == 80
    assert not set(record.labels.candidate_id) & set(result.rows[36:60])
    rest = run(make_arguments(tmp_path, **settings), [mates(**config)], pool, resume=str(tmp_path / "checkpoint-10"))
    assert rest.rows == result.rows[40:]


def test_added_to_a_run_that_had_none_and_dropped_again(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 25}
    plain = run(make_arguments(tmp_path, **settings), [Stop(5)])
    added = run(make_arguments(tmp_path, **settings), [mates(), Stop(20)], resume=str(tmp_path / "checkpoint-5"))
    assert "no state of MatesCallback" in caplog.text
    assert set(selections(tmp_path)) == {1, 2}
    assert load_round(tmp_path / "_mates" / "round-0001").info["step"] == 11
    assert len(set(plain.rows + added.rows)) == 80
    dropped = run(make_arguments(tmp_path, **settings), [], resume=str(tmp_path / "checkpoint-20"))
    assert dropped.trainer.state.global_step == 25


def test_a_run_that_does_not_resume_loads_no_round(tmp_path):
    first = run(make_arguments(tmp_path), [mates()])
    again = run(make_arguments(tmp_path), [mates(selection_seed=7)])
    assert first.rows != again.rows
    assert (tmp_path / "_mates" / "round-0001.stale").exists()


@pytest.mark.slow
def test_keep_rounds_bounds_the_disk(tmp_path):
    run(make_arguments(tmp_path, max_steps=40), [mates(keep_rounds=2)])
    assert set(selections(tmp_path)) == {5, 6}


def test_resume_with_another_config_or_pool_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    run(make_arguments(tmp_path, **settings), [mates(), Stop(10)])
    where = str(tmp_path / "checkpoint-10")
    with pytest.raises(RoundMismatchError, match=r"temperature: checkpoint 0\.0, this run 0\.5"):
        run(make_arguments(tmp_path, **settings), [mates(temperature=0.5)], resume=where)
    with pytest.raises(RoundMismatchError, match="pool"):
        run(make_arguments(tmp_path, **settings), [mates()], make_pool(seed=1), resume=where)


def test_resume_with_another_reference_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    run(make_arguments(tmp_path, **settings), [mates(), Stop(10)])
    other = MatesCallback(make_reference(num=7), small_config(switch_lead_steps=3))
    with pytest.raises(RoundMismatchError, match="reference"):
        run(make_arguments(tmp_path, **settings), [other], resume=str(tmp_path / "checkpoint-10"))


def test_resume_without_its_rounds_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    run(make_arguments(tmp_path, **settings), [mates(), Stop(10)])
    shutil.rmtree(tmp_path / "_mates")
    with pytest.raises(MatesError, match=r"round-0001.*is not there"):
        run(make_arguments(tmp_path, **settings), [mates()], resume=str(tmp_path / "checkpoint-10"))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_pool(40))


BIG = Dataset.from_dict({"input_ids": [[VOCAB + 5] * LENGTH] * 400, "labels": [[1] * LENGTH] * 400})
REFUSED = [
    pytest.param({"num_train_epochs": 1, "max_steps": -1}, {}, None, ValueError, "max_steps", id="epoch-in-one-pass"),
    pytest.param({"max_steps": 95}, {}, None, ValueError, "largest `max_steps` that fits", id="too-few-rows"),
    pytest.param({}, {}, Stream(), UnsupportedSettingError, "streaming", id="streaming"),
    pytest.param(
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}, {}, None, ValueError,
        "`switch_lead_steps` must be at least 9", id="lead",
    ),
    pytest.param(
        {"train_sampling_strategy": "batch_rebalance"}, {}, None, UnsupportedSettingError, "batch_rebalance",
        id="batch-rebalance",
    ),
    pytest.param(
        {"dataloader_in_order": False, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}, {}, None,
        UnsupportedSettingError, "in_order", id="in-order",
    ),
    pytest.param(
        {"accelerator_config": {"dispatch_batches": True}}, {}, None, UnsupportedSettingError, "dispatch",
        id="dispatch",
    ),
    pytest.param({}, {}, BIG, ValueError, "vocabulary", id="vocabulary"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "config", "pool", "error", "match"), REFUSED)
def test_refused_before_the_first_step_and_nothing_written(tmp_path, args, config, pool, error, match):
    steps: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    with pytest.raises(error, match=match):
        run(make_arguments(tmp_path / "run", **args), [mates(**config), Steps()], pool)
    assert not steps
    assert not (tmp_path / "run" / "_mates").exists()


@pytest.mark.parametrize("value", [None, "lambada", 3])
def test_wrong_arguments(value):
    with pytest.raises(TypeError, match="reference"):
        MatesCallback(value)
    with pytest.raises(TypeError, match="config"):
        MatesCallback(make_reference(), {"update_steps": 3})


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A probe whose labels are given to the wrong candidates: the control of the planted pool."""

    inner: DirectionalProbe

    def for_run(self, settings):
        return Shuffled(self.inner.for_run(settings))

    def measure(self, model, optimizer, reference, candidates):
        labels = self.inner.measure(model, optimizer, reference, candidates)
        order = np.random.default_rng(0).permutation(len(labels))
        moved = labels.take(order)
        return dataclasses.replace(moved, candidate_id=labels.candidate_id)


@pytest.mark.parametrize(("shuffled", "evidence_weight"), [(False, 1.0), (False, 0.0), (True, 1.0)])
def test_planted_pool_is_found_and_with_shuffled_labels_it_is_not(tmp_path, shuffled, evidence_weight):
    # 30 % of the pool is like the reference: its rows count up, all others are random.
    rng = np.random.default_rng(0)
    planted = rng.permutation(1000) < 300
    counting = [32 + (rng.integers(0, 8) + np.arange(LENGTH - 2)) % 8 for _ in range(1000)]
    noise = rng.integers(32, VOCAB, (1000, LENGTH - 2))
    rows = [[i // 32, i % 32, *(counting[i] if planted[i] else noise[i]).tolist()] for i in range(1000)]
    pool = Dataset.from_dict({"input_ids": rows, "labels": rows})
    config = MatesConfig(update_steps=24, num_probes=200, selection_ratio=0.2, random_share=0.0)
    probe = Shuffled(DirectionalProbe()) if shuffled else DirectionalProbe()
    args = make_arguments(tmp_path, max_steps=48, learning_rate=1e-3, lr_scheduler_type="constant")
    influence_model = NgramInfluenceModel(evidence_weight=evidence_weight)
    callback = MatesCallback(make_reference(), config, probe=probe, influence_model=influence_model)
    result = run(args, [callback], pool)
    record = load_round(tmp_path / "_mates" / "round-0001")
    share = np.mean(planted[result.rows[record.info["from_position"] :]])
    if shuffled:
        assert record.info["guard"]["decision"] == "own_order"
        assert abs(share - 0.3) < CHANCE
    else:
        # What is added to the labels' part agrees with them less.
        assert record.info["guard"]["spearman"] > (0.35 if evidence_weight else 0.5)
        assert share >= 0.8


def test_candidates_without_a_trained_token_are_counted_and_not_selected(tmp_path):
    pool = make_pool()
    labels = [[-100] * LENGTH if i % 5 == 0 else row for i, row in enumerate(pool["input_ids"])]
    pool = pool.remove_columns("labels").add_column("labels", labels)
    run(make_arguments(tmp_path), [mates()], pool)
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["num_skipped"] + len(record.labels) == record.info["num_probed"] == 40
    assert record.info["num_skipped"] > 0
    assert not np.any(np.asarray(record.selection) % 5 == 0)


def test_an_error_in_a_probe_ends_the_run_with_the_model_as_it_was(tmp_path):
    weights: list[dict[str, torch.Tensor]] = []

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            self.model = model

    before = Before()

    @dataclasses.dataclass(frozen=True)
    class Broken:
        def for_run(self, settings):
            return self

        def measure(self, model, optimizer, reference, candidates):
            raise RuntimeError("broken probe")

    watch = run_until_error(tmp_path, [before, mates_with(Broken())])
    assert "broken probe" in str(watch)
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, weights[-1][name])


def mates_with(probe) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(switch_lead_steps=3), probe=probe)


def run_until_error(tmp_path, callbacks) -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        run(make_arguments(tmp_path), callbacks)
    return caught.value


def test_every_hook_takes_what_a_newer_trainer_may_pass():
    for name in dir(MatesCallback):
        if name.startswith("on_"):
            parameters = inspect.signature(getattr(MatesCallback, name)).parameters.values()
            assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters), name
