"""A data influence model for any modality: it reads what the model that trains makes of a candidate and its label.

Where it is used: in place of `ngram_model`, where candidates are images, audio, or texts with more than tokens. What
moves a model is the product of a hidden state and the error of what was said there, the gradient of the output head. A
ridge on that product ranks candidates in one forward pass each (`features/gradient`).

Trade-off: a label error needs the label, and predictions cost a forward pass of the training model a candidate and
hold for the weights of the fit. Small copies of the inputs times the label (`features/inputs`) need no pass and hold
longer, where what matters can be seen in them. Pixels or hidden states alone predict little.

Shape suffix: N candidates.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from mates_hf.data.arguments import check_fit, fitted_repr
from mates_hf.data.batches import Candidates
from mates_hf.errors import MatesError
from mates_hf.prediction.artifacts import damaged
from mates_hf.prediction.features import saved
from mates_hf.prediction.features.head import name_of_head
from mates_hf.prediction.features.inputs import InputReader
from mates_hf.prediction.features.live import check_arguments, readable, tell_other_weights
from mates_hf.prediction.features.media import MediaReader
from mates_hf.prediction.features.pooled import FeatureFunction
from mates_hf.prediction.features.reader import LiveReader
from mates_hf.prediction.features.rows import codes_of, is_fed, labelled_rows, open_rows
from mates_hf.prediction.features.saved import Line
from mates_hf.prediction.judge import fresh_report
from mates_hf.prediction.ridge import FitTarget, StateLine
from mates_hf.records import FitReport, FloatArray, InfluenceLabels

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

Features = Literal["head_gradient", "hidden", "inputs"]
_SAVED = ("column", "head", "num_errors", "tokens_per_batch", "max_seconds", "seed", "progress")


class FeatureInfluenceModel:
    """Predict a candidate's influence from hidden states and label errors of the model that trains.

    It works for every model that has one cross-entropy loss a target: image classifiers, speech to text,
    vision-language models and language models. `fit`, `evaluate` and the predictions run the model as it is at that
    moment, in eval mode, and leave it as found, bit for bit. `save_pretrained` writes the ridge and a digest of the
    weights that it was fitted at, never the model.

    Args:
        features: What is read of a candidate. `"head_gradient"`: the mean over its targets of hidden state times label
            error. `"hidden"`: the mean hidden state, and the class where a candidate has one. `"inputs"`: small copies
            of pictures, sounds or measurements times labels, without a pass of any model (`features/inputs`). A
            function `features(model, batch)`: what it returns, (B, D) for the B rows of a batch with labels. An
            encoder of images or sounds, a model of transformers or its folder or repository: its pooled states,
            without labels and without the model that trains, so that a `MatesSelector` can score datasets with it.
        model: The model that trains; None where each call is given one, or a run.
        head: The output head, or its name in the model (`"classifier"`). None looks for it.
        num_errors: Number of dimensions that label errors are projected to where there are more classes. None keeps up
            to 1,024 where each candidate has one target, and 64 otherwise: a fit then holds 4 bytes times states
            times 64 for each label.
        tokens_per_batch: Padded tokens in one pass; less memory, not other results.
        max_seconds: Largest number of seconds that scoring the candidates of one round may take. A run that would take
            longer is refused before its first step. None sets no limit, and the seconds are logged.
        processor: Image processor or feature extractor of an encoder; None loads the one that lies next to it.
        column: The pool's column that an encoder reads; None is `image`, or `audio` with a feature extractor.
        seed: Random seed of the held-out split.
        progress: Whether to show progress bars.

    Raises:
        ValueError: an argument outside its range.
    """

    __repr__ = fitted_repr
    reads_examples = True  # rows as the model is fed them, not token ids alone

    def __init__(
        self,
        features: Features | FeatureFunction | nn.Module | str | os.PathLike[str] = "head_gradient",
        model: nn.Module | None = None,
        *,
        head: nn.Module | str | None = None,
        num_errors: int | None = None,
        tokens_per_batch: int = 8192,
        max_seconds: float | None = None,
        processor: Any = None,
        column: str | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        kind = check_arguments(features, num_errors, tokens_per_batch, max_seconds, seed, processor, column)
        self.features = features
        self._kind, self.processor, self.column = kind, processor, column
        self._encoder: MediaReader | None = None
        if kind == "encoder":
            self._encoder = MediaReader.of(features, processor, column, progress=progress)
            self.column = self._encoder.column
        self.model = self._readable(model)
        self.head = head
        self.num_errors, self.tokens_per_batch, self.max_seconds = num_errors, tokens_per_batch, max_seconds
        self.seed, self.progress = seed, progress
        self._line: Line | None = None
        self._weights: str | None = None  # of the fit
        self._in_run = False
        self._told: set[str] = set()
        self._report: FitReport | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that runs the same model; all else is replaced by a fit, never written to."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin._told = set(self._told)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but the model: it does not travel to other processes."""
        return {**vars(self), "model": None, "head": self.head if isinstance(self.head, str) else None}

    def with_model(self, model: nn.Module) -> Self:
        """A copy of this, fitted or not, that runs `model`."""
        twin = self.__deepcopy__({})
        twin.model = self._readable(model)
        return twin

    def _readable(self, model: nn.Module | None) -> nn.Module | None:
        """The module to read with; None where an encoder reads, or none is given."""
        return None if model is None or self._encoder is not None else readable(model, runs=self.runs_the_model)

    def for_run(self, *, model: nn.Module, tokenizer: Any = None) -> Self:
        """A copy that reads a run's model, unless one was given; the run's guard judges it at other weights."""
        twin = self.with_model(model if self.model is None else self.model)
        twin._in_run = True
        return twin

    @property
    def report(self) -> FitReport:
        """Held-out agreement of the last fit, in the unit of `influence`.

        Raises:
            MatesError: the model is not fitted.
        """
        self._fitted()
        assert self._report is not None
        return self._report

    @property
    def reads_media(self) -> bool:
        """Whether it reads images or sounds by an encoder of their own, and no model that trains."""
        return self._encoder is not None

    @property
    def runs_the_model(self) -> bool:
        """Whether it runs the model that trains, which must be whole in its process then."""
        return self._encoder is None and self._kind != "inputs"

    @property
    def weights(self) -> str | None:
        """Digest of the weights that the last fit was made at; None before it."""
        return self._weights

    def _fitted(self) -> Line:
        if self._line is None:
            raise MatesError("The influence model must be fitted first: call `fit(candidates, labels)`.")
        return self._line

    def fit(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        model: nn.Module | None = None,
        held_out_fraction: float = 0.2,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        previous: FeatureInfluenceModel | None = None,
        seed: int | None = None,
    ) -> Self:
        """Fit on most candidates, report on the rest, then fit on all; one forward pass a candidate.

        Args:
            candidates: The candidate pool that was probed, with the collator of the run; or the rows that the labels'
                `candidate_id` point into.
            labels: Measured influence, > 0 helps.
            model: The model to read with; None takes the constructor's.
            held_out_fraction: Share of the candidates to report on, in (0, 1).
            groups: (N,) group of each label (domain, source), for the report only.
            documents: (N,) document of each label; split and bootstrap take whole ones. None: equal inputs are one.
            previous: The influence model of the round before, to build on as far as its coefficients fit the new
                labels; not changed.
            seed: Random seed of the split. Defaults to the constructor's seed.

        Returns:
            self, fitted.

        Raises:
            InfluenceError: labels are non-finite, all zero, all equal, or all of one document.
            ValueError: labels do not belong to the candidates, too few, no model, or `previous` is of another kind.
            UnsupportedSettingError: no layer of the model makes its logits.
        """
        started = time.perf_counter()
        if is_fed(candidates) and isinstance(labels, InfluenceLabels):
            labels.check()
        else:
            check_fit(candidates, labels)
        seed = self.seed if seed is None else seed
        earlier = saved.line_of(previous, self._kind)
        reader, rows = self._opened(candidates, model, labels)
        usable = labels.num_tokens > 0
        target = FitTarget.of(
            labels, usable, groups=groups, documents=codes_of(rows) if documents is None else documents,
            held_out_fraction=held_out_fraction, seed=seed,
        )  # fmt: skip
        kept = rows.take(np.flatnonzero(usable))
        held_out, self._line, flops = reader.fit(kept, target, earlier)
        self._weights = reader.digest()
        report = target.report(held_out, num_labels=int((~target.held_out).sum()), seed=seed)
        self._report = dataclasses.replace(
            report,
            seconds=time.perf_counter() - started,
            flops=flops,
            flops_per_token=flops / float(np.asarray(kept.num_targets).sum()),
        )
        logger.info(
            "Fitted a feature influence model on %d candidates (%d held out) in %.1f s: Spearman %.3f.",
            len(target.labels), report.num_held_out, self._report.seconds, report.spearman,
        )  # fmt: skip
        return self

    def predict(self, dataset: Any, *, model: nn.Module | None = None) -> FloatArray:
        """Predicted `influence` of each row.

        At other weights than those of the fit, a warning says so once for each of them: fit again there.

        Args:
            dataset: A candidate pool with its collator, rows of one as a model is fed them, `TokenRows`, or a dataset
                with `input_ids` (and `labels`).
            model: The model to read with, as the fit has seen it; None takes the constructor's.

        Returns:
            (N,) float32 predicted influence in the unit of the labels, higher is better; the intercept where
            a row has no target.

        Raises:
            ValueError: there is no model, or it has another head than the one that was fitted on.
        """
        return (self._per_token(dataset, model) * self._units.step_size).astype(np.float32)

    def predict_per_token(self, dataset: Any, *, model: nn.Module | None = None) -> FloatArray:
        """Predicted `influence_per_token` of each row, (N,) float32, > 0 helps; arguments as in `predict`."""
        return self._per_token(dataset, model).astype(np.float32)

    @property
    def _units(self) -> StateLine:
        return saved.units_of(self._fitted())

    def _per_token(self, dataset: Any, model: nn.Module | None, *, tell: bool = True) -> npt.NDArray[np.float64]:
        line = self._fitted()
        reader, rows = self._opened(dataset, model)
        if tell and not self._in_run and isinstance(reader, LiveReader):
            tell_other_weights(reader.model, self._weights, self._told)
        found = np.asarray(rows.num_targets) > 0
        if not found.any():
            return self._units.per_token(np.zeros(0), found)
        return self._units.per_token(reader.z_scores(rows.take(np.flatnonzero(found)), line), found)

    def _opened(self, candidates: Any, model: nn.Module | None, labels: InfluenceLabels | None = None) -> Any:
        """What reads candidates, and the candidates: those of labels in their order, or all."""
        if self._encoder is not None:
            return self._encoder, self._encoder.rows(candidates, labels)
        live = self._live(model)
        reader = InputReader(self.progress) if live is None or self._kind == "inputs" else self._reader(live)
        if labels is None:
            return reader, open_rows(candidates, live)
        return reader, labelled_rows(candidates, labels, live, aligned=self._in_run)

    def _reader(self, live: nn.Module) -> LiveReader:
        self.head = name_of_head(live, self.head)
        return LiveReader(
            live, self.features, self.head, self.num_errors, self.tokens_per_batch, self.seed, self.progress
        )

    def _live(self, model: nn.Module | None) -> nn.Module | None:
        """The model to read with, unwrapped; None where none is given and none is run."""
        model = self.model if model is None else model
        if model is None and self._kind != "inputs":
            raise ValueError(
                "A FeatureInfluenceModel needs the model that trains to read with, and is saved without it. Pass it "
                "(`predict(dataset, model=model)`), or use `with_model(model)`."
            )
        return self._readable(model)

    def evaluate(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        model: nn.Module | None = None,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Compare predictions with labels of candidates the model was not fitted on, at whatever weights.

        Args:
            candidates: The candidate pool, or the rows the labels' `candidate_id` point into.
            labels: Fresh labels, of this round or a later one.
            model: The model to read with; None takes the constructor's.
            groups: (N,) group of each label, or None.
            documents: (N,) document of each label, for the bootstrap; None: equal inputs are one.
            seed: Random seed of the bootstrap.

        Returns:
            The report, in the unit of `labels.influence`; `seconds` is the time this took.
        """
        _, rows = self._opened(candidates, model, labels)
        return fresh_report(
            lambda: self._per_token(rows, model, tell=False), labels, self.report, groups=groups,
            documents=codes_of(rows) if documents is None else documents, seed=seed,
        )  # fmt: skip

    def seconds_to_score(self, candidates: Candidates, num: int, *, model: nn.Module | None = None) -> float:
        """Estimate how long one process takes to predict `num` candidates, by running a few of them.

        Args:
            candidates: Rows of the pool.
            num: Number of candidates.
            model: The model to read with; None takes the constructor's.

        Returns:
            Seconds.
        """
        if self._encoder is not None:
            return self._encoder.seconds(candidates, num)
        reader, rows = self._opened(candidates, model)
        return float(reader.seconds(rows, num))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory.

        Args:
            path: Created where missing. The ridge is written, and the digest of the weights that it was fitted at;
                neither the model nor a function of features is.
        """
        line = self._fitted()
        settings = {name: getattr(self, name) for name in _SAVED}
        settings |= {"features": self._kind, "weights": self._weights}
        settings["encoder"] = None if self._encoder is None else self._encoder.name
        saved.write_line(path, type(self).__name__, settings, line, self.report)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        features: FeatureFunction | nn.Module | None = None,
        processor: Any = None,
    ) -> Self:
        """Read what `save_pretrained` wrote. Nothing is unpickled.

        Args:
            path: The directory.
            model: The model to read candidates with; at the weights of the fit, predictions are equal bit for bit.
            features: The function or the encoder that it was fitted with, where no file holds it. An encoder that was
                given by its folder or repository is loaded from there.
            processor: Processor of an encoder that is given.

        Returns:
            The fitted ridge; without a model it can be `previous`, and predicts once it is given one.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, was written in a newer format, or needs `features`.
            MatesError: a file is damaged or was changed after it was written, or the encoder is another one.
        """
        config, line, report = saved.read_line(path, cls.__name__, (*_SAVED, "features", "weights", "encoder"))
        read = saved.features_to_load(path, config, features)
        try:
            found = cls(read, model, processor=processor, **{name: config[name] for name in _SAVED})
        except (TypeError, ValueError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        saved.require_encoder(found._encoder, config["weights"])
        found._line, found._report, found._weights = line, report, config["weights"]
        return found

    def load_fitted(self, path: str | os.PathLike[str]) -> Self:
        """A saved fit of this influence model, with the function of features that a file cannot hold."""
        if not callable(self.features):
            return self.from_pretrained(path)
        return self.from_pretrained(path, features=self.features, processor=self.processor)
