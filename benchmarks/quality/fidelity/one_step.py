"""Labels against one real step: what a candidate is worth in the place of one row of a real batch.

The parts `in_batch` and `cost` of `fidelity`. Trade-off: brute force, an optimizer step and a pass over the reference
passages for each candidate and batch, so there are a hundred candidates and not thousands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.lab import models
from benchmarks.lab.brute_force import worth_in_batch
from benchmarks.lab.checkpoint import BATCH_ROWS, LOSSES, Paths, one_a_document, warm_point
from benchmarks.lab.corpus import Lab
from benchmarks.lab.machine import alternate
from benchmarks.lab.models import LR, TOKENS_PER_BATCH, row_losses
from benchmarks.lab.statistics import FloatArray, Ids, spearman, without_group_means
from benchmarks.quality.fidelity.setup import Sizes
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.preserve import preserved
from mates_hf.flops import PATH_STEPS
from mates_hf.influence.difference import Direction, norm_of, row_means
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.influence.preconditioner import parameter_steps
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.worth import row_worth

TUNED_STEPS = 10  # of the perplexity difference
ORACLE = "one_step"
COST_TURNS = 3
EPSILON = 1e-3  # where a direction is not measured by `DirectionalProbe.measure`, which chooses its own


def in_batch(
    lab: Lab,
    sizes: Sizes,
    paths: Paths,
    *,
    steps: int,
    beta2: float = 0.95,
    clip: float | None = 1.0,
    many_lengths: bool = False,
    batch_rows: int = BATCH_ROWS,
    lr: float = LR,
    seed: int = 0,
    bf16: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    """Labels of candidates and the truth they stand for, after `steps` random steps.

    With `bf16` labels are measured under bf16 autocast; training and truth stay in float32. `shape` is the model's.
    """
    rng = np.random.default_rng([seed, 1])
    rows = shortened(lab.rows, rng.integers(12, 65, len(lab.rows))) if many_lengths else lab.rows
    order = rng.permutation(len(rows))
    trained, rest = np.split(order, [steps * batch_rows])
    batches, rest = np.split(rest, [sizes.truth_batches * batch_rows])
    chosen = stratified(lab, rest, np.concatenate([trained, batches]), sizes.per_domain)
    candidates, domain = rows.take(chosen), lab.domain[chosen]
    references = {loss_on: lab.reference[loss_on].subset(sizes.truth_passages) for loss_on in LOSSES}

    model = models.build_model(lab.vocab_size, seed=seed, **shape)
    optimizer = models.build_optimizer(model, lr=lr, beta2=beta2)
    probe = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, batch_rows=batch_rows)
    recent: dict[str, list[Direction]] = {loss_on: [] for loss_on in LOSSES}

    def keep_direction(step: int) -> None:
        if step > steps - 10:
            for loss_on in LOSSES:
                recent[loss_on].append(probe.compute_direction(model, optimizer, references[loss_on]))

    models.train_steps(
        model, optimizer, rows, trained, batch_rows=batch_rows, max_grad_norm=clip, warm_up=20, on_step=keep_direction
    )
    worth = worth_in_batch(
        model, optimizer, lambda copied: [*models.task_losses(copied, references).values()], candidates,
        [rows.take(batch) for batch in np.split(batches, sizes.truth_batches)], clip=clip,
    )  # fmt: skip
    truth = {loss_on: worth[:, j].mean(0) for j, loss_on in enumerate(LOSSES)}
    pairs = [(i, k) for i in range(len(worth)) for k in range(i)]
    between = {
        loss_on: float(np.mean([spearman(worth[i, j], worth[k, j])["spearman"] for i, k in pairs]))
        for j, loss_on in enumerate(LOSSES)
    }
    result: dict[str, Any] = {
        "steps": steps, "beta2": beta2, "clip": clip, "many_lengths": many_lengths, "batch_rows": batch_rows,
        "learning_rate": lr, "seed": seed, "bf16": bf16, "family": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()), "candidate": chosen, "domain": domain,
        "num_tokens": candidates.num_targets, "truth": truth, "truth_between_batches": between, "labels": {},
        "agreement": {},
    }  # fmt: skip
    for loss_on in LOSSES:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            kinds = label_kinds(probe, model, optimizer, references[loss_on], clip, recent[loss_on])
            labels = {name: label(candidates) for name, label in kinds.items()}
        if many_lengths:
            for name in (ORACLE, "directional"):
                per_token = labels.pop(name)
                labels[f"{name}, mean"] = per_token
                labels[f"{name}, sum"] = per_token * candidates.num_targets
                labels[f"{name}, worth"] = row_worth(per_token, candidates.num_targets)
        result["labels"][loss_on] = labels
        result["agreement"][loss_on] = {
            name: {
                **spearman(label, truth[loss_on]),
                "within": spearman(without_group_means(label, domain), without_group_means(truth[loss_on], domain)),
            }
            for name, label in labels.items()
        }
    return result


def label_kinds(
    probe: DirectionalProbe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reference: ReferenceTask,
    clip: float | None,
    recent: list[Direction],
) -> dict[str, Callable[[TokenRows], FloatArray]]:
    """Every kind of label that is compared: (N,) of N candidates, > 0 helps (the candidate's own loss aside).

    Without directions of `recent` steps the kind that takes their mean is left out.
    """
    oracle = OneStepProbe(max_grad_norm=clip, tokens_per_batch=TOKENS_PER_BATCH)

    def measured(**changes: Any) -> Callable[[TokenRows], FloatArray]:
        variant = dataclasses.replace(probe, **changes)
        return lambda candidates: variant.measure(model, optimizer, reference, candidates).influence_per_token.astype(
            np.float64
        )

    def along(direction: Callable[[], Direction]) -> Callable[[TokenRows], FloatArray]:
        def label(candidates: TokenRows) -> FloatArray:
            found = direction()
            either_side = probe.directional_derivatives(model, found, candidates, EPSILON)
            return row_means(candidates, found.derivatives(*either_side, EPSILON))

        return label

    kinds: dict[str, Callable[[TokenRows], FloatArray]] = {
        ORACLE: lambda rows: oracle.measure(model, optimizer, reference, rows).influence.astype(np.float64),
        "directional": measured(),
        "directional, E[g_B²] from batches": measured(second_moment="batches"),
        "directional, blocks": measured(parameters="blocks"),
        "directional, path": measured(path_steps=PATH_STEPS),
        "directional, u over 10 steps": along(lambda: mean_direction(recent)),
        "directional, gradient before the null step": along(
            lambda: plain_direction(model, optimizer, reference, null_step=False)
        ),
        "gradient product (P = 1)": along(lambda: plain_direction(model, optimizer, reference, precondition=False)),
        "LESS: cosine with Adam's step": lambda rows: adam_cosine(model, optimizer, reference, rows),
        "perplexity difference": lambda rows: tuned_difference(model, optimizer, reference, rows),
        "the candidate's own loss": lambda rows: row_losses(model, rows),
    }
    if not recent:
        del kinds["directional, u over 10 steps"]
    return kinds


def cost(lab: Lab, sizes: Sizes, paths: Paths, *, seed: int = 0) -> dict[str, Any]:
    """Seconds that each kind of label takes for the same candidates, in turns: one thread, all reference passages.

    The oracle, which reads the passages again for each candidate, gets few; all others begin by reading them once.
    """
    point = warm_point(lab, sizes.warm, paths.work, seed)
    probe = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, batch_rows=BATCH_ROWS)
    kinds = label_kinds(probe, point.model, point.optimizer, lab.reference["all"], 1.0, [])
    nums = {name: sizes.cost_oracle if name == ORACLE else sizes.cost_candidates for name in kinds}
    for label in kinds.values():
        label(lab.rows.take(point.rest[:4]))  # warms up
    arms = {name: functools.partial(label, lab.rows.take(point.rest[: nums[name]])) for name, label in kinds.items()}
    return {
        "seed": seed, "passages": len(lab.reference["all"]), "row_tokens": int(lab.rows.lengths[0]),
        "num_candidates": nums, "turns": alternate(arms, COST_TURNS),
    }  # fmt: skip


def adam_cosine(
    model: nn.Module, optimizer: torch.optim.Optimizer, reference: ReferenceTask, candidates: TokenRows
) -> FloatArray:
    """(N,) cosine of the reference gradient with the step that Adam takes on the candidate alone, as in LESS."""
    group = optimizer.param_groups[0]
    (beta1, beta2), eps = group["betas"], group["eps"]
    found = np.zeros(len(candidates))
    with preserved(model) as snapshot:
        mean_loss_gradient(model, reference.rows, tokens_per_batch=TOKENS_PER_BATCH)
        wanted = torch.cat([p.grad.flatten().clone() for p in snapshot.parameters if p.grad is not None])
        states = [optimizer.state[p] for p in snapshot.parameters if p.grad is not None]
        first, second = (torch.cat([s[name].flatten() for s in states]) for name in ("exp_avg", "exp_avg_sq"))
        count = float(states[0]["step"]) + 1
        for i in range(len(candidates)):
            mean_loss_gradient(model, candidates.take(np.array([i])), tokens_per_batch=TOKENS_PER_BATCH)
            own = torch.cat([p.grad.flatten() for p in snapshot.parameters if p.grad is not None])
            mean = (beta1 * first + (1 - beta1) * own) / (1 - beta1**count)
            square = (beta2 * second + (1 - beta2) * own.square()) / (1 - beta2**count)
            found[i] = torch.nn.functional.cosine_similarity(mean / (square.sqrt() + eps), wanted, dim=0)
    return found


def tuned_difference(
    model: nn.Module, optimizer: torch.optim.Optimizer, reference: ReferenceTask, candidates: TokenRows
) -> FloatArray:
    """(N,) loss of each candidate minus its loss after `TUNED_STEPS` optimizer steps on the reference passages."""
    with preserved(model, optimizer):
        before = row_losses(model, candidates)
        for _ in range(TUNED_STEPS):
            mean_loss_gradient(model, reference.rows, tokens_per_batch=TOKENS_PER_BATCH)
            optimizer.step()
        return before - row_losses(model, candidates)


def plain_direction(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reference: ReferenceTask,
    *,
    null_step: bool = True,
    precondition: bool = True,
) -> Direction:
    """`DirectionalProbe.compute_direction` with parts of it left out."""
    by_parameter: dict[nn.Parameter, torch.Tensor] = {}
    with preserved(model) as snapshot:
        steps = parameter_steps(optimizer, snapshot.parameters)
        if null_step:
            with torch.no_grad():
                for step in steps:
                    step.write_null()
            snapshot.written()
        loss = mean_loss_gradient(model, reference.rows, tokens_per_batch=TOKENS_PER_BATCH)
        step_size = max(step.coefficient for step in steps)
        for step in steps:
            gradient = step.parameter.grad
            if gradient is not None:
                if precondition:
                    step.precondition(gradient, step.coefficient / step_size, None)
                by_parameter[step.parameter] = gradient
    return Direction(
        by_parameter=by_parameter, step_size=step_size, norm=norm_of(by_parameter.values()),
        parameter_norm=norm_of(by_parameter), reference_loss=loss, flops=0.0,
    )  # fmt: skip


def mean_direction(directions: list[Direction]) -> Direction:
    """The mean of u over several steps."""
    last = directions[-1]
    mean = {
        parameter: torch.stack([direction.by_parameter[parameter] for direction in directions]).mean(0)
        for parameter in last.by_parameter
    }
    return dataclasses.replace(last, by_parameter=mean, norm=norm_of(mean.values()))


def shortened(rows: TokenRows, lengths: npt.NDArray[np.int64]) -> TokenRows:
    """The first `lengths` tokens of each row, which has as many."""
    return TokenRows.from_lists([rows.values[a : a + n] for a, n in zip(rows.offsets, lengths, strict=False)])


def stratified(lab: Lab, ids: Ids, trained: Ids, per_domain: int) -> Ids:
    """The first rows of each domain among `ids`, one a document, none of a document trained on."""
    ids = one_a_document(lab, ids[~np.isin(lab.document[ids], lab.document[trained])])
    return np.concatenate([ids[lab.domain[ids] == k][:per_domain] for k in range(len(lab.domain_names))])
