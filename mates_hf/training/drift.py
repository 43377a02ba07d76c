"""Inside a round: does what it does still hold for the model as it is now?

Where it is used: `session` calls `look_inside` at the steps that `trust.next_check` gives, at weights averaged as at a
boundary. Where the answer is no, the next round starts at once.

Where rounds find their length (`first_round_steps`), the question is `trust`'s: are the rows that were bought, and are
still ahead, worth more than those that were passed over? It is answered by 128 probes on a share of the reference
task, which stay in the round's directory with their gap.

Where rounds have one length and `drift_check_steps` is set, a round also measures a sentinel, a few of its candidates
on a share of the reference task, and a check has the same measured again. Where the two no longer rank the candidates
alike, labels no longer hold: `update_steps` is a maximum then.

Trade-off: the sentinel is compared with itself and not with the round's labels, which are on all passages: how well
the two agree is recorded in the round, and not held against the model. A check of either kind costs 2 x 128 candidates
forward and a share of the reference task forward and backward (`flops.sentinel_passages`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.config import NUM_SENTINELS
from mates_hf.disk import read_array, read_json, write_json
from mates_hf.errors import InfluenceError
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.influence.path_length import rate_steps
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import round_path
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.plan import PlannedRound, RunPlan, num_candidates
from mates_hf.training.measure import measure_sentinel
from mates_hf.training.order import Order
from mates_hf.training.run import Run
from mates_hf.training.trust import SENTINEL_FILE, check_file, gap_between, longest_steps, rows_to_check

logger = logging.getLogger(__name__)


def look_inside(
    run: Run, order: Order, plan: RunPlan, position: Callable[[int], int], step: int
) -> tuple[PlannedRound | None, dict[str, float]]:
    """In the main process: whether the next round starts now, before the present one is over.

    Args:
        run: the run's state; the model has the weights that a round would probe now. Where the next round starts, it
            gets what that is to know.
        order: the present round's.
        plan: the run's plan.
        position: pool rows before a step.
        step: optimizer steps done.

    Returns:
        The next round, as long as it may be, or None; and metrics.
    """
    config, path = run.config, round_path(run.rounds_dir, order.number)
    if config.first_steps is None:
        correlation = check_drift(run, path)
        logger.info("drift check of round %d at step %d: %.3f", order.number, step, correlation)
        found = {"mates/drift_spearman": correlation}
        early = plan.round_at(order.number + 1, step) if correlation < config.drift_spearman else None
        if early is not None:
            logger.info("labels no longer hold: round %d starts early, at step %d", early.number, step)
        return early, found
    lasted = step - int(order.info["step"])
    early = plan.round_at(order.number + 1, step, longest_steps(config, lasted, order.info["guard"]["decision"]))
    if early is None or not _has_rows(run, order, early, position):
        return None, {}
    check = check_gap(run, order, path, step, position(step) - order.from_position)
    if check is None or check["gap"] is None:
        return None, {}
    gap, (low, high) = check["gap"]["gap"], check["gap"]["interval"]
    found = {"mates/check_gap": gap}
    if gap > 0:
        logger.info("round %d at step %d: what it buys holds (gap %+.2f)", order.number, step, gap)
        return None, found
    logger.info(
        "Round %d starts early, at step %d: what round %d buys is worth no more than the rest by now (gap %+.2f "
        "standard deviations of the labels, 95 %% interval %+.2f to %+.2f).",
        early.number, step, order.number, gap, low, high,
    )  # fmt: skip
    run.last_steps, run.ended_by = lasted, {"round": order.number, "step": step, **check["gap"]}
    return early, found


def _has_rows(run: Run, order: Order, early: PlannedRound, position: Callable[[int], int]) -> bool:
    """Whether a round that starts early finds rows enough; what it cuts off of the present one is unused again."""
    config, ledger = run.config, run.ledger
    unused = ledger.num_unused + len(order.rows_from(position(early.from_step)))
    needed = num_candidates(early.num_rows, config.selection_ratio) + config.num_probes
    return needed <= unused or ledger.pass_number < config.most_passes


def check_gap(run: Run, order: Order, path: Path, step: int, num_done: int) -> dict[str, Any] | None:
    """Measure whether what a round buys is still worth more than what it passed over, and write that down.

    Args:
        run: the run's state; the model has the weights that a round would probe now.
        order: the round's.
        path: its directory.
        step: optimizer steps done.
        num_done: how many of its rows are trained on.

    Returns:
        What was written, with a `gap` of None where the labels tell nothing; None where too few rows are ahead.
    """
    began, (low, high) = time.perf_counter(), (max(num_done, 0), int(order.info["num_rows"]))
    files = [
        read_array(path / name, dtype)
        for name, dtype in (("candidates.npy", np.int64), ("scores.npy", np.float32), ("num_targets.npy", np.int32))
    ]
    rows = np.asarray(order.rows[:high])
    candidates, scores, num_targets = (np.asarray(file) for file in files if file is not None)
    ids, is_bought = rows_to_check(run.config, order.number, step, candidates, scores, num_targets, rows, low)
    if not len(ids):
        return None
    seed = stage_seed(run.config.selection_seed, order.number, "sentinel")
    check: dict[str, Any] = {"round": order.number, "step": step, "num_done": low, "gap": None}
    try:
        labels = measure_sentinel(run, ids, epsilon=order.info["probe"].get("epsilon"), seed=seed)
    except InfluenceError as error:
        logger.warning("The check of round %d at step %d tells nothing: %s", order.number, step, error)
        check["reason"] = str(error)
    else:
        is_bought = is_bought[np.isin(ids, labels.candidate_id)]
        gap = gap_between(labels.influence_per_token, labels.num_tokens, is_bought)
        check |= {
            "gap": None if gap is None else gap.to_dict(),
            "candidate_id": labels.candidate_id.tolist(),
            "influence_per_token": labels.influence_per_token.tolist(),
            "num_tokens": labels.num_tokens.tolist(),
            "flops": labels.info.get("flops"),
        }
    check["seconds"] = time.perf_counter() - began
    write_json(path / check_file(step), check)
    return check


def set_sentinel(run: Run, path: Path, labels: InfluenceLabels, number: int) -> float | None:
    """Measure the sentinel of a round and write it into the round's directory, unless it is there.

    Args:
        run: the run's state; the model has the weights that the round probes.
        path: the round's directory.
        labels: Labels of the round.
        number: the round.

    Returns:
        FLOPs it took, whenever that was; None where they are not known.
    """
    if (path / SENTINEL_FILE).exists():
        flops = read_json(path / SENTINEL_FILE).get("flops")
        return None if flops is None else float(flops)
    seed = stage_seed(run.config.selection_seed, number, "sentinel")
    picked = np.sort(np.random.default_rng(seed).permutation(len(labels))[:NUM_SENTINELS])
    epsilon = labels.info.get("epsilon")
    try:
        found = measure_sentinel(run, labels.candidate_id[picked], epsilon=epsilon, seed=seed)
    except InfluenceError as error:
        logger.warning("Round %d gets no drift checks: its sentinel cannot be ranked (%s).", number, error)
        write_json(path / SENTINEL_FILE, {"candidate_id": []})
        return None
    sentinel = {
        "candidate_id": found.candidate_id.tolist(),
        "influence_per_token": found.influence_per_token.tolist(),
        "epsilon": epsilon,
        "seed": seed,
        "flops": found.info.get("flops"),
        "spearman_with_labels": rank_correlation(found.influence_per_token, labels.influence_per_token[picked]),
    }
    write_json(path / SENTINEL_FILE, sentinel)
    return None if sentinel["flops"] is None else float(sentinel["flops"])


def check_drift(run: Run, path: Path) -> float:
    """Measure the sentinel of the last round again.

    Args:
        run: the run's state; the model has the weights that a round would probe now.
        path: directory of the last round.

    Returns:
        Spearman of its influence now with what it was at the round; 0 where nothing can be ranked any more, 1 where
        the round has no sentinel.
    """
    file = path / SENTINEL_FILE
    sentinel = read_json(file) if file.exists() else {"candidate_id": []}
    if not sentinel["candidate_id"]:
        return 1.0
    ids = np.array(sentinel["candidate_id"], np.int64)
    try:
        now = measure_sentinel(run, ids, epsilon=sentinel["epsilon"], seed=sentinel["seed"])
    except InfluenceError as error:
        logger.warning("Drift check: the sentinel cannot be ranked any more (%s).", error)
        return 0.0
    return rank_correlation(now.influence_per_token, np.array(sentinel["influence_per_token"], np.float32))


def rate_steps_ahead(
    run: Run,
    plan: RunPlan,
    planned: PlannedRound | None,
    order: Order | None,
    rates: tuple[float, ...] | None,
    step: int,
) -> float | None:
    """The coming round in steps at the present rates; at a check, that of the round that is checked.

    Args:
        run: the run's state.
        plan: The plan of the run.
        planned: The coming round, as long as it may be; None where there is none.
        order: The order of the last round; None before the first.
        rates: The last learning rates that moved; None takes those of the optimizer.
        step: optimizer steps done.

    Returns:
        A number of steps; None where the schedule is not known.
    """
    if planned is None or step < planned.boundary_step:
        assert order is not None
        found: float | None = order.info.get("rate_steps")
        return found
    rates = rates or tuple(float(group["lr"]) for group in run.optimizer.param_groups)
    return rate_steps(run.lr_scheduler, min(planned.steps, plan.max_steps - step), rates)
