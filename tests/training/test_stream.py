"""A streamed pool (`MatesStream`): one order for any workers, processes and resumes; refusals; where it ends."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node

from mates_hf import MatesCallback, MatesRounds, MatesStream
from mates_hf.data.stream_pool import StreamPool
from mates_hf.data.stream_reader import BufferReader
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.selection.stream_buffers import BufferSizes, sizes_for, split
from mates_hf.training.stream.files import numbered, read_buffer
from mates_hf.training.stream.sampler import StreamEndedError
from mates_hf.training.verify import verify_run
from tests.launch import free_port, start_processes
from tests.training.kit import DIGITS, make_arguments, make_pool, make_reference, run, small_config
from tests.training.settings import NO_FILE, Setup, assert_refused, case, proves, rounds_of
from tests.training.stream_worker import BUFFER_ROWS, CONFIG, STEPS, source, train

pytestmark = pytest.mark.skipif(int(datasets.__version__.split(".")[0]) < 4, reason="streams need datasets 4.0")


STREAM = "a streaming pool wrapped in `MatesStream`"
BATCH = 4


def callback(**changes: Any) -> MatesCallback:
    return MatesCallback(make_reference(8), small_config(**{**CONFIG, **changes}))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The run that all others must equal: one process, no workers, not stopped."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, train({"output_dir": str(folder)})


def buffers(folder: Path) -> list[Any]:
    return [read_buffer(path) for _, path in numbered(folder / "_mates", "buffer")]


@proves(STREAM, "the best rows of each buffer, once each; none that is probed; verifies", note="docs/train.md")
def test_the_best_of_each_buffer_are_trained_on(baseline):
    folder, result = baseline
    records, rows = buffers(folder), result["rows"]
    assert len(rows) == STEPS * BATCH == len(set(rows))
    trained = np.concatenate([record.selection for record in records])
    assert rows == trained[: len(rows)].tolist()
    rounds = rounds_of(folder)
    probed = np.concatenate([record.labels.candidate_id for record in rounds])
    assert len(set(probed.tolist())) == len(probed)  # buffers set enough aside for each round
    assert not set(probed.tolist()) & set(trained.tolist())
    whole = [record for record in records if record.influence is None]
    selected = [record for record in records if record.influence is not None]
    assert whole
    assert len(selected) > len(whole)
    for record in whole:
        assert sorted(record.selection) == record.rows.tolist() != record.selection.tolist()
    for record in selected:
        is_in = record.places >= 0
        assert is_in.sum() == len(record.rows) // 2  # `selection_ratio`
        assert record.influence[is_in].min() >= record.influence[~is_in].max()
        assert record.selection.tolist() != sorted(record.selection)
    # What the reference prefers: rows whose number is a multiple of three.
    kinds = [np.mean(np.concatenate([r.selection for r in some]) % 3 == 0) for some in (whole, selected)]
    assert kinds[1] > 1.5 * kinds[0]
    result = verify_run(folder)
    assert result.problem is None
    assert len(result.rounds) == len(rounds) == 4


def test_a_changed_buffer_does_not_verify(baseline, tmp_path):
    import shutil

    shutil.copytree(baseline[0] / "_mates", tmp_path / "_mates")
    path = next(path for _, path in reversed(list(numbered(tmp_path / "_mates", "buffer"))))
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    swapped = np.asarray(table.column("influence")).copy()
    swapped[:] = -swapped
    table = table.set_column(table.schema.get_field_index("influence"), "influence", pa.array(swapped))
    pq.write_table(table, path)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert (problem.round, problem.file) == ("stream", path.name)


@proves(STREAM, "the same rows for any number of dataloader workers; resumes exactly")
def test_workers_and_a_resume_change_no_row(baseline, tmp_path):
    _, whole = baseline
    folder, workers = tmp_path / "run", {"dataloader_num_workers": 2}
    first = train({"output_dir": str(folder), "args": workers, "stop_at": 17})
    assert first["rows"] == whole["rows"][: 17 * BATCH]
    assert first["losses"] == whole["losses"][:17]
    (checkpoint,) = folder.glob("checkpoint-14")
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["mates_hf"]
    place = state["stream"]["buffer"]
    assert place["position"] < 14 * BATCH < place["position"] + BUFFER_ROWS  # amid a buffer
    rest = train({"output_dir": str(folder), "resume": str(checkpoint)})
    assert rest["rows"] == whole["rows"][14 * BATCH :]
    assert rest["losses"] == whole["losses"]
    assert verify_run(folder).problem is None
    assert [r.info["order_sha256"] for r in rounds_of(folder)] == [
        r.info["order_sha256"] for r in rounds_of(baseline[0])
    ]
    spooled = list((folder / "_mates" / "stream" / "spool").iterdir())
    assert len(spooled) <= 4  # two behind, the one in training, one ahead


# ---- real processes


def start(folder: Path, name: str, size: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """Train in processes of their own; what each of them saw. None ends well where one is to be killed."""
    given = {"output_dir": str(folder / name), "result": str(folder / f"{name}-result"), **settings}
    command = ["-m", "tests.training.stream_worker", json.dumps(given)]
    processes = start_processes(command, size, free_port())
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            killed = "killed_at" in settings and process.returncode == -signal.SIGKILL
            assert killed or process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    if "killed_at" in settings:
        return []
    return [json.loads(Path(f"{given['result']}-{rank}.json").read_text()) for rank in range(size)]


def joined(results: list[dict[str, Any]], batch: int) -> list[int]:
    """The rows of each step, those of the main process first."""
    per_step = [np.array(result["rows"]).reshape(-1, batch) for result in results]
    return np.concatenate(per_step, axis=1).reshape(-1).tolist()


HALF = {"per_device_train_batch_size": 2}
WORKERS = {"dataloader_num_workers": 2}


@pytest.mark.slow
@proves(STREAM, "the same with workers that are spawned and persist, and for batches that are accumulated")
def test_spawned_workers_that_persist_and_accumulated_batches_change_no_row(baseline, tmp_path):
    args = {**HALF, **WORKERS, "gradient_accumulation_steps": 2, "dataloader_persistent_workers": True}
    (found,) = start(tmp_path, "spawned", args=args, spawn=True)
    assert found["rows"] == baseline[1]["rows"]


@pytest.mark.slow
@proves(STREAM, "the rows of one process in its order in several, also where each has a folder of its own")
def test_two_processes_with_workers_and_folders_of_their_own_train_on_the_rows_of_one(baseline, tmp_path):
    results = start(tmp_path, "two", 2, args={**HALF, **WORKERS}, spool_dir=str(tmp_path / "spool"))
    assert joined(results, 2) == baseline[1]["rows"]
    assert len(results[0]["rounds"]) == 4
    assert all(list((tmp_path / f"spool-{rank}").glob("mates-*/buffer-*.arrow")) for rank in (0, 1))


@pytest.mark.slow
@proves(STREAM, "resumes exactly after a kill amid a buffer, also in another number of processes")
def test_a_run_that_is_killed_amid_a_buffer_goes_on(baseline, tmp_path):
    start(tmp_path, "killed", killed_at=17, args=WORKERS)
    checkpoint = str(tmp_path / "killed" / "checkpoint-14")
    results = start(tmp_path, "killed", 2, resume=checkpoint, args=HALF)
    assert joined(results, 2) == baseline[1]["rows"][14 * BATCH :]
    assert verify_run(tmp_path / "killed").problem is None


@pytest.mark.slow
def test_passages_stand_between_the_rows_of_a_stream_and_old_rounds_can_go(tmp_path):
    config = {"reference_passes": 2, "keep_rounds": 2}
    whole = train({"output_dir": str(tmp_path), "config": config})
    passages = [row for row in whole["rows"] if row >= DIGITS**2]  # they begin with no number of a row
    assert len(passages) == 2 * 8
    trained = np.concatenate([record.selection for record in buffers(tmp_path)]).tolist()
    rows = [row for row in whole["rows"] if row < DIGITS**2]
    assert rows == trained[: len(rows)]
    args = {"dataloader_num_workers": 2}
    checkpoint = str(tmp_path / "checkpoint-21")
    rest = train({"output_dir": str(tmp_path), "config": config, "resume": checkpoint, "args": args})
    assert rest["rows"] == whole["rows"][21 * BATCH :]
    assert rest["losses"] == whole["losses"]
    assert verify_run(tmp_path).problem is None


# ---- sources


def read_all(stream: MatesStream, size: int = 7) -> list[list[int]]:
    """The token ids of all rows, read by buffers, each from its own place."""
    places, found = [], []
    reader = BufferReader(stream.source, 0, stream.source.beginning, size)
    while True:
        buffer = reader.next()
        places.append(buffer.place)
        found.append(buffer.table)
        if buffer.is_last:
            break
    for number, place in reversed(list(enumerate(json.loads(json.dumps(places))))):
        reader = BufferReader(stream.source, number, place, size)
        assert reader.next().table.equals(found[number])
        reader.stop()
    return [row for table in found if len(table) for row in table.column("input_ids").to_pylist()]


class Counting:
    """A source of one's own, with a state."""

    def __init__(self, num_rows: int = 40) -> None:
        self.num_rows, self.at = num_rows, 0

    def state_dict(self):
        return {"at": np.int64(self.at)}

    def load_state_dict(self, state):
        self.at = int(state["at"])

    def __iter__(self):
        while self.at < self.num_rows:
            self.at += 1
            yield {"input_ids": np.array([self.at - 1, 1])}


class Plain:
    """A source without a state, which begins anew each time."""

    def __iter__(self):
        return ({"input_ids": [i, 1]} for i in range(40))


def shards(folder: Path, kind: str) -> Any:
    """Forty rows in two files of a kind, streamed."""
    files = []
    for shard in range(2):
        rows = [{"input_ids": [20 * shard + i, 1]} for i in range(20)]
        path = folder / f"shard-{shard}.{kind}"
        files.append(str(path))
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_dataset({"jsonl": "json"}.get(kind, kind), data_files=files, split="train", streaming=True)


def tar_shards(folder: Path) -> Any:
    """Forty rows in a tar file, as WebDataset has them."""
    import io
    import tarfile

    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i in range(40):
            data = json.dumps({"input_ids": [i, 1]}).encode()
            member = tarfile.TarInfo(f"{i:05d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = load_dataset("webdataset", data_files=str(folder / "shard.tar"), split="train", streaming=True)
    return found.map(lambda row: {"input_ids": row["json"]["input_ids"]}, remove_columns=list(found.features))


def in_memory(folder: Path) -> Any:
    """Parquet behind fsspec."""
    import fsspec

    name = f"memory://{folder.name}/rows.parquet"
    with fsspec.open(name, "wb") as file:
        Dataset.from_list([{"input_ids": [i, 1]} for i in range(40)]).to_parquet(file)
    return load_dataset("parquet", data_files=name, split="train", streaming=True)


SOURCES = {
    "a stream of `datasets`": lambda folder: Dataset.from_list(
        [{"input_ids": [i, 1]} for i in range(40)]
    ).to_iterable_dataset(num_shards=3),
    "Parquet shards": lambda folder: shards(folder, "parquet"),
    "JSON shards": lambda folder: shards(folder, "jsonl"),
    "an fsspec path": in_memory,
    "WebDataset": tar_shards,
    "mapped": lambda folder: shards(folder, "parquet").map(lambda row: {"input_ids": [row["input_ids"][0], 1]}),
    "a source of one's own": lambda folder: Counting(),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_read_again_from_any_buffer(tmp_path, name):
    stream = MatesStream(SOURCES[name](tmp_path), 64)
    assert read_all(stream) == [[i, 1] for i in range(40)]
    assert read_all(stream, 40) == [[i, 1] for i in range(40)]  # the last buffer is full


def test_interleaved_sources_and_sources_that_are_read_again(tmp_path, monkeypatch):
    # `datasets` waits so long, 5 seconds, wherever such a reading ends, and here many do.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    parts = [SOURCES["a stream of `datasets`"](tmp_path), shards(tmp_path, "parquet")]
    mixed = interleave_datasets(parts, probabilities=[0.3, 0.7], seed=3)
    assert read_all(MatesStream(mixed)) == [row["input_ids"] for row in mixed]
    assert read_all(MatesStream(Plain(), resume="reread")) == [[i, 1] for i in range(40)]


def test_a_source_is_left_where_it_stood():
    given = Counting()
    given.at = 5
    stream = MatesStream(given)
    pool = StreamPool(stream)
    assert given.at == 5
    assert pool.token_rows([0]).values.tolist() == [5, 1]


def test_a_stream_that_is_not_equal_in_place_is_told():
    class Shrinks(Plain):
        times = 0

        def __iter__(self):
            Shrinks.times += 1
            return iter([{"input_ids": [i, 1]} for i in range(40 - 20 * (Shrinks.times > 2))])

    stream = MatesStream(Shrinks(), resume="reread")
    next(stream.source.tables({"rows": 0}, 0, 4))
    with pytest.raises(MatesError, match="had 20 rows now where the run had read 30"):
        next(stream.source.tables({"rows": 30}, 30, 4))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[1, 2]], "must be a dict, got list in row 0"),
        ([{"input_ids": [1]}, {"input_ids": [1], "id": 3}], r"got \['id', 'input_ids'\] in row 1"),
        ([{"input_ids": [1], "what": object()}], "the column `what` of rows 0 to 0 has no Arrow type"),
        ([], "must have rows, got none"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused_by_name(rows, match):
    class Given:
        def __iter__(self):
            return iter(rows)

    with pytest.raises((TypeError, ValueError), match=match):
        StreamPool(MatesStream(Given(), resume="reread"))


def test_code_of_a_source_that_draws_from_the_random_streams_is_refused():
    stream = source().map(lambda row: {"noise": float(torch.rand(()))})
    with pytest.raises(UnsupportedSettingError, match="must not draw from the random streams"):
        StreamPool(MatesStream(stream))


# ---- refused where it is made


class Draining:
    """Gives its rows once."""

    def __iter__(self):
        return self

    def __next__(self):
        return {"input_ids": [1]}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MatesStream(source().shuffle(seed=3, buffer_size=64)), r"Leave the shuffle out"),
        (lambda: MatesStream(interleave_datasets([source().shuffle(seed=3), source()])), "Leave the shuffle out"),
        (lambda: MatesStream(Plain()), "Set `resume='reread'`"),
        (lambda: MatesStream(Draining(), resume="reread"), "whose `__iter__` begins anew"),
        (lambda: MatesStream(split_dataset_by_node(source(), 0, 2)), "before it is split"),
        (lambda: MatesStream(make_pool(20)), "Give a Dataset to the Trainer as it is"),
        (lambda: MatesStream({"train": source()}), "Pass one split"),
        (lambda: MatesStream(source(), 1), "`buffer_rows` must be a whole number of at least 2, got 1"),
        (lambda: MatesStream(source(), resume="later"), "`resume` must be 'state' or 'reread'"),
        (lambda: MatesStream(source(), num_rows=0), "`num_rows` must be a whole number of at least 1"),
        (lambda: MatesRounds(make_reference(4), MatesStream(source()), output_dir="unused"), "MatesCallback"),
    ],
)
def test_what_is_no_stream_to_select_from_is_refused_by_name(make, match):
    with pytest.raises((ValueError, TypeError, UnsupportedSettingError), match=match):
        make()


def test_the_advice_of_each_refusal_works():
    MatesStream(source())
    MatesStream(Plain(), resume="reread")
    MatesStream(IterableDataset.from_generator(lambda: ({"input_ids": [i, 1]} for i in range(40))))


def test_rows_are_asked_for_by_a_sampler_alone(tmp_path):
    stream = MatesStream(source())
    with pytest.raises(UnsupportedSettingError, match="Add a MatesCallback"):
        stream[3]
    assert "not known" in repr(stream)
    assert len(stream) > 1e15


# ---- refused before the first step


def stream_setup(buffer_rows: int = BUFFER_ROWS, **given: Any) -> Setup:
    return Setup(pool=lambda: MatesStream(source(), buffer_rows, **given), args={"max_steps": STEPS})


def refused(setting: str, setup: Setup, match: str, error: Any = UnsupportedSettingError, **config: Any) -> Any:
    return case(setting, setup, match, error, config, outcome="refused", what=NO_FILE)


REFUSED = [
    refused("a stream with `candidate_scope=\"pool\"`", stream_setup(), "`candidate_scope='pool'`",
            candidate_scope="pool"),
    refused("a stream with `max_passes` above 1", stream_setup(), "`max_passes=2`", max_passes=2),
    refused("a stream with `drift_check_steps`", stream_setup(), "`drift_check_steps`", drift_check_steps=3,
            average_steps=2),
    refused("a stream with `allow`", stream_setup(), "filter the stream itself", allow="licence=mit"),
    refused("a stream with `group_column`", stream_setup(), "interleave_datasets", group_column="source"),
    refused("a stream with `score_column`", stream_setup(), r"by it with `\.filter", score_column="quality"),
    refused("a stream known to have fewer rows than the run reads", stream_setup(num_rows=90),
            r"Set `max_steps` to \d+ or less", ValueError),
    refused("a stream in buffers that leave no row to choose", stream_setup(buffer_rows=3),
            "Set `buffer_rows` to 8 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "setup", "match", "error", "config"), REFUSED)
def test_what_a_stream_cannot_do_is_refused_by_name(tmp_path, setting, setup, match, error, config):
    given = {**CONFIG, **config}
    assert_refused(tmp_path, setup, match, error=error, callbacks=lambda: [callback(**given)])


@proves("a stream with `datasets` before 4.0", NO_FILE, outcome="refused", note="`pip install -U datasets`")
def test_a_datasets_that_does_not_find_its_place_again_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mates_hf.training.supply.version", lambda name: {"datasets": "3.6.0"}[name])
    assert_refused(tmp_path, stream_setup(), "pip install -U datasets", callbacks=lambda: [callback()])


@proves("a stream with an influence model that needs the run's model", NO_FILE, outcome="refused")
def test_an_influence_model_that_needs_the_runs_model_is_refused(tmp_path):
    def needing() -> list[Any]:
        return [MatesCallback(make_reference(8), small_config(**CONFIG), influence_model=HiddenStateInfluenceModel())]

    assert_refused(tmp_path, stream_setup(), "NgramInfluenceModel", callbacks=needing)


def test_the_sizes_of_buffers_serve_every_round():
    for most, ratio, probes, steps in ((65_536, 0.2, 2_000, 50), (500, 0.5, 100, 6), (10_000, 0.1, 40, 300)):
        config = small_config(
            selection_ratio=ratio, num_probes=probes, update_steps=10 * steps, first_round_steps=steps,
            average_steps=0, switch_lead_steps=2,
        )  # fmt: skip
        sizes = sizes_for(most, config, 8)
        shortest = steps * 8
        assert sizes.rows <= most + 1
        assert sizes.kept == math.floor(sizes.candidates * ratio) <= sizes.candidates <= shortest
        assert shortest / sizes.kept * sizes.set_aside >= probes  # of a round that selects
        assert math.ceil(10 * shortest / sizes.candidates) * sizes.set_aside >= probes  # of the first
        rows = split(sizes, 3, sizes.rows, seed=1)
        assert len(rows.set_aside) == sizes.set_aside
        assert sorted([*rows.set_aside, *rows.candidates]) == list(range(sizes.rows))
        short = split(sizes, 3, 20, seed=1)
        assert short.set_aside.tolist() == [place for place in rows.set_aside if place < 20]
    assert sizes_for(8, small_config(**CONFIG), BATCH).kept >= 1  # what the refusal of small buffers says
    assert (
        split(BufferSizes(50, 20, 15), 0, 50, 1).set_aside.tolist()
        != split(BufferSizes(50, 20, 15), 1, 50, 1).set_aside.tolist()
    )


# ---- ends


@proves(STREAM, "a stream that ends before the run does: its last whole step is trained on and saved, and it is named")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_ends_is_named_at_its_end(tmp_path, workers):
    args = make_arguments(
        tmp_path, max_steps=STEPS, save_strategy="steps", save_steps=50, **{"dataloader_num_workers": workers}
    )
    with pytest.raises(
        StreamEndedError, match=r"ended after 150 rows, at step 1\d of 30.*Set `max_steps=1\d`"
    ) as told:
        run(args, [callback()], MatesStream(source(150), BUFFER_ROWS))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"at step {step} of" in str(told.value)
    trained = sum(len(record.selection) for record in buffers(tmp_path))
    assert step == trained // BATCH
    assert sum(record.facts["num_rows"] for record in buffers(tmp_path)) == 150
    fits = make_arguments(tmp_path / "fits", max_steps=step)
    finished = run(fits, [callback()], MatesStream(source(150), BUFFER_ROWS))
    assert len(finished.rows) == step * BATCH == len(set(finished.rows))


def test_a_stream_of_less_than_a_step_is_refused(tmp_path):
    args = make_arguments(tmp_path, max_steps=STEPS)
    with pytest.raises(StreamEndedError, match="for an optimizer step"):
        run(args, [callback()], MatesStream(source(5), BUFFER_ROWS))


def test_a_run_that_never_selects_trains_on_whole_buffers(tmp_path):
    args = make_arguments(tmp_path, max_steps=8)
    finished = run(args, [callback(random_rounds=99)], MatesStream(source(), BUFFER_ROWS))
    assert len(set(finished.rows)) == 32
    assert max(finished.rows) < 2 * BUFFER_ROWS
    assert finished.rows[:BUFFER_ROWS] != sorted(finished.rows[:BUFFER_ROWS])
