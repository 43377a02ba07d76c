"""A data influence model made of a text encoder: the paper's, with any encoder of transformers.

Where it is used: in place of `ngram_model`, between a probe and selection; the room `encoder/` runs it, `ridge`
judges what it predicts. Trade-off: it reads whole documents and brings what its own pretraining knows of text; for
that it must be downloaded, wants a GPU, and spends a forward pass on every candidate. `head_only=True` leaves the
encoder as it is and fits a ridge on its pooled states: a forward pass a label and seconds, where a fine-tuning run
takes minutes.

A candidate here is token ids of the *training* tokenizer, so it is decoded and read anew with the encoder's own.
Paper: MATES (arXiv:2406.06046) fine-tunes bert-base-uncased with the defaults below. Its best epoch is chosen on
candidates that are neither fitted nor reported on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mates_hf.data.arguments import check_fit, fitted_repr
from mates_hf.data.documents import text_codes
from mates_hf.data.pool import rows_to_predict
from mates_hf.data.texts import decode_rows, has_column, read_texts
from mates_hf.errors import MatesError
from mates_hf.flops import forward_flops
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.artifacts import damaged, read_artifact, told_text_only, write_artifact
from mates_hf.prediction.encoder.fine_tune import FineTuning
from mates_hf.prediction.encoder.folding import FoldingEncoder, load_encoder, pack_tokenizer, rebuild, unpack_tokenizer
from mates_hf.prediction.judge import fresh_report, measured_rows
from mates_hf.prediction.pooling import own_streams
from mates_hf.prediction.ridge import SETTINGS, FitTarget, StateLine, fit_ridge, require_same_width
from mates_hf.records import FitReport, FloatArray, InfluenceLabels, IntArray

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_ARGUMENTS = (
    "head_only", "max_tokens", "chunk_tokens", "learning_rate", "num_epochs", "batch_rows", "tokens_per_batch",
    "validation_fraction", "text_column", "seed", "device", "progress",
)  # fmt: skip
_COUNTS = ("max_tokens", "chunk_tokens", "num_epochs", "batch_rows", "tokens_per_batch")


class EncoderInfluenceModel:
    """Predict a candidate's influence from its text, by an encoder with a regression head on its mean state.

    The defaults are the paper's. Fine-tuning is AdamW without weight decay, the learning rate falling to 0 in a line,
    gradients clipped at 1, squared error on z-scored labels; bf16 where the device multiplies in it.

    Args:
        encoder: Hub id or path of any encoder of transformers, a (model, tokenizer) pair, or a model loaded from one
            of the former; loaded here, copied, never changed.
        tokenizer: the training tokenizer, which decodes candidates; None where they come with a text column.
        head_only: fit a ridge on the states of the encoder as it is, instead of fine-tuning it.
        max_tokens: tokens of a candidate that are read, of the encoder's tokenizer.
        chunk_tokens: longer candidates are folded into chunks of at most this many, and pooled.
        learning_rate: Learning rate of the first step of fine-tuning.
        num_epochs: Epochs of fine-tuning; the one with the best Spearman on the validation candidates is kept.
        batch_rows: candidates in an optimizer step.
        tokens_per_batch: padded tokens in one pass; less memory, not other results.
        validation_fraction: share of the candidates fitted on to choose the epoch by and to calibrate on.
        text_column: Column of the text, in datasets that are read as texts.
        seed: Random seed of splits, order of candidates, and dropout.
        device: where to run; None is the GPU where there is one. Between calls the weights are on the CPU.
        progress: show progress bars.
        text_only: Whether the text of rows is enough where they have other inputs, such as images, which are not read.

    Raises:
        ValueError: an argument outside its range, or an encoder without tokenizer.
        TypeError: `encoder` is none, or `tokenizer` cannot decode.
        OSError: the Hub or the path has no such encoder.
    """

    __repr__ = fitted_repr

    def __init__(
        self,
        encoder: Any = "bert-base-uncased",
        *,
        tokenizer: Any = None,
        head_only: bool = False,
        max_tokens: int = 1024,
        chunk_tokens: int = 512,
        learning_rate: float = 5e-5,
        num_epochs: int = 5,
        batch_rows: int = 32,
        tokens_per_batch: int = 8192,
        validation_fraction: float = 0.1,
        text_column: str = "text",
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
        text_only: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.head_only = head_only
        self.max_tokens, self.chunk_tokens = max_tokens, chunk_tokens
        self.learning_rate, self.num_epochs, self.batch_rows = learning_rate, num_epochs, batch_rows
        self.tokens_per_batch, self.validation_fraction = tokens_per_batch, validation_fraction
        self.text_column, self.seed = text_column, seed
        self.device = None if device is None else str(device)
        self.progress, self.text_only = progress, text_only
        for name in _COUNTS:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {getattr(self, name)!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {learning_rate!r}.")
        if not 0 < validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in (0, 1), got {validation_fraction!r}.")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise TypeError(
                f"`tokenizer` must be the training tokenizer, to decode candidates, got {type(tokenizer).__name__}."
            )
        self.num_empty = 0
        """Candidates without text or target in the last call: not fitted on, and predicted as the intercept."""
        if not isinstance(encoder, FoldingEncoder):
            encoder = load_encoder(encoder, max_tokens=max_tokens, chunk_tokens=chunk_tokens)
        self._source: FoldingEncoder = encoder
        self._encoder: FoldingEncoder | None = None
        self._line: StateLine | None = None
        self._report: FitReport | None = None

    def for_run(self, *, model: Any = None, tokenizer: Any) -> Self:
        """The influence model with what it leaves open (None) taken from the run; what was set is kept.

        Args:
            model: the model that trains, which is not needed here.
            tokenizer: its tokenizer.

        Returns:
            This, or a copy.

        Raises:
            ValueError: there is no tokenizer to decode candidates with.
        """
        if self.tokenizer is not None:
            return self
        if tokenizer is None:
            raise ValueError(
                "`EncoderInfluenceModel` must have the training tokenizer, to decode candidates, got none. Pass "
                "`EncoderInfluenceModel(tokenizer=...)`, or `Trainer(processing_class=tokenizer)`."
            )
        twin = copy.copy(self)
        twin.tokenizer = tokenizer
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

    def _fitted(self) -> tuple[FoldingEncoder, StateLine]:
        if self._encoder is None or self._line is None:
            raise MatesError("The influence model must be fitted first: call `fit(candidates, labels)`.")
        return self._encoder, self._line

    def fit(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        held_out_fraction: float = 0.1,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        previous: EncoderInfluenceModel | None = None,
        seed: int | None = None,
    ) -> Self:
        """Fit on most candidates and report on the rest.

        A ridge (`head_only`) is then fitted on all. A fine-tuned encoder is not: what is reported on is what is kept.
        The random streams of the caller are left as found; the same seed gives the same bits on a CPU.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into, as tokens or texts.
            labels: measured influence, > 0 helps.
            held_out_fraction: share of the candidates to report on, in (0, 1).
            groups: (N,) group of each label (domain, source), for the report only.
            documents: (N,) document of each label; split and bootstrap take whole ones. None: equal texts are one.
            previous: the influence model of the round before; not changed. Fine-tuning starts at its weights, a ridge
                builds on its coefficients as far as they fit the new labels.
            seed: Random seed of splits and fine-tuning. Defaults to the constructor's seed.

        Returns:
            self, fitted.

        Raises:
            InfluenceError: labels are non-finite, all zero, all equal, or all of one document.
            ValueError: labels do not belong to the candidates, too few, candidates without text, or `previous` is of
                another kind.
            MatesError: fine-tuning diverged.
        """
        started = time.perf_counter()
        check_fit(candidates, labels)
        seed = self.seed if seed is None else seed
        before = self._previous(previous)
        texts, found = self._read(candidates, labels)
        documents = text_codes(texts, found) if documents is None else documents
        drawn: dict[str, Any] = {"held_out_fraction": held_out_fraction, "seed": seed}
        target = FitTarget.of(labels, found, groups=groups, documents=documents, **drawn)
        held_out = target.held_out
        num_parameters = count_multiplied_parameters(self._source.module)
        reading = forward_flops(num_parameters, self._source.num_tokens(texts))
        if self.head_only:
            encoder = self._source
            with self._running(encoder, seed):
                states = encoder.states(texts, self.tokens_per_batch, progress=self.progress)
            line = fit_ridge(states[~held_out], target.values[~held_out], before and before[1])
            predicted = line.z_scores(states[held_out])
            line = fit_ridge(states, target.values, before and before[1])
            flops = reading
        else:
            encoder = self._source.trainable(before and before[0])
            with self._running(encoder, seed):
                tuning, unseen = self._tuning(seed), [texts[i] for i in np.flatnonzero(held_out)]
                line = tuning.run(encoder, before and before[1], texts, target)
                predicted = encoder.states(unseen, self.tokens_per_batch, line.z_scores)
            flops = tuning.flops(encoder, texts, target)
            flops += forward_flops(num_parameters, encoder.num_tokens(unseen))
        report = target.report(predicted, num_labels=int((~held_out).sum()), seed=seed)
        self._encoder, self._line = encoder, line.in_units_of(target)
        self._report = dataclasses.replace(
            report,
            seconds=time.perf_counter() - started,
            flops=flops,
            flops_per_token=reading / float(target.labels.num_tokens.sum()),
        )
        logger.info(
            "Fitted an encoder influence model on %d candidates (%d held out, %s) in %.1f s: Spearman %.3f.",
            len(target.labels), report.num_held_out, "head only" if self.head_only else "fine-tuned",
            self._report.seconds, report.spearman,
        )  # fmt: skip
        return self

    def _previous(self, previous: Any) -> tuple[FoldingEncoder, StateLine] | None:
        """What an earlier round's model contributes."""
        if previous is None:
            return None
        if not isinstance(previous, EncoderInfluenceModel):
            raise ValueError(f"`previous` must be an EncoderInfluenceModel, got {type(previous).__name__}.")
        encoder, line = previous._fitted()
        require_same_width(line, self._source.width)
        if not self.head_only and encoder.shapes() != self._source.shapes():
            raise ValueError("`previous` must be a fit of the same encoder. Leave it out after a change of encoder.")
        return encoder, line

    def _tuning(self, seed: int) -> FineTuning:
        names = (field.name for field in dataclasses.fields(FineTuning))
        return FineTuning(**{**{name: getattr(self, name) for name in names}, "seed": seed})

    @contextlib.contextmanager
    def _running(self, encoder: FoldingEncoder, seed: int) -> Iterator[None]:
        """Run the encoder where it is fast, on random streams of its own; memory of the device is free afterwards."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with own_streams(seed, device):
            try:
                encoder.module.to(device)
                yield
            finally:
                encoder.module.to("cpu").eval()

    def _read(
        self, candidates: Any, labels: InfluenceLabels | None = None
    ) -> tuple[list[IntArray], npt.NDArray[np.bool_]]:
        """Encoder's token ids of the candidates that have any and a target, and (M,) bool, which of all those are."""
        as_text = has_column(candidates, self.text_column)
        if as_text and (self.tokenizer is None or not has_column(candidates, "input_ids")):
            texts = read_texts(candidates, self.text_column, None if labels is None else labels.candidate_id)
            found = np.ones(len(texts), bool) if labels is None else labels.num_tokens > 0
        elif self.tokenizer is None:
            raise ValueError(
                f"The encoder needs text: `candidates` must have a column `{self.text_column}`, or pass the training "
                "tokenizer, which decodes token ids (`EncoderInfluenceModel(..., tokenizer=tokenizer)`)."
            )
        else:
            rows = rows_to_predict(candidates) if labels is None else measured_rows(candidates, labels)
            texts, found = decode_rows(rows, self.tokenizer), rows.num_targets > 0
        read = self._source.read(texts)
        found = found & np.array([len(ids) > 0 for ids in read], bool)
        self.num_empty = int((~found).sum())
        if self.num_empty:
            logger.info("%d of %d candidates have no text to read.", self.num_empty, len(read))
        return [read[i] for i in np.flatnonzero(found)], found

    def predict(self, dataset: Any) -> FloatArray:
        """Predicted `influence` of each row.

        Args:
            dataset: `TokenRows`, a candidate pool, or a dataset with `input_ids` or a text column.

        Returns:
            (N,) float32 predicted influence in the unit of the labels, higher is better; the intercept where
            a row has no text or no target (`num_empty` counts them).
        """
        return (self._predicted(*self._read(dataset)) * self._fitted()[1].step_size).astype(np.float32)

    def predict_per_token(self, dataset: Any) -> FloatArray:
        """Predicted `influence_per_token` of each row, (N,) float32, > 0 helps; arguments as in `predict`."""
        return self._predicted(*self._read(dataset)).astype(np.float32)

    def _predicted(self, texts: list[IntArray], found: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """(M,) float64 predicted `influence_per_token` of what `_read` found."""
        encoder, line = self._fitted()
        with self._running(encoder, self.seed):
            z_scores = encoder.states(texts, self.tokens_per_batch, line.z_scores, progress=self.progress)
        return line.per_token(z_scores, found)

    def evaluate(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Compare predictions with labels of candidates the model was not fitted on.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
            labels: fresh labels, of this round or a later one.
            groups: (N,) group of each label, or None.
            documents: (N,) document of each label, for the bootstrap; None: equal texts are one.
            seed: Random seed of the bootstrap.

        Returns:
            The report, in the unit of `labels.influence`; `seconds` is the time this took.
        """
        self._fitted()
        texts, found = self._read(candidates, labels.check())
        documents = text_codes(texts, found) if documents is None else documents
        return fresh_report(
            lambda: self._predicted(texts, found), labels, self.report, groups=groups, documents=documents, seed=seed
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory.

        Args:
            path: created where missing. The encoder and both tokenizers are among what is written, so that what is
                loaded needs nothing else; no text of a candidate is.
        """
        encoder, line = self._fitted()
        tensors = {"coefficient": line.coefficient, **encoder.tensors()}
        if self.tokenizer is not None:
            tensors |= pack_tokenizer(self.tokenizer, "tokenizer")
        settings = {name: getattr(self, name) for name in _ARGUMENTS} | told_text_only(self)
        settings |= {**line.settings(), "encoder_config": encoder.config()}
        write_artifact(path, type(self).__name__, settings, tensors, self.report)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: str | None = None) -> Self:
        """Read what `save_pretrained` wrote; on a CPU, predictions are equal to the bit. Nothing is unpickled.

        Args:
            path: the directory.
            device: where to run; None is what was saved.

        Returns:
            The fitted model. Fitted again it starts at the weights it was saved with.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, or was written in a newer format.
            MatesError: a file is damaged or was changed after it was written.
        """
        names = (*_ARGUMENTS, *SETTINGS, "encoder_config")
        config, tensors, report = read_artifact(path, cls.__name__, names)
        try:
            arguments = {name: config[name] for name in _ARGUMENTS} | {"text_only": config.get("text_only", False)}
            lengths = {name: arguments[name] for name in ("max_tokens", "chunk_tokens")}
            encoder = rebuild(config["encoder_config"], tensors, **lengths)
            model = cls(encoder, tokenizer=unpack_tokenizer(tensors, "tokenizer"), **arguments)
            model._line = require_same_width(StateLine.read(config, tensors.get("coefficient")), encoder.width)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        model._encoder, model._report = encoder, report
        model.device = device or model.device
        return model
