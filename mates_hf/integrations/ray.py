"""Ray Data: score the rows of a dataset in its batches, and keep exactly the best of them.

Where it is used: `dataset.map_batches(score_batch("selector/"), batch_format="pyarrow", ...)` adds columns, and
`top_ratio(dataset, 0.2)` keeps rows by them. Trade-off: Ray decides what a block and a batch is, and may decide anew
in each pass, so nothing here depends on it: a row is known by what it says.

A dataset of Ray is a plan that each pass carries out again. Write what was scored, or `materialize()` it, before it is
filtered: `top_ratio` goes through it twice.

Sign: influence > 0 helps, higher is better.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from mates_hf.selection.budget import Budget
from mates_hf.selection.content_rule import ContentRule, content_rule
from mates_hf.selection.cut import find_cut
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.table_scorer import SCORE_COLUMNS, TableScorer, check_selector_path, with_scores

__all__ = ["score_batch", "top_ratio"]

logger = logging.getLogger(__name__)

_BLOCKS_A_TASK = 32  # of the small columns: half a megabyte each, where blocks of texts have Ray's usual size

Found = TypeVar("Found")


def score_batch(selector_path: str, *, column: str | None = None, num_threads: int | None = 1) -> type:
    """What `map_batches` scores with: a class, of which each actor makes one object and so reads the selector once.

    ```python
    actors = ray.data.ActorPoolStrategy(size=8)
    scored = dataset.map_batches(score_batch("selector/"), batch_format="pyarrow", batch_size=1000, compute=actors)
    ```

    It adds the columns `influence` (float32, in the unit of the labels, higher is better), `num_targets` (int32
    trained tokens) and `content_hash` (uint64, equal for copies); columns of these names are replaced.

    Args:
        selector_path: What `MatesSelector.from_pretrained` reads, on a disk that all nodes see.
        column: Column to score, in any form that `MatesSelector.map` takes; None takes `input_ids`, else `text`, else
            `messages`.
        num_threads: Number of threads of an actor; as many as its `num_cpus`. None is one a core.

    Returns:
        The class. Its objects take a `pyarrow.Table` and return one.

    Raises:
        TypeError: `selector_path` is no path.
    """
    path = check_selector_path(selector_path)

    class MatesScores:
        """Adds the scores of each batch."""

        def __init__(self) -> None:
            self._scorer = TableScorer(path, column, num_threads)

        def __call__(self, table: Any) -> Any:
            return with_scores(table, self._scorer)

    return MatesScores


def top_ratio(
    dataset: Any,
    ratio: float | None = None,
    *,
    k: int | None = None,
    num_tokens: int | None = None,
    threshold: float | None = None,
    random_share: float = 0.0,
    seed: int = 0,
) -> Any:
    """The rows that help most, exactly as many as are asked for; one of `ratio`, `k`, `num_tokens` and `threshold`.

    It keeps what `MatesSelector.filter` keeps; which copies of a text at its edge are kept may differ. The three small
    columns are brought into Ray's object store, 16 bytes a row over all nodes, and counted where they lie. The result
    is a plan like any other dataset; of a text at the edge with several copies it reads the dataset once more.

    Args:
        dataset: A dataset that was scored, with the columns of `score_batch`, best as it was written or
            `materialize()`d.
        ratio: Share of the rows to keep, in (0, 1].
        k: Number of rows to keep.
        num_tokens: Largest number of trained tokens to keep.
        threshold: Lowest `influence` to keep. It means nothing for path labels.
        random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
        seed: Random seed of the share and of the order among equals.

    Returns:
        A dataset of the kept rows, columns unchanged.

    Raises:
        ValueError: the budget is impossible, or the dataset has no scores.
        InfluenceError: a score is not finite.
    """
    budget = Budget(ratio=ratio, k=k, num_tokens=num_tokens, threshold=threshold, random_share=random_share, seed=seed)
    names = dataset.columns() or []
    missing = [name for name in SCORE_COLUMNS if name not in names]
    if missing and names:
        raise ValueError(
            f"The dataset must have {', '.join(SCORE_COLUMNS)}, and has no {', '.join(missing)}. Score it first: "
            '`map_batches(score_batch("selector/"), batch_format="pyarrow", compute=ActorPoolStrategy(size=8))`.'
        )
    if not names:  # no row, and so no schema
        return dataset
    pieces = _Pieces(dataset.select_columns(list(SCORE_COLUMNS)).materialize().to_arrow_refs())
    cut = find_cut(pieces, budget)
    rule = content_rule(cut, pieces)
    logger.info("Keeping %d of %d rows, and %d tokens.", cut.num_kept, cut.num_rows, cut.num_tokens_kept)
    kept = dataset.map_batches(_Keep(rule), batch_format="pyarrow")
    if not rule.some:
        return kept
    copies = dataset.map_batches(_Copies(*rule.some), batch_format="pyarrow")
    if len(rule.some) == 1:
        return kept.union(*(copies.limit(num) for num in rule.some.values()))
    copies = copies.materialize()  # for a budget of tokens there may be some twenty
    each = (copies.map_batches(_Copies(text), batch_format="pyarrow").limit(num) for text, num in rule.some.items())
    return kept.union(*each)


class _Keep:
    """Keeps the rows of a batch by a rule."""

    def __init__(self, rule: ContentRule) -> None:
        self._rule, self.__name__ = rule, "mates_top_ratio"

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        return table.filter(pa.array(self._rule.mask(_scores_of(table))))


class _Copies:
    """Keeps the copies of some texts, which their hashes name."""

    def __init__(self, *contents: int) -> None:
        self._contents, self.__name__ = np.array(contents, np.uint64), "mates_copies"

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        return table.filter(pa.array(np.isin(_scores_of(table).content, self._contents)))


def _scores_of(table: Any) -> PieceScores:
    """The scores that a table's columns hold."""
    if not table.num_rows:  # a block without rows may come without columns
        return PieceScores(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.uint64))
    influence, num_targets, content = (table.column(name).to_numpy() for name in SCORE_COLUMNS)
    return PieceScores(influence.astype(np.float32), num_targets.astype(np.int32), content.astype(np.uint64))


class _Pieces(Sequence[Callable[[], PieceScores]]):
    """The blocks of the small columns, which stay where they are: functions are sent to them.

    Args:
        blocks: References of `pyarrow.Table`s.
    """

    def __init__(self, blocks: list[Any]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, number: int) -> Callable[[], PieceScores]: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Callable[[], PieceScores]]: ...

    def __getitem__(self, number: int | slice) -> Any:
        import ray

        if isinstance(number, slice):
            return _Pieces(self._blocks[number])
        return lambda: _scores_of(ray.get(self._blocks[number]))

    def each(self, function: Callable[[int, PieceScores], Found]) -> Iterator[Found]:
        """What a function finds in each block, in their order; some blocks to a task."""
        import ray

        task, sent = ray.remote(_found_in), ray.put(function)
        starts = range(0, len(self._blocks), _BLOCKS_A_TASK)
        found = [task.remote(sent, begin, *self._blocks[begin : begin + _BLOCKS_A_TASK]) for begin in starts]
        for part in found:
            yield from ray.get(part)


def _found_in(function: Callable[[int, PieceScores], Found], first: int, *tables: Any) -> list[Found]:
    return [function(first + i, _scores_of(table)) for i, table in enumerate(tables)]
