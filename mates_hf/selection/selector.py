"""`MatesSelector`: a fitted data influence model as a filter for datasets, on disk and on the Hub.

Where it is used: by people who choose data before a run or outside of a Trainer, with any fitted influence model. A
round inside the Trainer selects by `select_stage` instead. Trade-off: `map` goes through `datasets`, its cache
and its processes, and writes a column; `filter` and `select` score in place and write nothing, and score nothing that
this selector has scored before (see `dataset_input`).

Sign: influence > 0 helps, higher is better. Shape suffix: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin

from mates_hf.data.allowed import allowed_part
from mates_hf.data.arguments import check_influence_model
from mates_hf.data.raw_texts import find_text_column
from mates_hf.data.text_spans import as_text_list
from mates_hf.display import card, html_card
from mates_hf.prediction.score import Predictions
from mates_hf.records import FitReport
from mates_hf.selection.budget import Budget
from mates_hf.selection.card import TAGS, label_unit, selector_facts, write_card
from mates_hf.selection.dataset_input import DatasetInput, Scored
from mates_hf.selection.inputs import Fitted, Splits, open_input
from mates_hf.selection.options import SHARD_ROWS, Options, bounds_of, one_column
from mates_hf.selection.saved import open_selector, write_selector
from mates_hf.selection.streaming import StreamInput

if TYPE_CHECKING:
    from typing_extensions import Self

_NO_LENGTH = 10**9  # a tokenizer without a maximum says 10**30


class MatesSelector(ModelHubMixin, library_name="mates_hf", tags=list(TAGS)):
    """Predict the influence of any dataset's rows, and keep those that help.

    A text becomes exactly `tokenizer(text)`, truncated, never packed; every token but the first is a target. A
    conversation (`messages`) becomes the text that the tokenizer's chat template makes of it, and that text becomes
    tokens in the same way. Token columns are used as they are (next to `input_ids`, columns `labels` and
    `attention_mask` count as in training).

    Args:
        influence_model: A fitted influence model: any object with `predict`, `report` and `save_pretrained` (see
            "Adding an influence model" in CONTRIBUTING.md). One whose predictions depend on more than what it saves
            needs a `digest()`.
        tokenizer: Tokenizer of the tokens the model was fitted on; None takes its own where it has one, and otherwise
            leaves token columns only.
        max_length: Number of tokens that a text is cut to; None takes the tokenizer's maximum where it has one.
        origin: JSON values for the card: `model`, `step`, `reference`, `num_probed`, `fidelity`, `datasets`,
            `license`.

    Raises:
        MatesError: the influence model is not fitted.
        ValueError: the model has seen ids that the tokenizer does not have, or `max_length` is below 1.
    """

    def __init__(
        self,
        influence_model: Any,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        check_influence_model(influence_model, "predict")
        self.influence_model = influence_model
        self._report: FitReport | None = getattr(influence_model, "report", None)  # of an unfitted one: an error
        self.tokenizer = tokenizer if tokenizer is not None else getattr(influence_model, "tokenizer", None)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"`max_length` must be a whole number of at least 1, or None, got {max_length!r}.")
        self.origin = {**getattr(influence_model, "origin", {}), **(origin or {})}
        if self.tokenizer is not None:
            if max_length is None and self.tokenizer.model_max_length < _NO_LENGTH:
                max_length = int(self.tokenizer.model_max_length)
            _check_tokenizer(self.tokenizer, influence_model)
        self.max_length = max_length
        self._scored = Scored()

    def __repr__(self) -> str:
        return card("MatesSelector", selector_facts(self))

    def _repr_html_(self) -> str:
        return html_card("MatesSelector", selector_facts(self))

    # --- scoring ---

    def map(
        self,
        dataset: Any,
        *,
        column: str | None = None,
        text_column: str | None = None,
        batch_size: int = 1000,
        num_proc: int | None = None,
        shards_dir: str | Path | None = None,
        shard_rows: int = SHARD_ROWS,
        **kwargs: Any,
    ) -> Any:
        """The dataset with a float32 `influence` column, in the unit of the labels: higher is better.

        Rows keep their order, columns and format; a column of that name is replaced, with a warning where it is not
        this selector's. A row without a target gets the model's intercept; these are counted in the log. The cache of
        `datasets` is keyed by the dataset and all that a prediction depends on, so that a second process finds it and
        a changed weight does not.

        Only the new column is written (with the number of targets, for a later `filter`: 8 bytes a row). The other
        columns stay in the files where they are: keep these files, or `save_to_disk` the result. Rows that were
        shuffled or picked are first written in their new order.

        Args:
            dataset: `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`; streams are scored as read.
            column: Column of texts, token ids or conversations (lists of `role` and `content`); `meta.text` names one
                inside of a struct. None takes `input_ids`, else `text`, else `messages`.
            text_column: Another name for `column`; pass only one of the two.
            batch_size: Number of rows that are scored at once.
            num_proc: Number of worker processes, of one thread each; None scores in this process on all cores.
            shards_dir: Folder for finished parts of `shard_rows` rows, so that a killed run resumes where it stopped.
            shard_rows: Number of rows in each part that is kept in `shards_dir`.
            **kwargs: Further arguments of `datasets.Dataset.map`, which writes the new column. Those that would change
                what is computed raise an error. With splits, `cache_file_names` is one more.

        Returns:
            A dataset of the same kind.

        Raises:
            ValueError: there is no such column (names those there are), or a token is impossible.
            TypeError: the column holds neither texts nor tokens, or this is no dataset.
            UnsupportedSettingError: a transform hides the dataset's columns.
        """
        options = Options(
            column=one_column(column, text_column), batch_size=batch_size, num_proc=num_proc, shards_dir=shards_dir,
            shard_rows=shard_rows, for_map=kwargs,
        )  # fmt: skip
        return self._open(dataset, options).map()

    def score(
        self,
        dataset: Any,
        *,
        column: str | None = None,
        text_column: str | None = None,
        batch_size: int = 1000,
        num_proc: int | None = None,
        shards_dir: str | Path | None = None,
        shard_rows: int = SHARD_ROWS,
    ) -> Predictions:
        """Predictions alone, in memory: tokens are read where they lie on disk, and no dataset is written.

        Args:
            dataset: A `Dataset`.
            column: Column to score, in any form that `map` takes.
            text_column: Another name for `column`; pass only one of the two.
            batch_size: Number of texts that are tokenised at once.
            num_proc: Number of worker processes; None scores in this process on all cores, which is best for token
                columns.
            shards_dir: Folder for finished parts of `shard_rows` rows, so that a killed run resumes where it stopped.
            shard_rows: Number of rows in each part that is kept in `shards_dir`.

        Returns:
            `influence` (N,) float32, > 0 helps, and `num_targets` (N,) int32.

        Raises:
            ValueError: there is no such column, or a token is impossible.
            TypeError: the column holds neither texts nor tokens, or this is no `Dataset`.
            UnsupportedSettingError: a transform hides the dataset's columns.
        """
        options = Options(
            column=one_column(column, text_column), batch_size=batch_size, num_proc=num_proc, shards_dir=shards_dir,
            shard_rows=shard_rows,
        )  # fmt: skip
        return self._open(dataset, options).score()

    def distil(self, texts: Any, *, column: str | None = None, num_buckets: int = 2**20, seed: int = 0) -> Self:
        """A selector that ranks texts nearly as this one does, at the speed at which they can be read.

        It has no tokenizer: the tokenizer is what scoring takes its time for. How nearly is in the report of its
        influence model, which is of texts that were kept out of the fit.

        Args:
            texts: Some tens of thousands of texts of the kind that will be scored: a list of `str`, or a `Dataset`.
            column: Column of a dataset that holds the texts; None takes `text`.
            num_buckets: Number of hash buckets of words and pairs of words, a power of two; 2 bytes each.
            seed: Random seed of the texts that are kept out of the fit.

        Returns:
            A selector of a `TextInfluenceModel`.

        Raises:
            ValueError: there are too few texts, or there is no such column.
            TypeError: these are no texts.
        """
        import datasets

        from mates_hf.prediction.text_model import TextInfluenceModel

        is_dataset = isinstance(texts, datasets.Dataset)
        rows = texts if is_dataset else datasets.Dataset.from_dict({"text": as_text_list(texts)})
        found = find_text_column(rows.features.arrow_schema, column)
        values = self.score(rows, column=found.name).influence
        whole = found.open(rows).values(slice(0, len(rows)))
        model = TextInfluenceModel.distil(values, whole, num_buckets=num_buckets, seed=seed)
        return type(self)(model, origin={**self.origin, "distilled_from": type(self.influence_model).__name__})

    # --- selection ---

    def filter(
        self,
        dataset: Any,
        *,
        ratio: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        num_tokens: int | None = None,
        random_share: float = 0.0,
        temperature: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """The rows that help most, in the dataset's order, columns unchanged: `select(...).selected`.

        Args:
            dataset: `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`; each split by itself.
            ratio: Share of the rows to keep (of each split), in (0, 1].
            k: Number of rows to keep (of each split).
            threshold: Lowest `influence` to keep. It means nothing for path labels, and a warning says so.
            num_tokens: Largest number of trained tokens to keep (of each split).
            random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
            temperature: Temperature of Gumbel noise in standard deviations of the labels; 0 takes the highest.
            seed: Random seed of the noise and of the order among equals.
            **options: Other arguments of `select`.

        Returns:
            A dataset of the same kind.
        """
        budget: dict[str, Any] = {"ratio": ratio, "k": k, "threshold": threshold, "num_tokens": num_tokens}
        budget |= {"random_share": random_share, "temperature": temperature, "seed": seed}
        found = self.select(dataset, **budget, **options)
        if isinstance(dataset, dict):
            return type(dataset)({name: selection.selected for name, selection in found.items()})
        return found.selected

    def select(
        self,
        dataset: Any,
        *,
        ratio: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        num_tokens: int | None = None,
        random_share: float = 0.0,
        temperature: float = 0.0,
        seed: int = 0,
        column: str | None = None,
        text_column: str | None = None,
        batch_size: int = 1000,
        num_proc: int | None = None,
        shards_dir: str | Path | None = None,
        calibration_rows: int = 10_000,
        group_column: str | None = None,
        max_group_boost: float | None = None,
        min_group_boost: float = 0.0,
        allow: Mapping[str, Any] | str | None = None,
    ) -> Any:
        """Score a dataset and keep what a budget allows; exactly one of `ratio`, `k`, `threshold`, `num_tokens`.

        Row budgets rank by what a row adds to a batch, n * (influence - token-weighted mean); a token budget and a
        threshold by `influence`. Equals stand in one random order: without a random share a choice of k is part of
        that of k + 1. Copies of a text have equal influence and are not limited, unlike in a round (`max_copies`):
        drop them before.

        What `map`, `score` or `select` of this selector found for this dataset is used again, and so is an
        `influence` column that this selector wrote, in whatever process, if every row is as it was scored. A column of
        that name from elsewhere, or one whose rows were changed, is not used, and a warning says so.

        Args:
            dataset: `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`; each split by itself.
            ratio: Share of the rows to keep (of each split), in (0, 1].
            k: Number of rows to keep (of each split).
            threshold: Lowest `influence` to keep. It means nothing for path labels, and a warning says so.
            num_tokens: Largest number of trained tokens to keep (of each split); a row that does not fit into what is
                left is skipped, and a warning says so where less than 90 % of the budget is used.
            random_share: Share of what is kept that is drawn at random from the rest, in [0, 1).
            temperature: Temperature of Gumbel noise in standard deviations of the labels; 0 takes the highest.
            seed: Random seed of the noise and of the order among equals, from 0 to below 2**64.
            column: Column to score, in any form that `map` takes.
            text_column: Another name for `column`; pass only one of the two.
            batch_size: Number of rows that are scored at once.
            num_proc: Number of processes that score; None scores in this one.
            shards_dir: Folder that keeps finished shards, so that scoring that was killed continues.
            calibration_rows: Number of first rows of a stream from which the threshold for `ratio` is taken.
            group_column: Column with the group of each row, such as its source; `Selection.shares` says what each got.
            max_group_boost: Largest multiple of its share of the rows that a group gets of a `ratio` or `k`, at least
                1; None sets no bound.
            min_group_boost: Smallest multiple that each group gets, in [0, 1], as far as it has trained tokens.
            allow: Rows that may be used at all, as in `MatesConfig.allow`; others are not scored or counted.

        Returns:
            A `Selection`; a `StreamSelection` of a stream; a dict of them by split.

        Raises:
            ValueError: the budget is impossible, there is no such column, or a token is impossible.
            TypeError: the column holds neither texts nor tokens, or this is no dataset.
            UnsupportedSettingError: a transform hides the dataset's columns.
        """
        budget = Budget(
            ratio=ratio,
            k=k,
            threshold=threshold,
            num_tokens=num_tokens,
            random_share=random_share,
            temperature=temperature,
            seed=seed,
        ).of_labels(label_unit(self._report, self.origin))
        options = Options(
            column=one_column(column, text_column), batch_size=batch_size, num_proc=num_proc, shards_dir=shards_dir,
            calibration_rows=calibration_rows, bounds=bounds_of(group_column, max_group_boost, min_group_boost),
        )  # fmt: skip
        return self._open(allowed_part(dataset, allow), options).select(budget)

    def _open(self, dataset: Any, options: Options) -> Splits | StreamInput | DatasetInput:
        """What is scored, decided once."""
        return open_input(dataset, Fitted.of(self, self._scored), options)

    # --- on disk and on the Hub ---

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Read a selector, an influence model or the model of a finished round. Nothing is unpickled.

        Args:
            pretrained_model_name_or_path: A directory that `save_pretrained` wrote, a run's `output_dir` or `_mates`,
                whose newest finished round is read, a round's directory, or a repository on the Hub.
            tokenizer: Tokenizer of the tokens the model was fitted on; a recorded one must be the same. A round has
                its Trainer's `processing_class`.
            max_length: Number of tokens that a text is cut to; None takes what was saved.
            force_download: Whether to download again what is in the Hub's cache.
            token: Access token of the Hub, for private repositories.
            cache_dir: Folder where files of the Hub are kept.
            local_files_only: Whether to use only what is on this disk, and not ask the Hub.
            revision: Revision of the repository.

        Returns:
            The selector.

        Raises:
            FileNotFoundError: there is no such directory or repository, or it holds no influence model.
            ValueError: it was written in a newer format, or with another tokenizer than the one given.
            MatesError: a file is damaged or was changed after it was written.
        """
        saved = open_selector(
            pretrained_model_name_or_path, tokenizer, revision=revision, token=token, cache_dir=cache_dir,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        max_length = saved.max_length if max_length is None else max_length
        return cls(saved.model, saved.tokenizer, max_length=max_length, origin=saved.origin)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the model, its tokenizer and its origin; `save_pretrained` and `push_to_hub` call this."""
        write_selector(save_directory, self.influence_model, self.tokenizer, self.max_length, self.origin)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, made from the fit.

        Args:
            *args: Not used; `huggingface_hub` passes them.
            **kwargs: Not used; `huggingface_hub` passes them.

        Returns:
            The card.
        """
        tokenizer = None if self.tokenizer is None else type(self.tokenizer).__name__
        return ModelCard(write_card(type(self.influence_model).__name__, self._report, self.origin, tokenizer))


def _check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise a `ValueError` where an influence model has seen ids that the tokenizer does not have."""
    seen = getattr(model, "vocab_size", 0)
    if isinstance(seen, int) and seen > len(tokenizer):
        raise ValueError(
            f"`tokenizer` must be the one the influence model was fitted with: the model has seen the id {seen - 1}, "
            f"and the tokenizer has ids below {len(tokenizer)}."
        )
