"""Fine-tuning an encoder with a regression head on z-scored labels, as the paper does.

Where it is used: the fit inside `encoder.EncoderInfluenceModel`. Trade-off: some of the candidates are neither fitted
nor reported on: they choose the epoch, and calibrate what it predicts, so that a net that has learned its labels by
heart does not promise influence it cannot find elsewhere.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from mates_hf.errors import MatesError
from mates_hf.evaluation.agreement import rank_correlation, slope_of
from mates_hf.flops import forward_flops, gradient_flops
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.encoder.folding import FoldingEncoder
from mates_hf.prediction.judge import SLOPE_RANGE, split_held_out
from mates_hf.prediction.ridge import FitTarget, FloatVector, StateLine
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

_PRIOR_CANDIDATES = 10  # what says that the slope is 1: on its own, a slope through a few candidates is anything
_MAX_GRAD_NORM = 1.0
_HEAD_STD = 0.02  # of a new head's weights, as encoders of transformers begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How to fine-tune; AdamW without weight decay, clipped gradients, a learning rate that falls to 0 in a line.

    Attributes:
        learning_rate: Learning rate of the first step.
        num_epochs: passes over the candidates.
        batch_rows: candidates in an optimizer step.
        tokens_per_batch: padded tokens in one pass; a step's passes add up their gradients.
        validation_fraction: share of the candidates that choose the epoch, in (0, 1).
        seed: Random seed of the split and the order of candidates.
        progress: show a progress bar.
    """

    learning_rate: float
    num_epochs: int
    batch_rows: int
    tokens_per_batch: int
    validation_fraction: float
    seed: int
    progress: bool

    def run(
        self, encoder: FoldingEncoder, start: StateLine | None, documents: Sequence[IntArray], target: FitTarget
    ) -> StateLine:
        """Fine-tune an encoder in place, and leave the weights of its best epoch in it.

        Dropout and a new head draw from the torch stream that is set.

        Args:
            encoder: to be changed, on the device to run on.
            start: the head to begin with; None draws one.
            documents: token ids of N candidates, each with some.
            target: their labels; those held out are not looked at.

        Returns:
            The calibrated head, in z-scored units.

        Raises:
            MatesError: a prediction is not finite.
            ValueError: too few candidates to keep some for validation.
        """
        rows, validation = self._split(target)
        head = _new_head(encoder.width, start).to(encoder.module.device)
        best_value, weights, line = -math.inf, {}, _line_of(head)
        for epoch in self._epochs(encoder, head, documents, target.values, rows[~validation]):
            tried = _line_of(head)
            predicted = self._predict(encoder, tried, documents, rows[validation])
            value = rank_correlation(predicted, target.values[rows[validation]])
            logger.debug("epoch %d of %d: Spearman %.3f", epoch, self.num_epochs, value)
            if value > best_value:
                weights = {name: tensor.cpu().clone() for name, tensor in encoder.module.state_dict().items()}
                best_value, line = value, tried
        encoder.module.load_state_dict(weights)
        predicted = self._predict(encoder, line, documents, rows)
        labels = target.values[rows]
        slope = calibration_slope(labels[validation], predicted[validation])
        return StateLine(slope * line.coefficient, float(labels.mean() + slope * (line.intercept - predicted.mean())))

    def flops(self, encoder: FoldingEncoder, documents: Sequence[IntArray], target: FitTarget) -> float:
        """FLOPs of `run`: training, choosing the epoch, and calibration."""
        rows, validation = self._split(target)
        fitted, chosen = (
            encoder.num_tokens([documents[i] for i in part]) for part in (rows[~validation], rows[validation])
        )
        num_parameters = count_multiplied_parameters(encoder.module)
        epoch = gradient_flops(num_parameters, fitted) + forward_flops(num_parameters, chosen)
        return self.num_epochs * epoch + forward_flops(num_parameters, fitted + chosen)

    def _split(self, target: FitTarget) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """(R,) candidates that may be looked at, and (R,) bool, those of them that choose the epoch."""
        rows = np.flatnonzero(~target.held_out)
        documents = None if target.documents is None else target.documents[rows]
        return rows, split_held_out(len(rows), self.validation_fraction, self.seed + 1, documents)

    def _epochs(
        self,
        encoder: FoldingEncoder,
        head: nn.Linear,
        documents: Sequence[IntArray],
        values: FloatVector,
        fitted: IntArray,
    ) -> Iterator[int]:
        """Train, and stop in eval mode after each epoch, with its number."""
        parameters = [*encoder.module.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        order_rng = np.random.default_rng(self.seed)
        num_steps, step = self.num_epochs * math.ceil(len(fitted) / self.batch_rows), 0
        total = self.num_epochs * len(fitted)
        with tqdm(total=total, desc="fine-tune", unit="row", disable=not self.progress) as bar:
            for epoch in range(1, self.num_epochs + 1):
                encoder.module.train()
                order = order_rng.permutation(fitted)
                for begin in range(0, len(order), self.batch_rows):
                    batch = order[begin : begin + self.batch_rows]
                    optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / num_steps)
                    optimizer.zero_grad()
                    self._add_gradients(encoder, head, [documents[i] for i in batch], values[batch])
                    nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
                    optimizer.step()
                    step += 1
                    bar.update(len(batch))
                encoder.module.eval()
                yield epoch

    def _add_gradients(
        self, encoder: FoldingEncoder, head: nn.Linear, documents: Sequence[IntArray], values: FloatVector
    ) -> None:
        """Gradients of the mean squared error over a step's candidates, pass by pass."""
        labels = torch.from_numpy(values).float().to(head.weight.device)
        with torch.enable_grad():
            for part in encoder.batches(documents, self.tokens_per_batch):
                predicted = head(encoder.pooled([documents[i] for i in part])).squeeze(1)
                ((predicted - labels[part]).square().sum() / len(documents)).backward()

    def _predict(
        self, encoder: FoldingEncoder, line: StateLine, documents: Sequence[IntArray], rows: IntArray
    ) -> FloatVector:
        """(R,) float64 predictions of some documents, in their order."""
        predicted = encoder.states([documents[i] for i in rows], self.tokens_per_batch, line.z_scores)
        if not np.isfinite(predicted).all():
            raise MatesError(
                f"Fine-tuning must stay finite, and does not at `learning_rate`={self.learning_rate}. Lower it."
            )
        return predicted


def calibration_slope(labels: FloatVector, predicted: FloatVector) -> float:
    """Slope of (V,) labels on predictions of candidates that were not fitted, drawn towards 1 where V is small."""
    weight = len(labels) / (len(labels) + _PRIOR_CANDIDATES)
    return float(np.clip(weight * slope_of(labels, predicted) + 1 - weight, *SLOPE_RANGE))


def _new_head(width: int, start: StateLine | None) -> nn.Linear:
    """The head to begin with, float32."""
    head = nn.Linear(width, 1, dtype=torch.float32)
    if start is None:
        nn.init.normal_(head.weight, std=_HEAD_STD)
        nn.init.zeros_(head.bias)
    else:
        nn.init.constant_(head.bias, start.intercept)
        head.weight.data.copy_(torch.from_numpy(start.coefficient)[None])
    return head


def _line_of(head: nn.Linear) -> StateLine:
    """What the head predicts now."""
    return StateLine(head.weight.detach()[0].cpu().numpy().astype(np.float64), float(head.bias.detach()))
