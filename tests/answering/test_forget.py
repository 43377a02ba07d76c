"""`mates-hf forget`: removed rows are in nothing that follows, finished rounds lack them, and `verify` holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from mates_hf import MatesCallback, MatesRounds, MatesSelector, NgramInfluenceModel, load_round
from mates_hf.answering.audit import audit_run
from mates_hf.answering.forget import forget_rows
from mates_hf.answering.where import where_rows
from mates_hf.cli import main
from mates_hf.disk import read_json
from mates_hf.errors import UnsupportedSettingError
from mates_hf.round_files import read_labels
from mates_hf.training import journal
from mates_hf.training.lock import LockedError
from mates_hf.training.verify import report_lines, verify_run
from tests.launch import free_port, start_processes
from tests.training.kit import (
    OLD_TRAINER,
    Stop,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    run,
    small_config,
)

SAVES = {"save_strategy": "steps", "save_steps": 1}
ROWS = 1200


def callback(**config: Any) -> MatesCallback:
    settings = {"num_probes": 60, **config}
    model = NgramInfluenceModel(num_buckets=256)
    return MatesCallback(make_reference(), small_config(**settings), influence_model=model)


def train(path: Path, *callbacks: Any, resume: Any = None, pool: Any = None, config: Any = None, **settings: Any):
    args = make_arguments(path, **{**SAVES, "max_steps": 24, **settings})
    return run(
        args, [callback(**(config or {})), *callbacks], make_pool(ROWS) if pool is None else pool, resume=resume
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run that was stopped in its second round; the rows it was trained on."""
    path = tmp_path_factory.mktemp("forget") / "run"
    return path, train(path, Stop(16)).rows


@pytest.fixture
def copied(stopped: tuple[Path, list[int]], tmp_path: Path) -> tuple[Path, list[int]]:
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run", stopped[1]


def most_rows(seed: int = 0, num: int = 800) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(ROWS)[:num])


def holds(path: Path) -> bool:
    result = verify_run(path)
    assert result.problem is None, str(result.problem)
    return True


def mentions(path: Path, rows: np.ndarray) -> None:
    """No file of a finished round has a value that was made of one of these rows."""
    for round_path in (path / "_mates").glob("round-????"):
        record = load_round(round_path)
        assert not np.isin(record.labels.candidate_id, rows).any()
        assert len(record.labels.token_derivatives) == record.labels.num_tokens.sum()
        if record.candidates is not None:
            gone = np.isin(record.candidates, rows)
            assert np.isnan(record.scores[gone]).all()
            assert np.isfinite(record.scores[~gone]).all()
            for name in ("num_targets.npy", "hashes.npy"):
                assert not np.load(round_path / name)[gone].any()
        for check in round_path.glob("check-*.json"):
            assert not set(read_json(check).get("candidate_id", [])) & set(rows.tolist())


def each_is_known_of(path: Path, trained_on: list[int], removed: Any, since: int) -> int:
    """Rounds decided after a step, in one pass, know of every row before them: it cannot be drawn again; how many."""
    assert len(set(trained_on)) == len(trained_on)
    num = 0
    for round_path in sorted((path / "_mates").glob("round-????")):
        info = read_json(round_path / "round.json")
        if info["step"] <= since:
            continue
        bits = np.load(round_path / "consumed.npy")
        consumed = set(np.flatnonzero(np.unpackbits(bits, count=info["pool"]["num_rows"])).tolist())
        assert set(trained_on[: info["from_position"]]) <= consumed | set(np.asarray(removed).tolist())
        assert not consumed & set(trained_on[info["from_position"] :])
        num += 1
    return num


# --- what follows ---


@pytest.mark.parametrize("at", [16, 14, 13, 12, 8, 7, 6, 3], ids=lambda step: f"from-{step}")
def test_none_of_800_rows_is_trained_on_afterwards(copied, at):
    """From every kind of checkpoint: in a round, in the lead of one, in the own order before the first selection."""
    path, before = copied
    rows = most_rows()
    found = forget_rows(path, rows)
    assert found.num_trained_on == len(set(before) & set(rows.tolist()))
    mentions(path, rows)
    assert holds(path)
    rest = train(path, resume=str(path / f"checkpoint-{at}"))
    assert len(rest.rows) == 4 * (24 - at)
    assert not set(rest.rows) & set(rows.tolist())
    assert each_is_known_of(path, [*before[: 4 * at], *rest.rows], rows, at)
    assert holds(path)


LEAD = {"switch_lead_steps": 3}
BOUNDARY, SWITCH = 6, 9  # steps, of the first round with that lead


@pytest.mark.parametrize("at", [BOUNDARY, BOUNDARY + 1])
def test_rows_that_stand_before_the_first_selection_are_not_drawn_again(tmp_path, at):
    """Resumed between the first boundary and its switch; twice, and each time after a further removal."""
    path, before = tmp_path, train(tmp_path, Stop(16), config=LEAD).rows
    held = before[: 4 * SWITCH]
    found: list[list[int]] = []
    gone: list[int] = []
    for lost in (held[4 * at : 4 * SWITCH : 2], None, held[4 * at + 1 : 4 * SWITCH : 4]):
        # the second time a row is removed that the first time put somewhere, the last time others as well
        gone += lost if lost is not None else [found[-1][0]]
        forget_rows(path, gone)
        rest = train(path, Stop(at + 1), resume=str(path / f"checkpoint-{at}"), config=LEAD).rows
        again = train(path, Stop(20), resume=str(path / f"checkpoint-{at}"), config=LEAD).rows
        assert again[: len(rest)] == rest
        for new, was in zip(again[: 4 * (SWITCH - at)], found[-1] if found else [], strict=False):
            assert new == was or was in gone  # no row moves that an earlier resume put somewhere
        found.append(again)
        assert not set(again) & set(gone)
        assert each_is_known_of(path, [*before[: 4 * at], *again], gone, BOUNDARY) == 2
        assert holds(path)
        uses = {(use.row, use.position) for use in where_rows(path, np.arange(ROWS)).uses if use.done}
        assert uses == {(row, i) for i, row in enumerate([*before[: 4 * at], *again])}


def test_before_the_first_round(tmp_path):
    before = train(tmp_path, Stop(3)).rows
    own = train(tmp_path / "whole").rows
    assert own[:12] == before
    rows = np.array([*own[12:20:3], *own[:2], *most_rows(num=200).tolist()])
    found = forget_rows(tmp_path, rows)
    assert found.rounds == ()
    assert found.num_trained_on == len(set(before) & set(rows.tolist()))
    rest = train(tmp_path, resume=True)
    assert not set(rest.rows) & set(rows.tolist())
    gone = set(rows.tolist())
    assert [row if row in rest.rows[:12] else None for row in own[12:24]] == [
        None if row in gone else row for row in own[12:24]
    ]
    assert holds(tmp_path)
    uses = {(use.row, use.position) for use in where_rows(tmp_path, np.arange(ROWS)).uses if use.done}
    assert uses == {(row, at) for at, row in enumerate([*before, *rest.rows])}


def test_rounds_that_a_resume_comes_to_again_are_run_again(stopped, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stopped[0], path)
    rows = most_rows(num=300)
    forget_rows(path, rows)
    rest = train(path, resume=str(path / "checkpoint-8"))  # round 2 is on disk, decided before the removal
    assert (path / "_mates" / "round-0002.stale").exists()
    assert not set(rest.rows) & set(rows.tolist())
    assert len(set(rest.rows)) == len(rest.rows)
    assert holds(path)


def test_a_few_rows_and_the_rest_of_the_run(copied):
    path, before = copied
    order = [use.row for use in sorted(where_rows(path, np.arange(ROWS)).uses, key=lambda use: use.position)]
    ahead = np.array(order[16 * 4 :][::2])  # every other row that is still to come, and others
    rows = np.unique(np.concatenate([ahead, most_rows(seed=3, num=150)]))
    forget_rows(path, rows)
    rest = train(path, resume=str(path / "checkpoint-16"))
    assert len(rest.rows) == 8 * 4
    assert not set(rest.rows) & set(rows.tolist())
    assert not set(rest.rows) & set(before[: 16 * 4])  # each row once, also where others stand in a place
    assert holds(path)
    kept = [row for row in order[16 * 4 : 19 * 4] if row not in set(rows.tolist())]
    assert [row for row in rest.rows[: 3 * 4] if row in kept] == kept  # no other row moves
    numbers = [checked.number for checked in verify_run(path).rounds]
    assert numbers == [1, 2, 3]
    record = load_round(path / "_mates" / "round-0003")
    assert record.info["num_removed"] == len(rows)
    assert not np.isin(record.candidates, rows).any()
    assert not np.isin(record.labels.candidate_id, rows).any()
    uses = {(use.row, use.position) for use in where_rows(path, np.arange(ROWS)).uses if use.done}
    assert uses == {(row, at) for at, row in enumerate([*before[: 16 * 4], *rest.rows])}
    assert any("rows of its order replaced" in line for line in report_lines(verify_run(path)))


def test_it_resumes_exactly_again_and_is_removed_from_twice(copied):
    path, before = copied
    first, second = most_rows(seed=1, num=200), most_rows(seed=2, num=300)
    forget_rows(path, first)
    whole = train(path, resume=str(path / "checkpoint-16"))
    assert holds(path)
    again = train(path, resume=str(path / "checkpoint-18"))
    assert again.rows == whole.rows[2 * 4 :]
    again_found = forget_rows(path, second)
    assert again_found.num_before == len(np.intersect1d(first, second))
    assert len(again_found.rows) == len(np.setdiff1d(second, first))
    mentions(path, np.union1d(first, second))
    assert holds(path)
    rest = train(path, resume=str(path / "checkpoint-18"))
    assert not set(rest.rows) & set(np.union1d(first, second).tolist())
    assert holds(path)
    nothing = forget_rows(path, first)
    assert len(nothing.rows) == 0
    assert nothing.rounds == ()
    events = audit_run(path).facts["forgotten"]["events"]
    assert [event["count"] for event in events] == [200, len(again_found.rows)]


@pytest.mark.parametrize(
    "config",
    [
        {"candidate_scope": "pool"}, {"on_weak_signal": "own_order", "min_spearman": 1.0},
        {"temperature": 0.7, "random_share": 0.3},
    ],
    ids=["pool", "own-order", "noise"],
)  # fmt: skip
def test_other_kinds_of_rounds(tmp_path, config):
    train(tmp_path, Stop(16), config=config)
    rows = most_rows(num=300)
    forget_rows(tmp_path, rows)
    mentions(tmp_path, rows)
    assert holds(tmp_path)
    rest = train(tmp_path, resume=True, config=config)
    assert not set(rest.rows) & set(rows.tolist())
    assert holds(tmp_path)


def test_rounds_that_grow_and_are_looked_at_inside(tmp_path):
    config = {"first_round_steps": 3, "update_steps": 12, "drift_check_steps": 4, "average_steps": 0}
    train(tmp_path, Stop(34), config=config, max_steps=48)
    rows = most_rows(num=250)
    forget_rows(tmp_path, rows)
    mentions(tmp_path, rows)
    assert holds(tmp_path)
    rest = train(tmp_path, resume=True, config=config, max_steps=48)
    assert not set(rest.rows) & set(rows.tolist())
    assert holds(tmp_path)


def test_several_passes(tmp_path):
    config = {"num_probes": 20, "max_passes": 6}
    pool = make_pool(120)
    train(tmp_path, Stop(30), config=config, pool=pool, max_steps=48)
    rows = np.arange(0, 120, 5)
    forget_rows(tmp_path, rows)
    assert holds(tmp_path)
    rest = train(tmp_path, resume=True, config=config, pool=pool, max_steps=48)
    assert not set(rest.rows) & set(rows.tolist())
    assert holds(tmp_path)


@pytest.mark.parametrize("at", [24, 25])
def test_several_passes_where_a_round_is_decided_and_not_begun(tmp_path, at):
    """Rows of the round before that stand in the lead: nothing takes their place that is in the next round too."""
    config = {"num_probes": 20, "max_passes": 6, "switch_lead_steps": 2}
    pool = make_pool(120)
    before = train(tmp_path, Stop(30), config=config, pool=pool, max_steps=48).rows
    rows = np.unique(before[4 * at : 4 * 26])
    forget_rows(tmp_path, rows)
    rest = train(tmp_path, resume=str(tmp_path / f"checkpoint-{at}"), config=config, pool=pool, max_steps=48).rows
    assert not set(rest) & set(rows.tolist())
    info = read_json(tmp_path / "_mates" / "round-0004" / "round.json")
    assert (info["step"], info["from_position"]) == (24, 4 * 26)
    lead, own = rest[: 4 * (26 - at)], rest[4 * (26 - at) :][: info["num_rows"]]
    assert not set(lead) & set(own)
    assert holds(tmp_path)


@pytest.mark.skipif(OLD_TRAINER, reason="transformers 4 resumes with the batch size of the checkpoint")
@pytest.mark.parametrize("at", [16, 7])
def test_a_larger_batch_after_the_resume(copied, at):
    path, before = copied
    rows = np.union1d(most_rows(num=300), np.array(before[4 * at : 4 * at + 4], np.int64))
    forget_rows(path, rows)
    resume = str(path / f"checkpoint-{at}")
    rest = train(path, resume=resume, per_device_train_batch_size=8, max_steps=24 if at == 16 else 18)
    assert len(rest.rows) == 8 * (8 if at == 16 else 11)
    assert not set(rest.rows) & set(rows.tolist())
    assert each_is_known_of(path, [*before[: 4 * at], *rest.rows], rows, at)
    assert holds(path)


# --- influence models ---


def test_models_are_fitted_again_from_the_probes_that_stay(copied):
    path, _ = copied
    rounds = path / "_mates"
    probed = read_labels(rounds / "round-0001" / "probes.parquet").candidate_id
    found = forget_rows(path, probed[:20])
    assert found.models == ("round-0001", "round-0002")  # each pools what is before it
    with pytest.raises(FileNotFoundError, match="fitted again when the run resumes"):
        MatesSelector.from_pretrained(rounds / "round-0002")
    train(path, Stop(17), resume=True)
    assert holds(path)
    for number in (1, 2):
        about = read_json(rounds / f"round-{number:04d}" / "redacted.json")
        assert about["influence_model"] == "refitted"
    model = MatesSelector.from_pretrained(rounds / "round-0001").influence_model
    assert model.report.num_labels + model.report.num_held_out == len(probed) - 20


def test_a_resume_that_is_killed_while_it_fits_again(copied, monkeypatch):
    path, _ = copied
    forget_rows(path, most_rows(num=200))
    from mates_hf.training import refit

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(refit, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            train(path, resume=True)
    train(path, resume=True)
    assert holds(path)


def test_a_round_that_loses_all_its_probes_has_no_model(copied):
    path, _ = copied
    probed = np.concatenate(
        [read_labels(file).candidate_id for file in (path / "_mates").glob("round-????/*.parquet")]
    )
    forget_rows(path, probed)
    assert holds(path)
    rest = train(path, resume=True)
    assert not set(rest.rows) & set(probed.tolist())
    assert holds(path)


class Odd(NgramInfluenceModel):
    """A model that nobody knows."""


def test_a_model_that_cannot_be_fitted_again_is_refused_with_a_way_out(tmp_path, capsys):
    args = make_arguments(tmp_path, **SAVES, max_steps=24)

    def odd() -> MatesCallback:
        return MatesCallback(make_reference(), small_config(num_probes=60), influence_model=Odd(num_buckets=64))

    run(args, [odd(), Stop(16)], make_pool(ROWS))
    before = snapshot(tmp_path / "_mates")
    with pytest.raises(UnsupportedSettingError, match=r"test_forget.Odd reads more .*drop_models=True"):
        forget_rows(tmp_path, most_rows())
    assert snapshot(tmp_path / "_mates") == before
    capsys.readouterr()
    np.save(tmp_path / "rows.npy", most_rows(num=100))
    assert main(["forget", str(tmp_path), "--rows", str(tmp_path / "rows.npy"), "--drop-models"]) == 0
    out = capsys.readouterr().out
    assert "are not fitted again: round-0001, round-0002." in out
    assert "it did not unlearn" in out
    assert holds(tmp_path)
    rest = run(args, [odd()], make_pool(ROWS), resume=True)
    assert not set(rest.rows) & set(most_rows(num=100).tolist())
    assert holds(tmp_path)


# --- whole or not at all ---


def snapshot(folder: Path) -> dict[str, bytes]:
    """Files by name; the date of a removal is not compared."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".lock"):
            name = path.relative_to(folder).as_posix()
            content = path.read_bytes()
            if path.name in ("redacted.json", "removed.json"):
                content = json.dumps(undated(json.loads(content))).encode()
            if path.name == "SHA256SUMS":
                content = b"\n".join(line for line in content.splitlines() if b"redacted.json" not in line)
            found[name] = content
    return found


def undated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: undated(part) for key, part in value.items() if key != "date"}
    return [undated(part) for part in value] if isinstance(value, list) else value


class StopError(BaseException):
    """A kill."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Let the process die at a change of the disk; which changes there were."""
    done: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= after:
                raise StopError
            done.append(name)
            return real(*args, **kwargs)

        return change

    monkeypatch.setattr(os, "replace", counted("replace", os.replace))
    monkeypatch.setattr(journal.shutil, "rmtree", counted("rmtree", shutil.rmtree))
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **kw: counted("unlink", unlink)(path, **kw))
    return done


def test_killed_at_every_change_of_the_disk_it_is_whole_or_not_begun(stopped, tmp_path):
    rows = most_rows(num=300)
    shutil.copytree(stopped[0] / "_mates", tmp_path / "whole" / "_mates")
    untouched = snapshot(tmp_path / "whole" / "_mates")
    forget_rows(tmp_path / "whole", rows)
    whole = snapshot(tmp_path / "whole" / "_mates")
    assert whole != untouched
    states = set()
    for after in range(500):
        path = tmp_path / f"killed-{after}"
        shutil.copytree(stopped[0] / "_mates", path / "_mates")
        with pytest.MonkeyPatch.context() as patched:
            done = dying(patched, after)
            try:
                forget_rows(path, rows)
                ended = True
            except StopError:
                ended = False
        (path / "_mates" / "lock.json").unlink(missing_ok=True)  # of a process that is dead
        decided = journal.is_pending(path / "_mates") or (path / "_mates" / "removed.npy").exists()
        if decided and not ended:
            states.add("decided")
            if journal.is_pending(path / "_mates"):
                assert "stopped in the middle" in str(verify_run(path).problem)
            journal.finish_pending(path / "_mates")
            with journal.held(path / "_mates"):
                journal.carry_out(path / "_mates")
            assert snapshot(path / "_mates") == whole
        elif not ended:
            states.add("not begun")
            kept = {
                name: data for name, data in snapshot(path / "_mates").items() if not name.startswith("forget.partial")
            }
            assert kept == untouched
            assert holds(path)
        forget_rows(path, rows)  # a second call ends in the same
        assert snapshot(path / "_mates") == whole
        assert holds(path)
        shutil.rmtree(path)
        if ended:
            break
    assert ended
    assert states == {"decided", "not begun"}
    assert len(done) > 10


def test_a_resume_finishes_what_a_killed_call_had_decided(copied, monkeypatch):
    path, _ = copied
    rows = most_rows(num=300)
    real = journal.carry_out

    def dies(rounds_dir: Path) -> None:
        if journal.is_pending(rounds_dir):
            raise StopError
        real(rounds_dir)

    with monkeypatch.context() as patched:
        patched.setattr("mates_hf.answering.forget.carry_out", dies)
        with pytest.raises(StopError):
            forget_rows(path, rows)
    assert journal.is_pending(path / "_mates")
    rest = train(path, resume=True)
    assert not journal.is_pending(path / "_mates")
    assert not set(rest.rows) & set(rows.tolist())
    assert holds(path)


class Forgets(TrainerCallback):
    """Calls `forget` from elsewhere while the run trains."""

    def __init__(self) -> None:
        self.status = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12 and self.status is None:
            words = [sys.executable, "-m", "mates_hf", "forget", args.output_dir, "--rows", "1,2"]
            self.status = subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_run_that_trains_refuses_it(tmp_path):
    forgets = Forgets()
    result = train(tmp_path, forgets, max_steps=14)
    assert len(result.rows) == 14 * 4
    assert forgets.status.returncode == 1
    assert "is in use by the run of process" in forgets.status.stderr
    assert len(forgets.status.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "_mates" / "removed.npy").exists()


def test_a_lock_that_is_held_elsewhere_is_an_error(copied, monkeypatch):
    path, _ = copied
    monkeypatch.setattr("mates_hf.training.lock._lives_here", lambda found: True)
    (path / "_mates" / "lock.json").write_text(json.dumps({"pid": 1, "host": "there", "nonce": "x"}))
    with pytest.raises(LockedError, match="is in use by the run of process 1 on there"):
        forget_rows(path, [1])


# --- the pool ---


def test_contents_may_be_blanked_in_place(copied):
    path, _ = copied
    rows = most_rows(num=300)
    blank = set(rows.tolist())
    held = make_pool(ROWS)
    emptied = held.map(
        lambda row, i: {name: [0] * 12 if i in blank else row[name] for name in ("input_ids", "labels")},
        with_indices=True, load_from_cache_file=False,
    )  # fmt: skip
    forget_rows(path, rows)
    rest = train(path, resume=True, pool=emptied)
    assert not set(rest.rows) & blank
    assert holds(path)
    one_more = next(i for i in range(ROWS) if i not in blank)
    blank.add(one_more)
    other = emptied.map(
        lambda row, i: {name: [0] * 12 if i == one_more else row[name] for name in ("input_ids", "labels")},
        with_indices=True, load_from_cache_file=False,
    )  # fmt: skip
    with pytest.raises(Exception, match="must have the pool it was started with"):
        train(path, resume=str(path / "checkpoint-20"), pool=other)


def test_a_loop_of_ones_own(tmp_path):
    def rounds() -> MatesRounds:
        return MatesRounds(
            make_reference(), make_pool(ROWS), small_config(num_probes=60), output_dir=tmp_path,
            influence_model=NgramInfluenceModel(num_buckets=64),
        )  # fmt: skip

    def steps(loop: MatesRounds, model: Any, optimizer: Any, stop: int) -> tuple[list[int], dict[str, Any]]:
        seen, state = [], {}
        for step, rows in loop.order(model, optimizer, batch_size=4, max_steps=24):
            seen += rows.tolist()
            batch = torch.tensor([loop.dataset[i]["input_ids"] for i in rows.tolist()])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == stop:
                state = loop.state_dict()
                break
        return seen, state

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    _, state = steps(rounds(), model, optimizer, 16)
    rows = most_rows(num=400)
    forget_rows(tmp_path, rows)
    resumed = rounds()
    resumed.load_state_dict(state)
    seen, _ = steps(resumed, model, optimizer, 99)
    assert len(seen) == 8 * 4
    assert not set(seen) & set(rows.tolist())
    assert holds(tmp_path)


def test_a_new_run_in_the_folder_does_not_know_the_rows(copied, caplog):
    path, _ = copied
    forget_rows(path, most_rows(num=100))
    train(path)
    assert "leave them out of its dataset" in caplog.text
    assert (path / "_mates" / "removed.npy.stale").exists()
    assert holds(path)


def test_rows_of_another_round_in_the_place_of_removed_ones_are_found(copied, capsys):
    path, _ = copied
    order = [use.row for use in sorted(where_rows(path, np.arange(ROWS)).uses, key=lambda use: use.position)]
    forget_rows(path, order[16 * 4 + 1 : 16 * 4 + 4])
    train(path, Stop(17), resume=True)
    file = path / "_mates" / "round-0002" / "replaced.npy"
    entries = np.load(file)
    assert len(entries) == 3
    for column, value in ((0, 3), (1, order[0]), (2, order[1])):
        wrong = entries.copy()
        wrong[1, column] = value
        np.save(file, wrong)
        assert "replaced.npy" in str(verify_run(path).problem)
    np.save(file, entries)
    assert holds(path)


# --- real processes ---


@pytest.mark.slow
def test_a_real_kill_at_a_few_moments(stopped, tmp_path):
    """SIGKILL from inside, at the nth rename: the next call, or nothing, makes it whole."""
    shutil.copytree(stopped[0] / "_mates", tmp_path / "whole" / "_mates")
    np.save(tmp_path / "rows.npy", most_rows(num=300))
    forget_rows(tmp_path / "whole", most_rows(num=300))
    whole = snapshot(tmp_path / "whole" / "_mates")
    script = (
        "import os, signal, sys\n"
        "left, real = [int(sys.argv[1])], os.replace\n"
        "def dies(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if left[0] < 0 else None\n"
        "    return real(*args, **kwargs)\n"
        "os.replace = dies\n"
        "from mates_hf.cli import main\n"
        "sys.exit(main(['forget', sys.argv[2], '--rows', sys.argv[3]]))\n"
    )
    ended = []
    for after in (3, 20, 25, 30):
        path = tmp_path / f"killed-{after}"
        shutil.copytree(stopped[0] / "_mates", path / "_mates")
        words = [sys.executable, "-c", script, str(after), str(path), str(tmp_path / "rows.npy")]
        ended.append(subprocess.run(words, capture_output=True, check=False).returncode)
        forget_rows(path, most_rows(num=300))
        assert snapshot(path / "_mates") == whole
        assert holds(path)
    assert -9 in ended


@pytest.mark.slow
def test_two_processes_resume_without_the_rows(tmp_path):
    def train_in_two(**settings: Any) -> list[list[int]]:
        given = {
            "output_dir": str(tmp_path / "run"),
            "result": str(tmp_path / "result"),
            "num_rows": ROWS,
            "args": {**SAVES, "max_steps": 14, "per_device_train_batch_size": 2},
            "config": {"num_probes": 40},
            **settings,
        }
        started = start_processes(["tests/training/worker.py", json.dumps(given)], 2, free_port())
        said = [process.communicate(timeout=200)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        return [json.loads((tmp_path / f"result-{rank}.json").read_text())["rows"] for rank in (0, 1)]

    train_in_two(stop_at=9)
    rows = most_rows(num=500)
    forget_rows(tmp_path / "run", rows)
    found = train_in_two(resume=str(tmp_path / "run" / "checkpoint-9"))
    assert [len(each) for each in found] == [5 * 2, 5 * 2]
    assert not {row for each in found for row in each} & set(rows.tolist())
    assert holds(tmp_path / "run")
