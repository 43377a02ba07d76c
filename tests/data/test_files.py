"""Rows of files by name: formats, compression, drawn rows, and what is said of files that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from mates_hf.data import files
from mates_hf.data.files import load_rows

TEXTS = [f"text {i}" for i in range(40)]


def every(names: Any) -> list[str]:
    return list(names)


def text(names: Any) -> list[str]:
    if "text" not in names:
        raise ValueError(f"no text in {list(names)}")
    return ["text"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": one, "n": i}) + "\n" for i, one in enumerate(texts)).encode()


def write(folder: Path, name: str, texts: list[str] = TEXTS) -> Path:
    """A file of these texts, in the format that its name says."""
    path = folder / name
    if ".parquet" in name:
        pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=5)
        return path
    content = "\n".join(texts).encode() if ".txt" in name else lines(texts)
    if name.endswith(".gz"):  # two members, as `cat a.gz b.gz` makes; the cut is inside of a line
        content = gzip.compress(content[:50]) + gzip.compress(content[50:])
    elif name.endswith(".zst"):
        content = b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in (content[:50], content[50:]))
    elif name.endswith(".bz2"):
        content = bz2.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.bz2", "a.txt", "a.txt.gz"]
)
def test_each_format_gives_the_rows_in_their_order(tmp_path, name):
    loaded = load_rows(write(tmp_path, name), text, name="pool")
    assert loaded.dataset["text"][:] == TEXTS
    assert loaded.dataset.column_names == ["text"]
    assert loaded.told.startswith("all 40 rows of 1 ")


def test_globs_lists_folders_and_urls_name_the_same_rows(tmp_path):
    for i in range(4):
        write(tmp_path, f"part-{i}.jsonl", TEXTS[10 * i : 10 * i + 10])
    (tmp_path / ".hidden.jsonl").write_text("{")
    each = [str(tmp_path / f"part-{i}.jsonl") for i in range(4)]
    ways = [
        f"{tmp_path}/part-*.jsonl",
        each,
        str(tmp_path),
        f"file://{tmp_path}/part-*.jsonl",
        [Path(p) for p in each],
    ]
    for way in [*ways, [Path(path) for path in each]]:
        assert load_rows(way, text, name="pool").dataset["text"][:] == TEXTS, way
    memory = fsspec.filesystem("memory")
    memory.pipe("/texts/part.jsonl", lines(TEXTS))
    assert load_rows("memory://texts/*.jsonl", text, name="pool").dataset["text"][:] == TEXTS


def test_a_file_may_have_the_name_of_a_pattern_and_rows_may_lack_the_column(tmp_path):
    path = tmp_path / "a[1].jsonl"
    path.write_bytes(lines(TEXTS) + b'{"other": 1}\n')
    assert load_rows(path, text, name="pool").dataset["text"][:] == [*TEXTS, None]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_some_rows_are_drawn_at_random_and_the_same_by_the_same_seed(tmp_path, name):
    path = write(tmp_path, name, [f"text {i}" for i in range(1000)])
    one, two, other = (load_rows(path, every, name="pool", num_rows=100, seed=seed).dataset for seed in (0, 0, 1))
    assert one["n"][:] == two["n"][:] == sorted(one["n"][:])
    assert one["n"][:] != other["n"][:]
    assert 400 < np.mean(one["n"][:]) < 600
    assert max(one["n"][:]) > 900


def test_of_large_files_a_share_is_read_of_each(tmp_path, monkeypatch):
    for kind, width in (("parquet", 5), ("jsonl", 1)):
        paths = [write(tmp_path, f"{i}.{kind}", [f"text {i} {j} {'x' * 60}" for j in range(4000)]) for i in range(4)]
        total = sum(path.stat().st_size for path in paths)
        monkeypatch.setattr(files, "READ_BYTES", total // 10)
        monkeypatch.setattr(files, "_BLOCK", 512)
        loaded = load_rows([str(path) for path in paths], every, name="pool", num_rows=400)
        owners = [row.split()[1] for row in loaded.dataset["text"][:]]
        assert {owner: round(owners.count(owner) / 100) for owner in "0123"} == dict.fromkeys("0123", 1), kind
        assert loaded.told.startswith("400 rows drawn at random from the 1,6"), loaded.told
        assert "4 of 4 " in loaded.told
        assert ", 10.00% of each" in loaded.told
        if width > 1:  # row groups from anywhere
            assert max(loaded.dataset["n"][:]) > 3000


def test_of_many_files_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_FILES", 3)
    for i in range(8):
        write(tmp_path, f"{i}.jsonl", [f"{i} {j}" for j in range(5)])
    loaded = load_rows(str(tmp_path), text, name="pool", num_rows=1000)
    assert len({row.split()[0] for row in loaded.dataset["text"][:]}) == 3
    assert loaded.told == "all 15 rows of 3 of 8 JSON Lines files"
    assert len(load_rows(str(tmp_path), text, name="reference").dataset) == 40  # where all rows are wanted, all files


def test_datasets_and_what_save_to_disk_wrote(tmp_path):
    dataset = Dataset.from_dict({"text": TEXTS, "n": range(40)})
    loaded = load_rows(dataset.with_format("torch"), text, name="pool", num_rows=10)
    assert loaded.told == "10 rows drawn at random from the 40 of a dataset"
    assert isinstance(loaded.dataset[0]["text"], str)
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved", text, name="pool").dataset["text"][:] == TEXTS
    DatasetDict(train=dataset.select(range(30)), test=dataset.select(range(10))).save_to_disk(str(tmp_path / "splits"))
    assert len(load_rows(tmp_path / "splits", text, name="pool").dataset) == 30
    assert len(load_rows(tmp_path / "splits", text, name="pool", split="test").dataset) == 10
    with pytest.raises(ValueError, match=r"must have the split 'dev', got \['test', 'train'\]"):
        load_rows(tmp_path / "splits", text, name="pool", split="dev")


@pytest.mark.parametrize("source", [{"text": TEXTS}, TEXTS[:0], 3, "stream"], ids=["dict", "nothing", "int", "stream"])
def test_what_is_no_source_is_refused(source):
    if source == "stream":
        source = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    with pytest.raises(TypeError, match="`pool` must be a `datasets.Dataset`, files, a folder"):
        load_rows(source, text, name="pool")


def test_files_that_cannot_be_read_are_named(tmp_path):
    def said(source: Any, error: type[Exception] = ValueError) -> str:
        with pytest.raises(error) as refused:
            load_rows(source, text, name="pool")
        return str(refused.value)

    whole = write(tmp_path, "whole.jsonl.gz")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole.read_bytes()[:-20])
    assert f"`{cut}` must be a whole file" in said(cut)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1" + zlib.compress(b"x" * 50))
    assert f"`{bad}` must be a whole Parquet file" in said(bad)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"body": ["a"]}), other)
    good = write(tmp_path, "good.parquet")
    assert f"`{other}` has ['body']" in said([str(good), str(other)])
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": [1]}), numbers)
    assert "must hold the same in the columns ['text'] of all files" in said([str(good), str(numbers)])
    lines_of_others = tmp_path / "other.jsonl"
    lines_of_others.write_text('{"body": "a"}\n')
    assert f"`{lines_of_others}` has ['body']" in said([str(whole), str(lines_of_others)])
    (tmp_path / "a.csv").write_text("text\na\n")
    assert "must be files of Parquet, JSON Lines" in said(tmp_path / "a.csv")
    assert "nothing matches" in said(tmp_path / "x*.parquet", FileNotFoundError)
    assert "and none of ['a', 'b'] is" in said(["a", "b"], FileNotFoundError)
    assert "or a dataset on the Hub that can be read" in said("no/such-dataset", FileNotFoundError)


def test_several_formats_are_read_together(tmp_path):
    names = ["a.parquet", "b.jsonl.gz", "c.txt", "d.jsonl", "e.parquet"]
    for i, name in enumerate(names):
        write(tmp_path, name, TEXTS[8 * i : 8 * i + 8])
    loaded = load_rows(tmp_path, text, name="pool")
    assert sorted(loaded.dataset["text"][:]) == sorted(TEXTS)
    assert loaded.told == "all 40 rows of 2 Parquet files and 2 JSON Lines files and 1 text file"
    drawn = [load_rows(tmp_path, text, name="pool", num_rows=20, seed=seed).dataset["text"][:] for seed in range(30)]
    counts = {one: sum(one in some for some in drawn) for one in TEXTS}
    assert all(4 <= count <= 26 for count in counts.values())  # 15 of 30 expected, 2.7 the standard deviation
    assert len({tuple(some) for some in drawn}) == 30
    assert all(len(set(some)) == 20 for some in drawn)


def test_several_formats_must_hold_the_same_and_the_way_out_works(tmp_path):
    tokens = tmp_path / "tokens.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2]], "text": pa.array(["a"], pa.large_string())}), tokens)
    write(tmp_path, "texts.jsonl")

    def tokens_first(names: Any) -> list[str]:
        return [next(one for one in ("input_ids", "text") if one in names)]

    with pytest.raises(ValueError, match=r"must have the columns \['input_ids'\], and `.*texts.jsonl` has \['text'\]"):
        load_rows(tmp_path, tokens_first, name="pool")
    assert len(load_rows(tmp_path, text, name="pool").dataset) == 41  # a column that all have
    assert len(load_rows(f"{tmp_path}/*.parquet", tokens_first, name="pool").dataset) == 1  # a pattern
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 1}')
    with pytest.raises(ValueError, match="must hold the same in the columns"):
        load_rows([str(tokens), str(numbers)], text, name="pool")


def test_what_is_ours_is_no_input(tmp_path):
    write(tmp_path, "a.parquet")
    for hidden in ("_mates/scores", ".cache", "deep/_mates"):
        (tmp_path / hidden).mkdir(parents=True)
        write(tmp_path / hidden, "b.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    for way in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/**/a.parquet"):
        assert load_rows(way, text, name="pool").dataset["text"][:] == TEXTS
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain", "a.json")
    with pytest.raises(FileNotFoundError, match="Plain `.json` files in a folder are passed over: name them"):
        load_rows(tmp_path / "plain", text, name="pool")
    assert load_rows(f"{tmp_path}/plain/*.json", text, name="pool").dataset["text"][:] == TEXTS
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        load_rows(f"{tmp_path}/**/_mates/**", text, name="pool")


def test_a_few_damaged_lines_are_left_out_and_many_are_refused(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS * 5) + b"{broken\n\n[1]\n")
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(path, text, name="pool").dataset) == 200
    assert "2 of 202 lines of `pool` are no JSON objects" in caplog.text
    path.write_bytes(lines(TEXTS) + b"{broken\n")
    with pytest.raises(ValueError, match="must hold one JSON object a line, and 1 of the 41 lines"):
        load_rows(path, text, name="pool")
    path.write_bytes(lines(TEXTS) + b'{"text": 3}\n')
    with pytest.raises(ValueError, match="same kind of value in each row of the column `text`"):
        load_rows(path, text, name="pool")


def test_empty_files_have_no_rows(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz"):
        path = tmp_path / name
        write(tmp_path, name, []) if name != "a.jsonl.gz" else path.write_bytes(gzip.compress(b""))
        with pytest.raises(ValueError, match="`pool` must have rows, got none"):
            load_rows(path, text, name="pool")
