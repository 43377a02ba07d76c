"""What stages cost, in FLOPs: the rule that rounds record with and that `reporting` predicts with, without torch.

Where it is used: beside the probes and influence models, which say how many tokens they ran. The rule is that of
the Trainer's `total_flos`: 2 FLOPs a parameter and token forward, 4 more backward, for every parameter that a token is
multiplied with. That is all of them but the tables it is looked up in: the output head counts, the input embedding
does not, and one matrix that is both counts once (`probe.count_multiplied_parameters`).

Trade-off: the rule leaves out attention scores (4 x layers x width x length a token forward, twice that backward),
what is done element by element (norms, activations, the softmax of the loss, the optimizer's step) and padding. Full
fine-tuning is assumed, and of a mixture of experts all experts count, as in `total_flos`.
"""

from __future__ import annotations

FORWARD = 2.0
FORWARD_AND_BACKWARD = 6.0
NUM_EPSILON_CANDIDATES = 16  # candidates that choose ε, on either side at ε and at 2ε for each step tried
PATH_STEPS = 32  # points of the default probe's path
PASSAGES_PER_STEP = 16  # of `LossReductionProbe`
MANY_PASSAGES = 200  # that `LossReductionProbe` needs in a look into a round: fewer are soon learned by heart
MIN_PASSAGES = 4  # that a point of a path reads: fewer are mostly noise
SENTINEL_SHARE = 8  # a look into a round reads one reference passage in so many
NUM_SECOND_MOMENT_BATCHES = 4  # batches of which E[g_B²] is the mean
# Of the n-gram influence model, on the CPU. A labelled token: about 200 sweeps over the cells of three tables, most of
# them to choose penalties by folds, at a dozen FLOPs each. A scored token: three look-ups and a hash; generous.
NGRAM_FIT_FLOPS = 3_000.0
NGRAM_SCORE_FLOPS = 30.0


def forward_flops(num_parameters: int, num_tokens: float) -> float:
    """FLOPs of a pass without gradient over so many tokens, by a model of so many multiplied parameters."""
    return FORWARD * num_parameters * num_tokens


def gradient_flops(num_parameters: int, num_tokens: float) -> float:
    """FLOPs of a forward and backward pass over so many tokens: of a probe's gradient, and of training."""
    return FORWARD_AND_BACKWARD * num_parameters * num_tokens


def directional_flops(
    num_parameters: int,
    *,
    num_candidate_tokens: float,
    num_reference_tokens: float,
    epsilon_steps: int = 0,
    tokens_per_row: float = 0,
    num_second_moment_tokens: float = 0,
    num_compared_tokens: float = 0,
) -> float:
    """FLOPs of one `DirectionalProbe.measure`: a gradient of the reference loss, two forward passes a candidate.

    Args:
        num_parameters: parameters a token is multiplied with.
        num_candidate_tokens: tokens of all candidates.
        num_reference_tokens: tokens of the reference task.
        epsilon_steps: steps tried to choose ε; 0 where it is given.
        tokens_per_row: tokens of each candidate that chooses ε.
        num_second_moment_tokens: tokens of the batches of E[g_B²].
        num_compared_tokens: tokens of the passages that a path reads without a gradient: all of them at its start, and
            `checked_passages` behind a stride.

    Returns:
        FLOPs.
    """
    once = gradient_flops(num_parameters, num_reference_tokens + num_second_moment_tokens)
    num_epsilon_tokens = 4 * epsilon_steps * NUM_EPSILON_CANDIDATES * tokens_per_row
    return once + forward_flops(num_parameters, 2 * num_candidate_tokens + num_epsilon_tokens + num_compared_tokens)


def loss_reduction_flops(
    num_parameters: int,
    *,
    num_candidate_tokens: float,
    num_reference_tokens: float,
    num_trained_tokens: float,
    num_compared_tokens: float = 0,
) -> float:
    """FLOPs of one `LossReductionProbe.measure`: steps on passages, and two forward passes a candidate.

    Args:
        num_parameters: parameters a token is multiplied with.
        num_candidate_tokens: tokens of all candidates.
        num_reference_tokens: tokens of the reference task, read once before the steps.
        num_trained_tokens: tokens of the passages that the steps read.
        num_compared_tokens: tokens run forward to find how the run's loss is read.

    Returns:
        FLOPs, without those of the optimizer's steps.
    """
    forward = 2 * num_candidate_tokens + num_reference_tokens + num_compared_tokens
    return gradient_flops(num_parameters, num_trained_tokens) + forward_flops(num_parameters, forward)


def num_path_points(path_steps: int, num_passages: int, num_processes: int = 1) -> int:
    """Points of a path over so many passages: fewer than asked for where they would read less than four each.

    Args:
        path_steps: points asked for.
        num_passages: passages with a trained token.
        num_processes: processes that must run each point together, because weights are sharded: each then reads one
            passage of a point at least, instead of running one that does not count.

    Returns:
        The number, at least 1.
    """
    return max(1, min(path_steps, num_passages // max(MIN_PASSAGES, num_processes)))


def checked_passages(num_passages: int) -> int:
    """Passages read once more to see that the loss falls along a path's direction: a quarter."""
    return max(1, round(num_passages / 4))


def sentinel_passages(num_passages: int, *, trains: bool) -> int:
    """Passages that a look into a round reads: an eighth, and `MANY_PASSAGES` at least where they are trained on."""
    return max(-(-num_passages // SENTINEL_SHARE), min(num_passages, MANY_PASSAGES) if trains else 0)


def one_step_flops(
    num_parameters: int, *, num_candidates: int, num_candidate_tokens: float, num_reference_tokens: float
) -> float:
    """FLOPs of one `OneStepProbe.measure`: a gradient and a pass over the reference task for each candidate.

    Args:
        num_parameters: parameters a token is multiplied with.
        num_candidates: candidates.
        num_candidate_tokens: tokens of all candidates.
        num_reference_tokens: tokens of the reference task, read once more after the null step.

    Returns:
        FLOPs, without those of the optimizer's steps.
    """
    reading = forward_flops(num_parameters, num_reference_tokens) * (num_candidates + 1)
    return gradient_flops(num_parameters, num_candidate_tokens) + reading
