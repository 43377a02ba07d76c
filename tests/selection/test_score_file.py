"""Score files: whole or absent, and hashes that depend on what a row says alone."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.conversations import messages_of
from mates_hf.data.raw_texts import RawTexts
from mates_hf.data.scored_column import Conversations, Texts, TokenIds
from mates_hf.errors import MatesError
from mates_hf.selection import score_file
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.score_file import (
    GROUP_ROWS,
    content_hashes,
    joined_scores,
    open_scores,
    read_facts,
    write_scores,
)

FACTS = {"selector": "abc", "source": "def", "part": 3}
TEXTS = RawTexts("text", ("text",))


def made(num: int, seed: int = 0) -> PieceScores:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, num).astype(np.int32)
    return PieceScores(rng.normal(size=num).astype(np.float32), counts, rng.integers(0, 2**64, num, np.uint64))


def read_all(url: str) -> PieceScores:
    return joined_scores(read() for read in open_scores(url))


def assert_same(one: PieceScores, other: PieceScores) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("place", ["local", "file", "memory"])
def test_scores_come_back_in_their_order_with_their_facts(tmp_path: Path, place: str):
    where = {"local": "", "file": "file://", "memory": "memory://"}[place] + f"{tmp_path}/deep/part.parquet"
    scores = made(1000)
    pieces = (PieceScores(*(column[i : i + 7] for column in scores)) for i in range(0, 1000, 7))
    facts = write_scores(where, pieces, FACTS)
    assert facts == {**FACTS, "num_rows": 1000, "num_tokens": int(scores.num_targets.sum())}
    assert read_facts(where) == facts
    assert_same(read_all(where), scores)
    write_scores(where, made(0), FACTS)  # replaced, and by no row
    assert read_facts(where)["num_rows"] == 0
    assert open_scores(where) == []
    fs, path = fsspec.url_to_fs(where)
    assert [Path(name).name for name in fs.ls(str(Path(path).parent), detail=False)] == ["part.parquet"]
    assert_same(read_all(score_file.located(where)[1]) if place != "memory" else made(0), made(0))


def test_a_file_system_may_be_given_instead_of_a_url():
    fs = fsspec.filesystem("memory")
    write_scores("/given/part", made(5), FACTS, fs=fs)
    assert read_facts("memory://given/part")["num_rows"] == 5
    assert_same(joined_scores(read() for read in open_scores("/given/part", fs=fs)), made(5))


def test_many_files_are_flushed_side_by_side_and_their_folders_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = [tmp_path / name / str(number) for name in "ab" for number in range(40)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_ino))
    score_file.flush_files(map(str, files))
    assert sorted(seen[:80]) == sorted(file.stat().st_ino for file in files)
    assert sorted(seen[80:]) == sorted((tmp_path / name).stat().st_ino for name in "ab")
    files[33].unlink()
    with pytest.raises(FileNotFoundError):
        score_file.flush_files(map(str, files))
    score_file.flush_files([])


def test_a_piece_has_so_many_rows_at_most_and_another_process_may_read_it(tmp_path: Path):
    scores = made(2 * GROUP_ROWS + 5)
    where = str(tmp_path / "part.parquet")
    third = len(scores.content) // 3
    write_scores(where, [PieceScores(*(c[:third] for c in scores)), PieceScores(*(c[third:] for c in scores))], FACTS)
    readers = pickle.loads(pickle.dumps(open_scores(where)))
    assert [len(read().content) for read in readers] == [GROUP_ROWS, GROUP_ROWS, 5]
    assert_same(joined_scores(read() for read in readers), scores)


def test_what_pyarrow_before_16_writes_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_scores(str(tmp_path / "new"), iter([made(5), made(6)]), FACTS)
    monkeypatch.delattr(pq.ParquetWriter, "add_key_value_metadata", raising=False)
    write_scores(str(tmp_path / "old"), iter([made(5), made(6)]), FACTS)
    assert read_facts(str(tmp_path / "old")) == read_facts(str(tmp_path / "new"))
    assert_same(read_all(str(tmp_path / "old")), read_all(str(tmp_path / "new")))


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_breaks_on_its_way_leaves_the_file_that_was_there(tmp_path: Path, scheme: str):
    where = f"{scheme}{tmp_path}/part.parquet"
    write_scores(where, made(3), FACTS)

    def broken() -> Any:
        yield made(2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_scores(where, broken(), FACTS)
    assert_same(read_all(where), made(3))
    fs, path = fsspec.url_to_fs(str(where))
    assert len(fs.ls(str(Path(path).parent))) == 1


def test_wrong_input_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'selector' and 'source'"):
        write_scores(str(tmp_path / "part"), made(1), {"selector": "abc"})
    with pytest.raises(ValueError, match="one length"):
        write_scores(str(tmp_path / "part"), made(3)._replace(num_targets=np.zeros(2, np.int32)), FACTS)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path: Path):
    where = tmp_path / "part.parquet"
    with pytest.raises(FileNotFoundError):
        read_facts(str(where))
    write_scores(str(where), made(1000), FACTS)
    content = where.read_bytes()
    for damaged in (content[:-9], content[: len(content) // 2], b"", content[:-60] + bytes(52) + content[-8:]):
        where.write_bytes(damaged)
        for read in (read_facts, open_scores):
            with pytest.raises(MatesError, match=f"{where.name}` must be a whole file of scores.*score again"):
                read(str(where))
    pq.write_table(pa.table({"text": ["a"]}), where)
    with pytest.raises(MatesError, match="is another Parquet file"):
        read_facts(str(where))


# --- hashes of what rows say ---


def hash_of(content: bytes) -> int:
    """The hash as the kernel's docstring has it, one step at a time."""
    full = 2**64 - 1
    total = len(content) * 0xBF58476D1CE4E5B9 & full
    for begin in range(0, len(content) // 8 * 8 + 1, 8):
        total = (total ^ int.from_bytes(content[begin : begin + 8], "little")) * 0x9E3779B97F4A7C15 & full
        total ^= total >> 32
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ (total >> shift)) * factor & full
    return total ^ (total >> 31)


def test_a_text_has_one_hash_whatever_holds_it():
    texts = ["", "a", "eight by", "a longer text of some words, äöü 数据", None, "a"]
    plain = content_hashes(TEXTS, pa.table({"text": texts}))
    assert plain.tolist() == [hash_of((text or "").encode()) for text in texts]
    assert plain[1] == 17807200846439174253  # part of what is on disk: it never changes
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    kinds += [pa.string_view()] if hasattr(pa, "string_view") else []
    for kind in kinds:
        assert np.array_equal(content_hashes(TEXTS, pa.table({"text": pa.array(texts).cast(kind)})), plain)
    chunked = pa.table({"text": pa.chunked_array([texts[:1], texts[1:4], texts[4:]])})
    assert np.array_equal(content_hashes(TEXTS, chunked), plain)
    assert np.array_equal(content_hashes(TEXTS, chunked.slice(2, 3)), plain[2:5])
    assert np.array_equal(content_hashes(Texts("text", ("text",)), {"text": texts}), plain)
    nested = pa.table({"meta": [{"text": text} for text in texts]})
    assert np.array_equal(content_hashes(RawTexts("meta.text", ("meta", "text")), nested), plain)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=30))
def test_different_texts_have_different_hashes(texts: list[str]):
    found = content_hashes(TEXTS, pa.table({"text": pa.array(texts, pa.string())}))
    assert len(set(found.tolist())) == len(set(texts))


def test_texts_that_differ_in_one_bit_or_by_a_zero_byte_have_different_hashes():
    texts = ["\0" * n for n in range(40)] + ["a" * n for n in range(1, 40)]
    texts += [" " * n + chr(ord(" ") ^ (1 << bit)) + " " * (20 - n) for n in range(21) for bit in range(7)]
    found = content_hashes(TEXTS, pa.table({"text": texts}))
    assert len(set(found.tolist())) == len(set(texts))
    uniform = content_hashes(TEXTS, pa.table({"text": [f"row {i}" for i in range(20_000)]}))
    for shift in (0, 32, 56):  # every byte of a hash is as good as random
        counts = np.bincount((uniform >> np.uint64(shift)).astype(np.uint8), minlength=256)
        assert counts.max() < 150
        assert counts.min() > 30


def test_tokens_have_one_hash_whatever_integers_they_are_and_whatever_rows_are_near():
    lists = [[5, 6, 7], [], [7, 6, 5], [5, 6, 7], [0], [0, 0]]
    column = TokenIds("input_ids", ("input_ids",))
    plain = content_hashes(column, pa.table({"input_ids": pa.array(lists, pa.list_(pa.int64()))}))
    assert [plain.tolist().index(value) for value in plain.tolist()] == [0, 1, 2, 0, 4, 5]
    assert plain[0] == 16603089147002462836
    for kind in (pa.int16(), pa.uint32()):
        assert np.array_equal(content_hashes(column, pa.table({"input_ids": pa.array(lists, pa.list_(kind))})), plain)
    assert np.array_equal(content_hashes(column, {"input_ids": lists}), plain)
    # Labels that say nothing count for nothing, also next to rows where they do.
    labels = [[5, 6, 7], [], [-100, 6, 5], [-100, -100, 7], [0], [0, -100]]
    masked = content_hashes(column, pa.table({"input_ids": lists, "labels": labels}))
    assert np.array_equal(masked == plain, [True, True, True, False, True, False])
    alone = content_hashes(column, pa.table({"input_ids": lists, "labels": labels}).slice(3, 1))
    assert alone[0] == masked[3]
    padding = pa.table({"input_ids": [[5, 6, 7, 0, 0]], "attention_mask": [[1, 1, 1, 0, 0]]})
    assert content_hashes(column, padding)[0] == plain[0]


def test_a_conversation_has_one_hash_in_all_its_forms():
    turns = [{"role": "user", "content": "hi"}, {"content": "hello", "role": "assistant"}]
    column = Conversations("messages", ("messages",))
    plain = content_hashes(column, {"messages": [turns, None, [], turns[:1]]})
    assert plain[1] == plain[2]
    assert len(set(plain.tolist())) == 3
    assert plain[0] == 10111150843417068731
    filled = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "hello", "name": None}]
    assert content_hashes(column, pa.table({"messages": [filled, [{**filled[0], "name": "x"}]]}))[0] == plain[0]
    columns = {"role": ["user", "assistant"], "content": ["hi", "hello"]}
    assert content_hashes(column, {"messages": [columns]})[0] == plain[0]
    assert messages_of(columns) == messages_of(turns)
