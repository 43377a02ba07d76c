"""The scores of a corpus as the tasks of a cluster leave them: a file a task, with what it is of.

Where it is used: by engines that go through a corpus twice and share it out in the same way both times, such as
datatrove. In the first pass each task writes the scores of its rows; `task_cut` finds the cut over the files of all.
Trade-off: no column is carried from pass to pass and nothing is scored again, so a row is known by its task and its
place there.

Sign: > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.data.listing import located
from mates_hf.data.raw_texts import RawTexts
from mates_hf.data.scored_column import Conversations, ScoredColumn, TokenIds
from mates_hf.errors import MatesError
from mates_hf.selection.prefix import Keys, PieceScores
from mates_hf.selection.score_file import (
    read_facts,
    write_scores,
)

_KINDS: dict[str, type[ScoredColumn]] = {"text": RawTexts, "tokens": TokenIds, "messages": Conversations}
_NUM_LISTED = 8  # tasks in an error


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """What the score file of a task says of it.

    Attributes:
        rank: Number of the task.
        num_tasks: Number of tasks that the corpus was shared out to.
        selector: Digest of what scored; empty where the task had no row.
        source: Digest of what was scored, row by row.
        column: Name of the scored column.
        kind: What it holds: "text", "tokens" or "messages".
        label_std: Standard deviation of the labels' `influence`, the unit of a temperature.
        label_unit: "step" where labels price a step, "order" where they give an order.
        num_rows: Number of rows.
        num_tokens: Number of trained tokens.
    """

    rank: int
    num_tasks: int
    selector: str
    source: str
    column: str
    kind: str
    label_std: float
    label_unit: str
    num_rows: int = 0
    num_tokens: int = 0

    @classmethod
    def of(cls, found: Mapping[str, Any], path: str) -> TaskFacts:
        """What `read_facts` found; a `MatesError` for a score file that is not of a task."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not names <= set(found):
            missing = ", ".join(sorted(names - set(found)))
            raise MatesError(
                f"`{path}` must be the score file of a task, and does not say its {missing}. `scores_dir` must hold "
                "what `MatesScorer` wrote and nothing else."
            )
        values = {name: found[name] for name in names}
        return cls(**{**values, "label_std": float(found["label_std"])})

    def written(self) -> dict[str, str | int]:
        """Plain values by name, for `write_scores`; of NaN, too, equals are equal."""
        return {**dataclasses.asdict(self), "label_std": repr(self.label_std)}


def kind_of(column: ScoredColumn) -> str:
    """What a column holds, in the word of a score file."""
    if isinstance(column, TokenIds):
        return "tokens"
    return "messages" if isinstance(column, Conversations) else "text"


def hashed_column(name: str, kind: str) -> ScoredColumn:
    """A column that is read to be hashed alone, for which neither model nor tokenizer is needed."""
    return _KINDS.get(kind, RawTexts)(name, (name,))  # of a task without rows the kind is not known


def task_path(scores_dir: str, rank: int) -> str:
    """Path of the score file of a task."""
    return posixpath.join(scores_dir, f"{rank:05d}.parquet")


def source_digest(hashes: Sequence[Keys]) -> str:
    """Digest of what the rows of a task say, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in hashes:
        digest.update(part.astype("<u8").tobytes())
    return digest.hexdigest()


def write_task(scores_dir: str, facts: TaskFacts, parts: Sequence[PieceScores]) -> None:
    """Write the score file of a task, whole or not at all."""
    write_scores(task_path(scores_dir, facts.rank), parts, facts.written())


def check_room(scores_dir: str, num_tasks: int, selector: str) -> None:
    """Refuse to score into a folder that has scores of another selector or another number of tasks.

    Args:
        scores_dir: The folder, which need not be there.
        num_tasks: Number of tasks that the corpus is shared out to.
        selector: Digest of what will score.

    Raises:
        MatesError: the folder has such scores.
    """
    found = _ranks(scores_dir)
    if not found:
        return
    facts = read_task(scores_dir, found[0])
    if facts.num_tasks != num_tasks or (facts.selector and facts.selector != selector):
        what = f"of {facts.num_tasks} tasks" if facts.num_tasks != num_tasks else "of another selector"
        raise MatesError(
            f"`scores_dir` must be empty or of the same selector and of {num_tasks} tasks, and `{scores_dir}` holds "
            f"scores {what}. Take another folder, or delete that one."
        )


def read_task(scores_dir: str, rank: int) -> TaskFacts:
    """What the score file of a task says."""
    path = task_path(scores_dir, rank)
    return TaskFacts.of(read_facts(path), path)


def _ranks(scores_dir: str) -> list[int]:
    """Numbers of the tasks whose score files are there, ascending."""
    fs, root = located(scores_dir)
    if not fs.exists(root):
        return []
    fs.invalidate_cache(root)
    names = [posixpath.basename(path) for path in fs.ls(root, detail=False)]
    stems = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def read_tasks(scores_dir: str) -> list[TaskFacts]:
    """What the score files of all tasks say.

    Args:
        scores_dir: The folder.

    Returns:
        The facts of every task, by its number.

    Raises:
        FileNotFoundError: there is no score file.
        MatesError: a task's file is missing, or they are not all of one selector and one number of tasks.
    """
    found = [read_task(scores_dir, rank) for rank in _ranks(scores_dir)]
    if not found:
        raise FileNotFoundError(
            f"`scores_dir` must hold score files, and `{scores_dir}` has none. Run the pipeline with `MatesScorer` "
            "to its end first."
        )
    sizes = sorted({facts.num_tasks for facts in found})
    if len(sizes) > 1:
        raise MatesError(
            f"All scores must be of one number of tasks, and `{scores_dir}` holds some of {sizes[0]} and some of "
            f"{sizes[1]} tasks. Another `tasks=` shares out the files anew: score into a new folder."
        )
    missing = sorted(set(range(sizes[0])) - {facts.rank for facts in found})
    if missing:
        shown = ", ".join(map(str, missing[:_NUM_LISTED])) + (", ..." if len(missing) > _NUM_LISTED else "")
        raise MatesError(
            f"All {sizes[0]} tasks must have left their scores, and {len(missing)} of them have none in "
            f"`{scores_dir}` (tasks {shown}). Run the scoring pipeline again with the same `logging_dir` and "
            f"`tasks={sizes[0]}`: finished tasks are skipped."
        )
    if len({(facts.selector, facts.column, facts.kind) for facts in found if facts.num_rows}) > 1:
        raise MatesError(
            f"All scores must be of one selector and one column, and `{scores_dir}` holds those of several. Score "
            "into a new folder."
        )
    return found
