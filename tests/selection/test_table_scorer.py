"""A saved selector that scores Arrow tables: as `MatesSelector.score` does, and nothing of the process is changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from mates_hf import MatesSelector
from mates_hf.selection.table_scorer import SCORE_COLUMNS, TableScorer, check_selector_path, with_scores
from tests.selection.selector_kit import fit_model, make_lists, with_template

LISTS = make_lists(60, seed=5)
TEXTS = [" ".join(f"w{i}" for i in ids) for ids in LISTS]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
COLUMNS = {
    "text": TEXTS,
    "input_ids": LISTS,
    "messages": [[{"role": "user", "content": text}] for text in TEXTS],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("selector")
    MatesSelector(fit_model(), with_template(tiny_tokenizer, TEMPLATE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("column", list(COLUMNS))
def test_a_table_is_scored_as_a_dataset_is(saved: Path, column: str) -> None:
    table = pa.table({"other": list(range(60)), column: COLUMNS[column]})
    want = MatesSelector.from_pretrained(saved).score(Dataset(table))
    scorer = TableScorer(str(saved))
    parts = [scorer.score(table.slice(begin, 25)) for begin in range(0, 75, 25)]  # the last one has no rows
    assert np.array_equal(np.concatenate([part.influence for part in parts]), want.influence)
    assert np.array_equal(np.concatenate([part.num_targets for part in parts]), want.num_targets)
    contents = np.concatenate([part.content for part in parts])
    assert np.array_equal(contents, scorer.score(table).content)
    assert len(set(contents.tolist())) == 60
    assert scorer.label_std == fit_model().report.label_std


def test_the_distilled_model_scores_tables_too(tmp_path: Path, saved: Path) -> None:
    fast = MatesSelector.from_pretrained(saved).distil(TEXTS, num_buckets=2**8)
    fast.save_pretrained(tmp_path)
    table = pa.table({"text": TEXTS})
    assert np.array_equal(TableScorer(str(tmp_path)).score(table).influence, fast.score(Dataset(table)).influence)


def test_columns_of_these_names_are_replaced(saved: Path) -> None:
    table = pa.table({"influence": ["old"] * 60, "text": TEXTS, "content": ["theirs"] * 60})
    found = with_scores(table, TableScorer(str(saved)))
    assert found.column_names == ["text", "content", *SCORE_COLUMNS]
    assert [str(found.schema.field(name).type) for name in SCORE_COLUMNS] == ["float", "int32", "uint64"]
    empty = with_scores(table.slice(0, 0), TableScorer(str(saved)))
    assert empty.schema == found.schema
    with pytest.raises(TypeError, match="must be Arrow tables, got dict"):
        with_scores({"text": TEXTS}, TableScorer(str(saved)))


def test_the_tokenizer_keeps_to_one_thread_and_the_variable_is_put_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    scorer = TableScorer(str(saved))
    tokenizer = scorer.scorer(pa.schema([("text", pa.string())])).column.tokenizer
    original = type(tokenizer).__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    for before, num_threads, want in (("true", 1, "false"), (None, 1, "false"), ("true", None, "true")):
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        seen.clear()
        TableScorer(str(saved), num_threads=num_threads).score(pa.table({"text": TEXTS}))
        assert seen == [want]
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_what_cannot_be_sent_to_a_worker_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"got MatesSelector. Write .*`selector.save_pretrained\(path\)`"):
        check_selector_path(MatesSelector.from_pretrained(saved))
    assert check_selector_path(saved) == str(saved)
    assert check_selector_path("me/my-influence-model") == "me/my-influence-model"
    monkeypatch.chdir(saved.parent)
    assert check_selector_path(saved.name) == str(saved)  # a worker starts elsewhere
    with pytest.raises(ValueError, match="`num_threads` must be at least 1"):
        TableScorer(str(saved), num_threads=0)
    with pytest.raises(ValueError, match=r"a column `txt` to score, got the columns \['text'\]"):
        TableScorer(str(saved), "txt").score(pa.table({"text": TEXTS}))
