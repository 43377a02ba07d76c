"""The pool rows whose loss is compared, each collated alone, and what their batches hold beside token ids.

Where it is used: `reading` compares the run's loss of these with what a probe would read. Trade-off: 64 rows are
looked at, so what only rare rows show is not seen. Further inputs are therefore tried, too: a row is compared with one
of them changed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mates_hf.data.batches import IGNORED, Reading
from mates_hf.data.collated import collate, drew_random, name_of
from mates_hf.data.columns import fixed_positions
from mates_hf.data.examples import beyond_text, content_hash
from mates_hf.data.feeds import model_batch
from mates_hf.data.pool import CandidatePool
from mates_hf.data.segments import document_starts, is_packing_key
from mates_hf.engine.model_traits import accepts, input_device
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.influence.passes import logits_of_batch

logger = logging.getLogger(__name__)

NUM_LOOKED_AT = 64
NO_LOGITS = (AttributeError, IndexError, KeyError, TypeError, UnsupportedSettingError)
_TEXT_KEYS = ("input_ids", "labels", "attention_mask", "shift_labels")


class ComparedRows:
    """Rows of a pool, collated to be compared.

    Args:
        model: whose forward takes what is collated.
        pool: rows and their collator.
        base: says where labels are.

    Attributes:
        rows: pool rows; the first ones, of several lengths, from the shortest on.
        batches: a batch of each of those rows alone, then variants of one of them with a further input changed.
        collated: the pool's dataset and collator.
        flattens: true where the collator makes one row of the batch of several rows of the dataset.
        packed: batches of one row each that have several documents, at most two; of several rows where the collator
            flattens.

    Raises:
        InfluenceError: no row looked at has a trained token.
    """

    def __init__(self, model: nn.Module, pool: CandidatePool, base: Reading) -> None:
        self.model, self.base = model, base
        self.collated = pool.collated(np.zeros(0, np.int64), base)
        self._looked_at = self._look(pool)
        self.flattens, self.packed = self._find_packed()
        self.extras = self.further_inputs(reads_all=False)
        self.rows = self._choose()
        self.batches = [self._looked_at[i] for i in self.rows] + self._variants()

    @property
    def longest(self) -> Mapping[str, Any]:
        """The batch of the longest chosen row."""
        return max((self._looked_at[i] for i in self.rows), key=_size)

    def together(self, rows: list[int]) -> Mapping[str, Any]:
        """Some pool rows in one batch; raises what the collator raises."""
        return collate(self.collated.dataset, self.collated.collate_fn, rows)

    def further_inputs(self, *, reads_all: bool) -> set[str]:
        """Inputs beside ids, labels and mask that reach the model; every key where the run's loss `reads_all`."""
        batches = self._looked_at.values()
        keys = {str(key) for batch in batches for key, value in batch.items() if value is not None}
        if self.packed:  # how documents are kept apart, which is looked at by itself
            keys = {key for key in keys if not is_packing_key(key) and key != "use_cache"}
        return {key for key in keys - set(_TEXT_KEYS) if reads_all or accepts(self.model, key)}

    def constants(self) -> dict[str, int]:
        """Further inputs that have one whole number at every token of every row looked at."""
        return {key: value for key in sorted(self.extras) if (value := self._constant(key)) is not None}

    def draws(self) -> tuple[bool, bool]:
        """Whether the dataset draws from the random streams, as augmentations do, and whether the collator does.

        Each row is then read and collated on streams of its own number, so what is measured of it is fixed.

        Raises:
            UnsupportedSettingError: a row is another one each time all the same, or the collator mixes rows.
        """
        dataset, collate_fn = self.collated.dataset, self.collated.collate_fn
        found = [drew_random(dataset, collate_fn, i) for i in self.rows[:4]]
        for i in self.rows[:4]:
            if content_hash(collate(dataset, collate_fn, [i]), with_labels=True) != content_hash(
                self._looked_at[i], with_labels=True
            ):
                raise UnsupportedSettingError(
                    f"A row must be the same whenever it is read at the same seeds, got two of pool row {i} by "
                    f"`{name_of(collate_fn)}`: an augmentation draws from a random stream of its own. Let it draw "
                    "from `random`, `numpy.random` or torch's default stream, or seed it by the number of the row."
                )
        if self.beyond_text:
            self._refuse_mixtures()
        reading, collating = (any(pair[place] for pair in found) for place in (0, 1))
        return reading, collating

    @property
    def beyond_text(self) -> tuple[str, ...]:
        """Inputs of the first row looked at that are no text."""
        return beyond_text(next(iter(self._looked_at.values())))

    def _refuse_mixtures(self) -> None:
        """Raise where what the collator makes of a row depends on the rows beside it (mixup, cutmix)."""
        for first in self.rows[:4]:  # a row may be mixed with itself
            others = [row for row in self.rows if row != first]
            try:
                one, other = (self.together([first, *others[part : part + 3]]) for part in (0, 3))
            except Exception as error:  # rows that fit no batch, which is looked at elsewhere
                logger.debug("The collator makes no batch of pool rows: %s", error)
                continue
            for key in self.beyond_text:
                a, b = one.get(key), other.get(key)
                if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or len(others) < 6:
                    continue
                if not torch.equal(a[0], b[0]):
                    raise UnsupportedSettingError(
                        "A collator must make of a row the same whatever rows are beside it, but "
                        f"`{name_of(self.collated.collate_fn)}` mixes them (mixup, cutmix): `{key}` of pool row "
                        f"{first} is another one beside other rows. What a row is worth cannot be told then. Leave "
                        "the mixing out of the collator; augmentations of single rows may stay."
                    )

    def joined(self, rows: list[int]) -> Mapping[str, Any] | None:
        """Some rows looked at in one batch, without the collator; None where their shapes differ."""
        singles = [self._looked_at[row] for row in rows]
        batch: dict[str, Any] = {}
        for key, value in singles[0].items():
            if not isinstance(value, Tensor):
                batch[key] = value
                continue
            parts = [single.get(key) for single in singles]
            if not value.dim() or not all(isinstance(p, Tensor) and p.shape == value.shape for p in parts):
                return None
            batch[key] = torch.cat([part for part in parts if part is not None])
        return batch

    def is_mask(self, key: str) -> bool:
        """True for an input of 0 and 1 at every label."""
        pairs = [(batch.get(key), self.base.labels_of(batch)) for batch in self.batches]
        return all(
            isinstance(value, Tensor)
            and isinstance(labels, Tensor)
            and value.shape == labels.shape
            and bool(((value == 0) | (value == 1)).all())
            for value, labels in pairs
        )

    def count_virtual(self) -> int:
        """Positions that an adapter puts before each row's; 0 where logits have another shape for other reasons."""
        counts = set()
        for batch in self.batches[:2] if hasattr(self.model, "peft_config") else ():
            given = model_batch(batch, self.base, input_device(self.model))
            try:
                logits = logits_of_batch(self.model, given)
                counts.add(
                    logits.shape[1] - given.labels.shape[1] if given.labels.dim() > 1 and given.labels.numel() else 0
                )
            except NO_LOGITS:
                return 0
        return max(0, counts.pop()) if len(counts) == 1 else 0

    def _look(self, pool: CandidatePool) -> dict[int, Mapping[str, Any]]:
        """Batches of one row each, of the rows looked at that train something."""
        ids = pool.candidate_ids[fixed_positions(len(pool), NUM_LOOKED_AT)]
        batches = {i: collate(self.collated.dataset, self.collated.collate_fn, [i]) for i in ids.tolist()}
        trained = {i: batch for i, batch in batches.items() if self._trains(batch)}
        if not trained:
            raise InfluenceError(
                f"Pool rows must have trained tokens, got none in {len(ids)} rows looked at: a row needs two tokens, "
                "and a label other than -100 after its first."
            )
        return trained

    def _find_packed(self) -> tuple[bool, list[Mapping[str, Any]]]:
        """Whether the collator makes one row of several, and batches in which documents share a row."""
        rows = list(self._looked_at)
        few = (rows * 2)[:2]
        try:
            pair = self.together(few)
        except Exception as error:  # a collator of single rows, or of rows of one length
            logger.debug("The collator makes no batch of pool rows %s: %s", few, error)
            pair = {}
        if len(pair.get("input_ids", ())) == 1:
            return True, [pair, self.together([rows[-1], rows[0]])]
        several = (batch for batch in self._looked_at.values() if document_starts(batch, "the collator") is not None)
        return False, list(itertools.islice(several, 2))

    def _trains(self, batch: Mapping[str, Any]) -> bool:
        """Whether a row has a label that any reading counts."""
        labels = self.base.labels_of(batch)
        if labels is None:
            return True
        labels = torch.as_tensor(labels)
        causal = labels.dim() > 1 and not self.base.encoder_decoder and "shift_labels" not in batch
        return bool(((labels[:, 1:] if causal else labels) != IGNORED).any())

    def _choose(self) -> list[int]:
        """Rows to compare, of several lengths; all where there are further inputs."""
        by_length = sorted(self._looked_at, key=lambda i: (_size(self._looked_at[i]), i))
        places = sorted({0, len(by_length) // 4, len(by_length) // 2, (3 * len(by_length)) // 4})
        chosen = [by_length[place] for place in places]
        return chosen + [i for i in by_length if i not in chosen] if self.extras else chosen

    def _variants(self) -> list[Mapping[str, Any]]:
        """A row with a further input changed, for each that looks like a mask: no row looked at need show its effect.

        A mask of the loss changes the run's loss and no likelihood; one of the attention changes both.
        """
        variants: list[Mapping[str, Any]] = []
        batch = self.longest
        for key in sorted(self.extras):
            value, ids = batch.get(key), batch.get("input_ids")
            if not (isinstance(value, Tensor) and isinstance(ids, Tensor) and value.shape == ids.shape):
                continue
            if bool(((value == 0) | (value == 1)).all()):
                changed = value.clone()
                half = changed[:, value.shape[1] // 2 :]  # a view
                if "mask" in key or "weight" in key:
                    half.copy_((1 - half.to(torch.int64)).to(half.dtype))
                else:
                    half.zero_()  # 1 might be no index of a table
                variants.append({**batch, key: changed})
        return variants

    def _constant(self, key: str) -> int | None:
        """The one whole number that an input has at every token of every row looked at; None where there is none."""
        pairs = [(batch.get(key), batch.get("input_ids")) for batch in self._looked_at.values()]
        if not all(isinstance(v, Tensor) and isinstance(ids, Tensor) and v.shape == ids.shape for v, ids in pairs):
            return None
        distinct = torch.cat([value.reshape(-1) for value, _ in pairs if value is not None]).unique()
        return int(distinct) if len(distinct) == 1 and not distinct.dtype.is_floating_point else None


def _size(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch of one row; where it has none, the values of its inputs."""
    ids = batch.get("input_ids")
    return int(ids.shape[-1]) if isinstance(ids, Tensor) else num_values(batch)


def num_values(batch: Mapping[str, Any]) -> int:
    """Input values of a batch that are no text."""
    return sum(int(torch.as_tensor(batch[name]).numel()) for name in beyond_text(batch))
