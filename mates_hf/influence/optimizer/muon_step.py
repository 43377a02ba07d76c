"""`torch.optim.Muon`: a step along the orthogonalised momentum, and how that turns when a gradient is added.

Where it is used: `preconditioner` makes one for each matrix. With B the momentum after a null step and κ what of a
gradient enters it (1−μ, with Nesterov 1−μ²), the step is lr' · NS(B + κ g), where NS runs the Newton-Schulz iteration
X ← aX + (bA + cA²)X, A = XXᵀ, from X = B / ‖B‖. So `coefficient` = κ lr' and P is the derivative of NS at B, A's own
change included. The iteration acts on singular values alone, so its derivative is symmetric, and Pᵀ∇L is one run
forward beside it and then that of the norm: no graph, two matrices more.

Trade-off: the form of OPUS (arXiv:2602.05400) keeps A as it is at B, a third of the products, but it treats a gradient
along the momentum, which NS flattens, like one across it, and ranks worse (`python -m benchmarks muon_response`).
Either is taken where the null step leaves the momentum; a lone candidate turns it further than a derivative tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mates_hf.influence.optimizer.parameter_step import ParameterStep, sum_of_squares

Coefficients = tuple[float, float, float]


def orthogonalise(matrix: Tensor, coefficients: Coefficients, num_steps: int, eps: float) -> Tensor:
    """NS(matrix): the matrix with its singular values pushed towards 1, as torch computes it in this dtype."""
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def orthogonalise_change(
    matrix: Tensor, change: Tensor, coefficients: Coefficients, num_steps: int, eps: float
) -> Tensor:
    """Transposed derivative of `orthogonalise` at a matrix, applied to a change of it."""
    a, b, c = coefficients
    wide, tangent = (matrix, change) if matrix.shape[0] <= matrix.shape[1] else (matrix.T, change.T)
    norm = wide.norm().clamp(min=eps)
    start = x = wide / norm
    for _ in range(num_steps):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        half = tangent @ x.T
        turn = half + half.T  # how the Gram matrix changes, then how what multiplies x does
        product = turn @ gram
        moved = torch.addmm(tangent, update, tangent, beta=a)
        x, tangent = (
            torch.addmm(x, update, x, beta=a),
            torch.addmm(moved, (b * turn).add_(product + product.T, alpha=c), x),
        )
    along = start * (start * tangent).sum()  # changes the matrix's norm, which is divided out
    turned: Tensor = (tangent - along) / norm
    return turned if wide is matrix else turned.T


class MuonStep(ParameterStep):
    """The next step of Muon on one matrix.

    Args:
        parameter: the matrix, whole.
        state: its state.
        group: its parameter group.
        lr: learning rate of the step.
    """

    def __init__(self, parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], lr: float) -> None:
        momentum = float(group["momentum"])
        self._buffer: Tensor = state["momentum_buffer"]
        self._kept = momentum**2 if group["nesterov"] else momentum
        self._shrink = 1 - lr * float(group["weight_decay"])
        self._newton_schulz = (tuple(group["ns_coefficients"]), int(group["ns_steps"]), float(group["eps"]))
        self._rate = lr * _shape_factor(group["adjust_lr_fn"], *parameter.shape)
        super().__init__(parameter, self._rate * (1 - self._kept), 0.0, group)

    def write_null(self) -> None:
        """Move the matrix to where a step with zero gradient takes it, in the precision that Muon uses."""
        self.parameter.detach().mul_(self._shrink).add_(self._null_update(), alpha=-self._rate)

    def null_square(self) -> Tensor:
        """() squared length of the null step."""
        moved = self.parameter.detach() * (1 - self._shrink)
        return sum_of_squares(moved.add_(self._null_update(), alpha=self._rate))

    def _null_update(self) -> Tensor:
        return orthogonalise((self._buffer * self._kept).bfloat16(), *self._newton_schulz)

    def precondition(self, gradient: Tensor, scale: float, squares: Tensor | None) -> None:
        """Multiply a gradient by `scale` and the transpose of P, in place."""
        dtype = torch.promote_types(self._buffer.dtype, torch.float32)
        matrix, change = (self._buffer * self._kept).to(dtype), gradient.to(dtype)
        turned = orthogonalise_change(matrix, change, *self._newton_schulz).mul_(scale)
        was_reached = matrix.norm() > self._newton_schulz[2]  # by a batch; the host does not wait for the answer
        gradient.copy_(torch.where(was_reached, turned, torch.zeros_like(turned)))


def _shape_factor(adjust: str | None, rows: int, columns: int) -> float:
    """What Muon multiplies the learning rate with for a matrix of this shape."""
    if adjust is None or adjust == "original":
        return float(max(1.0, rows / columns) ** 0.5)
    return float(0.2 * max(rows, columns) ** 0.5)
