"""A filter by words: how much likelier a row's tokens are in the reference task than in the pool. No model is asked.

Where it is used: as the first thing to try, since it costs nothing, and as the rival that selecting while a model
trains must beat. It is the difference of two cross-entropies (Moore and Lewis, 2010), by bigram models that back off
to unigrams. A run counts the same next to its labels (`ngram.evidence`). In the lab of long runs it gained as much as
labels did (benchmark `horizon`).

Trade-off: it knows which words the reference has, and nothing of what a model knows already. Of a large pool a sample
is counted, and those rows rank a little below others (`num_counted`).

Shape suffixes: N rows, V vocabulary, H hash buckets.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mates_hf.data.arguments import described
from mates_hf.data.arrow import joined_rows
from mates_hf.data.pool import CandidatePool, rows_to_predict
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.data.scored_column import find_column
from mates_hf.data.weighted import WeightedRows, plain
from mates_hf.display import call, cut
from mates_hf.errors import MatesError
from mates_hf.prediction.artifacts import damaged, read_without_report, write_artifact
from mates_hf.prediction.ngram.arguments import check_buckets
from mates_hf.prediction.ngram.evidence import Passages, log_odds
from mates_hf.prediction.ngram.tables import Tables
from mates_hf.records import FloatArray, IntArray

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 2**21  # of a large pool that are counted, also by a run
SAMPLE_ROWS = 2**14  # in which they are, at most; reading a row may take a call of a collator
WHOLE = 4  # times a sample: a pool up to this size is counted whole
DISCOUNT = 1.0  # so that rows of the pool that are counted rank less below others
_AT_ONCE = 1_024  # rows that are read together
_FEWEST = 10  # passages or rows, below which none are kept out to judge by
_CLOSE = 0.6  # chance below which passages are hardly told from the pool
_SETTINGS = ("num_buckets", "bigrams", "seed", "separation", "reference")


def num_counted(num_rows: int, tokens_per_row: float) -> int:
    """How many rows of a pool to count: all of a small pool, a sample of a large one.

    A row that was counted ranks below others, because its rarest bigrams are its own. In a pool that is counted whole
    that is the same for all rows, and a sample is less than a quarter of its pool.

    Args:
        num_rows: Rows of the pool.
        tokens_per_row: Mean tokens of a row.

    Returns:
        A number of at most `num_rows`.
    """
    sample = min(math.ceil(SAMPLE_TOKENS / max(tokens_per_row, 1.0)), SAMPLE_ROWS)
    return num_rows if num_rows <= WHOLE * sample else sample


def background_rows(num_rows: int, read: Callable[[IntArray], TokenRows], rng: np.random.Generator) -> TokenRows:
    """Rows of the pool to count, drawn at random; the first of them say how long rows are.

    Args:
        num_rows: Rows of the pool.
        read: Reads rows by their places in the pool, (N,) int64 ascending.
        rng: Random generator that the draw alone reads.

    Returns:
        `num_counted` rows; of packed ones each document is a row.
    """
    drawn = rng.permutation(rng.choice(num_rows, min(num_rows, WHOLE * SAMPLE_ROWS), replace=False, shuffle=False))
    places = np.sort(drawn[:_AT_ONCE])
    rows = read(places)
    first = rows.unpacked()  # a document begins anew
    wanted = num_counted(num_rows, len(first.values) / max(len(places), 1))
    if wanted < len(places):
        return rows.take(np.searchsorted(places, np.sort(drawn[:wanted]))).unpacked()
    later = [read(np.sort(drawn[at : min(at + _AT_ONCE, wanted)])) for at in range(_AT_ONCE, wanted, _AT_ONCE)]
    return joined_rows([first, *(some.unpacked() for some in later)])


class MooreLewisModel:
    """Rank rows by the log-odds of their tokens, the reference task against the pool: a filter, no model needed.

    `MatesSelector(MooreLewisModel().fit(reference, dataset, tokenizer=tokenizer), tokenizer)` maps, filters and saves
    as with any other influence model. Mix random rows in (`random_share`): a filter alone forgets the rest.

    Args:
        num_buckets: Number of hash buckets of the bigram table, a power of two; 4 bytes each in memory and on disk.
        bigrams: Whether the token before counts as well, or each token alone.
        seed: Random seed of the rows that are counted, and of what is kept out to judge by.

    Raises:
        ValueError: an argument outside its range.
    """

    runs_beside_training = True  # numpy and kernels on tokens: no model, no device, no random stream
    fits_labels = False  # a run has none for it
    reads_spans = True  # `predict` scores rows in the buffers of others, without a copy

    def __init__(self, *, num_buckets: int = 2**20, bigrams: bool = True, seed: int = 0) -> None:
        check_buckets(num_buckets)
        if not isinstance(bigrams, bool):
            raise ValueError(f"`bigrams` must be True or False, got {bigrams!r}.")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        self.num_buckets, self.bigrams, self.seed = num_buckets, bigrams, seed
        self.separation = float("nan")
        self._reference: str | None = None
        self._tables: Tables | None = None  # float32, nats

    def __repr__(self) -> str:
        usual = {"num_buckets": 2**20, "bigrams": True, "seed": 0}
        changed = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        if self._tables is None:
            return f"{call(type(self).__name__, changed)}\n  not fitted"
        told = "too few passages to judge it" if math.isnan(self.separation) else f"separation {self.separation:.3f}"
        return f"{call(type(self).__name__, changed)}\n  fitted to {cut(self._reference or 'passages', 30)}: {told}"

    @property
    def origin(self) -> dict[str, Any]:
        """What a selector's card says of it; JSON values."""
        return {"label_unit": "log_odds", **({"reference": {"name": self._reference}} if self._reference else {})}

    @property
    def vocab_size(self) -> int:
        """Ids of this and above were never seen and have no effect."""
        return len(self._fitted().token)

    def _fitted(self) -> Tables:
        if self._tables is None:
            raise MatesError("The filter must be fitted first: call `fit(reference, background)`.")
        return self._tables

    def fit(
        self,
        reference: ReferenceTask | Passages,
        background: Any,
        *,
        tokenizer: Any = None,
        column: str | None = None,
        max_length: int | None = None,
    ) -> Self:
        """Count the passages and rows of the pool.

        A fifth of both is kept out first, and `separation` says how well what is counted tells these apart; then all
        are counted. Some seconds for each two million tokens, and tokenising where the pool is of texts.

        Args:
            reference: The task, or its rows. Where tokens have weights, one of weight 2 counts as two.
            background: The pool: a `datasets.Dataset` of tokens, texts or conversations, a `CandidatePool`,
                `TokenRows`, or a sequence of dicts with `input_ids`. Of one of more than eight million tokens, rows of
                about two million are drawn.
            tokenizer: Tokenizer of the reference's tokens; needed where the pool is of texts or conversations.
            column: Column of a dataset; None takes `input_ids`, else `text`, else `messages`.
            max_length: Number of tokens that a text is cut to; None leaves it whole.

        Returns:
            self, fitted.

        Raises:
            TypeError: the reference is no text, or the pool is of no such kind.
            ValueError: there is no token to count, no such column, or no tokenizer for it.
            UnsupportedSettingError: the pool is a stream.
        """
        passages = _passages(reference)
        rows = self._background(background, tokenizer, column, max_length)
        if not rows.num_targets.any():
            raise ValueError("`background` must have rows of two tokens or more, and has none.")
        self._reference = reference.name if isinstance(reference, ReferenceTask) else None
        self.separation = self._separation(passages, rows)
        if self.separation < _CLOSE:
            logger.warning(
                "Words hardly separate the reference from the pool: a passage that was not counted ranks above a row "
                "of the pool in %.0f%% of pairs (50%% is chance). A filter by words finds little here.",
                100 * self.separation,
            )  # fmt: skip
        self._tables = self._count(passages, rows)
        return self

    def _background(self, background: Any, tokenizer: Any, column: str | None, max_length: int | None) -> TokenRows:
        """Rows of the pool that are counted."""
        if isinstance(background, ReferenceTask):
            raise TypeError("`background` must be the pool, got a ReferenceTask: `fit(reference, background)`.")
        num, read = _opened(background, tokenizer, column, max_length)
        return background_rows(num, read, np.random.default_rng([self.seed, 0]))

    def _count(self, passages: Passages, rows: TokenRows) -> Tables:
        tokens, bigrams = log_odds(passages, rows, self.num_buckets, DISCOUNT)
        return (tokens.plus(bigrams) if self.bigrams else tokens).scaled(1.0)

    def _separation(self, passages: Passages, rows: TokenRows) -> float:
        """How often a passage ranks above a row of the pool, neither of them counted; NaN where there are few."""
        if min(len(passages), len(rows)) < _FEWEST:
            return float("nan")
        kept_out = [np.random.default_rng([self.seed, 1]).permutation(len(part)) % 5 == 0 for part in (passages, rows)]
        counted = self._count(passages.take(np.flatnonzero(~kept_out[0])), rows.take(np.flatnonzero(~kept_out[1])))
        inside = plain(passages.take(np.flatnonzero(kept_out[0])))
        assert isinstance(inside, TokenRows)
        mine, theirs = counted.score(inside), counted.score(rows.take(np.flatnonzero(kept_out[1])))
        above = np.searchsorted(np.sort(theirs), mine, side="left") + np.searchsorted(np.sort(theirs), mine, "right")
        return float(above.mean() / (2 * len(theirs)))

    def predict(self, dataset: Any) -> FloatArray:
        """Log-odds of each row.

        Args:
            dataset: `TokenRows`, `TokenSpans`, a candidate pool, or a dataset with `input_ids` (and `labels`).

        Returns:
            (N,) float32, the mean over a row's trained tokens in nats/token: above 0 is likelier in the reference than
            in the pool, higher is better; 0 where a row has no target.

        Raises:
            MatesError: the filter is not fitted.
        """
        rows = dataset if isinstance(dataset, TokenSpans) else rows_to_predict(dataset)
        return self._fitted().score(rows).astype(np.float32)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory.

        Args:
            path: The directory; it is created where it is missing. No text is among what is written, but which tokens
                the reference has can be read off.
        """
        settings = {
            "num_buckets": self.num_buckets, "bigrams": self.bigrams, "seed": self.seed, "reference": self._reference,
            "separation": None if math.isnan(self.separation) else self.separation,
        }  # fmt: skip
        tensors = {f"tables.{name}": table for name, table in vars(self._fitted()).items()}
        write_artifact(path, type(self).__name__, settings, tensors, None)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote; predictions are the same bit for bit. Nothing is unpickled.

        Args:
            path: The directory.

        Returns:
            The fitted filter.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, or was written in a newer format.
            MatesError: a file is damaged or was changed after it was written.
        """
        config, tensors = read_without_report(path, cls.__name__, _SETTINGS)
        try:
            model = cls(num_buckets=config["num_buckets"], bigrams=config["bigrams"], seed=config["seed"])
            model._tables = Tables.read(tensors, "tables", model.num_buckets)
            if config["separation"] is not None:
                model.separation = float(config["separation"])
            if not isinstance(config["reference"], (str, type(None))):
                raise ValueError("`reference` must be a name, and is not")
        except (TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        model._reference = config["reference"]
        return model


def _opened(
    background: Any, tokenizer: Any, column: str | None, max_length: int | None
) -> tuple[int, Callable[[IntArray], TokenRows]]:
    """How many rows a pool has, and what reads some of them."""
    import datasets

    if isinstance(background, datasets.Dataset):
        opened = find_column(background.features.arrow_schema, column, tokenizer, max_length).open(background)

        def read(ids: IntArray) -> TokenRows:
            rows = opened.rows(ids)
            assert isinstance(rows, TokenRows)
            return rows

        return len(background), read
    if isinstance(background, TokenRows):
        return len(background), background.take
    pool = background if isinstance(background, CandidatePool) else CandidatePool(background)
    ids_of = pool.candidate_ids
    return len(pool), lambda ids: pool.token_rows(ids_of[ids])


def _passages(reference: Any) -> Passages:
    """The rows of a reference with their weights."""
    if isinstance(reference, ReferenceTask):
        reference.text("a filter by words")
        found: Passages = reference.weighted_rows
        return found
    if not isinstance(reference, (TokenRows, WeightedRows)):
        raise TypeError(f"`reference` must be a ReferenceTask, got {described(reference)}.")
    return reference
