"""The text influence model: how another model ranks texts, read straight from UTF-8 at the speed of memory.

Where it is used: between a fitted influence model and corpora of terabytes. A tokenizer is 99.7 % of the time that
scoring takes; this model has none. It is distilled: fitted to what another influence model predicts of some tens of
thousands of texts. Trade-off: it knows words, their ends, signs, letters and pairs of them, not tokens, so that it
ranks nearly as the other does, and its report says how nearly.

The room `text/` holds the parts. Effects are in the unit of the values that were distilled, > 0 helps.
Shape suffix: N texts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arguments import described, fitted_repr
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.data.text_spans import TextSpans
from mates_hf.errors import InfluenceError, MatesError
from mates_hf.prediction import judge
from mates_hf.prediction.artifacts import damaged, read_artifact, write_artifact
from mates_hf.prediction.text.ridge_path import MOST_ENTRIES, Choice, Design, Effects, choose
from mates_hf.prediction.text.units import score_texts
from mates_hf.records import FitReport, FloatArray

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

FEW_TEXTS = 2_000  # below this a fit ranks texts it has not seen badly
UNITS_VERSION = 1  # of how a text becomes buckets (`text/units`); raised when that changes
_LARGEST = np.iinfo(np.int16).max
_LEAST_TEXTS = 20
_ENTRIES_PER_BYTE = 0.6  # of a design, about: a unit and a pair for each four to five bytes, and some pieces
_SETTINGS = ("num_buckets", "seed", "units", "units_version", "penalty", "intercept", "smallest_effect")


class TextInfluenceModel:
    """Predict the influence of texts without a tokenizer, as another influence model does.

    Make one with `TextInfluenceModel.distil(values, texts)` or `selector.distil(texts)`.

    Args:
        num_buckets: Number of hash buckets of units and pairs, a power of two; 2 bytes each in memory and on disk.
        seed: Random seed of the texts that are kept out of the fit.

    Raises:
        ValueError: an argument outside its range.
    """

    __repr__ = fitted_repr
    runs_beside_training = True  # numpy and kernels on texts: no model, no device, no random stream
    reads_texts = True  # `predict` scores texts, and a selector hands it the column as it is

    def __init__(self, *, num_buckets: int = 2**20, seed: int = 0) -> None:
        if not isinstance(num_buckets, int) or not 2 <= num_buckets <= 2**30 or num_buckets & (num_buckets - 1):
            raise ValueError(f"`num_buckets` must be a power of two from 2 to 2**30, got {num_buckets!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        self.num_buckets, self.seed = num_buckets, seed
        self._effects: npt.NDArray[np.int16] | None = None  # (num_buckets,) in smallest effects
        self._smallest = 0.0  # effect that one stands for, in the unit of the values
        self._intercept = 0.0
        self._choice = Choice(False, 0.0, float("nan"))
        self._report: FitReport | None = None

    @classmethod
    def distil(cls, values: Any, texts: Any, *, num_buckets: int = 2**20, seed: int = 0) -> Self:
        """Fit a model to values of texts, such as another influence model's predictions.

        A fifth of the texts is kept out, and the report is of those; then all are fitted. Whether words alone count,
        pairs of them, or both ends of long words as well, and the penalty, are what ranks texts best that were kept
        out of a part of the fitted ones. About a minute on one core for 20,000 texts of 1,500 bytes. Tens of thousands
        of texts of the kind that will be scored are worth having: rare words are learned from nothing else.

        Args:
            values: (N,) finite numbers, > 0 helps; predictions' `influence`.
            texts: N texts: a list of `str` and None, a `pyarrow` array of strings, or a column of a dataset.
            num_buckets: Number of hash buckets of units and pairs, a power of two; 2 bytes each in memory and on disk.
            seed: Random seed of the texts that are kept out.

        Returns:
            The fitted model.

        Raises:
            TypeError: `texts` are no texts.
            ValueError: there are fewer than 20 texts that have a word, values are not finite, or their number is not
                that of the texts.
            InfluenceError: all values are equal.
        """
        model = cls(num_buckets=num_buckets, seed=seed)
        model._fit(_checked_values(values), TextSpans.of(texts))
        return model

    def _fit(self, values: npt.NDArray[np.float64], spans: TextSpans) -> None:
        started = time.perf_counter()
        if len(values) != len(spans):
            raise ValueError(f"`values` must have one number a text ({len(spans)}), got {len(values)}.")
        wanted = _fitted_rows(spans, self.seed)
        if len(wanted) < _LEAST_TEXTS:
            raise ValueError(
                f"A text influence model needs at least {_LEAST_TEXTS} texts that are not empty, got {len(wanted)}. "
                "Tens of thousands are usual."
            )
        spans, values = spans.take(wanted), values[wanted]
        if not np.ptp(values) > 0:
            raise InfluenceError("`values` must differ between texts, and all are equal: there is nothing to learn.")
        if len(wanted) < FEW_TEXTS:
            logger.warning(
                "A text influence model is distilled from %d texts: too few to know rare words by. Give it at least "
                "%d, better tens of thousands; they need no labels of their own.", len(wanted), FEW_TEXTS,
            )  # fmt: skip
        held_out = judge.split_held_out(len(values), 0.2, self.seed)
        inside = np.flatnonzero(~held_out)
        self._choice = choose(spans.take(inside), values[inside], self.num_buckets, self.seed)
        design = Design(spans, self.num_buckets, self._choice.pairs, self._choice.pieces)
        first = design.solve_by_way(values, ~held_out, self._choice.penalty)
        predicted = design.predict(first, held_out)
        report = judge.fit_report(
            predicted, values[held_out], num_labels=int((~held_out).sum()), seed=self.seed,
            label_std=float(values.std()),
        )  # fmt: skip
        everyone = np.ones(len(values), bool)
        self._keep(design.solve(values, everyone, self._choice.penalty, first.effects_H))
        self._report = dataclasses.replace(report, seconds=time.perf_counter() - started)
        logger.info(
            "Distilled a text influence model from %d texts (%d held out, %s) in %.1f s: Spearman %.3f.",
            len(values), report.num_held_out, self.units, self._report.seconds, report.spearman,
        )  # fmt: skip

    def _keep(self, found: Effects) -> None:
        """Keep effects as whole numbers of a smallest one, which add up to the same sum in any order."""
        largest = float(np.abs(found.effects_H).max())
        self._smallest = largest / _LARGEST if largest else 1.0
        self._effects = np.rint(found.effects_H / self._smallest).astype(np.int16)
        self._intercept = found.intercept

    @property
    def units(self) -> str:
        """What is counted: "words" and signs, "pairs" of them as well, or "pieces", both ends of long words, too."""
        return "pieces" if self._choice.pieces else "pairs" if self._choice.pairs else "words"

    @property
    def report(self) -> FitReport:
        """Held-out agreement with the values that were distilled, in their unit.

        Raises:
            MatesError: the model is not fitted.
        """
        self._fitted()
        assert self._report is not None
        return self._report

    def _fitted(self) -> npt.NDArray[np.int16]:
        if self._effects is None:
            raise MatesError(
                "The text influence model must be fitted first: `TextInfluenceModel.distil(values, texts)`."
            )
        return self._effects

    def predict_texts(self, texts: Any) -> FloatArray:
        """Predicted influence of texts.

        Args:
            texts: N texts: a list of `str` and None, a `pyarrow` array of strings, or a column of a dataset. The bytes
                of Arrow arrays are read where they are.

        Returns:
            (N,) float32, > 0 helps, higher is better, in the unit of the values that were distilled; the intercept
            where a text is null or has no word. Each text gives the same bits alone and among others.

        Raises:
            TypeError: these are no texts.
            MatesError: the model is not fitted.
        """
        effects = self._fitted()
        sums = score_texts(TextSpans.of(texts), effects, self._choice.pairs, self._choice.pieces)
        return (sums * self._smallest + self._intercept).astype(np.float32)

    def predict(self, dataset: Any) -> FloatArray:
        """`predict_texts` of texts, or of the column `text` of a dataset.

        Args:
            dataset: Texts in any form that `predict_texts` takes, or a dataset with a column `text`.

        Returns:
            (N,) float32, as `predict_texts` gives it.

        Raises:
            TypeError: the rows hold tokens and no text.
        """
        if isinstance(dataset, (TokenRows, TokenSpans)):
            raise TypeError(
                "A `TextInfluenceModel` reads texts, got rows of tokens. Score the column of texts that they were "
                "made from, or use the influence model that this one was distilled from."
            )
        if "text" in (getattr(dataset, "column_names", None) or ()):
            dataset = dataset["text"]
        elif hasattr(dataset, "column_names"):
            raise TypeError(
                f"A `TextInfluenceModel` reads a column `text`, got {described(dataset)} with the columns "
                f"{dataset.column_names}. Pass the column: `predict_texts(dataset[name])`."
            )
        return self.predict_texts(dataset)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory. No text is among what is written.

        Args:
            path: The directory; it is created where it is missing.
        """
        settings = {
            "num_buckets": self.num_buckets, "seed": self.seed, "units": self.units, "units_version": UNITS_VERSION,
            "penalty": self._choice.penalty, "intercept": self._intercept, "smallest_effect": self._smallest,
        }  # fmt: skip
        write_artifact(path, type(self).__name__, settings, {"effects": self._fitted()}, self.report)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote; predictions are the same bit for bit. Nothing is unpickled.

        Args:
            path: The directory.

        Returns:
            The fitted model.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, or was written in a newer format.
            MatesError: a file is damaged or was changed after it was written.
        """
        config, tensors, report = read_artifact(path, cls.__name__, _SETTINGS)
        if config["units_version"] != UNITS_VERSION:
            raise ValueError(
                f"`{path}` must cut texts by version {UNITS_VERSION}, got {config['units_version']!r}. Upgrade "
                "mates-hf, or distil the model again."
            )
        try:
            model = cls(num_buckets=config["num_buckets"], seed=config["seed"])
            effects = tensors["effects"]
            if effects.dtype != np.int16 or effects.shape != (model.num_buckets,):
                raise ValueError(
                    f"`effects` must be ({model.num_buckets},) int16, got {effects.shape} {effects.dtype}"
                )
            if config["units"] not in ("words", "pairs", "pieces"):
                raise ValueError(f"`units` must be 'words', 'pairs' or 'pieces', got {config['units']!r}")
            model._smallest, model._intercept = float(config["smallest_effect"]), float(config["intercept"])
            model._choice = Choice(
                config["units"] != "words", float(config["penalty"]), float("nan"), config["units"] == "pieces"
            )
            if not np.isfinite([model._smallest, model._intercept, model._choice.penalty]).all():
                raise ValueError("`smallest_effect`, `intercept` and `penalty` must be finite, and are not")
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        model._effects, model._report = effects, report
        return model


def _checked_values(values: Any) -> npt.NDArray[np.float64]:
    """(N,) float64 values that can be fitted."""
    found = np.asarray(values, np.float64)
    if found.ndim != 1:
        raise ValueError(f"`values` must be one number a text, got an array of shape {found.shape}.")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(f"`values` must be finite; {len(bad)} are not, the first at {int(bad[0])}.")
    return found


def _fitted_rows(spans: TextSpans, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of the texts to fit: those that are not empty, and no more than memory is meant for."""
    num_bytes = spans.num_bytes
    rows = np.flatnonzero(num_bytes > 0)
    entries = num_bytes[rows] * _ENTRIES_PER_BYTE
    if entries.sum() <= MOST_ENTRIES:
        return rows
    drawn = np.random.default_rng([seed, 0]).permutation(len(rows))
    fits = int(np.searchsorted(np.cumsum(entries[drawn]), MOST_ENTRIES))
    logger.info("Of %d texts, %d drawn at random are fitted: that many fit into the memory of a fit.", len(rows), fits)
    return np.sort(rows[drawn[:fits]])
