"""Runs with `reference_passes`: each passage as often as asked, and every pool row where it would be without them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mates_hf import MatesCallback, MatesRounds, ReferenceTask, load_round
from mates_hf.data.mixing import PassageSchedule
from mates_hf.errors import MatesError, RoundMismatchError, UnsupportedSettingError
from mates_hf.records import STATE_KEY
from mates_hf.training.mixed_in import replace_dataset
from mates_hf.training.verify import verify_run
from tests.launch import free_port, start_processes
from tests.training.kit import (
    DIGITS,
    OLD_TRAINER,
    Result,
    Stop,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    run,
    small_config,
)
from tests.training.settings import proves
from tests.training.test_verify import forge

NUM = 8  # passages; a passage has no number of a row, so that what is watched of it lies behind those of all rows
FIRST = DIGITS * DIGITS
CODES = [int(ids[0] * DIGITS + ids[1]) for ids in (make_reference(NUM).rows.row(i)[0] for i in range(NUM))]
SETTING = "`reference_passes`"
EVERY = {"save_strategy": "steps", "save_steps": 1}


def mates(passes: int = 4, **changes: Any) -> MatesCallback:
    settings = {"reference_passes": passes, "switch_lead_steps": 3, **changes}
    return MatesCallback(make_reference(NUM), small_config(**settings))


def passages_of(rows: list[int]) -> dict[int, int]:
    """Position and number of each passage among the rows that were trained on."""
    return {position: CODES.index(row) for position, row in enumerate(rows) if row >= FIRST}


def pool_rows_of(rows: list[int]) -> list[int]:
    return [row for row in rows if row < FIRST]


def passages_at(passes: int, num_rows: int, start: int = 0) -> dict[int, int]:
    """Position and number of each passage of a run that has so many rows."""
    schedule = PassageSchedule(num_passages=NUM, passes=passes, start=start, num_rows=num_rows - start, seed=0)
    return dict(zip(*(part.tolist() for part in schedule.standing(0, num_rows)), strict=True))


def assert_mixed(rows: list[int], folder: Path, own: list[int]) -> None:
    """Passages where the schedule has them; all other rows are the own order's, and then the selections'."""
    assert passages_of(rows) == passages_at(4, len(rows))
    orders = [load_round(path) for path in sorted((folder / "_mates").glob("round-????"))]
    begin = orders[0].info["from_position"] if orders else len(pool_rows_of(rows))
    expected = own[:begin]
    for record in orders:
        assert record.info["from_position"] == len(expected)
        assert record.info["row_position"] == record.info["from_step"] * 4
        expected = expected + np.asarray(record.selection).tolist()
    assert pool_rows_of(rows) == expected
    result = verify_run(folder) if orders else None
    assert result is None or result.problem is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Result]:
    """20 steps of 4 rows, 32 of the 80 rows are passages; a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(make_arguments(folder, **EVERY), [mates()], dropout=0.1)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[int]:
    """The rows of the run without the callback."""
    return run(make_arguments(tmp_path_factory.mktemp("plain"), max_steps=100), []).rows


@proves(
    SETTING, "order; each passage of the reference task is trained on as often as asked; resumes exactly; verifies"
)
def test_passages_stand_between_the_rows_and_each_is_trained_on_as_often_as_asked(whole, own):
    folder, result = whole
    assert Counter(passages_of(result.rows).values()) == dict.fromkeys(range(NUM), 4)
    assert_mixed(result.rows, folder, own)
    infos = [load_round(path).info for path in sorted((folder / "_mates").glob("round-????"))]
    assert [info["num_rows"] + info["num_passage_rows"] for info in infos] == [24, 20]
    assert infos[0]["passages"] == result.trainer.state.stateful_callbacks[STATE_KEY]["passages"]
    assert type(result.trainer.callback_handler.train_dataloader.dataset) is Dataset  # what was there is put back


@pytest.mark.slow
def test_without_passages_nothing_names_them(tmp_path):
    callback = MatesCallback(make_reference(NUM), small_config(switch_lead_steps=3))
    state = run(make_arguments(tmp_path), [callback]).trainer.state.stateful_callbacks[STATE_KEY]
    path = tmp_path / "_mates" / "round-0001"
    key = json.loads((path / "key.json").read_text())
    info = load_round(path).info
    assert not {"passages", "row_position", "num_passage_rows"} & {*state, *key, *info}
    assert "reference_passes" not in {**key["config"], **state["config"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["workers", "spawn", "accumulation"],
)
def test_how_rows_are_fetched_moves_none(tmp_path, whole, own, changes):
    """Workers read ahead; persistent ones hold the dataset that the dataloader had when they began."""
    args = make_arguments(tmp_path, **changes)
    lead = {"switch_lead_steps": 5} if "dataloader_num_workers" in changes else {}
    result = run(args, [MatesCallback(make_reference(NUM), small_config(**{"reference_passes": 4, **lead}))])
    assert_mixed(result.rows, tmp_path, own)
    assert passages_of(result.rows) == passages_of(whole[1].rows)


@pytest.mark.quick("never")
@pytest.mark.parametrize(
    "changes", [{"random_rounds": 99}, {"on_weak_signal": "own_order", "min_spearman": 1.0}], ids=["never", "weak"]
)
def test_every_mode_has_them(tmp_path, own, changes):
    """Before a first selection that never comes, and in rounds in the own order."""
    rows = run(make_arguments(tmp_path), [mates(**changes)]).rows
    assert len(passages_of(rows)) == 32
    assert sorted(set(pool_rows_of(rows))) == sorted(pool_rows_of(rows))
    begin = 21 if "min_spearman" in changes else 48
    assert pool_rows_of(rows)[:begin] == own[:begin]
    assert "min_spearman" not in changes or verify_run(tmp_path).problem is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"first_round_steps": 3},
        {"drift_check_steps": 4, "drift_spearman": 1.0, "average_steps": 0},
        {"candidate_scope": "pool", "random_share": 0.3},
        {"keep_rounds": 2},
    ],
    ids=["growing", "drift", "pool", "pruned"],
)
def test_rounds_of_every_kind_lose_no_row(tmp_path, own, changes):
    """Also those that start early, and cut off what the round before them chose."""
    rows = run(make_arguments(tmp_path, max_steps=36), [mates(8, **changes)]).rows
    assert passages_of(rows) == passages_at(8, 144)
    infos = [load_round(path).info for path in sorted((tmp_path / "_mates").glob("round-????"))]
    assert "drift_check_steps" not in changes or infos[1]["step"] < 12
    assert len(infos) == 2 if "keep_rounds" in changes else len(infos) > 4
    found, begin = pool_rows_of(rows), 0
    for info, path in zip(infos, sorted((tmp_path / "_mates").glob("round-????")), strict=True):
        begin = info["from_position"]
        assert begin == len(pool_rows_of(rows[: info["from_step"] * 4]))
        after = [each["from_position"] for each in infos if each["from_position"] > begin]
        order = np.load(path / ("selection.npy" if (path / "selection.npy").exists() else "own_order.npy")).tolist()
        end = min([*after, begin + len(order)])
        assert found[begin:end] == order[: end - begin]
    assert len(found) == len(set(found)) == 144 - 64
    assert verify_run(tmp_path).problem is None


@pytest.mark.slow
def test_the_reference_loss_ends_lower_with_passages_than_without(tmp_path):
    """All else is equal; the pool has no text of the passages' kind, which nobody could predict."""
    rng = np.random.default_rng(1)
    texts = [np.concatenate([[33 + i], rng.integers(32, 64, 11)]).tolist() for i in range(NUM)]
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": texts}), input_ids_column="input_ids")
    losses = {}
    for passes in (0, 4):
        config = small_config(reference_passes=passes, update_steps=10, switch_lead_steps=5)
        given = {"max_steps": 40, "dataloader_num_workers": 2, "learning_rate": 1e-2}
        args = make_arguments(tmp_path / str(passes), lr_scheduler_type="constant", **given)
        result = run(args, [MatesCallback(reference, config)])
        counts = Counter(row for row in result.rows if row >= FIRST)
        assert sorted(counts.values()) == ([4] * NUM if passes else [])
        ids = torch.tensor(texts)
        with torch.no_grad():
            losses[passes] = float(result.trainer.model.eval()(input_ids=ids, labels=ids).loss)
    assert losses[4] < losses[0] - 0.1


# ---- going on


@pytest.mark.quick("14")
@pytest.mark.parametrize("step", [6, 8, 12, 14])
def test_a_run_that_is_stopped_goes_on_with_the_same_rows_and_weights(tmp_path, whole, step):
    folder, result = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for path in (folder / "_mates").iterdir():
        if path.suffix == ".safetensors" or (path.name.startswith("round-") and load_round(path).info["step"] <= step):
            (shutil.copytree if path.is_dir() else shutil.copy)(
                path, (tmp_path / "_mates").mkdir(exist_ok=True) or tmp_path / "_mates" / path.name
            )
    rest = run(make_arguments(tmp_path, **EVERY), [mates()], dropout=0.1, resume=str(tmp_path / f"checkpoint-{step}"))
    assert rest.rows == result.rows[step * 4 :]
    assert rest.losses == result.losses
    for name, value in result.weights.items():
        assert torch.equal(value, rest.weights[name]), name


@pytest.mark.slow
def test_a_longer_and_a_shorter_run_keep_the_schedule(tmp_path, whole, own, caplog):
    run(make_arguments(tmp_path, **EVERY), [mates(), Stop(8)])
    checkpoint = str(tmp_path / "checkpoint-8")
    shorter = run(make_arguments(tmp_path, max_steps=14), [mates()], resume=checkpoint)
    assert passages_of(shorter.rows) == {
        position - 32: passage for position, passage in passages_of(whole[1].rows).items() if 32 <= position < 56
    }
    assert "ends before 10 of its 32 passages are trained on" in caplog.text
    rest = run(make_arguments(tmp_path, max_steps=26), [mates()], resume=checkpoint)
    assert passages_of([0] * 32 + rest.rows) == {p: n for p, n in passages_of(whole[1].rows).items() if p >= 32}
    assert verify_run(tmp_path).problem is None


@pytest.mark.slow
@pytest.mark.skipif(OLD_TRAINER, reason="transformers 4 resumes with the batch size of the checkpoint")
@pytest.mark.parametrize("batch", [2, 8])
def test_another_batch_keeps_the_schedule_and_no_row_is_lost_or_trained_on_twice(tmp_path, batch):
    first = run(make_arguments(tmp_path, **EVERY), [mates(), Stop(8)])
    args = make_arguments(tmp_path, per_device_train_batch_size=batch)
    rows = first.rows + run(args, [mates()], resume=str(tmp_path / "checkpoint-8")).rows
    counts = Counter(passages_of(rows).values())
    assert max(counts.values()) <= 4
    assert batch == 2 or counts == dict.fromkeys(range(NUM), 4)
    assert passages_of(rows) == {at: passage for at, passage in passages_at(4, 80).items() if at < len(rows)}
    assert max(Counter(pool_rows_of(rows)).values()) == 1
    assert verify_run(tmp_path).problem is None
    records = [load_round(path) for path in sorted((tmp_path / "_mates").glob("round-????"))]
    ends = [*(record.info["from_position"] for record in records[1:]), len(pool_rows_of(rows))]
    for record, end in zip(records, ends, strict=True):
        begin, order = record.info["from_position"], np.asarray(record.selection).tolist()
        found = pool_rows_of(rows)[begin:end]
        assert found[: len(order)] == order[: len(found)]  # where it ends too soon, rows of the pool follow


@pytest.mark.slow
def test_another_number_of_passes_or_other_passages_is_another_run(tmp_path):
    run(make_arguments(tmp_path, **EVERY), [mates(), Stop(3)])
    checkpoint = str(tmp_path / "checkpoint-3")
    for passes in (0, 2):
        with pytest.raises(RoundMismatchError, match=r"differ in reference_passes: checkpoint 4, this run"):
            run(make_arguments(tmp_path), [mates(passes)], resume=checkpoint)
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    for change, error, said in (
        ({"sha256": "0"}, RoundMismatchError, "differ in sha256"),
        ({"num_passages": 9}, RoundMismatchError, "differ in num_passages"),
        ({"start": "a"}, MatesError, "must say where the passages stand"),
    ):
        changed = json.loads(json.dumps(state))
        changed["stateful_callbacks"][STATE_KEY]["passages"].update(change)
        path.write_text(json.dumps(changed))
        with pytest.raises(error, match=said):
            run(make_arguments(tmp_path), [mates()], resume=checkpoint)


@pytest.mark.slow
def test_a_run_of_a_version_without_the_field_goes_on_without_passages(tmp_path):
    config = {"switch_lead_steps": 3}
    callback = MatesCallback(make_reference(NUM), small_config(**config))
    run(make_arguments(tmp_path, **EVERY), [callback, Stop(8)])
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    assert "reference_passes" not in path.read_text()  # as an older version left it
    with pytest.raises(RoundMismatchError, match=r"differ in reference_passes: checkpoint 0, this run 4"):
        run(make_arguments(tmp_path), [mates()], resume=str(path.parent))
    run(
        make_arguments(tmp_path), [MatesCallback(make_reference(NUM), small_config(**config))], resume=str(path.parent)
    )


@pytest.mark.slow
def test_passages_may_be_added_to_a_run_that_had_no_callback(tmp_path):
    first = run(make_arguments(tmp_path, **EVERY), [Stop(5)])
    rest = run(make_arguments(tmp_path, **EVERY), [mates()], resume=str(tmp_path / "checkpoint-5"))
    assert len(first.rows) == 20
    assert passages_of(first.rows + rest.rows) == passages_at(4, 80, start=20)


# ---- epochs and small pools


@pytest.mark.slow
@pytest.mark.parametrize(("update_steps", "random_rounds"), [(8, 4), (10, 3)], ids=["inside", "at an end"])
def test_several_epochs_and_passes_with_a_ragged_end(tmp_path, update_steps, random_rounds):
    """A first selection in the third epoch, or at the end of the second, of a pool whose last batch is not full."""
    rounds = {"update_steps": update_steps, "random_rounds": random_rounds, "switch_lead_steps": 2}
    config = {"num_probes": 10, "selection_ratio": 1.0, "max_passes": 9, **rounds}
    pool, save = make_pool(58), {"save_strategy": "steps", "save_steps": 20, "max_steps": 60}
    rows = run(make_arguments(tmp_path, **save), [mates(**config)], pool).rows
    assert len(rows) == 240
    assert Counter(passages_of(rows).values()) == dict.fromkeys(range(NUM), 4)
    for begin in (0, 60):  # an epoch has 15 batches
        assert max(Counter(pool_rows_of(rows[begin : begin + 60])).values()) == 1
    record = load_round(tmp_path / "_mates" / f"round-{random_rounds:04d}")
    end = record.info["from_step"] * 4
    assert record.info["from_position"] == len(pool_rows_of(rows[:end]))
    consumed = np.unpackbits(np.load(record.path / "consumed.npy"), count=58)
    assert record.info["pass"] == 1
    assert np.flatnonzero(consumed).tolist() == sorted(pool_rows_of(rows[120:end]))
    assert pool_rows_of(rows[end:])[: len(record.selection)] == np.asarray(record.selection).tolist()
    assert verify_run(tmp_path).problem is None
    for step in (20, 40):
        again = run(
            make_arguments(tmp_path, max_steps=60), [mates(**config)], pool, resume=f"{tmp_path}/checkpoint-{step}"
        )
        assert again.rows == rows[step * 4 :]


@pytest.mark.slow
def test_a_pool_that_is_too_small_without_passages_suffices_with_them(tmp_path):
    """18 steps of 4 rows: 9 before the first selection, two rounds of 6 and 3; 16 passages among all of them."""
    config = {"num_probes": 10, "selection_ratio": 1.0, "switch_lead_steps": 3}
    pool = make_pool(68)
    args = make_arguments(tmp_path, max_steps=18)
    with pytest.raises(ValueError, match="The pool must have rows enough") as caught:
        run(args, [mates(0, **config)], pool)
    run(args, [mates(2, **config)], pool)
    with pytest.raises(ValueError, match=r"The largest `max_steps` that fits is \d+") as caught:
        run(make_arguments(tmp_path, max_steps=40), [mates(2, **config)], pool)
    most = int(str(caught.value).split("that fits is ")[1].split()[0])
    rows = run(make_arguments(tmp_path / "most", max_steps=most), [mates(2, **config)], pool).rows
    assert most == 18  # 56 rows and 10 probed ones
    assert Counter(passages_of(rows).values()) == dict.fromkeys(range(NUM), 2)


# ---- bad input


def test_more_passages_than_half_of_the_rows_are_left_out_with_their_number(tmp_path, caplog):
    rows = run(make_arguments(tmp_path), [mates(9, random_rounds=99)]).rows
    counts = Counter(passages_of(rows).values())
    assert sum(counts.values()) == 40
    assert set(counts.values()) == {5}
    assert "of 9 passes over 8 rows of them (`reference_passes`), 32 of 72 are left out" in caplog.text
    assert all(len(passages_of(rows[i : i + 4])) == 2 for i in range(0, 80, 4))


def test_one_passage_and_one_longer_than_the_context(tmp_path):
    ids = [(32 + np.arange(50) % 8).tolist()]  # the model reads 32
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": ids}), input_ids_column="input_ids")
    config = small_config(reference_passes=3, random_rounds=99)
    rows = run(make_arguments(tmp_path), [MatesCallback(reference, config)]).rows
    assert len([row for row in rows if row >= FIRST]) == 3 * 3  # 32 tokens are three blocks of 12


@pytest.mark.parametrize("evaluated", [{"is_evaluated": True}, {"description": {"split": "test"}}])
@proves(SETTING + " on a split that lm-eval evaluates", "no step, no file", outcome="refused")
def test_a_split_that_is_evaluated_is_refused(tmp_path, evaluated):
    reference = dataclasses.replace(make_reference(NUM), **evaluated)
    with pytest.raises(UnsupportedSettingError, match="which lm-eval evaluates.*another split"):
        run(make_arguments(tmp_path / "run"), [MatesCallback(reference, small_config(reference_passes=1))])
    assert not (tmp_path / "run" / "_mates").exists()
    run(make_arguments(tmp_path / "run", max_steps=2), [MatesCallback(reference, small_config())])


@proves(SETTING + " that no batch takes together with pool rows", "no step, no file", outcome="refused")
def test_a_pool_that_takes_no_passages_is_refused(tmp_path):
    pool = make_pool()
    pool = pool.add_column("weight", np.arange(len(pool)))
    args = make_arguments(tmp_path / "run", remove_unused_columns=False)
    with pytest.raises(UnsupportedSettingError, match=r"With `reference_passes` a batch must take.*\['weight'\]"):
        run(args, [mates()], pool)
    assert not (tmp_path / "run" / "_mates").exists()


@pytest.mark.slow
def test_workers_that_persist_from_before_are_given_the_passages():
    loader = prepare_data_loader(
        DataLoader(list(range(8)), 2, num_workers=1, persistent_workers=True), put_on_device=False
    )
    assert len(list(loader)) == 4
    before = loader.dataset
    put_back = replace_dataset(loader, [each + 100 for each in range(8)])
    assert [int(each) for batch in loader for each in batch] == list(range(100, 108))
    put_back()
    assert loader.dataset is before
    assert [int(each) for batch in loader for each in batch] == list(range(8))


def test_a_dataloader_that_reads_from_elsewhere_is_refused():
    class Elsewhere:
        dataset = [1]

    with pytest.raises(UnsupportedSettingError, match="where Elsewhere has its dataset is not known"):
        replace_dataset(Elsewhere(), [2])


# ---- records


def test_a_record_that_was_changed_is_found(tmp_path, whole):
    shutil.copytree(whole[0] / "_mates", tmp_path / "_mates")
    path = tmp_path / "_mates" / "round-0002"
    info = load_round(path).info
    passages = info["passages"]
    for change in (
        {"num_passage_rows": info["num_passage_rows"] + 1},
        {"num_passage_rows": None},
        {"row_position": info["row_position"] + 3},
        {"passages": {**passages, "num_rows": 90}},
        {"passages": {**passages, "sha256": "0"}},
        {"passages": None},
    ):
        forge(path, **{**info, **change})
        problem = verify_run(tmp_path).problem
        assert problem is not None, change
        assert problem.round == "round-0002"
    forge(path, **info)
    assert verify_run(tmp_path).problem is None


# ---- a loop of one's own, and several processes


def test_a_loop_of_ones_own_reads_passages_of_its_dataset_and_trains_as_the_trainer_does(tmp_path, own):
    pool, seen = make_pool(), []
    config = small_config(reference_passes=4, switch_lead_steps=3)

    def loop(stop: int, state: Any = None) -> Any:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rounds = MatesRounds(
            make_reference(NUM), pool, config, output_dir=tmp_path, collate_fn=default_data_collator, progress=False
        )
        with pytest.raises(MatesError, match="`dataset` must be asked for after `order`"):
            _ = rounds.dataset
        if state is not None:
            rounds.load_state_dict(state[0])
            model.load_state_dict(state[1])
            optimizer.load_state_dict(state[2])
        for step, rows in rounds.order(model, optimizer, batch_size=4, max_steps=20):
            batch = default_data_collator([rounds.dataset[int(i)] for i in rows])
            seen.extend((batch["input_ids"][:, 0] * DIGITS + batch["input_ids"][:, 1]).tolist())
            assert [int(i) < len(pool) for i in rows] == [row < FIRST for row in seen[-4:]]
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == stop:
                return rounds.state_dict(), model.state_dict(), optimizer.state_dict()
        return None

    loop(20, loop(8))
    assert_mixed(seen, tmp_path, own)
    plain = MatesRounds(make_reference(NUM), pool, small_config(), output_dir=tmp_path, progress=False)
    assert plain.dataset is pool


@pytest.mark.slow
def test_two_processes_have_one_schedule_and_a_stop_changes_nothing(tmp_path):
    def start(size: int, name: str, **more: Any) -> list[list[int]]:
        args = {
            "per_device_train_batch_size": 8 // size,
            "dataloader_num_workers": 1,
            "save_strategy": "steps",
            "save_steps": 9,
        }
        config = {"reference_passes": 2, "switch_lead_steps": 5}
        given = {
            "output_dir": str(tmp_path / name),
            "result": str(tmp_path / f"{name}-{size}"),
            "args": args,
            "config": config,
            **more,
        }
        processes = start_processes(["tests/training/worker.py", json.dumps(given)], size, free_port())
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * size, errors
        found = [json.loads((tmp_path / f"{name}-{size}-{rank}.json").read_text())["rows"] for rank in range(size)]
        return np.concatenate([np.reshape(rows, (-1, 8 // size)) for rows in found], 1).tolist()

    one = start(1, "one")
    counts = Counter(row for step in one for row in step if row >= FIRST)
    assert sorted(counts.values()) == sorted(2 * (3 if i < 8 else 0) for i in range(8))  # 24 passages of 8 kinds
    first = start(2, "two", stop_at=9)
    assert first + start(2, "two", resume=str(tmp_path / "two" / "checkpoint-9")) == one
    assert verify_run(tmp_path / "two").problem is None
