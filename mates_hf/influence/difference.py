"""Derivatives of candidates' losses along a direction, by central differences, and the step to take them with.

Where it is used: the second half of `DirectionalProbe.measure`, which finds the direction u. Candidates all run at
θ + ε u, then all at θ − ε u: two swaps of the weights for those given at once, 512 in a probe.

Trade-off: a small ε drowns in the rounding of the forward pass, a large one in curvature, and where the two meet
depends on precision. So ε is not a constant: a few candidates are measured at ε and 2ε, which must agree.

Shapes: N candidates with T trained tokens over all of them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from mates_hf.data.batches import Candidates
from mates_hf.engine.fragments import sharding_of, sum_over_shards
from mates_hf.engine.model_traits import is_low_precision, unwrap
from mates_hf.engine.preserve import local_shard, preserved
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.flops import NUM_EPSILON_CANDIDATES
from mates_hf.influence.preconditioner import add_up, squares_of

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.floating[Any]]

_MIN_AGREEMENT = 0.99
_LADDER = (1e-4, 1e-2)  # where a derivative is neither rounding noise nor curvature (in fp32; measured)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """The preconditioned gradient of the reference loss: a candidate whose loss rises along it helps.

    Attributes:
        by_parameter: u of each parameter that moves, as large as the parameter; the others do not move.
        step_size: c, the largest linear coefficient of a parameter; the others' ratio to it is inside u.
        norm: ‖u‖.
        parameter_norm: ‖θ‖ over the parameters of u.
        reference_loss: mean loss over the reference task's trained tokens, nats/token, each read where its gradient
            was taken: at θ_null, or along a path from there.
        flops: estimate of what finding it took.
        path_losses: mean loss of what each point of the path read, in its order, at that point.
        path_start_losses: mean loss of the same passages at θ_null, so that the two can be compared point by point;
            empty without a path.
        path_stopped: true where a longer path was given up because the loss rose along it: this one goes as far as the
            loss fell.
        path_stride: steps of the run from one point to the next.
        path_check: mean loss of the last quarter of the passages at θ_null, and one stride from there down u; None
            without a path.
        passage_losses: (R,) mean loss of each passage at θ_null, nats/token; 0 of one without a trained token.
    """

    by_parameter: Mapping[nn.Parameter, Tensor]
    step_size: float
    norm: float
    parameter_norm: float
    reference_loss: float
    flops: float
    path_losses: tuple[float, ...] = ()
    path_start_losses: tuple[float, ...] = ()
    path_stopped: bool = False
    path_stride: float | None = None
    path_check: tuple[float, float] | None = None
    passage_losses: FloatArray | None = None

    def length(self, epsilon: float) -> float:
        """The factor of u whose step is `epsilon` times as long as ‖θ‖."""
        return epsilon * self.parameter_norm / self.norm

    def path_info(self) -> dict[str, Any]:
        """What labels record of the path, as plain JSON values."""
        return {
            "path_losses": list(self.path_losses),
            "path_start_losses": list(self.path_start_losses),
            "path_points": max(1, len(self.path_losses)),
            "path_stopped": self.path_stopped,
            "path_stride": self.path_stride,
            "path_check": None if self.path_check is None else list(self.path_check),
        }

    def derivatives(self, plus: FloatArray, minus: FloatArray, epsilon: float) -> FloatArray:
        """(T,) float64 derivatives along u from losses at either side; > 0 helps."""
        return (plus.astype(np.float64) - minus) / (2 * self.length(epsilon))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsilonChoice:
    """The step of the central difference.

    Attributes:
        epsilon: ε‖u‖/‖θ‖.
        agreement: Pearson correlation of the candidates' derivatives at ε and 2ε; None where nothing was compared.
        num_rows: rows run forward to find out.
        num_tokens: tokens of those rows.
    """

    epsilon: float
    agreement: float | None = None
    num_rows: int = 0
    num_tokens: int = 0


def mean_of(row_losses: FloatArray, rows: Candidates, share: npt.NDArray[np.int64]) -> float:
    """Mean loss over the trained tokens of some rows; `row_losses` is (N,) mean loss of each row, `share` numbers."""
    return float(np.average(row_losses[share], weights=rows.num_targets[share]))


def passage_losses(rows: Candidates, means: FloatArray | None) -> npt.NDArray[np.float32] | None:
    """What labels record of the reference task's passages.

    Args:
        rows: Passages of the task.
        means: (R,) mean loss of each, nats/token; None where it is not known.

    Returns:
        (R, 2) float32, mean loss and trained tokens of each.
    """
    return None if means is None else np.stack([means, rows.num_targets], 1).astype(np.float32)


def losses_on_either_side(
    model: nn.Module, direction: Direction, epsilon: float, losses: Callable[[], FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Run `losses` in eval mode at θ + ε u, then at θ − ε u, and leave no trace.

    Args:
        model: the live model, unwrapped.
        direction: u.
        epsilon: ε‖u‖/‖θ‖.
        losses: what to measure, (T,) nats.

    Returns:
        Two arrays (T,), nats.
    """
    with preserved(model) as snapshot:
        model.eval()
        snapshot.shift(direction.by_parameter, direction.length(epsilon))
        plus = losses()
        snapshot.shift(direction.by_parameter, -direction.length(epsilon))
        return plus, losses()


def choose_epsilon(
    model: nn.Module,
    direction: Direction,
    rows: Candidates,
    either_side: Callable[[Candidates, float], tuple[FloatArray, FloatArray]],
    *,
    seed: int,
    processes: Processes = ALONE,
) -> EpsilonChoice:
    """The first step of a ladder whose derivatives agree with those at twice the step, else the one that agrees best.

    Args:
        model: the live model, for its precision.
        direction: u.
        rows: N candidates; up to 16 of them are measured.
        either_side: losses of some rows at an ε, as `losses_on_either_side` gives them.
        seed: Random seed of the candidates drawn.
        processes: those that call this together; the main one decides, so that all try the same steps.

    Returns:
        The choice, with the agreement to record.
    """
    start = smallest_step(model)
    if len(rows) < 3:
        return EpsilonChoice(epsilon=start)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:NUM_EPSILON_CANDIDATES]
    few = rows.take(np.sort(drawn))

    def derivatives(epsilon: float) -> FloatArray:
        return row_means(few, direction.derivatives(*either_side(few, epsilon), epsilon))

    tries: list[tuple[float, float]] = []
    for epsilon in (start * 3.0**power for power in (0, 1, -1, 2, -2, -3)):
        if not _LADDER[0] <= epsilon <= _LADDER[1]:
            continue
        tries.append((processes.agree(_pearson(derivatives(epsilon), derivatives(2 * epsilon))), epsilon))
        if tries[-1][0] >= _MIN_AGREEMENT:
            break
    agreement, epsilon = max(tries)
    if agreement < _MIN_AGREEMENT:
        logger.warning(
            "the derivatives of %d candidates at epsilon and at twice epsilon agree at %.3f at best (%.1e, of %d "
            "tried), below %.2f, so labels are noisy: low precision or candidates that are all alike do this",
            len(few), agreement, epsilon, len(tries), _MIN_AGREEMENT,
        )  # fmt: skip
    return EpsilonChoice(
        epsilon=epsilon,
        agreement=agreement if np.isfinite(agreement) else None,
        num_rows=4 * len(tries) * len(few),
        num_tokens=4 * len(tries) * int(few.lengths.sum()),
    )


def row_means(rows: Candidates, values: FloatArray) -> FloatArray:
    """(N,) float64 means of (T,) values over the trained tokens of each row, of which every row has one."""
    starts = np.cumsum(rows.num_targets, dtype=np.int64) - rows.num_targets
    means: FloatArray = np.add.reduceat(values.astype(np.float64), starts) / rows.num_targets
    return means


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Norm over all tensors together, over all shards of each."""
    return _norm_of_pairs([(tensor, tensor) for tensor in tensors])


def norm_by_parameter(tensors: Mapping[nn.Parameter, Tensor]) -> float:
    """Norm over all tensors together, each sharded as the parameter that it belongs to."""
    return _norm_of_pairs(list(tensors.items()))


def _norm_of_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Norm over the second tensors of all pairs together, each sharded as the first."""
    squares = squares_of([local_shard(tensor) for _, tensor in pairs])
    return joint_norm(zip((like for like, _ in pairs), squares, strict=True))


def joint_norm(squares: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Norm of what has these sums of squares: one wait for the device, one collective for each way of sharding.

    Args:
        squares: pairs of a tensor, which says how it is sharded, and the () sum of squares of a local shard like it.

    Returns:
        The root of the sum over all shards; all processes must call it where tensors are sharded.
    """
    by_sharding: dict[Any, list[Tensor]] = {}
    for like, square in squares:
        by_sharding.setdefault(sharding_of(like), []).append(square)
    sums = []
    for sharding, parts in by_sharding.items():
        sums.append(sum_over_shards(add_up(parts), sharding))
    return math.sqrt(float(add_up(sums)))


def _pearson(a: FloatArray, b: FloatArray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 and np.isfinite(scale) else -np.inf


def smallest_step(model: nn.Module) -> float:
    """ε‖u‖/‖θ‖ that a forward pass of this model tells from rounding noise in most cases."""
    return 3e-3 if is_low_precision(unwrap(model)) else 1e-3
