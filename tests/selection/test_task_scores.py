"""Scores that tasks leave behind: the cut through all of them is that of the whole; what does not fit is an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mates_hf.errors import MatesError
from mates_hf.prediction.score import Predictions
from mates_hf.selection.budget import Budget, keep_rows
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.score_file import content_hashes
from mates_hf.selection.task_cut import TaskCut, find_task_cut, saved_task_cut
from mates_hf.selection.task_scores import (
    TaskFacts,
    check_room,
    hashed_column,
    read_task,
    source_digest,
    task_path,
    write_task,
)

SIZES = (40, 0, 300, 1, 159)  # rows of each task
NUM = sum(SIZES)
LABEL_STD = 0.25


def texts_of(num: int = NUM) -> pa.Table:
    return pa.table({"text": [f"text {i}" for i in range(num)]})


def scores_of(table: pa.Table, seed: int = 0) -> PieceScores:
    rng = np.random.default_rng(seed)
    num_targets = rng.integers(0, 9, table.num_rows).astype(np.int32)
    content = content_hashes(hashed_column("text", "text"), table)
    return PieceScores(rng.normal(size=table.num_rows).astype(np.float32), num_targets, content)


def write(folder: Path | str, sizes: tuple[int, ...] = SIZES, **changes: Any) -> tuple[pa.Table, PieceScores]:
    """Score files of tasks of these sizes; all texts and all scores."""
    table = texts_of(sum(sizes))
    scores = scores_of(table)
    begin = 0
    for rank, size in enumerate(sizes):
        part = PieceScores(*(column[begin : begin + size] for column in scores))
        given: dict[str, Any] = {
            "rank": rank, "num_tasks": len(sizes), "selector": "mine" if size else "", "column": "text",
            "kind": "text" if size else "", "label_std": LABEL_STD, "label_unit": "step",
            "source": source_digest([part.content]),
        }  # fmt: skip
        write_task(str(folder), TaskFacts(**{**given, **changes}), [part] if size else [])
        begin += size
    return table, scores


def kept_of(cut: TaskCut, table: pa.Table, sizes: tuple[int, ...] = SIZES, batch: int = 7) -> list[int]:
    """Rows that all tasks keep, by their number in the whole."""
    found, begin = [], 0
    for rank, size in enumerate(sizes):
        rows = cut.rows_of(rank, len(sizes))
        for start in range(0, size, batch):
            kept = rows.next_kept(table.slice(begin + start, min(batch, size - start)))
            found += (begin + start + np.flatnonzero(kept)).tolist()
        rows.finish()
        begin += size
    return found


@pytest.mark.parametrize(
    "budget",
    [{"ratio": 0.2}, {"k": 0}, {"k": NUM}, {"k": 37}, {"num_tokens": 333}, {"threshold": 0.5}],
    ids=str,
)
def test_the_tasks_keep_what_the_whole_keeps(tmp_path: Path, budget: dict[str, Any]) -> None:
    table, scores = write(tmp_path)
    cut = find_task_cut(str(tmp_path), Budget(**budget))
    want = keep_rows(Predictions(scores.influence, scores.num_targets), Budget(**budget), LABEL_STD)
    assert kept_of(cut, table) == want.tolist()
    assert cut.num_kept == len(want)
    assert kept_of(TaskCut.from_json(cut.to_json()), table, batch=1000) == want.tolist()


def test_chance_is_of_the_text_and_the_seed_and_not_of_the_tasks(tmp_path: Path) -> None:
    budget = Budget(k=100, random_share=0.5, temperature=1.0, seed=3)
    found = []
    for sizes in (SIZES, (NUM,), (250, 250)):
        folder = tmp_path / str(len(sizes))
        table, _ = write(folder, sizes)
        cut = find_task_cut(str(folder), budget)
        found.append(kept_of(cut, table, sizes))
        assert kept_of(TaskCut.from_json(cut.to_json()), table, sizes) == found[-1]
    assert len(found[0]) == 100
    assert found[0] == found[1] == found[2]


def test_nothing_to_keep_is_no_error(tmp_path: Path) -> None:
    table, _ = write(tmp_path, (0, 0))
    assert kept_of(find_task_cut(str(tmp_path), Budget(ratio=0.5)), table, (0, 0)) == []


def test_a_task_that_left_nothing_is_named_and_can_be_made_up_for(tmp_path: Path) -> None:
    write(tmp_path / "scores")
    with pytest.raises(FileNotFoundError, match="has none. Run the pipeline"):
        find_task_cut(str(tmp_path / "nothing"), Budget(ratio=0.2))
    shutil.move(task_path(str(tmp_path / "scores"), 3), tmp_path / "away")
    with pytest.raises(MatesError, match=r"1 of them have none in .* \(tasks 3\). Run .* `tasks=5`: finished"):
        find_task_cut(str(tmp_path / "scores"), Budget(ratio=0.2))
    shutil.move(tmp_path / "away", task_path(str(tmp_path / "scores"), 3))
    assert find_task_cut(str(tmp_path / "scores"), Budget(ratio=0.2)).num_kept == 100


def test_scores_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, (20, 30, 10))
    write(tmp_path, (20, 30))
    with pytest.raises(MatesError, match="some of 2 and some of 3 tasks.* score into a new folder"):
        find_task_cut(str(tmp_path), Budget(ratio=0.2))
    with pytest.raises(MatesError, match="of the same selector and of 3 tasks, and .* scores of 2 tasks"):
        check_room(str(tmp_path), 3, "mine")
    write(tmp_path / "new", (20, 30, 10))
    write(tmp_path / "new", (20,), num_tasks=3, selector="another")
    with pytest.raises(MatesError, match="of one selector and one column.* new folder"):
        find_task_cut(str(tmp_path / "new"), Budget(ratio=0.2))
    with pytest.raises(MatesError, match="scores of another selector. Take another folder"):
        check_room(str(tmp_path / "new"), 3, "mine")
    check_room(str(tmp_path / "new"), 3, "another")
    check_room(str(tmp_path / "empty"), 3, "mine")


def test_a_score_file_of_another_origin_is_named(tmp_path: Path) -> None:
    from mates_hf.selection.score_file import write_scores

    write_scores(str(tmp_path / "00000.parquet"), scores_of(texts_of(3)), {"selector": "mine", "source": "x"})
    with pytest.raises(MatesError, match="00000.parquet` must be the score file of a task, .* its column, kind"):
        read_task(str(tmp_path), 0)


def test_other_documents_are_an_error_and_never_another_selection(tmp_path: Path) -> None:
    table, _ = write(tmp_path, (50, 50))
    cut = find_task_cut(str(tmp_path), Budget(ratio=0.2))
    swapped = table.take([0, 2, 1, *range(3, 50)])
    with pytest.raises(MatesError, match="task 0 has as document 1 another one.*`tasks=2`"):
        cut.rows_of(0, 2).next_kept(swapped)
    rows = cut.rows_of(1, 2)
    rows.next_kept(table.slice(50, 49))
    with pytest.raises(MatesError, match="task 1 has 49 documents where 50 were scored"):
        rows.finish()
    rows.next_kept(table.slice(99, 1))
    with pytest.raises(MatesError, match="task 1 has more documents than the 50 that were scored"):
        rows.next_kept(table.slice(0, 1))
    with pytest.raises(MatesError, match="are of 2 where this pipeline has 4.*set `tasks=2`"):
        cut.rows_of(0, 4)


def test_a_cut_is_of_the_scores_it_was_found_by(tmp_path: Path) -> None:
    write(tmp_path, (50, 50))
    cut = saved_task_cut(str(tmp_path), Budget(ratio=0.2))
    assert saved_task_cut(str(tmp_path), Budget(ratio=0.2)).to_json() == cut.to_json()
    assert len(list(tmp_path.glob("cut-*.json"))) == 1
    write(tmp_path, (50, 50), source="changed")
    with pytest.raises(MatesError, match="scores of task 1 .* written again since. Find the cut again"):
        saved_task_cut(str(tmp_path), Budget(ratio=0.2)).rows_of(1, 2)
    saved_task_cut(str(tmp_path), Budget(ratio=0.2), anew=True).rows_of(1, 2)
    saved_task_cut(str(tmp_path), Budget(ratio=0.2)).rows_of(1, 2)
    write(tmp_path, (50, 50), source="again")
    for file in tmp_path.glob("cut-*.json"):  # the other way that the error names
        file.unlink()
    saved_task_cut(str(tmp_path), Budget(ratio=0.2)).rows_of(1, 2)


def test_scores_may_lie_where_fsspec_finds_them(tmp_path: Path) -> None:
    table, _ = write("memory://task-scores/a")
    write(tmp_path)
    cut = saved_task_cut("memory://task-scores/a", Budget(ratio=0.2))
    again = saved_task_cut("memory://task-scores/a", Budget(ratio=0.2))
    assert kept_of(again, table) == kept_of(find_task_cut(str(tmp_path), Budget(ratio=0.2)), table)
    assert "100 of 500 kept" in repr(cut)
    assert "memory://task-scores/a, 5 tasks" in cut._repr_html_()
