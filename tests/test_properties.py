"""Wild input ends in a result or an error by name: damaged rounds and models, any config, any Arrow column.

The examples are fixed (`derandomize`), so a failure here is one everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments

from mates_hf import MatesCallback, MatesConfig, MatesSelector, NgramInfluenceModel
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.disk import read_json, sha256_of, write_json
from mates_hf.errors import MatesError
from mates_hf.prediction.artifacts import CONFIG_FILE, FIT_FILE, WEIGHTS_FILE
from mates_hf.records import FitReport
from mates_hf.round_files import load_round, write_checksums
from mates_hf.selection.saved import SELECTOR_FILE
from mates_hf.training.order import load_order
from mates_hf.training.verify import verify_run
from tests.training.kit import make_arguments, make_reference, run, small_config

STATE_ERRORS = (MatesError, ValueError)


def fixed(num: int) -> Callable[[Any], Any]:
    """The same examples on every machine, however slow it is."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=num, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


@contextmanager
def or_refused(*kinds: type[Exception]) -> Iterator[None]:
    """What is inside ends in a result, or in an error of these kinds that says something."""
    try:
        yield
    except kinds as error:
        if not str(error):
            raise AssertionError("an error must say what is wrong") from error


# --- damage: what happens to a file ---

_DAMAGES = ("flip", "truncate", "append", "delete", "replace", "empty", "folder", "loop", "pipe", "zeros", "other")


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Any]:
    kind = draw(st.sampled_from(_DAMAGES))
    if kind in ("flip", "zeros"):
        return kind, (draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 255)))
    if kind == "truncate":
        return kind, draw(st.floats(0, 1, exclude_max=True))
    if kind in ("append", "replace"):
        return kind, draw(st.binary(min_size=1, max_size=200) | st.sampled_from(_TEXTS))
    return kind, draw(st.integers(0, 100))


_TEXTS = [
    b"{}", b"[]", b"null", b'"text"', b"1e999", b"NaN", b"[" * 50_000, b'{"a": ' * 50_000, b"1" * 5_000,
    b'{"number": 1}',
    b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00\xff\xff\xff\xff{", b"PAR1PAR1", b"PK\x03\x04" + b"\0" * 40,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
]  # fmt: skip


@contextmanager
def damaged(path: Path, how: tuple[str, Any], others: list[Path]) -> Iterator[bool]:
    """The file after something happened to it, and as it was afterwards; whether its bytes are others now."""
    before = path.read_bytes()
    kind, value = how
    if kind in ("flip", "zeros", "truncate"):
        at = int((value if kind == "truncate" else value[0]) * len(before))
        end = before[at + 1 :] if kind == "flip" else b"\0" * (len(before) - at - 1)
        path.write_bytes(before[:at] if kind == "truncate" else before[:at] + bytes([value[1]]) + end)
    elif kind in ("append", "replace", "empty"):
        path.write_bytes(b"" if kind == "empty" else value if kind == "replace" else before + value)
    elif kind == "other":
        path.write_bytes(others[value % len(others)].read_bytes())
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "pipe":
            os.mkfifo(path)
    try:
        yield not path.is_file() or path.read_bytes() != before
    finally:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(before)


@contextmanager
def put_back(*paths: Path) -> Iterator[None]:
    """The files hold afterwards what they held before."""
    kept = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, content in zip(paths, kept, strict=True):
            path.write_bytes(content)


# --- round directories ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose round 3 stays in the Trainer's own order."""
    output_dir = tmp_path_factory.mktemp("properties")
    model = NgramInfluenceModel(num_buckets=64)
    run(make_arguments(output_dir), [MatesCallback(make_reference(), small_config(), influence_model=model)])
    shutil.rmtree(output_dir / "_mates" / "round-0001")
    for number in (2, 3):
        path = output_dir / "_mates" / f"round-{number:04d}"
        info = read_json(path / "round.json")
        info["config"]["keep_rounds"] = 2
        write_json(path / "round.json", info)
        write_checksums(path, info)
    assert verify_run(output_dir).problem is None
    return output_dir


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@fixed(250)
@given(data=st.data(), how=damages())
def test_a_damaged_round_is_loaded_or_refused_and_never_verified(finished, data, how):
    # What stands beside rounds, such as the run's history and its page, vouches for none of them.
    files = [file for round_dir in sorted((finished / "_mates").glob("round-*")) for file in files_of(round_dir)]
    path = data.draw(st.sampled_from(files))
    with damaged(path, how, files) as changed:
        for number in (2, 3):
            for load in (load_round, load_order):
                with or_refused(*STATE_ERRORS, FileNotFoundError):
                    load(finished / "_mates" / f"round-{number:04d}")
        problem = verify_run(finished).problem
        assert (problem is not None) is changed, (path.name, how)
        if problem is not None:
            assert f"{problem.round}/" in path.as_posix()


@pytest.mark.slow
@fixed(250)
@given(data=st.data(), how=damages())
def test_damage_with_checksums_to_match_is_verified_or_named(finished, data, how):
    """What the checksums would stop: nothing behind them may fall over either."""
    round_dir = finished / "_mates" / data.draw(st.sampled_from(["round-0002", "round-0003"]))
    files = [file for file in files_of(round_dir) if file.name != "SHA256SUMS"]
    sums = round_dir / "SHA256SUMS"
    path = data.draw(st.sampled_from(files))
    with damaged(path, how, files), put_back(sums):
        if path.is_file():
            name = path.relative_to(round_dir).as_posix()
            lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {name}")]
            sums.write_text("\n".join([f"{sha256_of(path)}  {name}", *lines]) + "\n")
        result = verify_run(finished)
        assert result.problem is None or (result.problem.expected and result.problem.found)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fixed(250)
@given(data=st.data(), value=json_values)
def test_any_value_in_a_round_is_verified_or_named(finished, data, value):
    """Entries of `round.json`, changed in every copy of them, checksums included."""
    round_dir = finished / "_mates" / "round-0003"
    names = ("round.json", "key.json", "selection.json", "SHA256SUMS")
    info, key, short = (json.loads((round_dir / name).read_bytes()) for name in names[:3])
    outer = data.draw(st.sampled_from(sorted(info)))
    inner = data.draw(st.none() | st.sampled_from(sorted(info[outer]))) if isinstance(info[outer], dict) else None
    for place in (info, key, short):
        if outer in place and inner is None:
            place[outer] = value
        elif outer in place and inner in place[outer]:
            place[outer][inner] = value
    with put_back(*(round_dir / name for name in names)):
        for name, content in zip(names, (info, key, short), strict=False):
            write_json(round_dir / name, content)
        write_checksums(round_dir, info)
        problem = verify_run(finished).problem
        assert problem is None or (problem.round == "round-0003" and problem.expected)


# --- configs ---

_NAMES = [field.name for field in dataclasses.fields(MatesConfig)]
near_values = st.sampled_from(
    [0, 1, 2, 10, 0.2, 0.5, -1, 1.5, "slice", "pool", "select", "error", None, True, "", "0.2", float("nan"), 2**70]
)


@fixed(300)
@given(st.dictionaries(st.sampled_from(_NAMES), near_values | json_values, max_size=5))
def test_any_config_is_made_or_refused(values):
    try:
        config = MatesConfig(**values)
    except (ValueError, TypeError) as error:
        if not any(f"`{name}`" in str(error) for name in _NAMES):
            raise AssertionError("an error must name a field") from error
        return
    assert MatesConfig(**config.to_dict()) == config
    assert config.lead_steps >= 1
    assert 0 <= config.window_steps <= config.update_steps


@fixed(120)
@given(st.dictionaries(st.sampled_from(_NAMES), near_values.map(str) | st.text(max_size=6), max_size=4))
def test_any_command_line_is_parsed_or_refused(values):
    arguments = [part for name, text in values.items() for part in (f"--{name}", text)]
    parser = HfArgumentParser((TrainingArguments, MatesConfig))
    parser.exit_on_error = False
    try:
        _, config = parser.parse_args_into_dataclasses(["--output_dir", "out", *arguments])
    except (ValueError, TypeError, argparse.ArgumentError, SystemExit):  # the last two are argparse's own
        return
    assert isinstance(config, MatesConfig)


# --- saved models ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    shutil.copytree(finished / "_mates" / "round-0002" / "influence_model", path)
    return path


ROWS = TokenRows.from_lists([[1, 2, 3], [4], [], [63, 1, 70_000]])


def vouch_for(path: Path) -> None:
    """Let the saved model's config hold the checksum that one of its files has now."""
    config_path = path.parent / CONFIG_FILE
    config = json.loads(config_path.read_bytes())
    config["sha256"][path.name] = sha256_of(path)
    config_path.write_text(json.dumps(config))


def load_and_use(path: Path) -> None:
    """Load a model, and if it loads, let it do what a run does with it."""
    model = NgramInfluenceModel.from_pretrained(path)
    predicted = model.predict(ROWS)
    assert predicted.shape == (4,)
    assert predicted.dtype == np.float32
    assert isinstance(model.report, FitReport)
    assert isinstance(model.report.passes(0.1), bool)
    model.explain(3)
    assert np.array_equal(MatesSelector.from_pretrained(path).influence_model.predict(ROWS), predicted)


@fixed(200)
@given(data=st.data(), how=damages())
def test_a_damaged_model_is_refused(saved, data, how):
    files = files_of(saved)
    path = data.draw(st.sampled_from(files))
    with damaged(path, how, files) as changed:
        try:
            load_and_use(saved)
        except (*STATE_ERRORS, FileNotFoundError):
            assert changed
        else:
            assert not changed or path.name in (CONFIG_FILE, SELECTOR_FILE)


@fixed(300)
@given(data=st.data(), how=damages())
def test_a_damaged_model_with_checksums_to_match_is_used_or_refused(saved, data, how):
    config_path = saved / CONFIG_FILE
    path = saved / data.draw(st.sampled_from([WEIGHTS_FILE, FIT_FILE]))
    with damaged(path, how, files_of(saved)), put_back(config_path):
        if path.is_file():
            vouch_for(path)
        with or_refused(*STATE_ERRORS, FileNotFoundError):
            load_and_use(saved)


@fixed(200)
@given(data=st.data(), value=json_values)
def test_any_value_in_a_models_config_is_used_or_refused(saved, data, value):
    config_path = saved / CONFIG_FILE
    config = json.loads(config_path.read_bytes())
    outer = data.draw(st.sampled_from(sorted(config)))
    with put_back(config_path):
        config_path.write_text(json.dumps({**config, outer: value}))
        with or_refused(*STATE_ERRORS):
            load_and_use(saved)


@fixed(200)
@given(data=st.data(), value=json_values)
def test_any_value_in_a_models_report_is_used_or_refused(saved, data, value):
    """The guard compares the report's numbers, so what is none must not get that far."""
    report_path = saved / FIT_FILE
    report = json.loads(report_path.read_bytes())
    with put_back(saved / CONFIG_FILE, report_path):
        report_path.write_text(json.dumps({**report, data.draw(st.sampled_from(sorted(report))): value}))
        vouch_for(report_path)
        with or_refused(*STATE_ERRORS):
            load_and_use(saved)


@fixed(150)
@given(data=st.data())
def test_any_arrays_in_a_model_are_used_or_refused(saved, data):
    """Arrays that are whole and wrong: ids beyond the tables, lengths that differ, numbers that are none."""
    from safetensors.numpy import load, save

    weights_path = saved / WEIGHTS_FILE
    tensors = load(weights_path.read_bytes())
    name = data.draw(st.sampled_from(sorted(tensors)))
    array = tensors[name].copy()
    kind = data.draw(st.sampled_from(["drop", "cut", "value", "type", "shape", "grow"]))
    if kind == "drop":
        del tensors[name]
    else:
        extreme = data.draw(st.sampled_from([-1, 2**62, 2**31 - 1, 0, np.nan, np.inf, -(2**62), 64]))
        if kind == "value":
            at = data.draw(st.integers(0, len(array) - 1))
            array[at] = extreme if array.dtype.kind == "f" or np.isfinite(extreme) else 0
        with np.errstate(all="ignore"):
            other = array.astype(data.draw(st.sampled_from([np.float64, np.int32, np.uint8, np.float16])))
        tensors[name] = {
            "cut": array[: len(array) // 2],
            "value": array,
            "type": other,
            "shape": array[None, :],
            "grow": np.concatenate([array, array]),
        }[kind]
    with put_back(saved / CONFIG_FILE, weights_path):
        weights_path.write_bytes(save(tensors))
        vouch_for(weights_path)
        with or_refused(*STATE_ERRORS):
            load_and_use(saved)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("statistics.keys", 2**62, "rising bigrams of ids below 64"),
        ("statistics.keys", (63 << 32) | 64, "rising bigrams of ids below 64"),
        ("statistics.keys", (64 << 32) | 63, "rising bigrams of ids below 64"),
        ("tables.token", np.nan, "finite"),
        ("tables.bigram", np.inf, "finite"),
        ("statistics.counts", -1.0, "at least 0"),
    ],
)
def test_arrays_that_a_later_fit_or_score_would_look_up_wrongly_are_refused(saved, tmp_path, name, value, rule):
    from safetensors.numpy import load, save

    path = tmp_path / "model"
    shutil.copytree(saved, path)
    tensors = load((path / WEIGHTS_FILE).read_bytes())
    assert len(tensors["tables.token"]) == 64
    array = tensors[name].copy()
    array[-1] = value
    (path / WEIGHTS_FILE).write_bytes(save({**tensors, name: array}))
    config = read_json(path / CONFIG_FILE)
    config["sha256"][WEIGHTS_FILE] = sha256_of(path / WEIGHTS_FILE)
    write_json(path / CONFIG_FILE, config)
    with pytest.raises(MatesError, match=f"`{name}` must be {rule}"):
        NgramInfluenceModel.from_pretrained(path)


# --- Arrow columns ---

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
OTHERS = [pa.float32(), pa.bool_(), pa.string()]


@st.composite
def columns(draw: st.DrawFn, num_rows: int, shape: list[int | None] | None = None) -> pa.ChunkedArray:
    """A list column in chunks, some of them slices of longer arrays; rows and tokens may be null."""
    kind = draw(st.sampled_from(["list", "large_list", "fixed"]))
    integer = draw(st.sampled_from(INTEGERS))
    size = draw(st.integers(0, 4))
    low, high = (0, 100) if draw(st.integers(0, 9)) else (-(2**62), 2**64 - 1)
    bits = integer.bit_width - (0 if str(integer).startswith("u") else 1)
    lowest = 0 if str(integer).startswith("u") else -(2**bits)
    tokens = st.integers(max(low, lowest), min(high, 2**bits - 1))
    null_tokens = not draw(st.integers(0, 4))
    null_rows = not draw(st.integers(0, 3))

    def row() -> list[int | None] | None:
        if null_rows and not draw(st.integers(0, 4)):
            return None
        length = size if kind == "fixed" else draw(st.integers(0, 5))
        return [None if null_tokens and not draw(st.integers(0, 5)) else draw(tokens) for _ in range(length)]

    column_type = {
        "list": pa.list_(integer), "large_list": pa.large_list(integer), "fixed": pa.list_(integer, size)
    }[kind]  # fmt: skip
    chunks, left = [], num_rows
    while left:
        take = draw(st.integers(1, left))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        array = pa.array([row() for _ in range(before + take + after)], column_type)
        chunks.append(array[before : before + take])
        left -= take
        if not draw(st.integers(0, 3)):
            chunks.append(array[:0])
    return pa.chunked_array(chunks, column_type)


@fixed(400)
@given(data=st.data(), num_rows=st.integers(1, 8))
def test_any_list_column_is_read_as_it_is_or_refused(data, num_rows):
    column = data.draw(columns(num_rows))
    dataset = Dataset(pa.table({"input_ids": column}))
    order = data.draw(st.none() | st.permutations(range(num_rows)))
    if order is not None:
        dataset = dataset.select(order)
    ids = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=10))
    plain = column.to_pylist()
    expected = [plain[i if order is None else order[i]] or [] for i in ids]
    try:
        rows = CandidatePool(dataset).token_rows(ids)
    except ValueError:
        # Chunks that are touched are looked at as a whole: a null token in another row of one refuses too.
        if not any(token is None or token >= 2**63 for row in plain for token in row or []):
            raise
        return
    assert [rows.row(i)[0].tolist() for i in range(len(rows))] == expected
    assert rows.num_targets.tolist() == [max(len(row) - 1, 0) for row in expected]


@fixed(150)
@given(data=st.data(), num_rows=st.integers(1, 6))
def test_any_columns_together_are_read_or_refused(data, num_rows):
    """Labels and masks of their own types, lengths and chunks; a column of no integers; a model that scores them."""
    names = data.draw(st.sets(st.sampled_from(["labels", "attention_mask"])))
    table = {"input_ids": data.draw(columns(num_rows)), **{name: data.draw(columns(num_rows)) for name in names}}
    if data.draw(st.integers(0, 5)) == 0:
        other = data.draw(st.sampled_from(OTHERS))
        name = data.draw(st.sampled_from(sorted(table)))
        table[name] = pa.array([[] if i % 2 else None for i in range(num_rows)], pa.list_(other))
    pool = CandidatePool(Dataset(pa.table(table)))
    with or_refused(*STATE_ERRORS, TypeError):
        rows = pool.token_rows()
        assert len(rows) == num_rows
        assert rows.offsets[-1] == len(rows.values)
        pool.identity()
        MODEL.predict(rows)


def small_model() -> NgramInfluenceModel:
    """Fitted on rows of a vocabulary of 50, with labels that follow one token."""
    from mates_hf.records import InfluenceLabels

    rng = np.random.default_rng(0)
    rows = TokenRows.from_lists(rng.integers(0, 50, (40, 6)).tolist())
    influence = np.array([(rows.row(i)[0] == 7).mean() for i in range(40)], np.float32) + rng.normal(size=40) * 1e-3
    labels = InfluenceLabels(
        candidate_id=np.arange(40),
        influence=influence.astype(np.float32),
        influence_per_token=influence.astype(np.float32),
        loss=np.ones(40, np.float32),
        num_tokens=rows.num_targets,
        probe=np.array(["directional"] * 40),
    )
    return NgramInfluenceModel(num_buckets=64).fit(rows, labels)


MODEL = small_model()


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.uint32])
@pytest.mark.parametrize("where", ["values", "labels"])
def test_an_id_beyond_every_table_is_never_looked_up(dtype, where):
    """The largest id of a type, as a token and as a label: 64 bits of one wrap into negative positions."""
    ids = np.array([1, 2, 3, 4], dtype)
    wild = ids.copy()
    wild[2] = np.iinfo(dtype).max
    rows = TokenRows(values=ids, offsets=np.array([0, 4]), labels=ids)
    rows = dataclasses.replace(rows, **{where: wild})
    if dtype == np.uint64:
        with pytest.raises(ValueError, match="Token ids must be below"):
            MODEL.predict(rows)
    else:
        assert np.isfinite(MODEL.predict(rows)).all()
