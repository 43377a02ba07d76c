"""NeMo Curator: a stage that scores the documents of a pipeline in whole batches.

Where it is used: `pipeline.add_stage(MatesScoreStage("selector/"))`, between a reader and a writer. Curator's own
`Score` calls a function for each document; a tokenizer wants many at once, so this is a stage of its own. Trade-off: a
stage sees one batch and never the corpus, so it adds columns and keeps every row. The exact share is taken from what
the pipeline wrote: with `mates_hf.integrations.ray.top_ratio`, which reads these columns.

Sign: influence > 0 helps, higher is better.
"""

from __future__ import annotations

from typing import Any

from mates_hf.selection.selector import MatesSelector
from mates_hf.selection.table_scorer import SCORE_COLUMNS, TableScorer, check_selector_path, with_scores

try:
    from nemo_curator.stages.base import ProcessingStage
    from nemo_curator.tasks import DocumentBatch
except ImportError as error:
    raise ImportError("`mates_hf.integrations.nemo_curator` needs it: `pip install nemo-curator`.") from error

__all__ = ["MatesScoreStage"]

_NEXT_TO_TOKENS = ("labels", "attention_mask")


class MatesScoreStage(ProcessingStage[DocumentBatch, DocumentBatch]):  # type: ignore[misc, unused-ignore]
    """Adds `influence`, `num_targets` and `content_hash` to the documents of each batch.

    `influence` (float32) is in the unit of the labels, higher is better; `num_targets` (int32) are trained tokens;
    `content_hash` (uint64) is equal for copies. Columns of these names are replaced. Rows keep their order, and a
    batch keeps its kind (Arrow or pandas).

    Args:
        selector_path: What `MatesSelector.from_pretrained` reads. A repository on the Hub is downloaded once a node.
        column: Column to score, in any form that `MatesSelector.map` takes.
        num_threads: Number of threads of a worker; as many as the stage's `resources` have processors. None is one a
            core.

    Raises:
        TypeError: `selector_path` is no path.
    """

    name = "mates_influence"

    def __init__(self, selector_path: str, *, column: str = "text", num_threads: int | None = 1) -> None:
        self.selector_path, self.column, self.num_threads = check_selector_path(selector_path), column, num_threads
        self._scorer: TableScorer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker: a path and settings."""
        return {**self.__dict__, "_scorer": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """Attributes and columns that a batch must have."""
        return ["data"], [self.column.partition(".")[0]]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Attributes and columns that a batch has afterwards."""
        return ["data"], [self.column.partition(".")[0], *SCORE_COLUMNS]

    def ray_stage_spec(self) -> dict[str, Any]:
        """A worker keeps what it has read, so it is an actor."""
        return {"is_actor_stage": True}

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Fill the Hub's cache, once a node.

        Args:
            node_info: Not used.
            worker_metadata: Not used.
        """
        MatesSelector.from_pretrained(self.selector_path)

    def setup(self, worker_metadata: Any = None) -> None:
        """Read the selector, once a worker.

        Args:
            worker_metadata: Not used.
        """
        self._scorer = TableScorer(self.selector_path, self.column, self.num_threads)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Score a batch.

        Args:
            task: The batch.

        Returns:
            The batch with its new columns.

        Raises:
            ValueError: a token is impossible.
            TypeError: the column holds neither texts, nor conversations, nor tokens.
        """
        if self._scorer is None:
            self.setup()
        assert self._scorer is not None
        data = task.data
        if hasattr(data, "iloc"):
            import pyarrow as pa

            read = [name for name in (*self.inputs()[1], *_NEXT_TO_TOKENS) if name in data.columns]
            scores = self._scorer.score(pa.Table.from_pandas(data[read], preserve_index=False))
            data = data.assign(**dict(zip(SCORE_COLUMNS, scores, strict=True)))
        else:
            data = with_scores(data, self._scorer)
        return DocumentBatch(
            dataset_name=task.dataset_name, data=data, _metadata=task._metadata, _stage_perf=task._stage_perf
        )
