"""The reference task: the passages, or examples, whose loss says what the model should get better at.

Where it is used: `training/` and the probes read its `rows`; nothing else of it reaches them. The reference loss is
the mean negative log-likelihood over all its target tokens (nats/token, weighted by token, never a mean of means),
unless its tokens have weights: `mixture` gives each task its share, and `loss_on="both"` the completion half.

Trade-off: passages are cut to `max_length` from the left, because what is asked for stands at their end; their first
tokens (and a beginning-of-text token) are lost instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import effective_labels
from mates_hf.data.batches import Candidates
from mates_hf.data.collated import name_of
from mates_hf.data.cut_passages import check_loss_on, check_parts, cut_passages
from mates_hf.data.examples import ExampleRows, examples_of
from mates_hf.data.mixture import mixed
from mates_hf.data.passages import (
    LossOn,
    Passage,
    check_columns,
    check_tokenizer,
    columns_there,
    first_rows,
    id_rows,
    join,
    tokenise,
)
from mates_hf.data.rows import TokenRows, flat_index
from mates_hf.data.weighted import WeightedRows, Weights, checked_weights
from mates_hf.display import card
from mates_hf.errors import UnsupportedSettingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceTask:
    """What the model should get better at. Build it with `from_dataset`, `from_lm_eval` or `from_examples`.

    Attributes:
        name: Name of the task in reports and round records.
        rows: Passages of text, whose labels are -100 outside of the targets; or examples of any modality.
        loss_on: `"all"` where every token of a passage but the first is a target (or every labelled one, where labels
            were given), `"completion"` where only the completion's are, `"both"` where all are and the completion's
            together count as much as all together.
        description: Plain JSON values: source, columns, sizes, and how many passages were cut or dropped.
        fed: The passages as the run's model is fed them, where that is not as plain rows; `MatesCallback` and probes
            fill it in.
        weights: (T,) float32 of all tokens, 0 for those that are no target, with a mean of 1 over the targets; None
            where each counts as much as another. What is given is scaled to that.
        is_evaluated: whether lm-eval evaluates the task on the split that the passages are of, as far as is known.

    Raises:
        ValueError: no passage has a target token, or weights that are none.
    """

    name: str
    rows: TokenRows | ExampleRows
    loss_on: LossOn = "all"
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fed: Candidates | None = dataclasses.field(default=None, repr=False, compare=False)
    weights: Weights | None = dataclasses.field(default=None, repr=False, compare=False)
    is_evaluated: bool = dataclasses.field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_parts(self.name, self.rows, self.description)
        check_loss_on(self.loss_on)
        if not self.num_targets:
            needs = "passages with none. A passage needs two tokens, and a label other than -100 after the first."
            if isinstance(self.rows, ExampleRows):
                needs = "examples with none. An example needs `labels` of which one is not -100."
            raise ValueError(f"The reference task `{self.name}` must have target tokens, got {len(self)} {needs}")
        if self.weights is not None:
            text = self.text("weights of tokens")
            weights = checked_weights(self.weights, len(text.values), text.target_mask, self.name)
            object.__setattr__(self, "weights", weights)
        sizes = {
            "name": self.name,
            "loss_on": self.loss_on,
            "num_passages": len(self),
            "num_targets": self.num_targets,
        }
        object.__setattr__(self, "description", {**self.description, **sizes})

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        source = str(self.description.get("source", "rows"))
        facts = {"passages": f"{len(self):,}, {self.num_targets:,} target tokens (loss_on {self.loss_on!r})"}
        if isinstance(self.rows, ExampleRows):
            facts = {"examples": f"{len(self):,}, {self.num_targets:,} labels"}
        return card(f"ReferenceTask: {self.name}", {**facts, "source": source})

    @property
    def is_text(self) -> bool:
        """Whether the task is of passages of text; else of examples, whatever they are made of."""
        return isinstance(self.rows, TokenRows)

    def text(self, what: str, instead: str = "") -> TokenRows:
        """The passages, for what reads text.

        Args:
            what: What needs text, for the error.
            instead: A whole sentence on what to do where there is none.

        Returns:
            The passages.

        Raises:
            UnsupportedSettingError: the task is of examples.
        """
        if isinstance(self.rows, TokenRows):
            return self.rows
        raise UnsupportedSettingError(
            f"A reference task must be of text for {what}, got `{self.name}`, which is of examples. {instead}".strip()
        )

    @property
    def measured(self) -> Candidates:
        """What a probe reads: the passages as the model is fed them, with the weights of their targets."""
        if not self.is_text and self.fed is not None:
            return self.fed
        weighted = self.weighted_rows
        if self.fed is None:
            return weighted
        return dataclasses.replace(weighted, rows=self.fed) if isinstance(weighted, WeightedRows) else self.fed

    @property
    def weighted_rows(self) -> TokenRows | WeightedRows:
        """The passages as text, with the weights of their targets where they have some."""
        rows = self.text("tokens of it to be read", "Give a probe that ships here, which feeds it to the model.")
        return rows if self.weights is None else WeightedRows(rows, self.weights[rows.target_mask])

    @property
    def num_targets(self) -> int:
        """Target tokens, or labels of examples, over all rows: what the reference loss is a mean over."""
        known = self.rows if self.fed is None or self.is_text else self.fed
        return int(known.num_targets.sum())

    def digest(self) -> str:
        """SHA-256 of the passages' tokens, targets and weights; of examples, of all their inputs and labels."""
        if isinstance(self.rows, ExampleRows):
            return self.rows.digest()
        digest = hashlib.sha256()
        for part in (self.rows.offsets, self.rows.values, effective_labels(self.rows)):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        if self.weights is not None:
            digest.update(np.ascontiguousarray(self.weights, "<f4").tobytes())
        return digest.hexdigest()

    def fit_to_model(self, vocab_size: int | None, max_positions: int | None) -> ReferenceTask:
        """The task as a model can read it.

        Args:
            vocab_size: Number of rows of the model's token embedding; None checks nothing.
            max_positions: Number of tokens of the model's longest input; longer passages are cut from the left. None
                cuts nothing.

        Returns:
            The same passages, cut and counted in `description`; those that lose all their targets are left out.
            Examples stay as they are.

        Raises:
            ValueError: a token id is beyond the vocabulary, or no target is left.
        """
        if isinstance(self.rows, ExampleRows):
            return self
        values = self.rows.values
        if vocab_size is not None and (values.min() < 0 or values.max() >= vocab_size):
            raise ValueError(
                f"The token ids of the reference task `{self.name}` must be below the model's `vocab_size` "
                f"({vocab_size}), got {values.min()} to {values.max()}. Use the model's own tokenizer."
            )
        if max_positions is None:
            return self
        given = (self.name, self.rows, self.loss_on, self.description, max_positions, "the model's context")
        return ReferenceTask(**cut_passages(*given, self.weights), is_evaluated=self.is_evaluated)

    def split(self, fraction: float, seed: int = 0) -> tuple[ReferenceTask, ReferenceTask]:
        """Two disjoint tasks that together hold every passage, drawn by `seed`.

        Args:
            fraction: Share of the passages in the first task, in (0, 1); each task gets one passage at least.
            seed: Random seed of the draw; equal seeds draw equal parts.

        Returns:
            The two parts, passages in their order.

        Raises:
            ValueError: the fraction is out of range, there is only one passage, or a part has no target.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1), got {fraction}.")
        if len(self) < 2:
            raise ValueError(f"A reference task must have 2 passages to be split, `{self.name}` has {len(self)}.")
        num = min(max(round(fraction * len(self)), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[:num])), self.take(np.sort(order[num:]))

    def subset(self, num: int, seed: int = 0) -> ReferenceTask:
        """`num` passages drawn by `seed`, in their order; the task itself where it has no more than that."""
        if num < 1:
            raise ValueError(f"`num` must be at least 1 passage, got {num}.")
        if num >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:num]))

    def take(self, index: npt.NDArray[Any]) -> ReferenceTask:
        """Some passages: `index` is (M,) int numbers or an (N,) bool mask; order and repeats are kept."""
        passages = np.flatnonzero(index) if index.dtype == bool else np.asarray(index, np.int64)
        fed = None if self.fed is None else self.fed.take(passages)
        weights = self.weights
        if weights is not None and isinstance(self.rows, TokenRows):
            weights = weights[flat_index(self.rows.offsets[passages], self.rows.lengths[passages])]
        return dataclasses.replace(self, rows=self.rows.take(passages), fed=fed, weights=weights)

    @classmethod
    def mixture(
        cls, tasks: Sequence[ReferenceTask], weights: Sequence[float] | None = None, *, name: str | None = None
    ) -> ReferenceTask:
        """One task of several: its loss is the weighted mean of theirs, however long their passages are.

        Args:
            tasks: Two or more, by the same tokenizer.
            weights: Share of each task, at least 0; None gives them all the same.
            name: Name of the task in reports; the default joins theirs.

        Returns:
            The passages of all tasks, one task after the other. `loss_on` is theirs where they agree, else `"all"`.

        Raises:
            ValueError: fewer than two tasks, or not one weight for each, or weights that are none.
            TypeError: something else than reference tasks.
        """
        for task in tasks:
            if not isinstance(task, ReferenceTask):
                raise TypeError(f"`tasks` must be reference tasks, got {type(task).__name__}.")
        return cls(**mixed(tasks, weights, name))

    @classmethod
    def from_examples(
        cls, dataset: Any, data_collator: Any = None, *, name: str = "examples", limit: int | None = None
    ) -> ReferenceTask:
        """A task of rows that the run's own collator turns into a batch: images, speech, or any other inputs.

        The reference loss is the mean over their labels: a class of each image, or the tokens of each text. Where the
        model gives no likelihood of labels, it is the run's own loss, example by example. Each row is read once here.

        Args:
            dataset: A map-style dataset or a list of dicts, in the form of the rows that the run trains on.
            data_collator: Makes a batch of these rows. None takes the collator of the run.
            name: Name of the task in reports.
            limit: Number of first rows to take; None takes all.

        Returns:
            The task; rows whose labels are all -100 are left out and counted.

        Raises:
            ValueError: no row, or none with a label.
            TypeError: `dataset` has no numbered rows, a row is no dict, or holds what has no bytes to be known by.
        """
        rows = examples_of(dataset, data_collator, limit)
        num = len(dataset) if limit is None else min(limit, len(dataset))
        return cls(name=name, rows=rows, description={
            "source": "from_examples", "limit": limit, "num_dropped": num - len(rows),
            "collator": "the run's" if data_collator is None else name_of(data_collator),
        })  # fmt: skip

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        tokenizer: Any = None,
        *,
        text_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        input_ids_column: str | None = None,
        labels_column: str | None = None,
        loss_on: LossOn = "all",
        max_length: int = 1024,
        limit: int | None = None,
        name: str | None = None,
    ) -> ReferenceTask:
        """A task from texts, from prompts with completions, or from token ids.

        Args:
            dataset: A `datasets.Dataset`, a list, or a stream together with `limit`; its rows are dicts.
            tokenizer: The model's tokenizer; not needed for token ids.
            text_column: Column of texts, each of which becomes exactly `tokenizer(text)`.
            prompt_column: Column of prompts, given with `completion_column`. The two are joined by a space unless
                white space is there already, and tokenised as one text.
            completion_column: Column of the texts that should follow the prompts.
            input_ids_column: Column of token ids.
            labels_column: Column of labels, given with `input_ids_column`: ids where a token is a target, -100
                elsewhere.
            loss_on: `"all"` makes every token but the first a target (with `labels_column`, every labelled one);
                `"completion"` only the completion's, counting a token that spans the border; `"both"` counts every
                token, and the completion's (with `labels_column`, the labelled ones) together as much as all.
            max_length: Largest number of tokens of a passage; longer ones are cut from the left, with one warning.
            limit: Number of first rows to take; None takes all.
            name: Name of the task in reports; the default says which columns it is made of.

        Returns:
            The task; passages without a target are left out and counted.

        Raises:
            ValueError: not exactly one of the three forms, a column that is not there, a value of the wrong kind, a
                stream without limit, or no target token.
            TypeError: the dataset cannot be iterated over, or is a dict of splits.
        """
        check_loss_on(loss_on)
        columns = {
            "text_column": text_column,
            "prompt_column": prompt_column,
            "completion_column": completion_column,
            "input_ids_column": input_ids_column,
            "labels_column": labels_column,
        }
        given = {key: column for key, column in columns.items() if column is not None}
        forms = [{"text_column"}, {"prompt_column", "completion_column"}, {"input_ids_column"}]
        if given.keys() - {"labels_column"} not in forms or ("labels_column" in given and not input_ids_column):
            raise ValueError(
                "Exactly one of `text_column`, `prompt_column` with `completion_column`, or `input_ids_column` (with "
                f"`labels_column` where not every token counts) must be given, got {given or 'none'}."
                f"{columns_there(dataset)}"
            )
        if loss_on != "all" and (text_column or (input_ids_column and not labels_column)):
            raise ValueError(
                f'`loss_on="{loss_on}"` must come with a completion to tell apart, got '
                f"{given}. Give `prompt_column` and `completion_column`, or `labels_column`."
            )
        rows = list(first_rows(dataset, limit))
        check_columns(rows, given, dataset)
        if input_ids_column:
            tokens = id_rows(rows, input_ids_column, labels_column)
        else:
            passages = [join(row, text_column, prompt_column, completion_column, i) for i, row in enumerate(rows)]
            tokens = tokenise(passages, check_tokenizer(tokenizer), loss_on)
        description = {"source": "from_dataset", **given, "limit": limit, "max_length": max_length}
        named = name or ",".join(given.values())
        return cls(**cut_passages(named, tokens, loss_on, description, max_length, "`max_length`"))

    @classmethod
    def from_lm_eval(
        cls,
        task: Any,
        tokenizer: Any,
        *,
        limit: int | None = None,
        max_length: int = 1024,
        loss_on: LossOn = "all",
        metadata: Mapping[str, Any] | None = None,
        split: Literal["train", "validation", "test"] | None = None,
    ) -> ReferenceTask:
        """A task from lm-evaluation-harness: its contexts and gold targets, joined as the harness scores them.

        Args:
            task: A task's name, the path of its YAML file, its config as a dict, or an lm-eval task. lm-eval runs the
                Python functions that a YAML file names, so give it only files you would run.
            tokenizer: The model's tokenizer.
            limit: Number of first documents to take; None takes all.
            max_length: Largest number of tokens of a passage; longer ones are cut from the left, with one warning.
            loss_on: `"all"` counts every token but the first, `"completion"` the gold target's only, `"both"` every
                token, and the gold targets together as much as all.
            metadata: Metadata that lm-eval's `TaskManager` gets, as from its `--metadata`.
            split: None takes a split that the task is not evaluated on, or warns that there is none.

        Returns:
            The task; its targets are gold targets only where `loss_on="completion"`.

        Raises:
            ImportError: lm-eval is not installed.
            ValueError: no such task or split, a group instead of a task, or no target token.
        """
        from mates_hf.data.harness import read_passages

        check_loss_on(loss_on)
        name, used, is_evaluated, pairs = read_passages(task, metadata, split, limit)
        tokens = tokenise([Passage(*pair) for pair in pairs], check_tokenizer(tokenizer), loss_on)
        description = {"source": "from_lm_eval", "split": used, "limit": limit, "max_length": max_length}
        made = cut_passages(name, tokens, loss_on, description, max_length, "`max_length`")
        return cls(**made, is_evaluated=is_evaluated)
