"""Files in, files out: the rows that `MatesSelector.filter` keeps, in files of the same form, however they are cut."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from fsspec.implementations.memory import MemoryFileSystem

import mates_hf
from mates_hf.data.files import load_rows
from mates_hf.data.rows import TokenRows
from mates_hf.errors import InfluenceError, MatesError, RoundMismatchError
from mates_hf.selection.file_scoring import FilesReport, score_files
from mates_hf.selection.files import json_files, lines, parquet_files, plan, work
from mates_hf.selection.score_file import read_facts
from mates_hf.selection.selector import MatesSelector
from tests.selection.files_kit import (
    METADATA,
    content_of,
    kept_ids,
    lines_of_texts,
    make_texts,
    outputs,
    read_lines_of,
    text_selector,
    worth,
    write_corpus,
    write_lines,
    write_parquet,
)
from tests.selection.selector_kit import fit_model, make_lists, with_template


@pytest.fixture(scope="module")
def selector() -> MatesSelector:
    return text_selector()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


@pytest.fixture
def small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_BUNDLE_FILES", 1)


def ids_by_filter(selector: MatesSelector, texts: list[Any], **budget: Any) -> list[int]:
    dataset = Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    return selector.filter(dataset, **budget)["id"]


# --- what is kept ---


@pytest.mark.parametrize(
    "budget", [{"ratio": 0.2}, {"k": 37}, {"num_tokens": 5_000}, {"threshold": 0.1}, {"ratio": 1.0}, {"k": 0}], ids=str
)
def test_what_filter_keeps_is_kept(
    budget: dict[str, Any], selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path
):
    folder, texts = corpus
    report = score_files(selector, folder, tmp_path / "out", **budget)
    expected = ids_by_filter(selector, texts, **budget)
    assert kept_ids(tmp_path / "out") == expected
    assert report.rows_kept == len(expected)
    assert (report.rows, report.files, report.files_left_out) == (len(texts), 6, 0)
    assert report.tokens == sum(-(-len(text) // 4) for text in texts)
    assert outputs(tmp_path / "out") == outputs(folder)
    summary = json.loads((tmp_path / "out" / "_mates" / "summary.json").read_text())
    assert summary == report.to_dict()
    assert summary["bytes_written"] == sum(map(len, content_of(tmp_path / "out").values()))


def test_the_best_rows_are_kept_and_not_the_worst(
    selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path
):
    folder, texts = corpus
    score_files(selector, folder, tmp_path / "out", num_tokens=4_000)
    kept = kept_ids(tmp_path / "out")
    values = np.array([worth(text) for text in texts])
    assert values[kept].mean() > values.mean() + 0.5 * values.std()


def test_rows_keep_their_form(selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path):
    folder, _ = corpus
    score_files(selector, folder, tmp_path / "out", ratio=0.3)
    for name in outputs(folder):
        if name.endswith("parquet"):
            had, has = pq.ParquetFile(folder / name), pq.ParquetFile(tmp_path / "out" / name)
            assert has.schema_arrow.equals(had.schema_arrow, check_metadata=True)
            assert has.schema_arrow.metadata == METADATA
            rows = had.read().to_pylist()
            assert all(row in rows for row in has.read().to_pylist())
            assert has.metadata.row_group(0).column(1).compression == "ZSTD"
        else:
            assert set(read_lines_of(tmp_path / "out" / name)) <= set(read_lines_of(folder / name))


def test_a_random_share_and_noise_are_of_the_seed_and_not_of_the_division(selector: MatesSelector, tmp_path: Path):
    texts = make_texts(900, 3)
    write_parquet(tmp_path / "whole" / "all.parquet", texts)
    for i in range(0, 900, 300):
        write_lines(tmp_path / "parts" / f"{i}.jsonl", lines_of_texts(texts[i : i + 300], i))
    drawn: dict[str, Any] = {"ratio": 0.2, "random_share": 0.5, "temperature": 0.5}
    found = {}
    for name in ("whole", "parts"):
        for seed in (0, 1):
            score_files(selector, tmp_path / name, tmp_path / f"out-{name}-{seed}", seed=seed, **drawn)
            found[name, seed] = kept_ids(tmp_path / f"out-{name}-{seed}")
    assert found["whole", 0] == found["parts", 0]
    assert found["whole", 1] == found["parts", 1]
    assert len(found["whole", 0]) == len(found["whole", 1]) == 180
    assert found["whole", 0] != found["whole", 1]


def test_all_rows_with_their_influence(selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path):
    folder, texts = corpus
    report = mates_hf.score_files(selector, folder, tmp_path / "out", add_scores=True)
    assert report.rows_kept == len(texts)
    assert report.threshold is None
    assert kept_ids(tmp_path / "out") == list(range(len(texts)))
    values: list[float] = []
    for name in outputs(tmp_path / "out"):
        if name.endswith("parquet"):
            table = pq.read_table(tmp_path / "out" / name)
            assert table.schema.field("influence").type == pa.float32()
            assert table.drop_columns(["influence"]).equals(pq.read_table(folder / name))
            assert table.schema.metadata == METADATA
            values += table.column("influence").to_pylist()
        else:
            had = [json.loads(line) for line in read_lines_of(folder / name)]
            found = [json.loads(line) for line in read_lines_of(tmp_path / "out" / name)]
            values += [row.pop("influence") for row in found]
            assert found == had
    expected = selector.score(Dataset.from_dict({"text": texts})).influence
    assert np.array_equal(np.array(values, np.float32), expected)
    again = score_files(selector, tmp_path / "out", tmp_path / "again", add_scores=True)  # the old column is replaced
    assert again.rows == len(texts)
    assert content_of(tmp_path / "again").keys() == content_of(tmp_path / "out").keys()
    assert b'"influence": 0.' in read_lines_of(tmp_path / "again" / "a.jsonl")[0] + b'"influence": 0.'
    read = load_dataset("parquet", data_files=str(tmp_path / "again" / "c.parquet"), cache_dir=str(tmp_path / "hf"))
    assert read["train"].column_names == ["id", "text", "meta", "influence"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_bundles")
def test_several_workers_give_the_same_bytes(selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path):
    folder, _ = corpus
    one = score_files(selector, folder, tmp_path / "one", ratio=0.2)
    two = score_files(selector, folder, tmp_path / "two", ratio=0.2, workers=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    same = ("rows_kept", "tokens_kept", "threshold", "bytes_written", "bytes_scored")
    assert [getattr(one, name) for name in same] == [getattr(two, name) for name in same]


def test_token_columns_and_texts_with_a_tokenizer(tiny_tokenizer: Any, tmp_path: Path):
    rows = [[], *make_lists(300)]
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    texts[5] = None
    labels = [[-100 if i % 3 else one for i, one in enumerate(row)] for row in rows]
    selector = MatesSelector(fit_model(), tiny_tokenizer)
    tables = {
        "tokens": {"id": list(range(len(rows))), "input_ids": rows, "labels": labels},
        "texts": {"id": list(range(len(rows))), "meta": [{"text": text} for text in texts]},
    }
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        half = {key: values[:150] for key, values in table.items()}
        pq.write_table(pa.table(half), tmp_path / name / "a.parquet", row_group_size=60)
        rest = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)][150:]
        write_lines(tmp_path / name / "b.jsonl", [json.dumps(row).encode() for row in rest])
        column = "meta.text" if name == "texts" else None
        report = score_files(selector, tmp_path / name, tmp_path / "out" / name, ratio=0.25, column=column)
        kept = selector.filter(Dataset.from_dict(table), ratio=0.25, column=column)
        assert kept_ids(tmp_path / "out" / name) == kept["id"]
        assert report.tokens == selector.score(Dataset.from_dict(table), column=column).num_targets.sum()


def test_conversations(tiny_tokenizer: Any, tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }} w{{ 3 + (m.tools or []) | length }} {% endfor %}"
    selector = MatesSelector(fit_model(), with_template(tiny_tokenizer, template))
    texts = [" ".join(f"w{i}" for i in row) for row in make_lists(120)]
    rows = [{"id": i, "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    rows[100]["messages"].append({"role": "tool", "content": "w9", "tools": ["a", "b"]})  # a field of this one alone
    rows[101]["messages"] = None
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:60]), tmp_path / "in" / "a.parquet")
    write_lines(tmp_path / "in" / "b.jsonl.gz", [json.dumps(row).encode() for row in rows[60:]])
    score_files(selector, tmp_path / "in", tmp_path / "out", add_scores=True)
    values = pq.read_table(tmp_path / "out" / "a.parquet").column("influence").to_pylist()
    values += [json.loads(line)["influence"] for line in read_lines_of(tmp_path / "out" / "b.jsonl.gz")]
    expected = selector.score(Dataset.from_list(rows)).influence
    assert np.array_equal(np.array(values, np.float32), expected)


# --- odd files ---


def test_parts_without_rows_give_parts_without_rows(selector: MatesSelector, tmp_path: Path):
    best = max((f"w{i}" for i in range(3, 60)), key=worth)
    worst = min((f"w{i}" for i in range(3, 60)), key=worth)
    write_lines(tmp_path / "in" / "a.jsonl", [])
    write_lines(tmp_path / "in" / "b.jsonl.zst", lines_of_texts([worst] * 5))
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(b"")
    write_parquet(tmp_path / "in" / "d.parquet", [])
    write_parquet(tmp_path / "in" / "e.parquet", [worst, None, ""])
    write_parquet(tmp_path / "in" / "f.parquet", [f"{best} {best} {best}"])
    report = score_files(selector, tmp_path / "in", tmp_path / "out", k=1)
    assert (report.rows, report.rows_kept) == (9, 1)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "in")
    assert pq.read_table(tmp_path / "out" / "f.parquet").num_rows == 1
    for name in ("d", "e"):
        table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
        assert table.num_rows == 0
        assert table.schema.equals(pq.read_schema(tmp_path / "in" / f"{name}.parquet"), check_metadata=True)
    for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl.gz"):
        assert read_lines_of(tmp_path / "out" / name) == []
    write_lines(tmp_path / "nothing" / "a.jsonl", [])
    with pytest.raises(ValueError, match="at least one row, and all files are empty"):
        score_files(selector, tmp_path / "nothing", tmp_path / "out2", k=1)


def test_blocks_and_batches_make_no_difference(
    selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts: list[str | None] = [*make_texts(300, 1), None, "", "w7 " * 500]
    write_parquet(tmp_path / "in" / "one-group.parquet", texts, row_group_size=10_000)
    odd = [b"", b"  ", *lines_of_texts(texts, 1000), b"", b"\t "]
    write_lines(tmp_path / "in" / "a.jsonl", odd, b"\r\n")
    (tmp_path / "in" / "b.jsonl").write_bytes(b"\n".join(lines_of_texts(texts, 2000)))  # the last one has no end
    score_files(selector, tmp_path / "in", tmp_path / "large", ratio=0.4)
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(parquet_files, "_GROUP_BYTES", 3_000)
    monkeypatch.setattr(lines.read_lines, "__defaults__", (200,))
    monkeypatch.setattr(work, "_TOKENISED_ROWS", 7)
    score_files(selector, tmp_path / "in", tmp_path / "small", ratio=0.4)
    assert kept_ids(tmp_path / "small") == kept_ids(tmp_path / "large")
    lines_kept = content_of(tmp_path / "small")
    assert {name: lines_kept[name] for name in ("a.jsonl", "b.jsonl")} == {
        name: content_of(tmp_path / "large")[name] for name in ("a.jsonl", "b.jsonl")
    }
    assert lines_kept["a.jsonl"].count(b"\r\n") == len(read_lines_of(tmp_path / "small" / "a.jsonl")) > 0
    assert pq.ParquetFile(tmp_path / "small" / "one-group.parquet").metadata.num_row_groups > 2
    assert pq.ParquetFile(tmp_path / "large" / "one-group.parquet").metadata.num_row_groups == 1


def test_a_column_that_is_stored_once_is_not_read_at_once(tmp_path: Path):
    texts = ["a long text that is there many times " * 200] * 5_000
    write_parquet(tmp_path / "a.parquet", texts, row_group_size=5_000)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    (part,) = plan.find_parts(tmp_path / "a.parquet", str(tmp_path / "out"))
    sizes = [table.nbytes for table in parquet_files.tables(part, ["text"], False)]
    assert sum(sizes) > 37_000_000
    assert max(sizes) < 1.1 * parquet_files.BATCH_BYTES


def test_lines_that_cannot_be_read(selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = lines_of_texts(make_texts(40, 0))
    bad = {
        3: b'{"id": 3, "text": "w3',
        4: b'{"id": 4, "text": 4}',
        7: b'{"id": 7, "text": "\xff"}',
        8: b'{"id": 8, "other": "\xff", "text": "w3"}',
        11: b"[1]",
        12: b'{"text": "w3"}{"text": "w4"}',
        20: b"null",
        39: b'{"id": 39, "text": "\\ud800"}',
    }
    some = [bad.get(i, line) for i, line in enumerate(good)]
    write_lines(tmp_path / "in" / "a.jsonl.gz", [b"", *some])
    write_parquet(tmp_path / "in" / "b.parquet", make_texts(10, 1), 100)
    with pytest.raises(MatesError, match=r"a.jsonl.gz`: line 4 cannot be read: .*`--on-error skip`") as error:
        score_files(selector, tmp_path / "in", tmp_path / "out", ratio=0.5)
    assert "\n" not in str(error.value)
    assert outputs(tmp_path / "out") == []
    report = score_files(selector, tmp_path / "in", tmp_path / "out", ratio=1.0, on_error="skip")
    assert (report.lines_left_out, report.files_left_out, report.rows) == (len(bad), 0, 42)
    assert kept_ids(tmp_path / "out") == [i for i in range(40) if i not in bad] + list(range(100, 110))
    assert [int(words.split("line ")[1].split(":")[0]) - 1 for words in report.errors] == list(bad)
    assert "8 lines" in repr(report)
    # A line is judged alone as it is among others.
    for size in (1, 150, 700):
        monkeypatch.setattr(lines.read_lines, "__defaults__", (size,))
        (part,) = plan.find_parts(tmp_path / "in" / "a.jsonl.gz", str(tmp_path / "out"))
        column = selector_column(selector)
        found = [bad.number for block in json_files.blocks(part, column, text_schema(), False) for bad in block.bad]
        assert found == list(bad)
    with pytest.raises(MatesError, match="earlier call left it out"):
        score_files(selector, tmp_path / "in", tmp_path / "out", ratio=1.0)
    monkeypatch.setattr(work, "_MOST_BAD", 7)
    report = score_files(selector, tmp_path / "in", tmp_path / "out2", ratio=1.0, on_error="skip")
    assert (report.files_left_out, report.rows) == (1, 10)


def selector_column(selector: MatesSelector) -> Any:
    from mates_hf.data.raw_texts import find_text_column

    return find_text_column(text_schema(), None)


def text_schema() -> Any:
    return pa.schema([("text", pa.string())])


@pytest.mark.usefixtures("small_bundles")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_files_that_cannot_be_read(workers: int, selector: MatesSelector, tmp_path: Path):
    folder = tmp_path / "in"
    texts = make_texts(500, 0)
    for name in ("b", "c", "d", "z"):
        write_parquet(folder / f"{name}.parquet", texts, row_group_size=100)
    content = bytearray((folder / "b.parquet").read_bytes())
    (folder / "b.parquet").write_bytes(content[:-50])  # no footer
    content[len(content) // 2 : len(content) // 2 + 900] = bytes(900)  # a damaged page behind good ones
    (folder / "c.parquet").write_bytes(content)
    pq.write_table(pa.table({"id": [1], "txt": ["a"]}), folder / "d.parquet")
    write_lines(folder / "e.jsonl.gz", lines_of_texts(texts))
    (folder / "e.jsonl.gz").write_bytes((folder / "e.jsonl.gz").read_bytes()[:-100])
    with pytest.raises(MatesError, match=r"b.parquet`: "):
        score_files(selector, folder, tmp_path / "out", ratio=0.5, workers=workers)
    with pytest.raises(ValueError, match=r"d.parquet`: The dataset must have a column `text`.*\['id', 'txt'\]"):
        score_files(selector, folder / "d.parquet", tmp_path / "out1", ratio=0.5, workers=workers)
    report = score_files(selector, folder, tmp_path / "out2", ratio=0.5, workers=workers, on_error="skip")
    assert (report.files, report.files_left_out, report.rows, report.rows_kept) == (5, 4, 500, 250)
    assert [name.split("`")[1].split("/")[-1] for name in report.errors] == [
        "b.parquet", "c.parquet", "d.parquet", "e.jsonl.gz",
    ]  # fmt: skip
    assert outputs(tmp_path / "out2") == ["z.parquet"]
    os.remove(folder / "z.parquet")
    with pytest.raises(MatesError, match="b.parquet`: "):
        score_files(selector, folder, tmp_path / "out3", ratio=0.5, workers=workers, on_error="skip")


def test_a_model_that_fails_is_no_fault_of_a_file(tmp_path: Path, tiny_tokenizer: Any):
    class Broken:
        report = None

        def predict(self, rows: TokenRows) -> Any:
            return np.full(len(rows), np.nan)

        def digest(self) -> str:
            return "broken"

    write_parquet(tmp_path / "in" / "a.parquet", make_texts(10, 0))
    selector = MatesSelector(Broken(), tiny_tokenizer)
    with pytest.raises(MatesError, match=r"a.parquet`: Predicted influence must be finite"):
        score_files(selector, tmp_path / "in", tmp_path / "out", ratio=0.5, on_error="skip")
    assert issubclass(work.FileError, MatesError)
    assert not issubclass(work.FileError, InfluenceError)


# --- what is there already ---


def change(path: Path) -> None:
    """Other rows, with the same number of bytes."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"w1", b"w2"))
    os.utime(path, ns=(1, 1))


def test_a_file_that_changes_meanwhile_is_named(
    selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_lines(tmp_path / "in" / "a.jsonl", lines_of_texts(make_texts(50, 0)))
    write_lines(tmp_path / "in" / "b.jsonl", lines_of_texts(make_texts(50, 1)))
    cut = work.write_bundle

    def changed_before(*arguments: Any) -> Any:
        change(tmp_path / "in" / "b.jsonl")
        return cut(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("mates_hf.selection.files.run.write_bundle", changed_before)
        with pytest.raises(MatesError, match=r"`.*b.jsonl` was changed meanwhile"):
            score_files(selector, tmp_path / "in", tmp_path / "out", ratio=0.5)
    assert outputs(tmp_path / "out") == ["a.jsonl"]
    with pytest.raises(RoundMismatchError, match=r"`b.jsonl` was changed \(1 in all\)"):
        score_files(selector, tmp_path / "in", tmp_path / "out", ratio=0.5)
    # While it is scored, and while it is written.
    for target, name in ((json_files, "blocks"), (json_files, "write_rows")):
        real = getattr(target, name)

        def changing(*arguments: Any, real: Any = real, **named: Any) -> Any:
            change(tmp_path / "in" / "a.jsonl")
            return real(*arguments, **named)

        os.utime(tmp_path / "in" / "a.jsonl", ns=(2, 2))
        with monkeypatch.context() as patched:
            patched.setattr(target, name, changing)
            with pytest.raises(MatesError, match=r"`.*a.jsonl` was changed meanwhile"):
                score_files(selector, tmp_path / "in", tmp_path / f"out-{name}", ratio=0.5)
        assert outputs(tmp_path / f"out-{name}") == []


def test_another_number_of_rows_under_the_same_facts_is_noticed(
    selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "in" / "a.jsonl"
    lines_had = lines_of_texts(make_texts(50, 0))
    write_lines(path, lines_had)
    before = path.stat()
    for num in (-1, 1):
        real = work.write_bundle

        def changing(*arguments: Any, real: Any = real, num: int = num) -> Any:
            write_lines(path, lines_had[:num] if num < 0 else [*lines_had, b"{}"])
            if num < 0:  # as many bytes
                path.write_bytes(path.read_bytes() + b" " * (before.st_size - path.stat().st_size))
            os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr("mates_hf.selection.files.run.write_bundle", changing)
            patched.setattr(work, "check_same", lambda part: None)
            with pytest.raises(MatesError, match="must have the 50 rows that were scored"):
                score_files(selector, tmp_path / "in", tmp_path / f"out{num}", ratio=0.5)
        write_lines(path, lines_had)
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


def test_the_folder_of_other_work_is_refused(
    selector: MatesSelector, tiny_tokenizer: Any, corpus: tuple[Path, list[str]], tmp_path: Path
):
    folder, texts = corpus
    out = tmp_path / "out"
    score_files(selector, folder, out, ratio=0.2)
    before = content_of(out)
    other = MatesSelector(fit_model(), tiny_tokenizer)
    with pytest.raises(RoundMismatchError, match="folder of this selector.*Choose another folder, or delete it"):
        score_files(other, folder, out, ratio=0.2)
    with pytest.raises(RoundMismatchError, match=r"`a.jsonl` is gone \(5 in all\)"):
        score_files(selector, folder / "c.parquet", out, ratio=0.2)
    assert content_of(out) == before
    with pytest.raises(ValueError, match="`inputs` must not lie in the output folder"):
        score_files(selector, folder / "c.parquet", folder, ratio=0.2)
    write_parquet(tmp_path / "others" / "mine.parquet", texts)
    with pytest.raises(ValueError, match="new or empty folder.*holds `mine.parquet`"):
        score_files(selector, folder, tmp_path / "others", ratio=0.2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="new or empty folder.*is a file"):
        score_files(selector, folder, tmp_path / "file", ratio=0.2)
    # Another budget takes the scores that are there.
    stamps = {path: path.stat().st_mtime_ns for path in (out / "_mates" / "scores").iterdir()}
    report = score_files(selector, folder, out, k=7)
    assert report.gb_per_hour is None
    assert kept_ids(out) == ids_by_filter(selector, texts, k=7)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    names = {path: path.stat().st_mtime_ns for path in map(out.joinpath, outputs(out))}
    score_files(selector, folder, out, k=7)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in names} == names
    (out / "a.jsonl").unlink()
    (out / "_mates" / "scores" / "000000.parquet").write_bytes(b"damaged")
    score_files(selector, folder, out, k=7)
    assert kept_ids(out) == ids_by_filter(selector, texts, k=7)
    (out / "_mates" / "score.json").write_text("{")
    with pytest.raises(MatesError, match=r"score.json` must be a JSON object, and is damaged"):
        score_files(selector, folder, out, k=7)


def test_two_calls_at_once_into_one_folder_are_refused(
    selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path
):
    import fcntl

    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(MatesError, match="another process writes into"):
        score_files(selector, corpus[0], tmp_path / "out", ratio=0.2)
    os.close(handle)
    score_files(selector, corpus[0], tmp_path / "out", ratio=0.2)


# --- which files ---


def test_what_inputs_may_be(selector: MatesSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = make_texts(30, 0)
    for name in ("en/a.parquet", "en/b.parquet", "de/a.parquet"):
        write_parquet(tmp_path / "in" / name, texts)
    write_lines(tmp_path / "in" / "en" / "c.json", lines_of_texts(texts))
    write_lines(tmp_path / "in" / "c4.json.gz", lines_of_texts(texts))
    (tmp_path / "in" / "README.md").write_text("hello")
    (tmp_path / "in" / "info.json").write_text("{}")
    write_parquet(tmp_path / "in" / "_old" / "a.parquet", texts)
    write_parquet(tmp_path / "in" / ".hidden.parquet", texts)

    def names(*inputs: Any, out: str = str(tmp_path / "out")) -> list[str]:
        return [part.name for part in plan.find_parts(list(inputs), out)]

    folder = tmp_path / "in"
    assert names(folder) == ["c4.json.gz", "de/a.parquet", "en/a.parquet", "en/b.parquet"]
    assert names(f"{folder}/en/*.parquet", f"{folder}/en/a.parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{folder}/en/*.parquet", f"{folder}/de/*.parquet") == [
        "de/a.parquet",
        "en/a.parquet",
        "en/b.parquet",
    ]
    assert names(f"{folder}/en/*.json") == ["c.json"]
    assert names(f"{folder}/**/a.parquet") == ["_old/a.parquet", "de/a.parquet", "en/a.parquet"]
    monkeypatch.chdir(folder)
    assert names("en") == names("./en/") == names("en/*.parquet") == ["a.parquet", "b.parquet"]
    # An output folder inside of an input folder is not read, whenever the call is made.
    assert names(folder, out=str(folder / "de")) == ["c4.json.gz", "en/a.parquet", "en/b.parquet"]
    score_files(selector, folder, folder / "out", ratio=0.5)
    report = score_files(selector, folder, folder / "out", ratio=0.4)
    assert report.files == 4
    for pattern in (folder, f"{folder}/**/*.parquet"):
        with pytest.raises(ValueError, match="is the output of an earlier run and would be read again"):
            score_files(selector, pattern, tmp_path / "out2", ratio=0.5)
    assert score_files(selector, folder / "out", tmp_path / "out3", ratio=0.5).files == 4  # asked for by its name
    assert names(f"{folder}/out/**/*.parquet") == ["de/a.parquet", "en/a.parquet", "en/b.parquet"]  # not our own
    for wrong, words in (
        ("nothing", "`nothing` is not"),
        ("en/*.csv", "nothing matches `en/.*csv`"),
        ("README.md", "must end in `.parquet`"),
        ("R*", "must end in `.parquet`"),
        ("out/de/a.parquet", "must not lie in the output folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            names(wrong, out=str(folder / "out"))
    (tmp_path / "empty").mkdir()
    for nothing in ([], [tmp_path / "empty"]):
        with pytest.raises(FileNotFoundError, match="at least one file ending in"):
            names(*nothing)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/x/en/a.parquet", (folder / "en" / "a.parquet").read_bytes())
    with pytest.raises(ValueError, match="would share `a.parquet`"):
        names("memory://x/en/*.parquet", f"{folder}/en/a.parquet")


def test_memory_in_and_out(selector: MatesSelector, corpus: tuple[Path, list[str]]):
    folder, texts = corpus
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/corpus", recursive=True)
    root = "/corpus" if fs.exists("/corpus/a.jsonl") else f"/corpus/{folder.name}"
    report = score_files(selector, f"memory://{root}", "memory://kept", ratio=0.2)
    assert outputs("memory://kept") == outputs(folder)
    found: list[int] = []
    for name in outputs("memory://kept"):
        with fs.open(f"/kept/{name}", compression=None) as file:
            content = file.read()
        if name.endswith("parquet"):
            found += pq.read_table(pa.BufferReader(content)).column("id").to_pylist()
        else:
            packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(Path(name).suffix)
            stream = pa.input_stream(pa.BufferReader(content), compression=packed)
            found += [json.loads(line)["id"] for line in stream.read().splitlines()]
    assert found == ids_by_filter(selector, texts, ratio=0.2)
    assert report.rows_kept == len(found)
    assert score_files(selector, f"memory://{root}", "memory://kept", ratio=0.2).gb_per_hour is None
    fs.pipe_file(f"{root}/a.jsonl", b"\n".join(lines_of_texts(make_texts(5, 0))))
    with pytest.raises(RoundMismatchError, match="`a.jsonl` was changed"):
        score_files(selector, f"memory://{root}", "memory://kept", ratio=0.2)
    with pytest.raises(ValueError, match="`workers` must be 1 with `memory://`"):
        score_files(selector, f"memory://{root}", "memory://kept", ratio=0.2, workers=2)


class StandIn(MemoryFileSystem):
    """A store as others are: paths without a leading slash, and a look at one file knows more than a listing."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}  # noqa: RUF012  # as fsspec has it
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def unstrip_protocol(self, name: str) -> str:
        return "gs://" + name.strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = dict(super().info(path, **options))
        if found["type"] == "file":
            found["md5Hash"] = hashlib.md5(self.cat_file(path), usedforsecurity=False).hexdigest()
        return found


def test_urls_of_another_store_go_the_same_way(
    selector: MatesSelector, corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No server of Google's protocol is at hand: a stand-in under its name takes the place of `gcsfs`."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", StandIn)
    folder, texts = corpus
    fs = fsspec.filesystem("gs")
    for name in outputs(folder):
        fs.pipe_file(f"gs://bucket/corpus/{name}", (folder / name).read_bytes())
    asked: dict[str, Any] = {"ratio": 0.2, "group_column": "meta.n", "max_group_boost": 1.1}
    report = score_files(selector, "gs://bucket/corpus", "gs://bucket/kept", **asked)
    score_files(selector, folder, tmp_path / "kept", **asked)
    assert report.out == "gs://bucket/kept"
    expected = content_of(tmp_path / "kept")
    assert {name: fs.cat_file(f"gs://bucket/kept/{name}") for name in expected} == expected
    pattern = score_files(selector, "gs://bucket/corpus/**/*.parquet", tmp_path / "here", k=5)
    assert (pattern.files, pattern.rows_kept) == (2, 5)
    loaded = load_rows("gs://bucket/corpus/*.jsonl*", lambda _: ["text"], name="pool")
    assert loaded.dataset["text"][:] == texts[:401]
    fs.pipe_file("gs://bucket/corpus/a.jsonl", b'{"text": "w3"}\n')
    with pytest.raises(RoundMismatchError, match="`a.jsonl` was changed"):
        score_files(selector, "gs://bucket/corpus", "gs://bucket/kept", ratio=0.2)
    with pytest.raises(ValueError, match="Protocol not known"):
        score_files(selector, "nowhere://bucket/corpus", tmp_path / "out", ratio=0.2)


def test_many_small_files_share_score_files(selector: MatesSelector, tmp_path: Path):
    texts = make_texts(900, 0)
    for i in range(300):
        write_lines(tmp_path / "in" / f"{i:03d}.jsonl", lines_of_texts(texts[3 * i : 3 * i + 3], 3 * i))
    score_files(selector, tmp_path / "in", tmp_path / "out", ratio=0.2)
    assert kept_ids(tmp_path / "out") == ids_by_filter(selector, texts, ratio=0.2)
    scores = sorted((tmp_path / "out" / "_mates" / "scores").iterdir())
    assert [read_facts(str(path))["num_rows"] for path in scores] == [768, 132]


def test_wrong_arguments_are_refused_by_name(selector: MatesSelector, tmp_path: Path):
    write_parquet(tmp_path / "in" / "a.parquet", make_texts(20, 0))
    given = selector, tmp_path / "in", tmp_path / "out"
    for options, words in (
        ({}, "Exactly one of `ratio`, `k`, `threshold` and `num_tokens`"),
        ({"ratio": 0.2, "k": 3}, "Exactly one of"),
        ({"ratio": 1.5}, "`ratio` must be in"),
        ({"add_scores": True, "ratio": 0.5}, "`add_scores` writes all rows, and `ratio` keeps some"),
        ({"add_scores": True, "temperature": 0.5}, "`add_scores` writes all rows, and `temperature`"),
        ({"ratio": 0.5, "workers": 0}, "`workers` must be a whole number of at least 1, got 0"),
        ({"ratio": 0.5, "on_error": "ignore"}, "`on_error` must be 'stop' or 'skip', got 'ignore'"),
        ({"ratio": 0.5, "column": "txt"}, r"a.parquet`: .* column `txt` to score, got the columns \['id', 'text'"),
        ({"k": 21}, r"`k` must be at most the number of rows \(20\), got 21"),
    ):
        with pytest.raises(ValueError, match=words):
            score_files(*given, **options)
    with pytest.raises(TypeError, match="a.parquet`: Column `id` must hold texts"):
        score_files(*given, ratio=0.5, column="id")
    with pytest.raises(TypeError, match="`selector` must be a `MatesSelector`, got the text 'selector'"):
        score_files("selector", *given[1:], ratio=0.5)  # type: ignore[arg-type]
    assert outputs(tmp_path / "out") == []


def test_a_report_prints(tmp_path: Path):
    report = FilesReport(
        out=str(tmp_path), asked_for="ratio=0.2", files=3, files_left_out=1, lines_left_out=2, rows=10, rows_kept=2,
        tokens=1_000, tokens_kept=300, threshold=0.25, bytes_read=2_500_000_000, bytes_scored=7_100_000,
        bytes_written=12, seconds=3.0, gb_per_hour=3_000.0, errors=("`a.jsonl`: line 3: it must be one JSON object.",),
    )  # fmt: skip
    lines_shown = repr(report).splitlines()
    assert lines_shown[0] == "FilesReport"
    assert len(lines_shown) <= 10
    assert "2.5 GB" in lines_shown[1]
    assert "7.1 MB" in lines_shown[1]
    assert "3,000.0 GB of files an hour" in repr(report)
    assert "1 files and 2 lines: `a.jsonl`: line 3" in report._repr_html_()
