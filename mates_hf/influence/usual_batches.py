"""What a batch of the run would bring at the present weights: the squares of its gradient, and how long that is.

Where it is used: `DirectionalProbe` asks for E[g_B²] under `second_moment="batches"`, and `reference_path` for the
length of a step where the optimizer's state does not tell it (SGD without momentum).

Trade-off: batches are drawn from the candidates at hand, with replacement, rather than from the run's own order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.averaging import trainable_parameters
from mates_hf.engine.preserve import local_shard
from mates_hf.flops import NUM_SECOND_MOMENT_BATCHES
from mates_hf.influence.difference import norm_by_parameter
from mates_hf.influence.preconditioner import ParameterStep, multiply, scaled_sums, squares_of


class UsualBatches:
    """Gradients of batches like the run's, of candidates, at the present weights.

    Args:
        model: the live model, unwrapped.
        candidates: rows that batches are drawn from, or None.
        batch_rows: rows in one optimizer step, or None.
        max_grad_norm: to what the run clips the gradient of a batch; None and 0 are off.
        seed: Random seed of what is drawn.
        mean_gradient: leaves the gradient of the mean loss of some rows in `.grad`.

    Attributes:
        num_tokens: run forward and backward so far.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates | None,
        *,
        batch_rows: int | None,
        max_grad_norm: float | None,
        seed: int,
        mean_gradient: Callable[[Candidates], float],
    ) -> None:
        self._model, self._candidates, self._rows = model, candidates, batch_rows
        self._max_grad_norm, self._seed, self._mean_gradient = max_grad_norm, seed, mean_gradient
        self.num_tokens = 0

    def mean_squares(self, steps: Sequence[ParameterStep]) -> dict[nn.Parameter, Tensor]:
        """E[g_B²] of each parameter that batches reach, clipped as the run clips: what an optimizer would see.

        Args:
            steps: the optimizer's next step of each parameter.

        Returns:
            Tensors of the local shards' shapes.

        Raises:
            ValueError: there is nothing to draw from.
        """
        if self._rows is None or self._candidates is None or not len(self._candidates):
            raise ValueError(
                "`second_moment='batches'` must have candidates and `batch_rows`, the rows of one optimizer step, got "
                f"batch_rows={self._rows} and "
                f"{0 if self._candidates is None else len(self._candidates)} candidates."
            )
        squares: dict[nn.Parameter, Tensor] = {}
        generator = np.random.default_rng(self._seed)
        for _ in range(NUM_SECOND_MOMENT_BATCHES):
            factor = self._read(generator)
            with torch.no_grad():
                self._add_squares(squares, [step for step in steps if step.parameter.grad is not None], factor)
        return squares

    def _add_squares(
        self, squares: dict[nn.Parameter, Tensor], reached: Sequence[ParameterStep], factor: float
    ) -> None:
        """Add the squares of `.grad` times a factor, their share of the mean; `.grad` is not left as it was."""
        found = {step.parameter: step.parameter.grad for step in reached}
        gradients = {parameter: local_shard(grad) for parameter, grad in found.items() if grad is not None}
        multiply(list(gradients.values()), factor)
        for l2 in {step.l2 for step in reached if step.l2}:
            decayed = [step.parameter for step in reached if step.l2 == l2]
            torch._foreach_add_([gradients[p] for p in decayed], [local_shard(p) for p in decayed], alpha=l2)
        if gradients:
            torch._foreach_mul_(list(gradients.values()), list(gradients.values()))
            torch._foreach_div_(list(gradients.values()), NUM_SECOND_MOMENT_BATCHES)
        again = [parameter for parameter in gradients if parameter in squares]
        if again:
            torch._foreach_add_([squares[p] for p in again], [gradients[p] for p in again])
        squares.update({p: gradient for p, gradient in gradients.items() if p not in squares})

    def square_of_one(self) -> dict[nn.Parameter, Tensor] | None:
        """() squared length of each local shard of one batch's gradient, clipped as the run clips; None without rows.

        Gradients are dropped.
        """
        if self._rows is None or self._candidates is None or not len(self._candidates):
            return None
        factor = self._read(np.random.default_rng(self._seed))
        found = {parameter: parameter.grad for parameter in trainable_parameters(self._model).values()}
        gradients = {parameter: local_shard(grad) for parameter, grad in found.items() if grad is not None}
        sums = [[square] for square in squares_of(list(gradients.values()))]
        squares = dict(zip(gradients, scaled_sums(sums, factor**2), strict=True))
        for parameter in trainable_parameters(self._model).values():
            parameter.grad = None
        return squares

    def _read(self, generator: np.random.Generator) -> float:
        """Leave the gradient of a batch in `.grad`; returns what the run's clipping would multiply it with."""
        assert self._rows is not None
        assert self._candidates is not None
        # With replacement, so that batches larger than the candidates at hand vary as much as they should.
        batch = self._candidates.take(generator.integers(len(self._candidates), size=self._rows))
        self.num_tokens += int(batch.lengths.sum())
        self._mean_gradient(batch)
        if not self._max_grad_norm:
            return 1.0
        found = trainable_parameters(self._model).values()
        norm = norm_by_parameter({p: p.grad for p in found if p.grad is not None})
        return min(1.0, self._max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_ does
