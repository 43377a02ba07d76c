"""Labels, fit reports and the round directory: what is refused, what survives a kill, what is read back."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mates_hf.records
from mates_hf.disk import read_array, write_array, write_json
from mates_hf.errors import InfluenceError, MatesError, RoundMismatchError
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.round_files import load_round, read_labels, write_labels
from mates_hf.round_writer import RoundWriter, is_whole, set_aside

COLUMNS = ("candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe")
PACKAGE_ROOT = Path(mates_hf.records.__file__).parents[1]


def make_labels(num_tokens=(3, 0, 2, 4), *, derivatives=True, seed=0) -> InfluenceLabels:
    """Labels that obey their own definition: influence_per_token is the mean of the derivatives."""
    generator = np.random.default_rng(seed)
    counts = np.asarray(num_tokens, np.int32)
    each = [generator.normal(size=n).astype(np.float32) for n in counts]
    per_token = np.array([part.mean() if len(part) else 0.0 for part in each], np.float32)
    return InfluenceLabels(
        candidate_id=generator.permutation(1_000)[: len(counts)].astype(np.int64),
        influence=per_token * np.float32(0.01),
        influence_per_token=per_token,
        loss=generator.uniform(1, 5, len(counts)).astype(np.float32),
        num_tokens=counts,
        probe=np.array(["directional"] * len(counts), np.str_),
        step_size=0.01,
        token_derivatives=np.concatenate([*each, np.zeros(0, np.float32)]) if derivatives else None,
        info={"epsilon": 1e-3, "skipped": [4, 5]},
    )


def assert_same_labels(got: InfluenceLabels, expected: InfluenceLabels) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        if name != "probe":
            assert getattr(got, name).dtype == getattr(expected, name).dtype
    assert got.step_size == expected.step_size
    assert dict(got.info) == dict(expected.info)
    if expected.token_derivatives is None:
        assert got.token_derivatives is None
    else:
        np.testing.assert_array_equal(got.token_derivatives, expected.token_derivatives)


# --- labels ---


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_take_keeps_each_candidates_derivatives_with_it(num_tokens, data):
    labels = make_labels(num_tokens)
    parts = [labels.token_derivatives[low:high] for low, high in zip(labels.offsets, labels.offsets[1:], strict=False)]
    for part, mean in zip(parts, labels.influence_per_token, strict=True):
        assert len(part) == 0 or part.mean() == mean
    rows = data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=10)) if len(labels) else []
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))), bool)
    for index, picked in ((np.array(rows, np.int64), rows), (mask, np.flatnonzero(mask).tolist())):
        taken = labels.take(index)
        assert len(taken) == len(picked)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(taken, name), getattr(labels, name)[picked])
        expected = np.concatenate([parts[i] for i in picked]) if picked else np.zeros(0, np.float32)
        np.testing.assert_array_equal(taken.token_derivatives, expected)
        assert taken.token_derivatives.dtype == np.float32


def test_take_without_derivatives_has_none():
    assert make_labels(derivatives=False).take(np.array([2, 0])).token_derivatives is None


@pytest.mark.parametrize("name", COLUMNS[1:])
def test_columns_of_different_lengths_are_refused_by_name(name):
    labels = make_labels(derivatives=False)
    columns = {column: getattr(labels, column) for column in COLUMNS}
    columns[name] = columns[name][:3]
    with pytest.raises(ValueError, match=rf"`{name}` must have one entry a candidate \(4\), got 3"):
        InfluenceLabels(**columns)


def test_derivatives_that_do_not_match_the_token_counts_are_refused():
    labels = make_labels()
    with pytest.raises(ValueError, match=r"one entry a trained token \(9\), got 8"):
        InfluenceLabels(
            **{name: getattr(labels, name) for name in COLUMNS}, token_derivatives=labels.token_derivatives[:8]
        )


def with_influence(values) -> InfluenceLabels:
    values = np.asarray(values, np.float32)
    num = len(values)
    return InfluenceLabels(
        candidate_id=np.arange(100, 100 + num),
        influence=values,
        influence_per_token=values,
        loss=np.ones(num, np.float32),
        num_tokens=np.ones(num, np.int32),
        probe=np.array(["directional"] * num, np.str_),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_refuses_influence_that_is_not_finite_and_names_the_candidates(bad):
    with pytest.raises(InfluenceError, match=r"2 of 4 candidates are not, first candidate_id \[101, 103\]"):
        with_influence([1, bad, 2, bad]).check()


@pytest.mark.parametrize(("values", "what"), [([0, 0, 0], "zero"), ([0, -0.0], "zero"), ([-2, -2], r"equal \(-2\)")])
def test_check_refuses_influence_that_ranks_nothing_and_names_the_candidates(values, what):
    with pytest.raises(InfluenceError, match=rf"all {len(values)} candidates \(candidate_id \[100, 101.* is {what}"):
        with_influence(values).check()


def test_check_refuses_no_candidate_and_passes_labels_that_rank():
    with pytest.raises(InfluenceError, match="No candidate was measured"):
        with_influence([]).check()
    labels = with_influence([1, 1, 1.0001])
    assert labels.check() is labels
    assert issubclass(InfluenceError, MatesError)


@pytest.mark.parametrize("derivatives", [True, False])
@pytest.mark.parametrize("num_tokens", [(3, 0, 2, 4), (0,), ()])
def test_labels_are_read_back_as_written(tmp_path, num_tokens, derivatives):
    labels = make_labels(num_tokens, derivatives=derivatives)
    write_labels(tmp_path / "probes.parquet", labels)
    assert_same_labels(read_labels(tmp_path / "probes.parquet"), labels)
    assert not list(tmp_path.glob("*.tmp"))


def test_labels_keep_nan_and_text_of_probes(tmp_path):
    labels = with_influence([np.nan, 1.0])
    object.__setattr__(labels, "probe", np.array(["one_step", "é"], np.str_))
    write_labels(tmp_path / "probes.parquet", labels)
    assert_same_labels(read_labels(tmp_path / "probes.parquet"), labels)


def test_probes_are_a_plain_parquet_table(tmp_path):
    import pyarrow.parquet as pq

    write_labels(tmp_path / "probes.parquet", make_labels())
    schema = pq.read_schema(tmp_path / "probes.parquet")
    types = ("int64", "float", "float", "float", "int32", "string")
    assert [(field.name, str(field.type)) for field in schema] == list(zip(COLUMNS, types, strict=True))


# --- fit report ---


def test_fit_report_is_read_back_from_json_and_ignores_keys_of_a_newer_version():
    report = FitReport(
        num_labels=80,
        num_held_out=20,
        spearman=0.4,
        interval=(0.1, 0.6),
        spearman_within_group=0.3,
        slope=0.9,
        top_fifth_overlap=0.5,
        calibration=((-1.0, -0.8), (1.0, 1.1)),
        label_std=0.01,
        seconds=1.5,
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert FitReport.from_dict(values) == report
    assert FitReport.from_dict({**values, "from_a_newer_version": 1}) == report
    least = FitReport(num_labels=8, num_held_out=2, spearman=0.1, interval=(-0.5, 0.5))
    again = FitReport.from_dict(json.loads(json.dumps(least.to_dict())))
    assert np.isnan(again.slope)
    assert again.interval == least.interval
    assert again.spearman_within_group is None


@pytest.mark.parametrize(
    ("spearman", "interval", "passes"),
    [
        (0.2, (0.05, 0.3), True),
        (0.1, (0.05, 0.3), True),
        (0.09, (0.05, 0.3), False),
        (0.2, (0.0, 0.4), False),
        (0.2, (-0.1, 0.4), False),
        (-0.9, (-0.95, -0.8), False),
        (float("nan"), (0.1, 0.2), False),
        (0.2, (float("nan"), float("nan")), False),
    ],
)
def test_guard_passes_only_a_rank_correlation_that_is_large_and_surely_positive(spearman, interval, passes):
    assert FitReport(num_labels=8, num_held_out=2, spearman=spearman, interval=interval).passes(0.1) is passes


# --- files ---


@pytest.mark.parametrize("value", [np.arange(5), np.zeros(0, np.int64), np.ones((2, 3), np.float32)])
def test_arrays_are_read_back_read_only(tmp_path, value):
    write_array(tmp_path / "a.npy", value)
    got = read_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(got, value)
    assert got.dtype == value.dtype
    assert not got.flags.writeable
    assert read_array(tmp_path / "none.npy") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_arrays_of_objects_are_neither_written_nor_read(tmp_path):
    objects = np.array([{}, []], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(tmp_path / "a.npy", objects)
    assert not (tmp_path / "a.npy").exists()
    np.save(tmp_path / "b.npy", objects, allow_pickle=True)
    with pytest.raises(MatesError, match="objects"):
        read_array(tmp_path / "b.npy")


def test_a_write_that_fails_leaves_the_earlier_file_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": 1}


# --- round directory ---

KEY = {"config": {"update_steps": 10, "pair": (1, 2)}, "pool": {"num_rows": 100}, "step": 20, "weights": "aa"}


def write_round(writer: RoundWriter, labels: InfluenceLabels, *, select: bool = True) -> Path:
    write_labels(writer.path / "probes.parquet", labels)
    if select:
        write_array(writer.path / "candidates.npy", np.array([5, 3, 9, 1]))
        write_array(writer.path / "scores.npy", np.array([0.5, -0.3, 0.9, 0.1], np.float32))
        write_array(writer.path / "selection.npy", np.array([9, 5]))
    return writer.finish({"number": 2, "guard": {"decision": "select"}})


def test_a_finished_round_is_loaded_as_written(tmp_path):
    labels = make_labels()
    path = write_round(RoundWriter(tmp_path / "_mates", 2, KEY), labels)
    assert path == tmp_path / "_mates" / "round-0002"
    assert [p.name for p in (tmp_path / "_mates").iterdir()] == ["round-0002"]
    record = load_round(str(path))
    assert record.path == path
    assert record.info == {"number": 2, "guard": {"decision": "select"}}
    assert_same_labels(record.labels, labels)
    assert record.candidates.tolist() == [5, 3, 9, 1]
    np.testing.assert_array_equal(record.scores, np.array([0.5, -0.3, 0.9, 0.1], np.float32))
    assert record.selection.tolist() == [9, 5]


def test_a_round_in_the_trainers_own_order_has_no_selection(tmp_path):
    record = load_round(write_round(RoundWriter(tmp_path, 1, KEY), make_labels(), select=False))
    assert record.candidates is None
    assert record.scores is None
    assert record.selection is None


def test_an_unfinished_round_is_not_loaded(tmp_path):
    writer = RoundWriter(tmp_path, 1, KEY)
    write_labels(writer.path / "probes.parquet", make_labels())
    for path, what in ((writer.path, "a finished round: it has no round.json"), (writer.final_path, "there")):
        with pytest.raises(FileNotFoundError, match=f"`{path}` is not {what}"):
            load_round(path)
    assert not writer.complete


def test_the_same_key_finds_the_stages_that_were_finished(tmp_path):
    first = RoundWriter(tmp_path, 3, KEY)
    write_labels(first.path / "probes.parquet", make_labels())
    again = RoundWriter(tmp_path, 3, json.loads(json.dumps(KEY)))  # tuples have become lists, as on disk
    assert again.path == first.path
    assert (again.path / "probes.parquet").exists()
    assert not again.complete
    write_round(again, make_labels())
    finished = RoundWriter(tmp_path, 3, KEY)
    assert finished.complete
    assert not finished.path.exists()
    assert not list(tmp_path.glob("*.stale"))


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("change", [{"weights": "bb"}, {"step": 21}])
def test_other_weights_set_the_round_aside_and_start_it_anew(tmp_path, complete, change):
    writer = RoundWriter(tmp_path, 3, KEY)
    write_labels(writer.path / "probes.parquet", make_labels())
    if complete:
        write_round(writer, make_labels())
    again = RoundWriter(tmp_path, 3, {**KEY, **change})
    assert not again.complete
    assert [path.name for path in again.path.iterdir()] == ["key.json"]
    assert (tmp_path / "round-0003.stale" / "probes.parquet").exists()
    assert (tmp_path / "round-0003.stale" / "round.json").exists() is complete
    third = RoundWriter(tmp_path, 3, KEY)  # a second stale one does not replace the first
    assert [path.name for path in third.path.iterdir()] == ["key.json"]
    assert (tmp_path / "round-0003.stale" / "probes.parquet").exists()
    assert [path.name for path in (tmp_path / "round-0003.stale-2").iterdir()] == ["key.json"]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("config", {"update_steps": 11, "pair": (1, 2)}), ("pool", {"num_rows": 101})]
)
def test_another_config_or_pool_is_refused_with_both_values_and_nothing_touched(tmp_path, complete, name, value):
    writer = RoundWriter(tmp_path, 3, KEY)
    write_array(writer.path / "scores.npy", np.ones(2))
    if complete:
        write_round(writer, make_labels())
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(RoundMismatchError) as caught:
        RoundWriter(tmp_path, 3, {**KEY, name: value, "weights": "bb"})
    for shown in (name, str(json.loads(json.dumps(KEY[name]))), str(json.loads(json.dumps(value)))):
        assert shown in str(caught.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_rounds_of_other_numbers_are_left_alone(tmp_path):
    write_round(RoundWriter(tmp_path, 1, KEY), make_labels())
    RoundWriter(tmp_path, 2, {**KEY, "pool": {"num_rows": 7}})
    assert RoundWriter(tmp_path, 1, KEY).complete


def test_a_directory_killed_before_its_key_was_written_is_begun_anew(tmp_path):
    (tmp_path / "round-0004.partial").mkdir()
    (tmp_path / "round-0004.partial" / "key.json.tmp").write_text("{", encoding="utf-8")
    writer = RoundWriter(tmp_path, 4, KEY)
    assert [path.name for path in writer.path.iterdir()] == ["key.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["round-0004.partial"]


def test_a_kill_between_round_json_and_the_rename_loses_nothing(tmp_path):
    writer = RoundWriter(tmp_path, 4, KEY)
    write_labels(writer.path / "probes.parquet", make_labels())
    write_json(writer.path / "round.json", {"number": 4})  # what `finish` does first
    again = RoundWriter(tmp_path, 4, KEY)
    assert not again.complete
    assert load_round(again.finish({"number": 4})).info == {"number": 4}


def finished_round(rounds_dir: Path) -> RoundWriter:
    """A finished round with an order, whose name a power cut took back."""
    writer = RoundWriter(rounds_dir, 4, KEY)
    write_labels(writer.path / "probes.parquet", make_labels())
    rows = np.arange(5, 9)
    write_array(writer.path / "selection.npy", rows)
    info = {"number": 4, "order_sha256": hashlib.sha256(rows.tobytes()).hexdigest()}
    writer.finish(info).rename(writer.path)
    return writer


def test_a_round_that_lost_its_last_rename_is_finished_by_the_next_start(tmp_path):
    finished_round(tmp_path)
    assert RoundWriter(tmp_path, 4, KEY).complete
    assert not (tmp_path / "round-0004.partial").exists()


@pytest.mark.parametrize("name", ["probes.parquet", "selection.npy", "SHA256SUMS", "round.json", "key.json"])
def test_a_round_that_lost_more_than_its_name_is_not_taken_for_whole(tmp_path, name):
    path = finished_round(tmp_path).path
    (path / name).write_bytes((path / name).read_bytes()[:-2])
    assert not is_whole(path)
    (path / name).unlink()
    assert not is_whole(path)


def test_a_round_without_what_vouches_for_it_goes_on_from_its_stages(tmp_path):
    path = finished_round(tmp_path).path
    (path / "round.json").unlink()
    path.rename(tmp_path / "round-0004")
    again = RoundWriter(tmp_path, 4, KEY)
    assert not again.complete
    assert (again.path / "selection.npy").exists()


def test_set_aside_names_a_partial_and_a_finished_round_alike(tmp_path):
    (tmp_path / "round-00010.stale-7").mkdir()  # another round's
    for number, name in enumerate(["round-0001", "round-0001.partial", "round-0001"], 1):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        stale = set_aside(tmp_path / name)
        assert stale == tmp_path / f"round-0001.stale{'' if number == 1 else f'-{number}'}"
        assert [path.name for path in stale.iterdir()] == [name]
    (tmp_path / "round-0001.stale-2").rename(tmp_path / "elsewhere")
    (tmp_path / "round-0001").mkdir()
    assert set_aside(tmp_path / "round-0001").name == "round-0001.stale-4"


def write_or_die(directory: Path, calls: int) -> int:
    """Write a round in a forked process that kills itself in place of a call to the disk; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = calls

    def die_or_go_on(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    code = 1
    try:
        os.replace, os.fsync, os.mkdir = (die_or_go_on(call) for call in (os.replace, os.fsync, os.mkdir))
        writer = RoundWriter(directory, 1, KEY)
        if not writer.complete:
            if not (writer.path / "scores.npy").exists():
                write_array(writer.path / "scores.npy", np.arange(4.0))
            writer.finish({"number": 1})
        code = 0
    finally:
        os._exit(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
def test_a_round_killed_at_any_write_is_finished_by_rerunning_it(tmp_path):
    for calls in range(60):
        directory = tmp_path / f"killed-{calls}" / "_mates"
        code = write_or_die(directory, calls)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        final = directory / "round-0001"
        assert not (final / "round.json").exists() or np.load(final / "scores.npy").tolist() == [0, 1, 2, 3]
        assert write_or_die(directory, 1_000) == 0
        assert np.load(final / "scores.npy").tolist() == [0, 1, 2, 3]
        assert json.loads((final / "round.json").read_text(encoding="utf-8")) == {"number": 1}
        assert not (directory / "round-0001.partial").exists()
        assert not list(directory.glob("*.stale*"))
    assert 16 <= calls < 59  # two directories, four files of three calls each, one last rename; folders flushed


def test_a_round_is_loaded_without_torch(tmp_path):
    path = write_round(RoundWriter(tmp_path, 1, KEY), make_labels())
    code = textwrap.dedent(
        f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers", "datasets", "accelerate", "numba"):
                    raise ImportError(name + " is not needed to read a round")
        sys.meta_path.insert(0, Blocked())
        from mates_hf.round_files import load_round
        record = load_round({str(path)!r})
        assert record.selection.tolist() == [9, 5]
        assert len(record.labels) == 4
        assert "torch" not in sys.modules
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
