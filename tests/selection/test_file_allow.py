"""`allow` over files: other rows are neither scored nor written, whatever the format, and the summary counts them."""

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
from mates_hf.errors import MatesError, RoundMismatchError
from mates_hf.selection.file_scoring import score_files
from mates_hf.selection.files import json_files, plan
from mates_hf.selection.selector import MatesSelector
from tests.selection.files_kit import content_of, kept_ids, make_texts, text_selector, write_lines

ENTRIES = ["mit", "apache-2.0", "all rights reserved", None, 7]
RULE = "licence=mit,7"
Corpus = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def selector() -> MatesSelector:
    return text_selector()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Files of every kind with a column of licences: nulls, numbers that one file has as text, entries not there."""
    folder = tmp_path_factory.mktemp("licensed")
    codes = np.random.default_rng(1).integers(0, len(ENTRIES), 600).tolist()
    rows = [
        {
            "id": i,
            "text": text,
            "licence": ENTRIES[code],
            "meta": {"licence": None if code == 3 else str(ENTRIES[code])},
        }
        for i, (text, code) in enumerate(zip(make_texts(600, 3), codes, strict=True))
    ]
    lines = [json.dumps(row).replace('"licence": null, ', "").encode() for row in rows[:200]]
    write_lines(folder / "a.jsonl", [*lines[:100], b"  ", *lines[100:]])
    write_lines(folder / "b.jsonl.zst", [json.dumps(row).encode() for row in rows[200:400]])
    text = [{**row, **{"licence": None if row["licence"] is None else str(row["licence"])}} for row in rows[400:]]
    table = pa.Table.from_pylist(text)
    pq.write_table(
        table.set_column(2, "licence", table["licence"].dictionary_encode()), folder / "c.parquet", row_group_size=70
    )
    return folder, rows


def may(row: dict[str, Any]) -> bool:
    return row["licence"] in ("mit", 7)


@pytest.mark.parametrize("amount", [{"ratio": 0.3}, {"k": 50}, {"num_tokens": 2_000}, {"ratio": 1.0}], ids=str)
def test_what_filter_keeps_of_the_allowed_rows_is_kept(selector, corpus, tmp_path, amount):
    folder, rows = corpus
    allowed = [row for row in rows if may(row)]
    alone = Dataset.from_dict({"id": [row["id"] for row in allowed], "text": [row["text"] for row in allowed]})
    report = score_files(selector, folder, tmp_path / "out", allow=RULE, **amount)
    assert kept_ids(tmp_path / "out") == selector.filter(alone, **amount)["id"]
    assert (report.rows, report.rows_not_allowed) == (len(allowed), len(rows) - len(allowed))
    summary = json.loads((tmp_path / "out" / "_mates" / "summary.json").read_text())
    assert summary["rows_not_allowed"] == len(rows) - len(allowed)
    assert summary["allow"] == {"licence": ["7", "mit"]}
    assert f"{len(rows) - len(allowed):,} other rows, not scored" in report.facts()["not allowed"]
    scored = [pq.read_table(file).num_rows for file in (tmp_path / "out" / "_mates" / "scores").iterdir()]
    assert sum(scored) == len(allowed)


def test_all_rows_with_scores_workers_nested_columns_and_groups(selector, corpus, tmp_path, monkeypatch):
    folder, rows = corpus
    score_files(selector, folder, tmp_path / "scores", allow={"meta.licence": ["mit", "7"]}, add_scores=True)
    assert kept_ids(tmp_path / "scores") == [row["id"] for row in rows if may(row)]
    asked = {"ratio": 0.3, "group_column": "licence", "max_group_boost": 1.0, "min_group_boost": 1.0}
    report = score_files(selector, folder, tmp_path / "one", allow=RULE, **asked)
    assert set(report.shares) == {"mit", "7"}
    assert all(share["boost"] == pytest.approx(1, abs=0.03) for share in report.shares.values())
    monkeypatch.setattr(plan, "_BUNDLE_FILES", 1)
    monkeypatch.setattr(json_files, "read_lines", lambda part, size=700: lines_in_pieces(part, size))
    score_files(selector, folder, tmp_path / "two", allow=RULE, **asked)
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


def lines_in_pieces(part: Any, size: int) -> Any:
    from mates_hf.selection.files.lines import read_lines

    return read_lines(part, size)


def test_a_call_that_goes_on_must_have_the_same_rule(selector, corpus, tmp_path):
    folder, _ = corpus
    out = tmp_path / "out"
    score_files(selector, folder, out, allow=RULE, ratio=0.3)
    first = content_of(out)
    for other in ("licence=mit", None, "licence=mit;meta.licence=mit"):
        with pytest.raises(RoundMismatchError, match="must be a folder of this `allow`") as caught:
            score_files(selector, folder, out, allow=other, ratio=0.3)
        assert "\n" not in str(caught.value)
    assert score_files(selector, folder, out, allow={"licence": ["7", "mit"]}, ratio=0.3).gb_per_hour is None
    assert content_of(out) == first
    score_files(selector, folder, tmp_path / "all", ratio=0.3)
    with pytest.raises(RoundMismatchError, match="was begun with None"):
        score_files(selector, folder, tmp_path / "all", allow=RULE, ratio=0.3)


def test_lines_that_cannot_be_read_are_not_taken_for_allowed_ones(selector, tmp_path):
    """A fault of a row that is not allowed is nobody's, and one whose entry cannot be read is no allowed row."""
    good, other = (json.dumps({"text": "w3 w4", "licence": name}).encode() for name in ("mit", "gpl"))
    wrong = json.dumps({"text": 5, "licence": "gpl"}).encode()
    write_lines(tmp_path / "in.jsonl", [good, wrong, b'{"text": "w3", "licence": mit}', other, good])
    with pytest.raises(MatesError, match=r"line 3 cannot be read"):
        score_files(selector, tmp_path / "in.jsonl", tmp_path / "stop", allow="licence=mit", ratio=1.0)
    report = score_files(
        selector, tmp_path / "in.jsonl", tmp_path / "skip", allow="licence=mit", ratio=1.0, on_error="skip"
    )
    assert (report.rows, report.rows_not_allowed, report.lines_left_out) == (2, 2, 1)
    assert (tmp_path / "skip" / "in.jsonl").read_bytes() == (good + b"\n") * 2


@pytest.mark.parametrize(
    ("rule", "message", "status"),
    [
        ("license=mit", r"`allow` must name columns of the files, got 'license'", 1),
        ("licence=zlib", r"`allow` must leave rows, and none of 600 has zlib in `licence`", 1),
        ("meta=mit", r"one text or number a row, got dict in `meta`", 1),
        ("licence", r"`allow` must be ", 2),
    ],
)
def test_what_cannot_be_allowed_is_one_line(selector, corpus, tmp_path, capsys, rule, message, status):
    selector.save_pretrained(tmp_path / "selector")
    words = ["score", str(tmp_path / "selector"), str(corpus[0]), "--out", str(tmp_path / "out"), "--ratio", "0.3"]
    assert main([*words, "--allow", rule]) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message.replace("\\", "") in said[0]


def test_the_command_prints_what_was_left_out(selector, corpus, tmp_path, capsys):
    selector.save_pretrained(tmp_path / "selector")
    words = ["score", str(tmp_path / "selector"), str(corpus[0]), "--out", str(tmp_path / "out"), "--ratio", "0.3"]
    assert main([*words, "--allow", "licence=mit,apache-2.0"]) == 0
    assert "other rows, not scored (allowed: licence=apache-2.0, mit)" in capsys.readouterr().out
    kept = {row["id"]: row["licence"] for row in corpus[1]}
    assert {kept[i] for i in kept_ids(tmp_path / "out")} == {"mit", "apache-2.0"}
