"""The exact cut through the scores of all tasks of a cluster, and the rows that each of them keeps.

Where it is used: by engines that go through a corpus twice, such as datatrove; `task_scores` has the score files that
the first pass leaves. In the second pass each task keeps its rows by its own file and by their places. Trade-off: what
each row says is hashed in both passes, so that another division into tasks is an error and never another selection.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mates_hf.data.listing import located
from mates_hf.display import card, html_card
from mates_hf.errors import MatesError
from mates_hf.selection.budget import Budget, asked_for
from mates_hf.selection.cut import Cut, Order, find_cut
from mates_hf.selection.prefix import Mask, PieceScores, Prefix
from mates_hf.selection.score_file import content_hashes, open_scores, written_whole_at
from mates_hf.selection.task_scores import TaskFacts, hashed_column, read_task, read_tasks, task_path

FORMAT_VERSION = 1

# --- the rows of a task ---


class TaskRows:
    """The rows of a task in their order: what they say, and which are kept.

    Args:
        facts: What the task's score file says.
        pieces: Its scores and which rows of them are kept, some at a time.
    """

    def __init__(self, facts: TaskFacts, pieces: Iterator[tuple[PieceScores, Mask]]) -> None:
        self._facts, self._pieces = facts, pieces
        self._column = hashed_column(facts.column, facts.kind)
        self._hashes, self._kept = np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        self._num_read = 0

    def next_kept(self, table: Any) -> Mask:
        """Which of the next rows are kept.

        Args:
            table: `pyarrow.Table` of the next rows of the task.

        Returns:
            (N,) bool, True where a row is kept.

        Raises:
            MatesError: these are not the rows that were scored.
        """
        num = table.num_rows
        while len(self._hashes) < num:
            scores, kept = next(self._pieces, (None, None))
            if scores is None or kept is None:
                raise self._error(f"has more documents than the {self._facts.num_rows:,} that were scored")
            self._hashes = np.concatenate([self._hashes, scores.content])
            self._kept = np.concatenate([self._kept, kept])
        found = content_hashes(self._column, table)
        wrong = np.flatnonzero(found != self._hashes[:num])
        if len(wrong):
            row = self._num_read + int(wrong[0])
            raise self._error(f"has as document {row:,} another one than was scored in its place")
        kept, self._kept, self._hashes = self._kept[:num], self._kept[num:], self._hashes[num:]
        self._num_read += num
        return kept

    def finish(self) -> None:
        """Raise a `MatesError` where rows that were scored did not come by."""
        if self._num_read != self._facts.num_rows:
            raise self._error(f"has {self._num_read:,} documents where {self._facts.num_rows:,} were scored")

    def _error(self, what: str) -> MatesError:
        return MatesError(
            f"Both passes must read the same documents in the same order, and task {self._facts.rank} {what}. Give "
            f"both the same reader with the same files and settings, and `tasks={self._facts.num_tasks}`; another "
            "`tasks=` shares out the files anew. If the files have changed, score them again into a new folder."
        )


# --- the cut ---


@dataclasses.dataclass(frozen=True)
class TaskCut:
    """Which rows of every task are kept, as `top_ratio` finds it.

    Attributes:
        scores_dir: Folder of the score files.
        cut: The cut through their pieces.
        first_pieces: Number of the first piece of each task.
        tasks: What the score file of each task said.
    """

    scores_dir: str
    cut: Cut
    first_pieces: tuple[int, ...]
    tasks: tuple[TaskFacts, ...]

    def __repr__(self) -> str:
        return card("TaskCut", self._facts())

    def _repr_html_(self) -> str:
        return html_card("TaskCut", self._facts())

    def _facts(self) -> dict[str, str]:
        cut = self.cut
        return {
            "asked for": asked_for(cut.budget),
            "rows": f"{cut.num_kept:,} of {cut.num_rows:,} kept",
            "tokens": f"{cut.num_tokens_kept:,} of {cut.num_tokens:,} kept",
            "scores": f"{self.scores_dir}, {len(self.tasks):,} tasks",
        }

    @property
    def num_kept(self) -> int:
        """Number of rows that are kept."""
        return self.cut.num_kept

    @property
    def column(self) -> str:
        """Name of the column that was scored."""
        return self.tasks[0].column

    def rows_of(self, rank: int, num_tasks: int) -> TaskRows:
        """The rows of a task and which of them are kept.

        Args:
            rank: Number of the task.
            num_tasks: Number of tasks that the corpus is shared out to.

        Returns:
            The rows, to be asked for from the first to the last.

        Raises:
            MatesError: the task's score file is not the one that the cut was found by.
        """
        if num_tasks != len(self.tasks):
            raise MatesError(
                f"Both passes must have the same number of tasks, and the scores in `{self.scores_dir}` are of "
                f"{len(self.tasks)} where this pipeline has {num_tasks}. Another `tasks=` shares out the files anew: "
                f"set `tasks={len(self.tasks)}`."
            )
        facts = read_task(self.scores_dir, rank)
        if facts.written() != self.tasks[rank].written():
            raise MatesError(
                f"The scores of task {rank} in `{self.scores_dir}` must be those that the cut was found by, and were "
                "written again since. Find the cut again: `top_ratio(scores_dir, ...)`, or delete `cut-*.json` there."
            )
        first = self.first_pieces[rank]
        reads = enumerate(open_scores(task_path(self.scores_dir, rank)), first)
        return TaskRows(
            facts, ((scores, self.cut.mask(i, scores)) for i, scores in ((i, read()) for i, read in reads))
        )

    def to_json(self) -> str:
        """All of it as JSON."""
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, default=lambda array: array.tolist())

    @classmethod
    def from_json(cls, text: str) -> TaskCut:
        """What `to_json` wrote."""
        value = json.loads(text)
        found = value["cut"]
        budget, order = Budget(**found["budget"]), Order(**found["order"])
        best, drawn = (_prefix_of(found[name]) for name in ("best", "drawn"))
        fitting = {int(piece): np.array(rows, np.int64) for piece, rows in found["fitting"].items()}
        counts = {name: found[name] for name in ("num_rows", "num_tokens", "num_kept", "num_tokens_kept")}
        cut = Cut(budget, order, best, drawn, found["most"], fitting, **counts)
        tasks = tuple(TaskFacts(**facts) for facts in value["tasks"])
        return cls(value["scores_dir"], cut, tuple(value["first_pieces"]), tasks)


def _prefix_of(value: Mapping[str, Any] | None) -> Prefix | None:
    if value is None:
        return None
    allowed = {int(piece): amount for piece, amount in value["allowed"].items()}
    return Prefix(value["key"], allowed, value["amount"])


def find_task_cut(scores_dir: str, budget: Budget) -> TaskCut:
    """The exact cut through the score files of all tasks.

    Args:
        scores_dir: The folder.
        budget: How much to keep.

    Returns:
        The cut.

    Raises:
        FileNotFoundError: there is no score file.
        MatesError: a task's file is missing, or they are not all of one selector and one number of tasks.
        ValueError: `k` is more than there are rows, or a temperature whose unit the fit did not record.
    """
    tasks = read_tasks(scores_dir)
    pieces: list[Callable[[], PieceScores]] = []
    first_pieces = []
    for facts in tasks:
        first_pieces.append(len(pieces))
        pieces += open_scores(task_path(scores_dir, facts.rank))
    scored = next((facts for facts in tasks if facts.num_rows), tasks[0])
    cut = find_cut(pieces, budget.of_labels(scored.label_unit), scored.label_std)
    return TaskCut(scores_dir, cut, tuple(first_pieces), tuple(tasks))


def _saved_path(scores_dir: str, budget: Budget) -> str:
    """Where the cut of a budget is kept."""
    asked = json.dumps(dataclasses.asdict(dataclasses.replace(budget, order_only=False)), sort_keys=True)
    return posixpath.join(scores_dir, f"cut-{hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}.json")


def saved_task_cut(scores_dir: str, budget: Budget, *, anew: bool = False) -> TaskCut:
    """The cut that is kept next to the score files; where there is none, it is found and kept.

    Args:
        scores_dir: The folder.
        budget: How much to keep.
        anew: Whether to find it again where it is kept.

    Returns:
        The cut.
    """
    path = _saved_path(scores_dir, budget)
    fs, name = located(path)
    fs.invalidate_cache()
    if not anew and fs.exists(name):
        return TaskCut.from_json(fs.cat_file(name).decode())
    found = find_task_cut(scores_dir, budget)
    with written_whole_at(path) as file:
        file.write_text(found.to_json())
    return found
