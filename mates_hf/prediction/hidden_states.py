"""A data influence model that reads the states of the very model that trains: no other model, nothing to download.

Where it is used: in place of `ngram_model`, between a probe and selection. A candidate becomes the mean of the
training model's hidden states over its trained tokens, at a few layers, and a ridge (`ridge`) takes that to influence.
Trade-off: it needs few labels, because what the model makes of a candidate is what its influence depends on; for that,
predicting costs a forward pass of the training model a candidate, and a fit is good for the weights it has seen: the
states move as the model trains.

Shape suffixes: N candidates, B rows of one pass, L tokens of the longest of them, D width of the states of all layers.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.data.arguments import check_fit
from mates_hf.data.documents import document_codes
from mates_hf.data.pool import rows_to_predict
from mates_hf.data.rows import TokenRows
from mates_hf.engine.model_traits import is_sharded, require_known_tokens, unwrap
from mates_hf.errors import MatesError
from mates_hf.flops import forward_flops
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.artifacts import damaged, read_artifact, write_artifact
from mates_hf.prediction.judge import fresh_report, measured_rows
from mates_hf.prediction.pooling import collect, fitting_precision, left_as_found, length_buckets, mean_states
from mates_hf.prediction.ridge import (
    SETTINGS,
    FitTarget,
    StateLine,
    fit_ridge,
    require_same_width,
)
from mates_hf.records import FitReport, FloatArray, InfluenceLabels

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_ARGUMENTS = ("layers", "tokens_per_batch", "seed", "progress")


class HiddenStateInfluenceModel:
    """Predict a candidate's influence by a ridge on the training model's hidden states of it.

    `fit`, `evaluate` and the predictions run the model as it is at that moment, in eval mode, and leave it to the bit
    as found. It is never copied, changed or saved: `save_pretrained` writes the ridge, and what is loaded can be
    built upon (`previous`) but predicts only once it is given a model again, which should be in the state that the fit
    has seen.

    Args:
        model: the model that trains, of transformers; None where each call is given one.
        layers: indices into the model's `hidden_states`, whose means are put side by side: 0 is the embedding, -1 what
            the output head reads. None takes the first, the middle and the last, which ranked better than any one.
        tokens_per_batch: padded tokens in one pass; less memory, not other results.
        seed: Random seed of the held-out split.
        progress: show progress bars.
        max_seconds: Largest number of seconds that scoring the candidates of one round may take. A run that would take
            longer is refused before its first step. None sets no limit, and the seconds are logged.

    Raises:
        ValueError: an argument outside its range.
        TypeError: `model` is no model of transformers.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        layers: Sequence[int] | None = None,
        tokens_per_batch: int = 8192,
        seed: int = 0,
        progress: bool = False,
        max_seconds: float | None = None,
    ) -> None:
        if layers is not None and not (layers and all(isinstance(layer, int) for layer in layers)):
            raise ValueError(f"`layers` must be None or whole numbers, got {layers!r}.")
        if not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
            raise ValueError(f"`tokens_per_batch` must be a whole number of at least 1, got {tokens_per_batch!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        if max_seconds is not None and not (isinstance(max_seconds, (int, float)) and max_seconds > 0):
            raise ValueError(f"`max_seconds` must be a number above 0, or None, got {max_seconds!r}.")
        if model is not None:
            _states_module(model)
        self.model = model
        self.max_seconds = max_seconds  # of a run: no prediction depends on it, and it is not saved
        self.layers = None if layers is None else list(layers)
        self.tokens_per_batch, self.seed, self.progress = tokens_per_batch, seed, progress
        self._line: StateLine | None = None
        self._report: FitReport | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that runs the same model; all else is replaced by a fit, never written to."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but the model: it does not travel to other processes."""
        return {**vars(self), "model": None}

    def with_model(self, model: nn.Module) -> Self:
        """A copy of this, fitted or not, that runs `model`."""
        _states_module(model)
        twin = copy.deepcopy(self)
        twin.model = model
        return twin

    def for_run(self, *, model: nn.Module, tokenizer: Any = None) -> Self:
        """The influence model with what it leaves open (None) taken from the run; what was set is kept.

        Args:
            model: the model that trains.
            tokenizer: its tokenizer, which is not needed here.

        Returns:
            This, or a copy.
        """
        return self if self.model is not None else self.with_model(model)

    @property
    def report(self) -> FitReport:
        """Held-out agreement of the last fit, in the unit of `influence`.

        Raises:
            MatesError: the model is not fitted.
        """
        self._fitted()
        assert self._report is not None
        return self._report

    def _fitted(self) -> StateLine:
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
        previous: HiddenStateInfluenceModel | None = None,
        seed: int | None = None,
    ) -> Self:
        """Fit on most candidates, report on the rest, then fit on all; one forward pass a candidate.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
            labels: measured influence, > 0 helps.
            model: the model to read with; None takes the constructor's.
            held_out_fraction: share of the candidates to report on, in (0, 1).
            groups: (N,) group of each label (domain, source), for the report only.
            documents: (N,) document of each label; split and bootstrap take whole ones. None: equal tokens are one.
            previous: the influence model of the round before, to build on as far as its coefficients fit the new
                labels; not changed.
            seed: Random seed of the split. Defaults to the constructor's seed.

        Returns:
            self, fitted.

        Raises:
            InfluenceError: labels are non-finite, all zero, all equal, or all of one document.
            ValueError: labels do not belong to the candidates, too few, tokens outside the vocabulary, no model, or
                `previous` is of another kind.
        """
        started = time.perf_counter()
        check_fit(candidates, labels)
        seed = self.seed if seed is None else seed
        if previous is not None and not isinstance(previous, HiddenStateInfluenceModel):
            raise ValueError(f"`previous` must be a HiddenStateInfluenceModel, got {type(previous).__name__}.")
        rows = measured_rows(candidates, labels)
        usable = labels.num_tokens > 0
        target = FitTarget.of(
            labels,
            usable,
            groups=groups,
            documents=document_codes(rows) if documents is None else documents,
            held_out_fraction=held_out_fraction,
            seed=seed,
        )
        rows = rows.take(usable)
        states = self._states(rows, model)
        earlier = None if previous is None else require_same_width(previous._fitted(), states.shape[1])
        fitted = ~target.held_out
        line = fit_ridge(states[fitted], target.values[fitted], earlier)
        report = target.report(line.z_scores(states[target.held_out]), num_labels=int(fitted.sum()), seed=seed)
        self._line = fit_ridge(states, target.values, earlier).in_units_of(target)
        module = _states_module(self.model if model is None else model)[0]
        flops = forward_flops(count_multiplied_parameters(module), float(rows.lengths.sum()))
        self._report = dataclasses.replace(
            report,
            seconds=time.perf_counter() - started,
            flops=flops,
            flops_per_token=flops / float(rows.num_targets.sum()),
        )
        logger.info(
            "Fitted a hidden-state influence model on %d candidates (%d held out) in %.1f s: Spearman %.3f.",
            len(target.labels), report.num_held_out, self._report.seconds, report.spearman,
        )  # fmt: skip
        return self

    def predict(self, dataset: Any, *, model: nn.Module | None = None) -> FloatArray:
        """Predicted `influence` of each row.

        Args:
            dataset: `TokenRows`, a candidate pool, or a dataset with `input_ids` (and `labels`).
            model: the model to read with, as the fit has seen it; None takes the constructor's.

        Returns:
            (N,) float32 predicted influence in the unit of the labels, higher is better; the intercept where
            a row has no target.

        Raises:
            ValueError: there is no model, or tokens are outside its vocabulary.
        """
        return (self._per_token(rows_to_predict(dataset), model) * self._fitted().step_size).astype(np.float32)

    def predict_per_token(self, dataset: Any, *, model: nn.Module | None = None) -> FloatArray:
        """Predicted `influence_per_token` of each row, (N,) float32, > 0 helps; arguments as in `predict`."""
        return self._per_token(rows_to_predict(dataset), model).astype(np.float32)

    def _per_token(self, rows: TokenRows, model: nn.Module | None) -> npt.NDArray[np.float64]:
        line, found = self._fitted(), rows.num_targets > 0
        return line.per_token(self._states(rows.take(found), model, line), found)

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
        """Compare predictions with labels of candidates the model was not fitted on.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
            labels: fresh labels, of this round or a later one.
            model: the model to read with; None takes the constructor's.
            groups: (N,) group of each label, or None.
            documents: (N,) document of each label, for the bootstrap; None: equal tokens are one.
            seed: Random seed of the bootstrap.

        Returns:
            The report, in the unit of `labels.influence`; `seconds` is the time this took.
        """
        rows = measured_rows(candidates, labels)
        return fresh_report(
            lambda: self._per_token(rows, model),
            labels,
            self.report,
            groups=groups,
            documents=document_codes(rows) if documents is None else documents,
            seed=seed,
        )

    def _states(self, rows: TokenRows, model: nn.Module | None, line: StateLine | None = None) -> npt.NDArray[Any]:
        """(N, D) float32 mean states of rows that all have targets, or (N,) float64 z-scored predictions of a line."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError(
                "A HiddenStateInfluenceModel needs the model that trains to read with, and is saved without "
                "it. Pass it (`predict(dataset, model=model)`), or use `with_model(model)`."
            )
        module, width, num_layers = _states_module(model)
        require_known_tokens(module, rows.values)
        layers = [0, (num_layers + 1) // 2, -1] if self.layers is None else self.layers
        for layer in layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(
                    f"`layers` must be among the model's {num_layers + 1} hidden states (0 to {num_layers}), got "
                    f"{layer}."
                )
        width *= len(layers)
        if line is not None:
            require_same_width(line, width)
        keep = {"width": width} if line is None else {"width": None, "of": line.z_scores}
        with left_as_found(model, self.seed), fitting_precision(next(model.parameters()).device):
            return collect(
                length_buckets(rows.lengths, np.ones(len(rows), np.int64), self.tokens_per_batch),
                lambda batch: _mean_over_targets(module, layers, rows.take(batch)),
                progress=self.progress,
                **keep,
            )

    def seconds_to_score(self, rows: TokenRows, num: int) -> float:
        """Estimate how long `num` candidates take to predict, by running a few, the second time of two."""
        rows, took = rows.take(rows.num_targets > 0), 0.0
        for _ in range(2):
            started = time.perf_counter()
            self._states(rows, None)
            took = time.perf_counter() - started
        return took * num / max(1, len(rows))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory.

        Args:
            path: created where missing. The ridge is written; the model whose states it reads is not.
        """
        line = self._fitted()
        settings = {name: getattr(self, name) for name in _ARGUMENTS} | line.settings()
        write_artifact(path, type(self).__name__, settings, {"coefficient": line.coefficient}, self.report)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Self:
        """Read what `save_pretrained` wrote. Nothing is unpickled.

        Args:
            path: the directory.
            model: to read candidates with; in the state that the fit has seen, predictions are equal to the bit.

        Returns:
            The fitted ridge; without a model it can be `previous`, and predicts once it is given one.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, or was written in a newer format.
            MatesError: a file is damaged or was changed after it was written.
        """
        config, tensors, report = read_artifact(path, cls.__name__, (*_ARGUMENTS, *SETTINGS))
        try:
            found = cls(model, **{name: config[name] for name in _ARGUMENTS})
            found._line = StateLine.read(config, tensors.get("coefficient"))
        except (TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        found._report = report
        return found


def _states_module(model: Any) -> tuple[Any, int, int]:
    """What gives the hidden states without the logits, their width, and the number of layers.

    Raises:
        TypeError: it is no model of transformers.
        MatesError: its weights are divided among processes.
    """
    inner: Any = unwrap(model) if isinstance(model, nn.Module) else model
    if hasattr(inner, "get_base_model"):  # peft: adapters stay in place
        inner = inner.get_base_model()
    config: Any = getattr(inner, "config", None)
    base = getattr(inner, "base_model", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, num_layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(base, nn.Module) or width is None or num_layers is None:
        raise TypeError(
            f"`model` must be a model of transformers, whose `base_model` gives hidden states, got "
            f"{type(model).__name__}."
        )
    if is_sharded(inner):
        raise MatesError(
            "A HiddenStateInfluenceModel runs the model in one process, so its weights must be whole there, and are "
            "sharded. Use `NgramInfluenceModel` or `EncoderInfluenceModel`."
        )
    return base, int(width), int(num_layers)


def _mean_over_targets(module: Any, layers: Sequence[int], rows: TokenRows) -> Tensor:
    """(B, D) float32 mean states over each row's trained tokens, layer by layer: states that have read the token."""
    num, owners, rows = len(rows), rows.owners, rows.unpacked()
    here_BL = np.arange(rows.lengths.max()) < rows.lengths[:, None]
    ids_BL = np.zeros(here_BL.shape, np.int64)  # padding on the right: any id does where the mask says so
    ids_BL[here_BL] = rows.values
    counted_BL = np.zeros(here_BL.shape, bool)
    counted_BL[here_BL] = rows.target_mask
    device = next(module.parameters()).device
    inputs = {"input_ids": torch.from_numpy(ids_BL).to(device)}
    if not here_BL.all():
        inputs["attention_mask"] = torch.from_numpy(here_BL.astype(np.int64)).to(device)
    deep = any(layer != -1 for layer in layers)
    output = module(**inputs, use_cache=False, output_hidden_states=deep, return_dict=True)
    states = [output["last_hidden_state"] if layer == -1 else output["hidden_states"][layer] for layer in layers]
    counted, owner = torch.from_numpy(counted_BL).to(device), torch.from_numpy(owners).to(device)
    return torch.cat([mean_states(state, counted, owner, num) for state in states], dim=1)
