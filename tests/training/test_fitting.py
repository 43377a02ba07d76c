"""Whole epochs and small pools: rounds are fitted to the pool, rows come back in turn, and every advice works."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf import MatesCallback, MatesConfig, load_round
from mates_hf.disk import read_json, write_json
from mates_hf.errors import RoundMismatchError
from mates_hf.round_files import write_checksums
from mates_hf.selection.plan import RunPlan, num_candidates
from mates_hf.training.fitting import settle
from mates_hf.training.start import tell_no_round
from mates_hf.training.verify import verify_run
from tests.training.kit import (
    OLD_TRAINER,
    VOCAB,
    Result,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    run,
    small_config,
)
from tests.training.settings import NO_FILE, Setup, assert_refused, mates, proves, rounds_of
from tests.training.test_loop import Training, make_rounds
from tests.training.test_processes import start

EPOCHS = "whole epochs (`num_train_epochs=1` and more)"
TRL_EPOCHS = "TRL's `sft.py` as documented (`--packing`, `--num_train_epochs 1`)"


# --- what is fitted ---


def plan_of(num_rows: int, max_steps: int, batch_rows: int = 4, **config: Any) -> RunPlan:
    settings_ = MatesConfig(**{"num_probes": 100, **config})
    return RunPlan(num_rows=num_rows, batch_rows=batch_rows, max_steps=max_steps, config=settings_)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 25),  # 100 rows from 500
        ({"num_probes": 700}, 15),  # 60 rows from the 300 that are not probed
        ({"selection_ratio": 0.5}, 62),
        ({"switch_lead_steps": 40}, 40),  # from 800, as it asks for so many
        ({"average_steps": 30, "drift_check_steps": 35}, 36),
        ({"update_steps": 26}, 25),
        ({"update_steps": 25}, None),
        ({"max_passes": 9}, None),
        ({"update_steps": 1_000, "random_rounds": 2}, None),  # as many rounds of its own order as it has
    ],
)
def test_rounds_choose_from_half_of_a_small_pool(caplog, changes, steps):
    plan = plan_of(1_000, 250, **changes)  # an epoch
    found = settle(plan, None)
    if steps is None:
        assert found == (plan.config, {})
        assert not caplog.records
        return
    asked = plan.config.update_steps
    assert found.config == MatesConfig(**{**plan.config.to_dict(), "update_steps": steps})
    assert found.asked == {"update_steps": asked}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"`update_steps` is {steps} in place of {asked}" in record.getMessage()


@pytest.mark.parametrize(
    ("num_rows", "max_steps", "config"),
    [
        (100_000, 250, {"update_steps": 40}),  # one pass suffices
        (520, 50, {"update_steps": 20, "num_probes": 10}),  # 80 rows from 400 of 420
        (1_000, 20, {}),  # too short for a round, in a pool that it does not go through: that is told
    ],
)
def test_where_one_pass_suffices_nothing_is_fitted(num_rows, max_steps, config):
    plan = plan_of(num_rows, max_steps, first_round_steps=None, **config)
    assert settle(plan, None) == (plan.config, {})


@settings(max_examples=150, deadline=None)
@given(
    st.integers(20, 3_000), st.integers(1, 16), st.floats(0.2, 5), st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    st.integers(10, 800), st.integers(1, 300), st.sampled_from([None, 1, 5, 40]), st.sampled_from([None, 1, 20]),
)  # fmt: skip
def test_what_is_fitted_always_finds_its_rows_and_each_refusal_says_what_does(
    num_rows, batch_rows, epochs, ratio, num_probes, update_steps, first, lead
):
    config = {"selection_ratio": ratio, "num_probes": num_probes, "update_steps": update_steps}
    config |= {"first_round_steps": first, "switch_lead_steps": None if lead is None else min(lead, update_steps)}
    plan = plan_of(num_rows, max(round(epochs * num_rows / batch_rows), 1), batch_rows, **config)
    found, message = None, ""
    try:
        found = settle(plan, None)
    except ValueError as error:
        message = str(error)
    if found is None:
        found = follow(plan, message)
    if found is None:
        assert "Enlarge the pool, or make the batch smaller" in message
        return
    fitted = RunPlan(num_rows=num_rows, batch_rows=batch_rows, max_steps=plan.max_steps, config=found.config)
    fitted.check()
    if found.asked:
        rows = num_candidates(found.config.update_steps * batch_rows, found.config.selection_ratio)
        assert rows + found.config.num_probes <= num_rows
        assert rows <= num_rows // 2 or found.config.update_steps == found.config.least_update_steps
        assert fitted.rounds


def follow(plan: RunPlan, message: str) -> Any:
    """What a run is fitted to that does as it is told; None where it is told of no setting."""
    told = re.search(r"Set (`.*`)", message)
    if told is None:
        return None
    changes = {name: json.loads(value) for name, value in re.findall(r"`(\w+)=([\d.]+)`", told[0])}
    changes |= dict.fromkeys(re.findall(r"`(\w+)=None`", told[0]))
    config = MatesConfig(**{**plan.config.to_dict(), **changes})
    changed = RunPlan(num_rows=plan.num_rows, batch_rows=plan.batch_rows, max_steps=plan.max_steps, config=config)
    found = settle(changed, None)
    assert RunPlan(
        num_rows=plan.num_rows, batch_rows=plan.batch_rows, max_steps=plan.max_steps, config=found.config
    ).rounds
    return found


@pytest.mark.parametrize(
    ("num_rows", "max_steps", "config", "way_out"),
    [
        (200, 150, {"update_steps": 20, "num_probes": 190}, "`num_probes=100`"),
        (60, 150, {"update_steps": 20, "num_probes": 59}, "`num_probes=20`"),
        (30, 150, {"update_steps": 20, "num_probes": 20}, "`num_probes=10`"),
        (20, 150, {"update_steps": 20, "num_probes": 20}, "`num_probes=10` and `selection_ratio=0.5`"),
        (300, 200, {"update_steps": 60, "switch_lead_steps": 50}, "`switch_lead_steps=3`"),
        (300, 200, {"update_steps": 60, "average_steps": 40}, "`average_steps=None`"),
        (12, 100, {"update_steps": 20, "num_probes": 10}, "Enlarge the pool, or make the batch smaller"),
    ],
)
def test_a_pool_too_small_for_any_round_is_refused_with_settings_that_work(num_rows, max_steps, config, way_out):
    plan = plan_of(num_rows, max_steps, **config)
    with pytest.raises(ValueError, match="must have rows enough for rounds of") as caught:
        settle(plan, None, look_ahead_steps=3)
    assert way_out in str(caught.value)
    assert (follow(plan, str(caught.value)) is None) == way_out.startswith("Enlarge")
    if way_out.startswith("Enlarge"):
        settle(plan_of(60, max_steps, **config), None)
        settle(plan_of(num_rows, max_steps, 1, **{**config, "selection_ratio": 1.0}), None)


@proves("a pool too small for any round", NO_FILE, outcome="refused", note="the message has settings that work")
def test_a_run_over_a_few_rows_is_refused_before_its_first_step(tmp_path):
    config: dict[str, Any] = {"max_passes": None, "num_probes": 60}
    setup = Setup(args={"num_train_epochs": 3, "max_steps": -1}, pool=lambda: make_pool(64))
    callbacks = lambda: [mates(**config)]  # noqa: E731
    assert_refused(tmp_path, setup, r"Set `num_probes=20`\.$", error=ValueError, callbacks=callbacks)
    config["num_probes"] = 20
    setup.run(tmp_path / "told", callbacks())
    assert len(rounds_of(tmp_path / "told")) > 2


def test_a_run_without_a_round_is_told_of_fewer_probes_where_those_are_too_many(caplog):
    plan = plan_of(400, 100, num_probes=2_000)
    assert settle(plan, None) == (plan.config, {})
    tell_no_round(plan)
    assert follow(plan, caplog.records[-1].getMessage()) is not None


def test_a_run_that_resumes_keeps_what_it_was_fitted_to():
    config = settle(plan_of(1_000, 250), None)
    saved = {"config": config.config.to_dict(), "asked": dict(config.asked)}
    for num_rows, max_steps, batch in ((1_000, 250, 4), (1_000, 900, 8), (90_000, 20, 1)):
        assert settle(plan_of(num_rows, max_steps, batch), saved) == config
        assert settle(plan_of(num_rows, max_steps, batch, update_steps=25), saved) == config
    with pytest.raises(RoundMismatchError, match=r"'update_steps': 1000}, fitted .*'update_steps': 25}, got .*: 500}"):
        settle(plan_of(1_000, 250, update_steps=500), saved)
    asked = plan_of(1_000, 250)
    assert settle(asked, {"config": asked.config.to_dict()}) == (asked.config, {})


# --- runs of whole epochs ---


def callback(**changes: Any) -> MatesCallback:
    """The default length of rounds, with few probes, whatever their signal."""
    config = {"update_steps": 1_000, "first_round_steps": 50, "max_passes": None, "num_probes": 20, **changes}
    return MatesCallback(make_reference(8), small_config(**config))


def epochs(folder: Path, num: float, **changes: Any) -> Any:
    return make_arguments(folder, num_train_epochs=num, max_steps=-1, **changes)


def check_turns(folder: Path, result: Result) -> list[Any]:
    """Rows are those of the records, each once in a pass, and none comes back before all had their turn."""
    records = rounds_of(folder)
    begin = records[0].info["from_position"]
    rows = [np.asarray(record.selection).tolist() for record in records]
    assert result.rows[begin:] == sum(rows, [])
    num_rows = len(result.trainer.train_dataset)
    had, trained, number = set(result.rows[:begin]), set(result.rows[:begin]), 1
    for record, chosen in zip(records, rows, strict=True):
        if record.info["pass"] > number:
            had, trained, number = had | trained, set(), record.info["pass"]
        offered = set(np.load(record.path / "candidates.npy").tolist())
        if offered & had:
            assert len(had | offered | trained) == num_rows
            had &= offered
        else:
            had |= offered
        assert not trained & set(chosen)
        trained |= set(chosen)
    assert max(np.bincount(result.rows)) <= number
    assert verify_run(folder).problem is None
    return records


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Path, Result]:
    """Three epochs of a pool of 200 rows, saved after each: rounds of 12 steps choose 48 rows from 96."""
    folder = tmp_path_factory.mktemp("three")
    return folder, run(epochs(folder, 3, save_strategy="epoch"), [callback()], make_pool(200))


@pytest.mark.slow
@proves(EPOCHS, "no trace up to the first selection; rounds are fitted to the pool, which the log says; a row comes "
        "back only when all had their turn; verifies", note="`max_passes=1` trains on no row twice")  # fmt: skip
def test_epochs_train_on_as_many_rows_as_they_say(tmp_path, three):
    folder, result = three
    records = check_turns(folder, result)
    assert len(result.rows) == 600
    assert {record.info["config"]["update_steps"] for record in records} == {12}
    assert {json.dumps(record.info["asked"]) for record in records} == {'{"update_steps": 1000}'}
    assert [record.info["pass"] for record in records][-1] >= 4
    assert ["num_waiting" in record.info for record in records] == [record.info["pass"] > 1 for record in records]
    plain = run(epochs(tmp_path, 3), [], make_pool(200))
    begin = records[0].info["from_step"]
    assert result.rows[: begin * 4] == plain.rows[: begin * 4]
    assert result.losses[:begin] == plain.losses[:begin]
    assert result.streams[:begin] == plain.streams[:begin]


@pytest.mark.slow
@proves(EPOCHS, "resumes exactly, also at another length or batch size")
def test_epochs_resume(tmp_path, three, caplog):
    folder, result = three
    args = epochs(folder, 3, save_strategy="epoch")
    rest = run(args, [callback()], make_pool(200), resume=str(folder / "checkpoint-100"))
    assert rest.rows == result.rows[400:]
    assert rest.losses == result.losses
    with pytest.raises(RoundMismatchError, match="fitted to the pool"):
        run(args, [callback(update_steps=900)], make_pool(200), resume=str(folder / "checkpoint-100"))
    with pytest.raises(RoundMismatchError, match="max_passes: checkpoint None, this run 2"):
        run(args, [callback(max_passes=2)], make_pool(200), resume=str(folder / "checkpoint-100"))
    first = epochs(tmp_path, 1, save_strategy="epoch")
    whole = run(first, [callback()], make_pool(200))
    changes = {} if OLD_TRAINER else {"per_device_train_batch_size": 2}
    longer = run(epochs(tmp_path, 2, **changes), [callback()], make_pool(200), resume=str(tmp_path / "checkpoint-50"))
    assert len(longer.rows) > 50
    assert sum("Rounds are fitted" in record.getMessage() for record in caplog.records) == 1  # a resume says nothing
    assert {record.info["round_steps"] for record in rounds_of(tmp_path)} == {12}
    assert verify_run(tmp_path).problem is None
    assert whole.rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "args"),
    [
        ({"first_round_steps": 3, "on_weak_signal": "own_order"}, {}),
        ({"candidate_scope": "pool", "keep_rounds": 2}, {}),
        ({"reference_passes": 2}, {}),
        ({"random_share": 0.5, "selection_ratio": 1.0}, {"gradient_accumulation_steps": 3}),
        ({"min_spearman": 1.0, "on_weak_signal": "own_order"}, {"train_sampling_strategy": "group_by_length"}),
        ({"switch_lead_steps": 8, "drift_check_steps": 9, "drift_spearman": 1.0, "average_steps": 2}, {}),
    ],
    ids=["growing", "pool", "passages", "all-ragged", "own-order", "drift"],
)
def test_other_settings_go_through_epochs(tmp_path, changes, args):
    pool = make_pool(105)  # a last batch of one row
    result = run(epochs(tmp_path, 2, **args), [callback(**changes)], pool)
    records = sorted((tmp_path / "_mates").glob("round-????"))
    assert len(records) >= 2
    last = load_round(records[-1]).info
    assert last["pass"] > 1
    assert len(result.rows) in (213, 216)  # 27 batches an epoch; the own order's last one has one row
    assert verify_run(tmp_path).problem is None


@pytest.mark.slow
def test_what_was_changed_of_turns_is_found_and_named(tmp_path):
    run(epochs(tmp_path, 1), [callback()], make_pool(200))
    path = next(p for p in sorted((tmp_path / "_mates").glob("round-*")) if load_round(p).info["pass"] > 1)
    file, info = path / "waiting.npy", read_json(path / "round.json")
    bits = np.load(file)

    def forged(change: Any, **changes: Any) -> Any:
        np.save(file, change)
        write_json(path / "round.json", {**info, **changes})
        write_checksums(path, {**info, **changes})
        return verify_run(tmp_path).problem

    flipped = bits.copy()
    flipped[0] ^= 0x80
    num = info["num_waiting"]
    for change, changes, named, expected in (
        (flipped, {}, "round.json", "`num_waiting`"),
        (flipped, {"num_waiting": num + (1 if flipped[0] > bits[0] else -1)}, "waiting.npy", "so row 0"),
        (bits[:-1], {}, "waiting.npy", "25 entries"),
        (bits, {"num_waiting": num + 1}, "round.json", f"`num_waiting` {num}"),
        (bits, {"pass": 1}, "round.json", "`pass`"),
        (bits, {"asked": {"update_steps": 500}}, "round.json", "`update_steps` 1000, as `asked` of round"),
        (bits, {"asked": {"update_steps": 12}}, "round.json", "`asked` with an `update_steps` above 12"),
    ):
        problem = forged(change, **changes)
        assert problem is not None
        assert (problem.round, problem.file) == (path.name, named), problem
        assert expected in problem.expected
    assert forged(bits) is None


@pytest.mark.slow
def test_a_loop_of_ones_own_has_the_rows_of_the_trainer(tmp_path):
    config = callback().config
    training = Training(tmp_path / "loop", max_steps=100)
    training.pool = make_pool(200)
    training.train(make_rounds(tmp_path / "loop", training.pool, config), max_steps=100)
    trained = run(epochs(tmp_path / "trainer", 2), [MatesCallback(make_reference(), config)], make_pool(200))
    assert training.rows == trained.rows
    assert verify_run(tmp_path / "loop").problem is None


@pytest.mark.slow
@proves(EPOCHS, "two processes train on the rows of one")
def test_two_processes_train_on_the_rows_of_one(tmp_path):
    config = {"update_steps": 1_000, "max_passes": None, "num_probes": 20}
    given_ = {"args": {"num_train_epochs": 2, "max_steps": -1}, "config": config, "num_rows": 120}
    one = start(tmp_path, 1, output_dir=str(tmp_path / "one"), **given_)
    two = start(tmp_path, 2, output_dir=str(tmp_path / "two"), **given_)
    assert (one.codes, two.codes) == ([0], [0, 0]), one.errors + two.errors
    assert two.rows == one.rows
    assert "".join(two.errors).count("Rounds are fitted to the pool") == 1


# --- TRL ---

SCRIPT = """
import inspect, sys
from datasets import Dataset
import trl.scripts.sft as sft
from mates_hf import MatesCallback, MatesConfig, ReferenceTask

passages = Dataset.from_json(sys.argv.pop(1))
lines = inspect.getsource(sft.main).split("\\n")
(at,) = (number for number, line in enumerate(lines) if line.startswith("    trainer.train("))
lines.insert(at, "    attach(trainer)")

def attach(trainer):
    reference = ReferenceTask.from_dataset(passages, trainer.processing_class, text_column="text")
    MatesCallback(reference, MatesConfig(num_probes=20, selection_ratio=0.5, on_weak_signal="select")).attach(trainer)

names = dict(vars(sft), attach=attach)
exec("\\n".join(lines), names)
names["main"](*sft.make_parser().parse_args_and_config(fail_with_unknown_args=False))
"""


@pytest.fixture
def documented(tmp_path, tiny_tokenizer) -> list[str]:
    """The arguments of TRL's documented command, with a small model and data set of this machine."""
    model, rng = make_model(), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    texts = [" ".join(f"w{i}" for i in rng.integers(3, VOCAB, size)) for size in rng.integers(5, 20, 300)]
    data = DatasetDict(train=Dataset.from_dict({"text": texts}), test=Dataset.from_dict({"text": texts[:20]}))
    for name, split in data.items():
        split.to_json(str(tmp_path / "data" / f"{name}.jsonl"))
    Dataset.from_dict({"text": texts[:30]}).to_json(str(tmp_path / "passages.jsonl"))
    return [
        "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data"),
        "--learning_rate", "2.0e-5", "--num_train_epochs", "1", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--eval_strategy", "steps", "--eval_steps", "100",
        "--output_dir", str(tmp_path / "out"), "--max_length", "32", "--report_to", "none", "--use_cpu",
        "--bf16", "False", "--packing",
    ]  # fmt: skip


@pytest.mark.slow
@proves(TRL_EPOCHS, "run unmodified but for the callback, they select and verify",
        note="the callback is the one line to add")  # fmt: skip
@pytest.mark.parametrize("further", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_the_commands_that_trl_documents_select(tmp_path, documented, further):
    pytest.importorskip("trl")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "passages.jsonl"), *documented, *further]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Rounds are fitted to the pool" in done.stderr
    records = rounds_of(tmp_path / "out")
    assert len(records) >= 3
    assert all(len(record.selection) for record in records)
    assert records[-1].info["pass"] > 1
    assert verify_run(tmp_path / "out").problem is None
    told = [line for line in done.stdout.splitlines() if line.startswith("round ")]
    assert len(told) == len(records) or not told
