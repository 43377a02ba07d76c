"""Candidates of any modality, opened and run: which rows, of which document, and how many of them at a time.

Where it is used: `feature_model` opens what it is given here. Rows that the run's collator makes (pixels, audio, text)
and token rows that pad themselves are run alike.

Trade-off: a pool whose reading is not known yet is compared with the model's own loss first, as a probe does, which
runs a few rows more.

Shape suffixes: N candidates, R rows that are run (documents of packed candidates are rows of their own).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.batches import Candidates, ModelBatch
from mates_hf.data.documents import document_codes
from mates_hf.data.feeds import CollatedRows
from mates_hf.data.media_column import MediaRows
from mates_hf.data.pool import open_candidates
from mates_hf.data.rows import TokenRows
from mates_hf.engine.model_traits import input_device, require_known_tokens, without_needless_mask
from mates_hf.flops import forward_flops
from mates_hf.influence.micro_batches import max_tokens, run_batches
from mates_hf.influence.passes import measured_apart
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.influence.reading import find_reading
from mates_hf.prediction.judge import require_measured
from mates_hf.records import InfluenceLabels, IntArray

_TIMED_ROWS = 64  # rows that are run to say how long many will take


def open_rows(
    candidates: Any, model: nn.Module | None, ids: IntArray | None = None, *, aligned: bool = False
) -> Candidates:
    """Candidates as the model is fed them.

    Args:
        candidates: `Candidates` of a run, `TokenRows`, a candidate pool, or a dataset with `input_ids`.
        model: The model that reads them; a pool whose reading is not known yet is compared with its loss. None only
            where the reading is known.
        ids: (N,) candidate ids; None takes all candidates.
        aligned: Whether rows that know no ids are those of `ids`, one each in their order, as a run hands them over.

    Returns:
        N rows, in the order of `ids`.

    Raises:
        ValueError: an id is none of the candidates', or a new pool is more than text and there is no model.
    """
    if is_fed(candidates):
        rows: Candidates = candidates
        if ids is None or (aligned and len(rows) == len(ids) and getattr(rows, "ids", None) is None):
            return rows
        return rows.take(_places(rows, ids))
    pool, _ = open_candidates(candidates)
    if pool.reading is None and pool.collate_fn is not None:
        if model is None and pool.beyond_text:
            raise ValueError(
                "How the rows of a pool are trained on must be known, and the model that trains tells it. Pass it "
                "once: `model=model`."
            )
        pool.reading = None if model is None else find_reading(model, pool)
    return pool.candidates(ids)


def labelled_rows(
    candidates: Any, labels: InfluenceLabels, model: nn.Module | None, *, aligned: bool = False
) -> Candidates:
    """The rows that labels were measured on, in their order.

    Args:
        candidates: Candidates in any form that `open_rows` takes.
        labels: Measured influence.
        model: The model that reads them.
        aligned: Whether rows that know no ids are those of the labels, in their order.

    Returns:
        One row a label.

    Raises:
        ValueError: their numbers of targets are not the labels'.
    """
    rows = open_rows(candidates, model, labels.candidate_id, aligned=aligned)
    require_measured(rows, labels)
    return rows


def is_fed(candidates: Any) -> bool:
    """Whether these are rows that a model can be fed as they are, and neither a pool nor a dataset."""
    return all(hasattr(candidates, name) for name in ("batch", "take", "num_targets", "lengths"))


def _places(rows: Any, ids: IntArray) -> IntArray:
    """Where candidates with these ids stand: rows of a collator know their pool rows, token rows count from 0."""
    known = getattr(rows, "ids", None)
    if known is None:
        highest = int(ids.max(initial=-1))
        if highest >= len(rows):
            raise ValueError(
                f"`candidates` must be those that were measured, got {len(rows)} rows for labels of rows up to "
                f"{highest}. Pass the pool that was probed."
            )
        return ids
    known = np.asarray(known)
    order = np.argsort(known, kind="stable")
    found = np.searchsorted(known, ids, sorter=order)
    places = order[np.minimum(found, len(known) - 1)] if len(known) else np.zeros(len(ids), np.int64)
    missing = np.flatnonzero(known[places] != ids) if len(known) else np.arange(len(ids))
    if len(missing):
        raise ValueError(
            f"`candidates` must be those that were measured, and lack candidate_id {int(ids[missing[0]])}. Pass the "
            "pool that was probed."
        )
    return np.asarray(places, np.int64)


def codes_of(rows: Candidates | MediaRows) -> IntArray:
    """(N,) int64, equal for candidates of one content: tokens, or all that the collator makes but the labels."""
    if isinstance(rows, MediaRows):
        return rows.hashes()
    if isinstance(rows, (TokenRows, CollatedRows)):
        return document_codes(rows)
    codes = np.empty(len(rows), np.int64)
    for i in range(len(rows)):
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(rows.batch(np.array([i]), "cpu").inputs.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name}\0{tuple(value.shape)}\0".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy().data if value.numel() else b"")
        codes[i] = int.from_bytes(digest.digest(), "little", signed=True)
    return codes


class Passes:
    """Rows in micro-batches of forward passes, without gradient.

    Args:
        model: The live model, unwrapped, in eval mode.
        rows: N candidates that all have a target.
        tokens_per_batch: Padded tokens in one pass at most.
    """

    def __init__(self, model: nn.Module, rows: Candidates, tokens_per_batch: int) -> None:
        self._model = model
        self._rows = measured_apart(rows)
        self._owners = rows.owners if isinstance(rows, TokenRows) else np.arange(len(rows))
        if isinstance(rows, TokenRows):
            require_known_tokens(model, rows.values)
        self._limit = min(tokens_per_batch, max_tokens(model))

    def first(self) -> ModelBatch:
        """The batch of the first row alone."""
        return self._batch(np.array([int(np.flatnonzero(self._rows.num_targets)[0])]))

    def run(self, work: Callable[[ModelBatch, IntArray, IntArray], None], *, progress: bool = False) -> None:
        """Call `work` with each batch, on the model's device.

        Args:
            work: Gets the batch, (B,) the candidate of each of its rows, and (B,) how many targets each has.
            progress: Whether to show a progress bar.
        """
        if not len(self._rows):
            return

        def one(index: npt.NDArray[np.int64], counts: bool) -> None:
            work(self._batch(index), self._owners[index], np.asarray(self._rows.num_targets[index], np.int64))

        with torch.no_grad(), tqdm(total=len(self._rows), desc="features", unit="row", disable=not progress) as bar:
            run_batches(
                self._model, self._rows, one, tokens_per_batch=self._limit, one_row=self._rows.one_by_one, bar=bar
            )

    def flops(self) -> float:
        """FLOPs of one pass over all rows, by the rule of `flops`."""
        return forward_flops(count_multiplied_parameters(self._model), float(self._rows.lengths.sum()))

    def _batch(self, index: npt.NDArray[np.int64]) -> ModelBatch:
        batch = self._rows.batch(index, "cpu").to(input_device(self._model))
        if isinstance(self._rows, TokenRows):  # padded by us, on the right
            batch = batch._replace(inputs=without_needless_mask(self._model, batch.inputs))
        return batch


def seconds_of_second(work: Callable[[], Any]) -> float:
    """Wall-clock of the second of two calls; the first warms up."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def sample_of(rows: Candidates) -> Candidates:
    """Some rows, evenly drawn, that are run to say how long all of them would take."""
    found = np.flatnonzero(rows.num_targets)
    return rows.take(found[np.unique(np.linspace(0, len(found) - 1, min(_TIMED_ROWS, len(found))).astype(np.int64))])
