"""`mates-hf where`: what it says is what the model was given, as a hook on the model saw it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import TrainerCallback

from mates_hf import MatesCallback, NgramInfluenceModel
from mates_hf.answering.where import where_rows
from mates_hf.cli import main
from mates_hf.errors import UnsupportedSettingError
from tests.training.kit import (
    OLD_DATASETS,
    OLD_TRAINER,
    Stop,
    make_arguments,
    make_pool,
    make_reference,
    run,
    small_config,
)

SAVES = {"save_strategy": "steps", "save_steps": 1}
ROWS = 400


def callback(**config) -> MatesCallback:
    return MatesCallback(make_reference(), small_config(**config), influence_model=NgramInfluenceModel(num_buckets=64))


def said(path, num_rows: int = ROWS) -> list[list[tuple[int, int, bool]]]:
    """Of each row the positions, steps and whether they are done, as the command says."""
    found = where_rows(path, np.arange(num_rows))
    uses = [[] for _ in range(num_rows)]
    for use in found.uses:
        uses[use.row].append((use.position, use.step, use.done))
    return uses


def seen(rows: list[int], batch: int, num_rows: int = ROWS) -> list[list[tuple[int, int, bool]]]:
    uses = [[] for _ in range(num_rows)]
    for position, row in enumerate(rows):
        uses[row].append((position, position // batch + 1, True))
    return uses


def done(uses):
    return [[use for use in each if use[2]] for each in uses]


def test_every_row_is_where_the_model_saw_it(tmp_path):
    result = run(make_arguments(tmp_path), [callback()])
    assert said(tmp_path) == seen(result.rows, 4)
    found = where_rows(tmp_path, [result.rows[0], result.rows[-1]])
    assert found.uses[0].round != found.uses[1].round
    assert {use.round for use in found.uses} == {None, 3}
    assert found.unknown == ()


def test_several_passes_in_the_own_order_and_in_rounds(tmp_path):
    pool = make_pool(60)
    config = {"update_steps": 6, "num_probes": 10, "random_rounds": 4, "max_passes": 5}
    result = run(make_arguments(tmp_path, max_steps=50, per_device_train_batch_size=4), [callback(**config)], pool)
    uses = said(tmp_path, 60)
    assert uses == seen(result.rows, 4, 60)
    assert max(map(len, uses)) >= 3


def test_a_last_batch_that_is_not_full_moves_no_row(tmp_path):
    pool = make_pool(58)
    config = {"update_steps": 6, "num_probes": 10, "random_rounds": 4, "max_passes": 5}
    result = run(make_arguments(tmp_path, max_steps=40), [callback(**config)], pool)
    steps = [use[1] for each in said(tmp_path, 58) for use in each]
    rows = [[] for _ in range(58)]
    for row in result.rows:
        rows[row].append(row)
    assert [len(each) for each in said(tmp_path, 58)] == [len(each) for each in rows]
    assert np.bincount(steps, minlength=41)[15] == 2  # 58 rows are 14 steps of four and one of two


def test_a_killed_run_that_resumes_earlier(tmp_path):
    whole = run(make_arguments(tmp_path, **SAVES), [callback(), Stop(16)])
    assert done(said(tmp_path)) == seen(whole.rows, 4)
    args = make_arguments(tmp_path, **SAVES)
    rest = run(args, [callback(), Stop(10)], resume=str(tmp_path / "checkpoint-8"))
    uses = said(tmp_path)
    assert done(uses) == seen([*whole.rows[: 8 * 4], *rest.rows], 4)
    assert len([use for each in uses for use in each]) > 40  # what is ahead is said, and is not done


@pytest.mark.skipif(OLD_TRAINER, reason="transformers 4 resumes with the batch size of the checkpoint")
def test_a_resume_with_a_larger_batch_has_its_own_steps(tmp_path):
    settings = {**SAVES, "max_steps": 20}
    first = run(make_arguments(tmp_path, **settings), [callback(switch_lead_steps=1), Stop(9)])
    larger = make_arguments(tmp_path, **settings, per_device_train_batch_size=8)
    rest = run(larger, [callback(switch_lead_steps=1)], resume=True)
    expected = seen(first.rows, 4)
    for at, row in enumerate(rest.rows):
        expected[row].append((36 + at, 10 + at // 8, True))
    assert said(tmp_path) == expected


def test_passages_between_the_rows_are_counted_as_steps_and_not_as_rows(tmp_path):
    result = run(make_arguments(tmp_path), [callback(reference_passes=1)])
    own = [(at, row) for at, row in enumerate(result.rows)]
    uses = {(use.row, use.step) for use in where_rows(tmp_path, np.arange(ROWS)).uses}
    # A passage's tokens read as a number beyond the pool.
    assert uses == {(row, at // 4 + 1) for at, row in own if row < ROWS}


def test_before_the_first_round_and_while_nothing_is_selected(tmp_path):
    result = run(make_arguments(tmp_path, **SAVES), [callback(), Stop(3)])
    assert not list((tmp_path / "_mates").glob("round-*"))
    assert done(said(tmp_path)) == seen(result.rows, 4)


def test_deleted_rounds_are_said_to_be_unknown(tmp_path):
    run(make_arguments(tmp_path, max_steps=30), [callback(keep_rounds=2)])
    found = where_rows(tmp_path, [0])
    assert len(found.unknown) == 1
    start, stop = found.unknown[0]
    assert stop - start == 6 * 4 * (4 - 2)
    assert "not known" in list(found.lines())[-1]


def test_a_new_run_in_the_same_folder_has_a_history_of_its_own(tmp_path):
    run(make_arguments(tmp_path), [callback()])
    second = run(make_arguments(tmp_path, seed=7), [callback()])
    assert said(tmp_path) == seen(second.rows, 4)
    assert (tmp_path / "_mates" / "history.stale").is_dir()


class EndsEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 3


def test_an_epoch_that_a_callback_ends(tmp_path):
    config = {"update_steps": 5, "switch_lead_steps": 5, "num_probes": 10, "max_passes": 3}
    result = run(make_arguments(tmp_path, max_steps=51), [EndsEpoch(), callback(**config), Stop(20)], make_pool(200))
    assert done(said(tmp_path, 200)) == seen(result.rows, 4, 200)


def test_the_command_prints_a_table_and_json(tmp_path, capsys):
    result = run(make_arguments(tmp_path), [callback()])
    never = next(row for row in range(ROWS) if row not in result.rows)
    np.save(tmp_path / "rows.npy", np.array([result.rows[3], never]))
    assert main(["where", str(tmp_path), "--rows", str(tmp_path / "rows.npy")]) == 0
    out = capsys.readouterr().out
    assert "the own order, before the first selection" in out
    assert f"{never:>10} {'-':>10} {'-':>8}  not trained on" in out
    assert main(["where", str(tmp_path), "--rows", f"{result.rows[3]},{never}", "--json"]) == 0
    found = {each["row"]: each["uses"] for each in json.loads(capsys.readouterr().out)["rows"]}
    assert found[result.rows[3]] == [{"position": 3, "step": 1, "round": None, "done": True}]
    assert found[never] == []


def test_rows_by_their_ids(tmp_path, capsys):
    pool = make_pool()
    result = run(make_arguments(tmp_path), [callback()], pool)
    capsys.readouterr()
    named = pool.add_column("key", [f"k{i}" for i in range(ROWS)])
    named.save_to_disk(tmp_path / "pool")
    words = ["where", str(tmp_path), "--id-column", "key", "--dataset", str(tmp_path / "pool"), "--json"]
    assert main([*words, "--ids", f"k{result.rows[5]}"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["uses"][0]["position"] == 5
    assert "mates-hf" not in captured.err
    assert main([*words, "--ids", "nobody"]) == 1
    assert "1 of 1 are not, first ['nobody']" in capsys.readouterr().err
    named.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    words[words.index(str(tmp_path / "pool"))] = str(tmp_path / "shuffled")
    assert main([*words, "--ids", "k1"]) == 0
    assert "other rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [("400", "0 to 399, got 400"), ("x", "or a file, got 'x'"), ("-1", "or a file")],
)
def test_what_is_no_row_is_refused_in_one_line(tmp_path, capsys, rows, message):
    (tmp_path / "_mates" / "history").mkdir(parents=True)
    assert main(["where", str(tmp_path), f"--rows={rows}"]) == 1
    run(make_arguments(tmp_path, max_steps=8), [callback()])
    capsys.readouterr()
    assert main(["where", str(tmp_path), f"--rows={rows}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(OLD_DATASETS, reason="streams need datasets 4.0")
def test_a_stream_is_refused_with_a_way_out(tmp_path):
    from mates_hf import MatesStream

    stream = MatesStream(make_pool().to_iterable_dataset(), buffer_rows=64)
    run(make_arguments(tmp_path, max_steps=8), [callback()], stream)
    with pytest.raises(UnsupportedSettingError, match=r"is of a stream.*Dataset.from_generator"):
        where_rows(tmp_path, [1])
