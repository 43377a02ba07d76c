from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from mates_hf.data.rows import TokenRows
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import BAD, GOOD, MeanId, fit_model, in_child, make_lists, truth

ROOT = Path(__file__).resolve().parents[2]
FORKS = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def fitted() -> NgramInfluenceModel:
    return fit_model()


@pytest.fixture(scope="module")
def selector(fitted: NgramInfluenceModel, tiny_tokenizer: Any) -> MatesSelector:
    return MatesSelector(fitted, tiny_tokenizer)


@pytest.fixture(scope="module")
def lists() -> list[list[int]]:
    return make_lists(120, seed=5)


@pytest.fixture(scope="module")
def dataset(lists: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": lists, "id": list(range(len(lists)))})


def alone(model: Any, lists: list[list[int] | None]) -> np.ndarray:
    """Each row predicted by itself."""
    return np.concatenate([model.predict(TokenRows.from_lists([ids or []])) for ids in lists])


def influence_of(scored: Any) -> np.ndarray:
    return np.array(scored.with_format(None)["influence"][:], np.float32)


# --- map ---


def layouts(lists: list[list[int]]) -> dict[str, Dataset]:
    """The same rows, or some of them, in every way `datasets` may hold them."""
    plain = Dataset.from_dict({"input_ids": lists})
    with_nulls = [None if i % 7 == 3 else ids if i % 7 else [] for i, ids in enumerate(lists)]
    fixed = [ids[:2] for ids in lists]
    narrow = pa.table({"input_ids": pa.array(lists, pa.list_(pa.int16()))})
    chunks = pa.concat_tables([narrow.slice(i, 17) for i in range(0, len(lists), 17)])
    return {
        "plain": plain,
        "shuffled": plain.shuffle(seed=1),
        "sliced": plain.select(range(20, 90)),
        "picked": plain.select([5, 5, 90, 2]),
        "concatenated": concatenate_datasets([plain.select(range(60, 120)), plain.select(range(0, 30))]),
        "large_list": Dataset(pa.table({"input_ids": pa.array(lists, pa.large_list(pa.int64()))})),
        "fixed_size": Dataset(pa.table({"input_ids": pa.array(fixed, pa.list_(pa.int32(), 2))})),
        "nulls": Dataset(pa.table({"input_ids": pa.array(with_nulls, pa.list_(pa.int32()))})),
        "shuffled nulls": Dataset(pa.table({"input_ids": pa.array(with_nulls, pa.list_(pa.int32()))})).shuffle(seed=2),
        "chunks": Dataset(chunks),
        "shuffled chunks": Dataset(chunks).shuffle(seed=3),
        "torch": plain.with_format("torch"),
    }


@pytest.mark.parametrize("name", sorted(layouts([[1, 2]] * 120)))
def test_map_equals_scoring_each_row_alone(name: str, selector: MatesSelector, lists: list[list[int]]) -> None:
    given = layouts(lists)[name]
    scored = selector.map(given, batch_size=13)
    rows = given.with_format(None)["input_ids"][:]
    assert scored.with_format(None)["input_ids"][:] == rows
    expected = alone(selector.influence_model, rows)
    assert np.array_equal(influence_of(scored), expected)
    assert scored.features["influence"] == datasets.Value("float32")
    assert scored.features["input_ids"] == given.features["input_ids"]
    assert scored.format["type"] == given.format["type"]
    assert np.array_equal(selector.score(given, shard_rows=50).influence, expected)
    assert expected.std() > 0


def test_the_sign_is_that_of_the_labels(selector: MatesSelector) -> None:
    scored = selector.map(Dataset.from_dict({"input_ids": [[5, GOOD, GOOD], [5, 20, 21], [5, BAD, BAD]]}))
    helps, nothing, hurts = influence_of(scored)
    assert helps > 0.005 > nothing > -0.005 > hurts


def test_texts_are_scored_as_their_tokens(selector: MatesSelector, lists: list[list[int]]) -> None:
    texts = [" ".join(f"w{i}" for i in ids) for ids in lists]
    dataset = Dataset.from_dict({"text": [*texts, "", None, " ".join(texts[:9])]})
    scored = influence_of(selector.map(dataset))
    long = selector.tokenizer(" ".join(texts[:9]), truncation=True)["input_ids"]
    assert len(long) == 64
    assert np.array_equal(scored, alone(selector.influence_model, [*lists, [], [], long]))
    assert np.array_equal(selector.score(dataset, batch_size=7).influence, scored)
    short = MatesSelector(selector.influence_model, selector.tokenizer, max_length=3)
    assert np.array_equal(
        influence_of(short.map(dataset)), alone(short.influence_model, [*(ids[:3] for ids in lists), [], [], long[:3]])
    )


def test_formats_columns_and_splits_are_kept(selector: MatesSelector, dataset: Dataset) -> None:
    shown = dataset.with_format("numpy", columns=["id"])
    scored = selector.map(shown)
    assert scored.format["columns"] == ["id", "influence"]
    assert scored.column_names == ["input_ids", "id", "influence"]
    assert scored[3]["influence"].dtype == np.float32
    assert shown.format["columns"] == ["id"]
    removed = selector.map(dataset, remove_columns=["input_ids"])
    assert removed.column_names == ["id", "influence"]
    again = selector.map(scored.with_format(None))
    assert again.column_names == ["input_ids", "id", "influence"]
    both = DatasetDict(a=dataset.select(range(10)), b=dataset.select(range(10, 40)))
    mapped = selector.map(both)
    assert isinstance(mapped, DatasetDict)
    assert np.array_equal(influence_of(mapped["b"]), influence_of(scored)[10:40])
    nothing = selector.map(dataset.select([]))
    assert nothing.column_names == ["input_ids", "id", "influence"]
    assert nothing.features["influence"] == datasets.Value("float32")


def test_the_new_column_is_written_alone(selector: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    info = datasets.DatasetInfo(description="made", builder_name="json", features=dataset.features)
    Dataset(dataset.data, info=info, split="train").save_to_disk(tmp_path / "data")
    stored = load_from_disk(str(tmp_path / "data"))
    scored = selector.map(stored)
    new = [Path(found["filename"]) for found in scored.cache_files if found not in stored.cache_files]
    assert [path.parent for path in new] == [tmp_path / "data"]
    assert Dataset.from_file(str(new[0])).column_names == ["influence", "num_targets"]
    address = stored.data.column("input_ids").chunk(0).values.buffers()[1].address
    assert scored.data.column("input_ids").chunk(0).values.buffers()[1].address == address
    assert (scored.info.description, scored.info.builder_name, scored.split) == ("made", "json", "train")
    assert selector.map(stored)._fingerprint == scored._fingerprint

    alone_there = selector.map(stored, remove_columns=["input_ids", "id"])
    assert alone_there.column_names == ["influence"]
    assert np.array_equal(influence_of(alone_there), influence_of(scored))
    scored.save_to_disk(tmp_path / "copy")
    expected = scored.to_dict()
    shutil.rmtree(tmp_path / "data")
    assert load_from_disk(str(tmp_path / "copy")).to_dict() == expected


def test_rows_in_another_order_are_written_once(selector: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "data")
    shuffled = load_from_disk(str(tmp_path / "data")).shuffle(seed=4)
    stay = selector.map(shuffled, keep_in_memory=True)
    assert stay.cache_files == []
    scored = selector.map(shuffled)
    first = caches(tmp_path / "data")
    assert scored["id"][:] == shuffled["id"][:] != dataset["id"][:]
    assert np.array_equal(influence_of(scored), alone(selector.influence_model, shuffled["input_ids"][:]))
    other = MatesSelector(MeanId()).map(shuffled)
    assert other["id"][:] == shuffled["id"][:]
    assert np.array_equal(influence_of(other), alone(MeanId(), shuffled["input_ids"][:]))
    assert len(caches(tmp_path / "data") - first) == 1  # the other model's column; the rows are there
    assert stay.to_dict() == scored.to_dict()


def test_rows_that_say_nothing_are_counted(selector: MatesSelector, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.from_dict({"input_ids": [[], [5], [5, GOOD], None]})
    with caplog.at_level(logging.INFO):
        scored = influence_of(selector.map(dataset))
    assert "3 of 4 rows have no trained token" in caplog.text
    assert scored[0] == scored[1] == scored[3] != scored[2]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_after_threads(selector: MatesSelector) -> None:
    """The kernel has run on threads in this process, and forked workers score the same, to the end."""
    rng = np.random.default_rng(0)
    values = pa.array(rng.integers(3, 64, 900_000).astype(np.int32))
    offsets = pa.array(np.arange(0, 900_001, 100), pa.int32())
    dataset = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)}))
    here = influence_of(selector.map(dataset, batch_size=4000))
    assert np.array_equal(influence_of(selector.map(dataset, num_proc=2)), here)
    assert np.array_equal(selector.score(dataset, num_proc=2).influence, here)
    assert np.array_equal(influence_of(selector.map(dataset)), here)
    assert np.array_equal(here, selector.influence_model.predict(dataset))


@pytest.mark.slow
def test_spawned_workers(selector: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    selector.save_pretrained(tmp_path / "selector")
    dataset.save_to_disk(tmp_path / "data")
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocess, sys, numpy as np\n"
        "from datasets import load_from_disk\n"
        "from mates_hf.selection.selector import MatesSelector\n"
        "if __name__ == '__main__':\n"
        "    multiprocess.set_start_method('spawn')\n"
        "    selector = MatesSelector.from_pretrained(sys.argv[1])\n"
        "    scored = selector.map(load_from_disk(sys.argv[2]), num_proc=2)\n"
        "    np.save(sys.argv[3], np.array(scored['influence'][:], np.float32))\n"
    )
    arguments = [str(tmp_path / name) for name in ("selector", "data", "out.npy")]
    subprocess.run([sys.executable, str(script), *arguments], cwd=ROOT, env=_env(), check=True, timeout=200)
    assert np.array_equal(np.load(tmp_path / "out.npy"), influence_of(selector.map(dataset)))


# --- the cache ---


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def caches(path: Path) -> set[str]:
    return {found.name for found in path.rglob("cache-*.arrow")}


@pytest.mark.slow
def test_another_process_hits_the_cache_and_another_model_misses_it(
    selector: MatesSelector, dataset: Dataset, tmp_path: Path
) -> None:
    selector.save_pretrained(tmp_path / "selector")
    dataset.save_to_disk(tmp_path / "data")
    code = (
        "import sys, numpy as np\n"
        "from datasets import load_from_disk\n"
        "from mates_hf.selection.selector import MatesSelector\n"
        "scored = MatesSelector.from_pretrained(sys.argv[1]).map(load_from_disk(sys.argv[2]))\n"
        "np.save(sys.argv[3], np.array(scored['influence'][:], np.float32))\n"
    )
    arguments = [str(tmp_path / name) for name in ("selector", "data", "out.npy")]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=_env(), check=True, timeout=100)
    first = caches(tmp_path / "data")
    assert len(first) == 1
    stored = load_from_disk(str(tmp_path / "data"))
    scored = selector.map(stored)
    assert caches(tmp_path / "data") == first
    assert Path(scored.cache_files[-1]["filename"]).name in first
    assert np.array_equal(influence_of(scored), np.load(tmp_path / "out.npy"))
    assert np.array_equal(influence_of(scored), influence_of(selector.map(dataset)))

    changed = fit_model()
    assert changed._tables is not None
    changed._tables.token[GOOD] += np.float32(0.5)
    other = selector.__class__(changed, selector.tokenizer).map(stored)
    assert len(caches(tmp_path / "data")) == 2
    assert np.array_equal(influence_of(other), alone(changed, dataset["input_ids"][:]))
    assert not np.array_equal(influence_of(other), influence_of(scored))


def test_a_dataset_changed_under_its_fingerprint_is_scored_anew(selector: MatesSelector, tmp_path: Path) -> None:
    for ids in ([5, GOOD], [5, BAD]):
        made = Dataset.from_dict({"input_ids": [ids] * 10}, split=datasets.Split.TRAIN)
        made._fingerprint = "always-the-same"
        made.save_to_disk(tmp_path / "data")
        loaded = load_from_disk(str(tmp_path / "data"))
        loaded._fingerprint = "always-the-same"
        assert np.array_equal(influence_of(selector.map(loaded)), alone(selector.influence_model, [ids] * 10))


# --- killed, and out of disk ---


@FORKS[0]
@FORKS[1]
@pytest.mark.parametrize("how", ["map", "score"])
def test_a_killed_run_goes_on_behind_its_finished_parts(how: str, dataset: Dataset, tmp_path: Path) -> None:
    def run(model: MeanId) -> np.ndarray:
        selector = MatesSelector(model)
        if how == "map":
            return influence_of(selector.map(dataset, shards_dir=tmp_path, shard_rows=25))
        return selector.score(dataset, shards_dir=tmp_path, shard_rows=25).influence

    assert in_child(lambda: run(MeanId(die_at=3)) and None) == -9
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".npy")}
    assert len(done) == (2 if how == "map" else 4)
    second = MeanId()
    found = run(second)
    assert np.array_equal(found, alone(MeanId(), dataset["input_ids"][:]))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    parts_left = 5 - 2
    assert second.num_calls <= parts_left + 1  # one more counts the empty rows
    third = MeanId()
    assert np.array_equal(run(third), found)
    assert third.num_calls <= 1
    assert not np.array_equal(
        influence_of(MatesSelector(fit_model()).map(dataset, shards_dir=tmp_path, shard_rows=25)), found
    )


def test_damaged_parts_are_scored_again(
    selector: MatesSelector, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = selector.score(dataset, shards_dir=tmp_path, shard_rows=50).influence
    damaged = sorted(tmp_path.rglob("*.influence.npy"))[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert np.array_equal(selector.score(dataset, shards_dir=tmp_path, shard_rows=50).influence, first)
    assert "damaged and is scored again" in caplog.text


@FORKS[0]
@FORKS[1]
def test_a_full_disk_leaves_nothing_that_looks_whole(selector: MatesSelector, tmp_path: Path) -> None:
    lists = make_lists(3000, seed=8, longest=4)
    Dataset.from_dict({"input_ids": lists * 20}).save_to_disk(tmp_path / "data")

    def run_out_of_disk() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        stored = load_from_disk(str(tmp_path / "data"))
        for work in (
            lambda: selector.map(stored),
            lambda: selector.map(stored, shards_dir=tmp_path / "parts", shard_rows=40_000),
            lambda: selector.score(stored, shards_dir=tmp_path / "parts"),
        ):
            with pytest.raises(OSError, match="File too large|requested and"):
                work()

    assert in_child(run_out_of_disk) == 0
    assert caches(tmp_path / "data") == set()
    assert [path for path in tmp_path.joinpath("parts").rglob("*") if path.suffix in (".arrow", ".npy")] == []
    scored = selector.map(load_from_disk(str(tmp_path / "data")), shards_dir=tmp_path / "parts", shard_rows=40_000)
    assert np.array_equal(influence_of(scored), np.tile(alone(selector.influence_model, lists), 20))


# --- bad input ---


def test_bad_input_is_refused_by_name(selector: MatesSelector, fitted: NgramInfluenceModel, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"column `body` to score, got the columns \['input_ids', 'id'\]"):
        selector.map(dataset, column="body")
    with pytest.raises(TypeError, match="Column `id` must hold texts .* got int64"):
        selector.filter(dataset, ratio=0.5, column="id")
    with pytest.raises(ValueError, match="below the tokenizer's 64, got 64 in row 2.*another tokenizer"):
        selector.map(Dataset.from_dict({"input_ids": [[3], [4], [5, 64]]}))
    with pytest.raises(ValueError, match="row 1 holds -100"):
        selector.score(Dataset.from_dict({"input_ids": [[3], [4, -100]]}))
    with pytest.raises(ValueError, match="must not be null"):
        selector.map(Dataset.from_dict({"input_ids": [[3], [4, None]]}))
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`.*got list"):
        selector.map([{"input_ids": [1, 2]}])
    with pytest.raises(TypeError, match="`batched`, `features` cannot be given"):
        selector.map(dataset, features=None, batched=True)
    with pytest.raises(ValueError, match=r"`remove_columns` must be columns.*got \['x'\]"):
        selector.map(dataset, remove_columns="x")
    with pytest.raises(TypeError, match="`cache_file_name` cannot be given: one file"):
        selector.map(DatasetDict(a=dataset), cache_file_name="x.arrow")
    with pytest.raises(ValueError, match="must not be given with `shards_dir`"):
        selector.map(dataset, cache_file_name="x.arrow", shards_dir="y")
    with pytest.raises(ValueError, match="`shard_rows` must be a whole number of at least 1, got 0"):
        selector.score(dataset, shard_rows=0)
    with pytest.raises(UnsupportedSettingError, match="with a transform"):
        selector.map(dataset.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="no tokenizer is recorded.*tokenizer=tokenizer"):
        MatesSelector(fitted).map(Dataset.from_dict({"text": ["w3"]}))
    with pytest.raises(MatesError, match="must be fitted first"):
        MatesSelector(NgramInfluenceModel())
    with pytest.raises(ValueError, match="`max_length` must be"):
        MatesSelector(fitted, max_length=0)


def test_a_tokenizer_without_the_ids_the_model_saw_is_refused(fitted: NgramInfluenceModel) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="the model has seen the id 63, and the tokenizer has ids below 2"):
        MatesSelector(fitted, small)


# --- on disk and on the Hub ---


def test_saved_selectors_predict_the_same_bits(selector: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["w3 w7 w9 w7", ""]})
    short = MatesSelector(selector.influence_model, selector.tokenizer, max_length=3, origin={"step": 400})
    short.save_pretrained(tmp_path)
    short.save_pretrained(tmp_path)  # over itself
    loaded = MatesSelector.from_pretrained(tmp_path)
    assert np.array_equal(influence_of(loaded.map(dataset)), influence_of(selector.map(dataset)))
    assert np.array_equal(influence_of(loaded.map(texts)), influence_of(short.map(texts)))
    assert (loaded.max_length, loaded.origin) == (3, {"step": 400})
    assert isinstance(NgramInfluenceModel.from_pretrained(tmp_path), NgramInfluenceModel)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pickle", ".bin", ".pt")]
    assert MatesSelector.from_pretrained(str(tmp_path), tokenizer=selector.tokenizer, max_length=2).max_length == 2
    other = MatesSelector.from_pretrained(tmp_path).tokenizer
    other.add_tokens(["w64"])
    with pytest.raises(ValueError, match="must be the one that .* was fitted with"):
        MatesSelector.from_pretrained(tmp_path, tokenizer=other)


def test_damaged_and_newer_files_are_refused(selector: MatesSelector, tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        selector.save_pretrained(tmp_path / name)
        return tmp_path / name

    path = saved("tokenizer")
    content = (path / "tokenizer" / "tokenizer.json").read_text()
    for wrong in (content[:-20], content.replace('"w7": 7', '"w7": 8').replace('"w8": 8', '"w8": 7')):
        assert wrong != content
        (path / "tokenizer" / "tokenizer.json").write_text(wrong)
        with pytest.raises(MatesError, match="cut short, changed or was added"):
            MatesSelector.from_pretrained(path)
    (path / "tokenizer" / "tokenizer.json").write_text(content)
    MatesSelector.from_pretrained(path)
    (path / "tokenizer" / "vocab.pkl").write_bytes(b"anything")
    with pytest.raises(MatesError, match="was added"):
        MatesSelector.from_pretrained(path)

    path = saved("weights")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(MatesError, match=r"model\.safetensors.*must be as it was written"):
        MatesSelector.from_pretrained(path)
    (path / "config.json").write_text('{"kind": ')
    with pytest.raises(MatesError, match="whole JSON object"):
        MatesSelector.from_pretrained(path)
    (path / "config.json").unlink()  # what a killed `save_pretrained` leaves
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        MatesSelector.from_pretrained(path)

    path = saved("selector")
    about = json.loads((path / "selector.json").read_text())
    (path / "selector.json").write_text(json.dumps({**about, "format_version": 9, "library_version": "9.9"}))
    with pytest.raises(ValueError, match=r"written by mates-hf 9\.9\. Upgrade"):
        MatesSelector.from_pretrained(path)
    for wrong in ({"max_length": "x"}, {"origin": None}, {"format_version": "1"}):
        (path / "selector.json").write_text(json.dumps({**about, **wrong}))
        with pytest.raises(MatesError, match="must say `format_version`"):
            MatesSelector.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="must be a directory or"):
        MatesSelector.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="on the Hub that can be read"):
        MatesSelector.from_pretrained("nobody/nothing", cache_dir=tmp_path / "hub")


def write_round(path: Path, fitted: NgramInfluenceModel) -> Path:
    fitted.save_pretrained(path / "influence_model")
    info = {
        "number": 3,
        "step": 1200,
        "num_probed": 2000,
        "reference": {"source": "from_lm_eval", "task": "lambada_openai", "digest": "abc"},
        "fidelity": {"truth": "one optimizer step", "spearman": 0.95, "interval": [0.9, 0.98]},
        "guard": {"decision": "select"},
    }
    (path / "round.json").write_text(json.dumps(info))
    return path


def test_a_round_directory_is_read(
    selector: MatesSelector, fitted: NgramInfluenceModel, dataset: Dataset, tmp_path: Path
) -> None:
    path = write_round(tmp_path / "_mates" / "round-0003", fitted)
    found = MatesSelector.from_pretrained(path)
    assert np.array_equal(influence_of(found.map(dataset)), influence_of(selector.map(dataset)))
    texts = Dataset.from_dict({"text": ["w3 w7"]})
    with pytest.raises(ValueError, match="no tokenizer is recorded"):
        found.map(texts)
    given = MatesSelector.from_pretrained(path, tokenizer=selector.tokenizer)
    assert np.array_equal(influence_of(given.map(texts)), influence_of(selector.map(texts)))
    card = str(found.generate_model_card())
    for fact in ("lambada_openai", "1,200", "2,000", "Spearman 0.950", "one optimizer step", "NgramInfluenceModel"):
        assert fact in card
    (path / "round.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a finished round"):
        MatesSelector.from_pretrained(path)


def test_the_newest_finished_round_of_a_run_is_read(
    selector: MatesSelector, fitted: NgramInfluenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for number in (2, 9999, 10_000):
        write_round(run / "_mates" / f"round-{number:04d}", fitted)
        info = {"number": number, "step": number}
        (run / "_mates" / f"round-{number:04d}" / "round.json").write_text(json.dumps(info))
    for name in ("round-10001.partial", "round-10002", "round-0003.stale"):  # begun, not finished
        fitted.save_pretrained(run / "_mates" / name / "influence_model")
    (run / "_mates" / "round-10003").mkdir()  # a finished one that kept no influence model
    (run / "_mates" / "round-10003" / "round.json").write_text("{}")
    (run / "config.json").write_text('{"model_type": "llama"}')  # what `Trainer.save_model` wrote
    for path in (run, run / "_mates", run / "_mates" / "round-10000"):
        assert MatesSelector.from_pretrained(path).origin == {"round": 10_000, "step": 10_000}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MatesSelector.from_pretrained("~/run").origin["step"] == 10_000
    assert MatesSelector.from_pretrained("~/run/_mates/round-0002").origin["step"] == 2

    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "begun" / "_mates" / "round-0001.partial").mkdir(parents=True)
    (tmp_path / "begun" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for path, said in {
        run / "checkpoint-5": f"holds a model of transformers.*Pass the run, `{run}`",
        run / "_mates" / "round-10002": "not a finished round",
        run / "_mates" / "round-10003": "kept no influence model",
        tmp_path / "begun": r"but _mates/, notes\.txt\. No round is finished: round-0001\.partial/",
        tmp_path / "empty": "nothing at all",
        tmp_path / "nowhere": "must be a directory or",
        tmp_path / "begun" / "notes.txt": "must be a directory or",
    }.items():
        with pytest.raises(FileNotFoundError, match=said):
            MatesSelector.from_pretrained(path)


def test_what_is_pushed(selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a stranger needs to score, and a card that says what the fit shows."""
    import shutil
    from types import SimpleNamespace

    from huggingface_hub import HfApi, ModelCard

    def upload_folder(self: HfApi, *, folder_path: str, **more: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "there")
        return "a commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **more: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    origin = {"model": "my-model", "step": 7, "reference": {"task": "a | b\n`c`"}}
    published = MatesSelector(selector.influence_model, selector.tokenizer, origin=origin)
    assert published.push_to_hub("me/my-influence-model") == "a commit"
    there = tmp_path / "there"
    texts = Dataset.from_dict({"text": ["w3 w7 w9", "w5"]})
    loaded = MatesSelector.from_pretrained(there)
    assert np.array_equal(influence_of(loaded.map(texts)), influence_of(selector.map(texts)))
    card = ModelCard.load(there / "README.md")
    assert card.data.library_name == "mates_hf"
    assert {"mates", "data-selection"} <= set(card.data.tags)
    report = selector.influence_model.report
    for fact in (
        "`my-model`",
        "`task: a \\| b 'c'`",
        f"{report.num_labels} / {report.num_held_out}",
        f"{report.spearman:.3f} (95 % interval {report.interval[0]:.3f} to {report.interval[1]:.3f})",
        "arXiv:2406.06046",
        "## Limits",
    ):
        assert fact in card.text


STEP = {"probe": {"class": "mates_hf.influence.one_step.OneStepProbe"}}


@pytest.mark.parametrize(
    ("info", "unit", "said"),
    [
        ({"probe": {"path_points": 26}}, "order", "give an order"),
        ({"probe": {"path_losses": [5.0, 4.9]}}, "order", "give an order"),
        ({"probe": {"path_points": 1}}, "step", "one optimizer step"),
        ({"probe": {}, "measured_with": STEP}, "step", "one optimizer step"),
        ({"probe": {}, "measured_with": {"probe": {"class": "mine.OneStepProbe"}}}, None, "not recorded"),
        ({"probe": {"path_points": "26"}, "measured_with": None}, None, "not recorded"),
    ],
)
def test_the_card_says_whether_labels_price_a_step(
    fitted: NgramInfluenceModel, tmp_path: Path, info: dict[str, Any], unit: str | None, said: str
) -> None:
    write_round(tmp_path / "round-0001", fitted)
    (tmp_path / "round-0001" / "round.json").write_text(json.dumps({"number": 1, **info}))
    selector = MatesSelector.from_pretrained(tmp_path / "round-0001")
    assert selector.origin.get("label_unit") == unit
    selector.save_pretrained(tmp_path / "saved")
    row = next(line for line in (tmp_path / "saved/README.md").read_text().splitlines() if "| Labels |" in line)
    assert said in row
    assert MatesSelector.from_pretrained(tmp_path / "saved").origin.get("label_unit") == unit
    assert unit is None or said in repr(selector)


def test_planted_influence_is_what_is_predicted(selector: MatesSelector, lists: list[list[int]]) -> None:
    scored = influence_of(selector.map(Dataset.from_dict({"input_ids": lists})))
    planted = np.array([truth(ids) for ids in lists])
    assert np.corrcoef(scored, planted)[0, 1] > 0.9
