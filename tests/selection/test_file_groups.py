"""Bounds on groups over files: the rows that `MatesSelector.filter` keeps within them, however files divide them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from mates_hf.cli import main
from mates_hf.errors import MatesError
from mates_hf.selection.file_scoring import score_files
from mates_hf.selection.files import parquet_files, plan, run
from mates_hf.selection.selector import MatesSelector
from tests.selection.files_kit import content_of, kept_ids, make_texts, outputs, text_selector, worth, write_lines

NAMES = ["web", "news", None, "7"]  # a null, and a number that another file has as text


@pytest.fixture(scope="module")
def selector() -> MatesSelector:
    return text_selector()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[Any]]:
    """Files with a column of sources; all texts and sources by the rows' ids."""
    folder = tmp_path_factory.mktemp("grouped")
    texts, sources = make_texts(700, 7), np.random.default_rng(0).choice(len(NAMES), 700, p=[0.6, 0.25, 0.1, 0.05])
    order = np.argsort([worth(text) + (source == 3) for text, source in zip(texts, sources, strict=True)])
    sources = sources[np.argsort(order)]
    rows = [
        {"id": i, "text": text, "source": NAMES[code], "meta": {"source": NAMES[code]}}
        for i, (text, code) in enumerate(zip(texts, sources.tolist(), strict=True))
    ]
    write_lines(folder / "a.jsonl", [json.dumps(row).encode() for row in rows[:200]])
    lines = [json.dumps(row).replace('"source": "7", "meta"', '"source": 7, "meta"').encode() for row in rows[200:400]]
    lines = [line.replace(b', "source": null', b"") for line in lines]  # what is not there is null
    write_lines(folder / "b.jsonl.gz", lines)
    table = pa.Table.from_pylist(rows[400:])
    encoded = table.column("source").dictionary_encode()
    pq.write_table(table.set_column(2, "source", encoded), folder / "c.parquet", row_group_size=70)
    return folder, texts, [row["source"] for row in rows]


def ids_by_filter(selector: MatesSelector, texts: list[str], sources: list[Any], **budget: Any) -> list[int]:
    dataset = Dataset.from_dict({"id": list(range(len(texts))), "text": texts, "source": sources})
    return selector.filter(dataset, group_column="source", **budget)["id"]


@pytest.mark.parametrize("amount", [{"ratio": 0.2}, {"k": 333}, {"k": 0}, {"ratio": 1.0}], ids=str)
@pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.5, 0.0), (None, 0.8), (None, 0.0)], ids=str)
def test_what_filter_keeps_within_bounds_is_kept(
    amount: dict[str, Any], bounds: tuple[float | None, float], selector: MatesSelector,
    corpus: tuple[Path, list[str], list[Any]], tmp_path: Path,
) -> None:  # fmt: skip
    folder, texts, sources = corpus
    asked = {**amount, "max_group_boost": bounds[0], "min_group_boost": bounds[1]}
    report = score_files(selector, folder, tmp_path / "out", group_column="source", **asked)
    expected = ids_by_filter(selector, texts, sources, **asked)
    assert kept_ids(tmp_path / "out") == expected
    names = np.array([source or "(none)" for source in sources])
    assert set(report.shares) == set(names)
    for name, share in report.shares.items():
        assert share["rows"] == pytest.approx(np.mean(names == name))
        kept = np.mean(names[expected] == name) if expected else 0.0
        assert share["kept"] == pytest.approx(kept)
        assert share["boost"] == pytest.approx(kept / np.mean(names == name))
    assert json.loads((tmp_path / "out" / "_mates" / "summary.json").read_text())["shares"] == report.shares
    assert "web 58.1% to " in report.facts()["groups"]


def test_workers_pieces_random_rows_and_nested_columns(
    selector: MatesSelector, corpus: tuple[Path, list[str], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = corpus
    asked = {"ratio": 0.3, "max_group_boost": 1.2, "min_group_boost": 0.8, "random_share": 0.3, "temperature": 0.5}
    report = score_files(selector, folder, tmp_path / "one", group_column="source", **asked)
    assert all(0.75 < share["boost"] < 1.3 for share in report.shares.values())
    monkeypatch.setattr(plan, "_BUNDLE_FILES", 1)
    score_files(selector, folder, tmp_path / "two", group_column="meta.source", workers=2, **asked)
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")
    monkeypatch.setattr(run, "_HELD_ROWS", 0)
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 4_000)
    monkeypatch.setattr("mates_hf.selection.score_file.GROUP_ROWS", 64)
    monkeypatch.setattr("mates_hf.selection.files.groups.GROUP_ROWS", 64)
    score_files(selector, folder, tmp_path / "three", group_column="source", **asked)
    assert content_of(tmp_path / "three") == content_of(tmp_path / "one")


def test_other_bounds_and_columns_reuse_the_scores(
    selector: MatesSelector, corpus: tuple[Path, list[str], list[Any]], tmp_path: Path
) -> None:
    folder, texts, sources = corpus
    out = tmp_path / "out"
    score_files(selector, folder, out, ratio=0.2)
    scores = out / "_mates" / "scores" / "000000.parquet"
    stamp = scores.stat().st_mtime_ns
    asked = {"ratio": 0.2, "max_group_boost": 1.0, "min_group_boost": 1.0}
    score_files(selector, folder, out, group_column="source", **asked)
    expected = ids_by_filter(selector, texts, sources, **asked)
    assert kept_ids(out) == expected
    (codes,) = (out / "_mates" / "groups").rglob("*.parquet")
    codes.write_bytes(codes.read_bytes()[:-30])  # damaged, so it is made again
    (out / outputs(out)[0]).unlink()
    score_files(selector, folder, out, group_column="source", **asked)
    assert kept_ids(out) == expected
    score_files(selector, folder, out, ratio=0.2)
    assert kept_ids(out) == ids_by_filter(selector, texts, sources, ratio=0.2)
    assert scores.stat().st_mtime_ns == stamp


def test_lines_that_are_left_out_have_no_group(selector: MatesSelector, tmp_path: Path) -> None:
    texts = make_texts(60, 1)
    lines = [json.dumps({"id": i, "text": text, "source": "ab"[i % 2]}).encode() for i, text in enumerate(texts)]
    bad = b'{"text": 3, "source": "c"}'
    write_lines(tmp_path / "in" / "a.jsonl", [b"{broken", *lines[:30], b"[1]", *lines[30:], bad])
    asked = {"ratio": 0.5, "max_group_boost": 1.0, "min_group_boost": 1.0}
    report = score_files(
        selector, tmp_path / "in", tmp_path / "out", group_column="source", on_error="skip", **asked
    )  # fmt: skip
    assert report.lines_left_out == 3
    assert {name: share["kept"] for name, share in report.shares.items()} == {"a": 0.5, "b": 0.5}
    assert kept_ids(tmp_path / "out") == ids_by_filter(selector, texts, ["ab"[i % 2] for i in range(60)], **asked)


def test_what_cannot_be_is_refused_by_name(
    selector: MatesSelector, corpus: tuple[Path, list[str], list[Any]], tmp_path: Path
) -> None:
    folder, texts, _ = corpus
    for options, match in (
        ({"num_tokens": 99, "group_column": "source", "max_group_boost": 2.0}, "Use `ratio` or `k`"),
        ({"threshold": 0.0, "group_column": "source", "min_group_boost": 0.5}, "Use `ratio` or `k`"),
        ({"ratio": 0.2, "max_group_boost": 2.0}, "`max_group_boost` needs `group_column`"),
        ({"ratio": 0.2, "group_column": "source", "max_group_boost": 0.5}, "`max_group_boost` must be None or a"),
        ({"add_scores": True, "group_column": "source"}, "`add_scores` writes all rows, and `group_column`"),
        ({"ratio": 0.2, "group_column": "kind"}, "`group_column` must be a column of the files, got 'kind'"),
        ({"ratio": 0.2, "group_column": "source.name"}, "`group_column` must be a column of the files"),
    ):
        with pytest.raises(ValueError, match=match):
            score_files(selector, folder, tmp_path / "out", **options)
        assert not outputs(tmp_path / "out")
    with pytest.raises(MatesError, match="`group_column` must hold one text or number a row, got dict in `meta`"):
        score_files(selector, folder, tmp_path / "out", ratio=0.2, group_column="meta")
    # A budget of tokens without bounds says what each group got.
    report = score_files(selector, folder, tmp_path / "tokens", num_tokens=2_000, group_column="source")
    assert sum(share["kept"] for share in report.shares.values()) == pytest.approx(1)
    write = {"id": [0], "text": [texts[0]]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({**write, "source": ["a"]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table(write), tmp_path / "in" / "b.parquet")
    with pytest.raises(
        MatesError, match="`group_column` must be a column of the files, got 'source', and `.*b.parquet` has"
    ):
        score_files(selector, tmp_path / "in", tmp_path / "later", ratio=0.5, group_column="source")


def test_the_command_takes_bounds(
    selector: MatesSelector,
    corpus: tuple[Path, list[str], list[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, texts, sources = corpus
    selector.save_pretrained(tmp_path / "selector")
    given = ["score", str(tmp_path / "selector"), str(folder), "--out", str(tmp_path / "out")]
    bounds = ["--group-column", "source", "--max-group-boost", "1.2", "--min-group-boost", "0.8"]
    assert main([*given, "--tokens", "99", *bounds]) == 2
    assert "Use `ratio` or `k`" in capsys.readouterr().err
    assert main([*given, "--ratio", "0.2", "--max-group-boost", "1.2"]) == 2
    assert "`max_group_boost` needs `group_column`" in capsys.readouterr().err
    assert main([*given, "--ratio", "0.2", *bounds]) == 0
    printed = capsys.readouterr().out
    assert "ratio=0.2, max_group_boost=1.2, min_group_boost=0.8" in printed
    assert "(share of the rows, and of those kept)" in printed
    asked = {"ratio": 0.2, "max_group_boost": 1.2, "min_group_boost": 0.8}
    assert kept_ids(tmp_path / "out") == ids_by_filter(selector, texts, sources, **asked)
