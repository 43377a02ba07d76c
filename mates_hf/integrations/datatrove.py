"""datatrove: score a corpus task by task, find the exact cut through all tasks, and filter by it.

Where it is used: in the pipelines of datatrove's executors (local, Slurm, Ray), which share out files over tasks, mark
finished ones and run the others again. `MatesScorer` leaves a score file a task, `top_ratio` finds the cut over all of
them, and `MatesFilter` keeps each task's rows by its own file.

Trade-off: documents go to the tokenizer in batches and come out in their order, so a batch of them waits in memory.
The scores of a task wait there as well, 16 bytes a document, until its last document has passed by; so a task that
died has none, and one that is marked as finished has all.

Sign: influence > 0 helps, higher is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mates_hf.prediction.score import INFLUENCE_COLUMN
from mates_hf.selection.budget import Budget
from mates_hf.selection.prefix import Mask, PieceScores
from mates_hf.selection.table_scorer import TableScorer, check_selector_path
from mates_hf.selection.task_cut import TaskCut, TaskRows, find_task_cut, saved_task_cut
from mates_hf.selection.task_scores import (
    TaskFacts,
    check_room,
    kind_of,
    source_digest,
    write_task,
)

try:
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.utils.batching import batched
    from datatrove.utils.typeshelper import StatHints
except ImportError as error:
    raise ImportError(
        "`mates_hf.integrations.datatrove` needs datatrove: `pip install mates-hf[datatrove]`."
    ) from error

__all__ = ["MatesCut", "MatesFilter", "MatesScorer", "top_ratio"]

TEXT = "text"  # the column that a document has as an attribute; all others are in its metadata
_NEXT_TO_TOKENS = ("labels", "attention_mask")


class MatesScorer(PipelineStep):  # type: ignore[misc, unused-ignore]
    """Predicts the influence of each document, and leaves the scores of its task in a folder.

    The influence is in `document.metadata["influence"]`, in the unit of the labels, higher is better. The score file
    of a task is written behind its last document and before datatrove marks the task as finished. It holds influence,
    number of trained tokens and a hash of what was scored: 16 bytes a document, which are in memory until then.

    Args:
        selector_path: What `MatesSelector.from_pretrained` reads, on a disk that all tasks see. The job carries this
            path, never the model.
        scores_dir: Folder of the score files, an fsspec path (local, `s3://`, `hf://`) that all tasks see.
        column: What is scored: `text` is the document's text, any other name is a key of its metadata with token ids
            (`labels` and `attention_mask` next to `input_ids` count as in training), a text or a conversation.
        batch_size: Number of documents that are scored at once.
        num_threads: Number of threads that tokenise and predict in a task; None is one a core.

    Raises:
        TypeError: `selector_path` is no path.
        ValueError: `batch_size` is below 1.
    """

    name = "MATES influence"
    type = "🎯 - SCORER"

    def __init__(
        self,
        selector_path: str,
        scores_dir: str,
        *,
        column: str = TEXT,
        batch_size: int = 1000,
        num_threads: int | None = 1,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
        self.selector_path, self.scores_dir = check_selector_path(selector_path), str(scores_dir)
        self.column, self.batch_size, self.num_threads = column, batch_size, num_threads
        self._scorer: TableScorer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a job carries: paths and settings."""
        return {**self.__dict__, "_scorer": None}

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score the documents of a task.

        Args:
            data: Documents, from the steps before.
            rank: Number of the task.
            world_size: Number of tasks.

        Yields:
            The documents, in their order.

        Raises:
            MatesError: `scores_dir` has scores of another selector or another number of tasks.
            ValueError: a document has no such column.
        """
        scorer = self._scorer = self._scorer or TableScorer(self.selector_path, self.column, self.num_threads)
        parts: list[PieceScores] = []
        decided: tuple[str, str] | None = None
        for batch in batched(data, self.batch_size):
            table = table_of(batch, self.column)
            decided = decided or self._decide(table.schema, world_size)
            with self.track_time("batch"):
                parts.append(scorer.score(table, sum(len(part.content) for part in parts)))
            self.stat_update(StatHints.total, value=len(batch), unit="batch")  # for each document: as long as scoring
            for document, influence in zip(batch, parts[-1].influence.tolist(), strict=True):
                document.metadata[INFLUENCE_COLUMN] = influence
                yield document
        selector, kind = decided or self._decide(None, world_size)
        facts = TaskFacts(
            rank=rank,
            num_tasks=world_size,
            selector=selector,
            source=source_digest([part.content for part in parts]),
            column=self.column,
            kind=kind,
            label_std=scorer.label_std,
            label_unit=scorer.label_unit or "",
        )
        write_task(self.scores_dir, facts, parts)

    def _decide(self, schema: Any, num_tasks: int) -> tuple[str, str]:
        """Digest of what scores, and what the column holds; empty for a task without documents (None)."""
        digest = kind = ""
        if schema is not None:
            assert self._scorer is not None
            scorer = self._scorer.scorer(schema)
            digest, kind = scorer.digest(), kind_of(scorer.column)
        check_room(self.scores_dir, num_tasks, digest)
        return digest, kind


def top_ratio(
    scores_dir: str,
    ratio: float | None = None,
    *,
    k: int | None = None,
    num_tokens: int | None = None,
    threshold: float | None = None,
    random_share: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
) -> TaskCut:
    """The exact cut through the scores of all tasks; exactly one of `ratio`, `k`, `num_tokens` and `threshold`.

    It keeps what `MatesSelector.filter` keeps of the whole corpus; which copies of a text at its edge are kept may
    differ. The score files are read a few times, one piece in memory at a time.

    Args:
        scores_dir: Folder that `MatesScorer` wrote the score files into.
        ratio: Share of the documents to keep, in (0, 1].
        k: Number of documents to keep.
        num_tokens: Largest number of trained tokens to keep.
        threshold: Lowest `influence` to keep. It means nothing for path labels, and a warning says so.
        random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
        temperature: Temperature of Gumbel noise in standard deviations of the labels; 0 takes the highest.
        seed: Random seed of the share, of the noise and of the order among equals.

    Returns:
        The cut, which `MatesFilter` takes.

    Raises:
        ValueError: the budget is impossible.
        FileNotFoundError: there is no score file.
        MatesError: a task's file is missing, or they are not all of one selector and one number of tasks.
    """
    budget = Budget(
        ratio=ratio, k=k, num_tokens=num_tokens, threshold=threshold, random_share=random_share,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    return find_task_cut(str(scores_dir), budget)


class MatesCut(PipelineStep):  # type: ignore[misc, unused-ignore]
    """Finds the cut through all tasks' scores, and keeps it next to them for `MatesFilter`.

    The only step of a pipeline of one task, between scoring and filtering, where both are submitted before anything is
    scored (`depends=` of Slurm). `MatesFilter(scores_dir, ...)` of the same budget reads what it found.

    Args:
        scores_dir: Folder of the score files.
        ratio: Share of the documents to keep, in (0, 1].
        **budget: Further arguments of `top_ratio`.
    """

    name = "MATES cut"
    type = "🎯 - SCORER"

    def __init__(self, scores_dir: str, ratio: float | None = None, **budget: Any) -> None:
        super().__init__()
        self.scores_dir, self.budget = str(scores_dir), Budget(ratio=ratio, **budget)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Find the cut.

        Args:
            data: Documents of steps before, which pass by.
            rank: Number of the task; only the first finds the cut.
            world_size: Number of tasks.

        Yields:
            The documents.
        """
        if rank == 0:
            cut = saved_task_cut(self.scores_dir, self.budget, anew=True).cut
            self.stat_update("kept", value=cut.num_kept)
        yield from data or ()


class MatesFilter(BaseFilter):  # type: ignore[misc, unused-ignore]
    """Keeps the documents that help most, by the score file of each task and the place of a document in it.

    The second pass over a corpus: the same reader, files and `tasks=` as in the pass that scored. Nothing is scored
    again. What each document says is compared with what was scored in its place.

    Args:
        scores: What `top_ratio` found; or the folder of the score files, with a budget, where they are not there yet
            when the job is submitted. Then the cut is read that `MatesCut` kept. Without it, each task that starts
            before one is kept goes through all scores by itself.
        ratio: Share of the documents to keep, in (0, 1], with a folder.
        exclusion_writer: Writer of the documents that are not kept.
        batch_size: Number of documents that are compared at once.
        **budget: Further arguments of `top_ratio`, with a folder.

    Raises:
        ValueError: there is no budget for a folder, or one besides a cut.
    """

    name = "MATES filter"

    def __init__(
        self,
        scores: TaskCut | str,
        ratio: float | None = None,
        *,
        exclusion_writer: Any = None,
        batch_size: int = 1000,
        **budget: Any,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        is_cut = isinstance(scores, TaskCut)
        if is_cut and (ratio is not None or budget):
            raise ValueError("A budget must not be given with a cut, which has its own. Leave it out.")
        self.scores: TaskCut | str = scores if is_cut else str(scores)
        self.budget = scores.cut.budget if isinstance(scores, TaskCut) else Budget(ratio=ratio, **budget)
        self._rows: TaskRows | None = None
        self._column = TEXT

    def __getstate__(self) -> dict[str, Any]:
        """What a job carries: the cut, or a path and the budget."""
        return {**self.__dict__, "_rows": None}

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Keep documents of a task.

        Args:
            data: Documents, from the reader.
            rank: Number of the task.
            world_size: Number of tasks.

        Yields:
            The documents that are kept, in their order.

        Raises:
            MatesError: these are not the documents that were scored, or not in this order.
        """
        found = saved_task_cut(self.scores, self.budget) if isinstance(self.scores, str) else self.scores
        self._rows, self._column = found.rows_of(rank, world_size), found.column
        yield from super().run(data, rank, world_size)
        self._rows.finish()

    def filter(self, doc: Any) -> bool | tuple[bool, str]:
        """Whether the next document of the task is kept.

        Args:
            doc: The document.

        Returns:
            True, or False with the reason.
        """
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: Sequence[Any]) -> list[bool | tuple[bool, str]]:
        """Whether the next documents of the task are kept.

        Args:
            batch: The documents.

        Returns:
            True, or False with the reason, of each.
        """
        assert self._rows is not None
        kept: Mask = self._rows.next_kept(table_of(batch, self._column))
        return [True if one else (False, "low_influence") for one in kept.tolist()]


def table_of(documents: Sequence[Any], column: str) -> Any:
    """`pyarrow.Table` of what is scored of documents.

    Args:
        documents: datatrove's documents.
        column: `text`, or a key of their metadata.

    Returns:
        The table, with `labels` and `attention_mask` next to `input_ids` where the first document has them.

    Raises:
        ValueError: a document has no such key.
    """
    import pyarrow as pa

    if column == TEXT:
        return pa.table({TEXT: pa.array([document.text for document in documents], pa.large_string())})
    beside = _NEXT_TO_TOKENS if column == "input_ids" else ()
    names = [column, *(name for name in beside if name in documents[0].metadata)]
    for document in documents:
        missing = next((name for name in names if name not in document.metadata), None)
        if missing is not None:
            raise ValueError(
                f"Every document's metadata must have `{missing}`, and document {document.id!r} has "
                f"{sorted(document.metadata)}. Pass the key that holds what is scored as `column=`, or `text`."
            )
    return pa.table({name: pa.array([document.metadata[name] for document in documents]) for name in names})
