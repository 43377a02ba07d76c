"""The direction in which the reference loss falls, over one step or along a path of many.

Where it is used: the first half of `DirectionalProbe.measure`; `difference` is the second.

What lowers the reference loss in one step need not be what lowers it over a round, so the preconditioned gradient
Pᵀ ∇L_ref may be read at several points instead of at θ_null alone. They lie on the way that training on the reference
task itself would take: point i at i strides from θ_null, down the mean of what the points before it gave. The points
share the passages, so that the task is read once either way, and the direction u is the mean over all trained tokens,
each at its point.

A stride is counted in the run's own steps. With momentum the null step tells how long one is (0.95 of a real one where
it was measured), without it P and the usual size of a gradient do, and where the optimizer keeps neither, the gradient
of one batch. So a point that reads few passages cannot throw the path off, however noisy its gradient is.

All passages are also read at θ_null without a gradient. What a point reads is compared with the same passages there,
so that passages which are hard do not look like a loss that rises. Where it does rise, the path is walked again
only as far as it fell, in shorter strides.

Trade-off: P is the live one at every point, and momentum is left out: a path needs no copy of the optimizer's state,
and no memory that a single point would not need. It costs a third of a reading more than a single point does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.preserve import Snapshot, local_shard
from mates_hf.flops import checked_passages, num_path_points
from mates_hf.influence.difference import (
    Direction,
    FloatArray,
    joint_norm,
    mean_of,
    norm_by_parameter,
    norm_of,
    row_means,
)
from mates_hf.influence.preconditioner import ParameterStep, grouped, squares_of, sum_of_squares
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

MAX_RISE = 0.1  # nats/token above θ_null at which a path is given up
MAX_STOPS = 3  # after so many there is a single point, θ_null


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathReader:
    """How a path reads passages at the model's present weights.

    Attributes:
        mean_gradient: leaves the gradient of the mean loss of some rows in `.grad`, and each row's sum of losses in an
            array; returns the mean.
        add_gradient: adds the gradient of the sum of the losses to `.grad`; returns the mean loss, or None where
            memory ran out. It then reads in smaller micro-batches, and all of `.grad` is to be read again.
        token_losses: (T,) nats, without a gradient.
        smallest_step: share of ‖θ‖ that a forward pass tells from rounding noise.
    """

    mean_gradient: Callable[[Candidates, FloatArray], float]
    add_gradient: Callable[[Candidates], float | None]
    token_losses: Callable[[Candidates], FloatArray]
    smallest_step: float


def shares_of_path(rows: Candidates, path_steps: int, seed: int, num_processes: int = 1) -> list[IntArray]:
    """Row numbers that each point of a path reads: all at a single one, else shares of about as many rows.

    Args:
        rows: the reference task's.
        path_steps: points asked for; fewer where they would read less than four passages.
        seed: Random seed of which passages a point reads.
        num_processes: processes that must run each point together; fewer points where one would be without a passage.

    Returns:
        Numbers that have all trained rows once.
    """
    trained = np.flatnonzero(rows.num_targets)
    num_points = num_path_points(path_steps, len(trained), num_processes)
    if num_points == 1:
        return [np.arange(len(rows))]
    order = np.random.default_rng(seed).permutation(trained)
    return [np.sort(part) for part in np.array_split(order, num_points)]


class ReferencePath:
    """A path over the passages of the reference task, to be walked inside `preserved`.

    Args:
        snapshot: Snapshot of the model, to return to.
        steps: the optimizer's next step of each parameter.
        rows: the reference task's.
        reading: how it is read.
        squares: E[g_B²] where the optimizer's state does not tell it.
        left_out: ids of parameters that do not move.
        batch_squares: squared lengths of a usual batch's gradient, for steps whose state does not tell how long they
            are; asked only where there are such steps, None where there is no batch to ask.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        steps: Sequence[ParameterStep],
        rows: Candidates,
        reading: PathReader,
        *,
        squares: Mapping[nn.Parameter, Tensor],
        left_out: Collection[int],
        batch_squares: Callable[[], Mapping[nn.Parameter, Tensor] | None],
    ) -> None:
        self._snapshot, self._rows, self._reading, self._squares = snapshot, rows, reading, squares
        self._steps = steps
        self._moving = [step for step in steps if id(step.parameter) not in left_out]
        self._moves = {id(step) for step in self._moving}
        self._alike = grouped(steps)
        self._batch_squares = batch_squares
        self._step_size = max(abs(step.coefficient) for step in steps)  # one scalar for all; the ratios go into u
        self.num_tokens_backward = 0
        self.num_tokens_forward = 0

    def read_once(self) -> Direction:
        """The gradient at θ_null alone.

        Returns:
            (c_p / step_size) Pᵀ ∇L_ref of each parameter that moves. Its norm is not finite where a gradient is not.
        """
        self._go_to(0, 0.0)
        sums = np.zeros(len(self._rows))
        loss = self._reading.mean_gradient(self._rows, sums)
        self.num_tokens_backward += int(self._rows.lengths.sum())
        losses = sums / np.maximum(self._rows.num_targets, 1)
        return dataclasses.replace(self._direction(1.0, loss), passage_losses=losses)

    def walk(self, num_points: int, rate: float, seed: int) -> Direction:
        """The mean of the preconditioned gradients along a path.

        Args:
            num_points: asked for; fewer where there are few passages.
            rate: length of a stride in the run's own steps.
            seed: Random seed of which passages a point reads.

        Returns:
            The mean over the tokens of the task of (c_p / step_size) Pᵀ ∇L, each where it was read.
        """
        self._go_to(0, 0.0)
        at_null = self._row_losses(np.arange(len(self._rows)))
        stride = self._own_step()
        shares = shares_of_path(self._rows, num_points, seed)
        num_stops = 0
        while True:
            starts = [mean_of(at_null, self._rows, share) for share in shares]
            losses = self._visit(shares, starts, rate, stride)
            if losses is None:
                continue  # in smaller micro-batches
            if len(losses) == len(shares) or not np.isfinite(losses[-1]):
                break
            num_stops += 1
            if num_stops == MAX_STOPS:
                shares = shares_of_path(self._rows, 1, seed)
            else:  # to the last point that was not above the start, or half-way to the first
                rate *= max(len(losses) - 1, 0.5) / (len(shares) - 1)
        tokens = [int(self._rows.num_targets[share].sum()) for share in shares[: len(losses)]]
        found = self._direction(1.0 / sum(tokens), float(np.average(losses, weights=tokens)))
        if num_stops:
            logger.info(
                "the reference loss rose along the path: it has %d points now, %.3g steps apart", len(losses), rate
            )
        return dataclasses.replace(
            found,
            path_losses=tuple(losses),
            path_start_losses=tuple(starts[: len(losses)]),
            path_stopped=num_stops > 0,
            path_stride=rate,
            path_check=self._check(found, at_null, shares, rate, stride),
            passage_losses=at_null,
        )

    def _visit(
        self, shares: Sequence[IntArray], starts: Sequence[float], rate: float, stride: float | None
    ) -> list[float] | None:
        """Read every share at its point, into `.grad`; returns the losses, up to where they rise or are not finite.

        None where memory ran out; where the losses are fewer than the shares, `.grad` is of no use.
        """
        for parameter in self._snapshot.parameters:
            parameter.grad = None
        losses: list[float] = []
        num_targets = 0
        for number, share in enumerate(shares):
            part = self._rows.take(share) if len(shares) > 1 else self._rows
            if number:
                if stride is None:  # nothing else tells: as long as a step on the first share
                    own = [(s.parameter, s.coefficient**2 * _square_of_gradient(s.parameter)) for s in self._moving]
                    stride = joint_norm(own) / num_targets
            self._go_to(number, rate * (stride or 0.0) * number)
            self.num_tokens_backward += int(part.lengths.sum())
            loss = self._reading.add_gradient(part)
            if loss is None:
                return None
            if number and not loss - starts[number] <= MAX_RISE:
                return losses
            losses.append(loss)
            num_targets += int(part.num_targets.sum())
            if not np.isfinite(loss):
                return losses
        return losses

    @torch.no_grad()
    def _go_to(self, number: int, length: float) -> None:
        """Take the null step, then `length` down what `.grad` holds so far, of which P makes the direction."""
        factor = 0.0
        if number and length:
            norm = joint_norm(self._squares_of_direction())
            factor = length / norm if norm > 0 and np.isfinite(norm) else 0.0
        self._snapshot.rewind_parameters()
        self._write_null()
        if factor:
            for steps in self._groups():
                for _, theta, change in self._preconditioned(steps, factor):
                    torch._foreach_sub_(theta, change)
        self._snapshot.written()

    def _write_null(self) -> None:
        for numbers in self._alike:
            steps = [self._steps[number] for number in numbers]
            steps[0].write_null_of(steps)

    def _groups(self) -> list[list[ParameterStep]]:
        """Steps that move and have a gradient, those together that can be worked on at once."""
        found = []
        for numbers in self._alike:
            alike = [self._steps[number] for number in numbers if id(self._steps[number]) in self._moves]
            alike = [step for step in alike if step.parameter.grad is not None]
            for given in (False, True):
                same = [step for step in alike if (step.parameter in self._squares) == given]
                found += [same] if same else []
        return found

    def _preconditioned(
        self, steps: list[ParameterStep], factor: float
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Pieces of the parameters of a group, and of `factor` (c_p / step_size) Pᵀ times their `.grad`."""
        return steps[0].preconditioned_of(
            steps, _gradients(steps), self._scales(steps, factor), self._squares_for(steps)
        )

    def _scales(self, steps: list[ParameterStep], factor: float) -> list[float]:
        return [factor * step.coefficient / self._step_size for step in steps]

    def _squares_for(self, steps: list[ParameterStep]) -> list[Tensor | None]:
        return [self._squares.get(step.parameter) for step in steps]

    def _squares_of_direction(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters, and () sums of squares of pieces of Pᵀ times what `.grad` holds, in the order of the steps."""
        found: dict[int, list[Tensor]] = {id(step): [] for step in self._moving}
        for steps in self._groups():
            for owners, _, pieces in self._preconditioned(steps, 1.0):
                for owner, square in zip(owners, squares_of(pieces), strict=True):
                    found[id(steps[owner])].append(square)
        return [(step.parameter, square) for step in self._moving for square in found[id(step)]]

    @torch.no_grad()
    def _own_step(self) -> float | None:
        """Length of a step of the run over the parameters that move; None where only a gradient would tell it."""
        lengths: list[tuple[Tensor, Tensor]] = []
        unknown: list[ParameterStep] = []
        self._snapshot.rewind_parameters()
        found: dict[int, Tensor] = {}
        for numbers in self._alike:
            steps = [self._steps[number] for number in numbers if id(self._steps[number]) in self._moves]
            if not steps:
                continue
            first = steps[0]  # whether there is momentum is the same for all that are alike
            squares = first.null_squares_of(steps) if first.momentum else first.usual_squares_of(steps)
            found.update(zip(map(id, steps), squares or (), strict=squares is not None))
        for step in self._moving:
            square = found.get(id(step))
            if square is None:
                unknown.append(step)
            else:
                lengths.append((step.parameter, square))
        if unknown:
            self._snapshot.written()
            batch = self._batch_squares()
            if batch is None:
                return None
            lengths += [(s.parameter, s.coefficient**2 * batch[s.parameter]) for s in unknown if s.parameter in batch]
        return joint_norm(lengths)

    @torch.no_grad()
    def _direction(self, scale: float, loss: float) -> Direction:
        """Precondition `.grad`, times `scale`, in place; parameters are put back, for ‖θ‖ is of where the run is."""
        for steps in self._groups():
            scales = self._scales(steps, scale)
            steps[0].precondition_of(steps, _gradients(steps), scales, self._squares_for(steps))
        moved = [step.parameter for step in self._moving]
        total = {parameter: parameter.grad for parameter in moved if parameter.grad is not None}
        for parameter in self._snapshot.parameters:
            parameter.grad = None
        self._snapshot.rewind_parameters()
        return Direction(
            by_parameter=total,
            step_size=self._step_size,
            norm=norm_by_parameter(total),
            parameter_norm=norm_of(total),
            reference_loss=loss,
            flops=0.0,
        )

    def _check(
        self, found: Direction, at_null: FloatArray, shares: Sequence[IntArray], rate: float, stride: float | None
    ) -> tuple[float, float] | None:
        """Loss of the last quarter of the passages at θ_null, and one stride down u, where it must be lower.

        The stride is at least so long that the forward pass tells it from rounding.
        """
        if not np.isfinite(found.norm) or not found.norm:
            return None
        order = np.concatenate(shares)
        order = order[self._rows.num_targets[order] > 0]
        last = np.sort(order[-checked_passages(len(order)) :])
        length = max(rate * (stride or 0.0), self._reading.smallest_step * found.parameter_norm)
        with torch.no_grad():
            self._write_null()
            torch._foreach_sub_(
                [local_shard(parameter) for parameter in found.by_parameter],
                [local_shard(change) for change in found.by_parameter.values()],
                alpha=length / found.norm,
            )
        self._snapshot.written()
        before, after = mean_of(at_null, self._rows, last), mean_of(self._row_losses(last), self._rows, last)
        self._snapshot.rewind_parameters()
        if not after < before:
            logger.warning(
                "The reference loss must fall along the direction that was found, but on the last quarter of the "
                "passages it went from %.4f to %.4f: labels may be noise. Look at the precision of the run "
                "(`fp16`), and at whether its learning rate is too high for the batch.", before, after,
            )  # fmt: skip
        return before, after

    def _row_losses(self, index: IntArray) -> FloatArray:
        """(N,) mean loss of the rows with these numbers where the model is now; 0 of all others."""
        part = self._rows.take(index[self._rows.num_targets[index] > 0])
        self.num_tokens_forward += int(part.lengths.sum())
        means = np.zeros(len(self._rows))
        means[index[self._rows.num_targets[index] > 0]] = row_means(part, self._reading.token_losses(part))
        return means


def _gradients(steps: list[ParameterStep]) -> list[Tensor]:
    """Local shards of the gradients of parameters that have one."""
    return [local_shard(step.parameter.grad) for step in steps if step.parameter.grad is not None]


def _square_of_gradient(parameter: nn.Parameter) -> Tensor:
    """() sum of squares of a local shard of a gradient; 0 without one."""
    gradient = parameter.grad
    return torch.zeros((), dtype=torch.float64) if gradient is None else sum_of_squares(local_shard(gradient))
