"""The paper's oracle: the reference loss after one real optimizer step on a candidate, in memory.

Where it is used: the audit of every round, the probe for optimizers that `DirectionalProbe` does not know, and the
label of the paper (arXiv:2406.06046), measured against the null step: before minus after would give every candidate
the sign of what momentum and weight decay do anyway.

Trade-off: exact for that one step, clipping included, at the price of a backward pass, an optimizer step and a pass
over the whole reference task for each candidate. Of an optimizer that the directional probe does not know, all of the
state is copied as well.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from mates_hf.data.arguments import check_measure
from mates_hf.display import changed_fields
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import in_evaluation, preserved
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.flops import forward_flops, one_step_flops
from mates_hf.influence.difference import FloatArray, passage_losses, row_means
from mates_hf.influence.passes import DEFAULT_TOKENS_PER_BATCH, LossFunction, mean_loss_gradient, token_losses
from mates_hf.influence.preconditioner import (
    FreshOptimizerError,
    group_learning_rates,
    require_real_steps,
    unwrap_optimizer,
)
from mates_hf.influence.probe import RunSettings, count_multiplied_parameters, filled, read_measurable
from mates_hf.influence.real_step import RealStep, has_stepped
from mates_hf.records import InfluenceLabels

if TYPE_CHECKING:
    from mates_hf.data.reference import ReferenceTask

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStepProbe:
    """Measure influence by a real step of the run's own optimizer on each candidate alone, undone each time.

    Steps are the optimizer's own, by its own code, and bit for bit those that training would take. Extra memory: the
    trainable parameters and their gradient. That holds for the optimizers that docs/optimizers.md calls directional
    (those of torch but ASGD and Rprop, and Adafactor of transformers), which are let step on one piece of a parameter
    after the other (`real_step`). Any other optimizer's state is copied whole, in addition.

    Attributes:
        max_grad_norm: clip the candidate's gradient to this norm as the Trainer does; None takes the run's, and alone
            None and 0 are off.
        tokens_per_batch: padded tokens in one forward pass; None takes the run's, alone 8,192.
        learning_rates: one a parameter group, of the step to come; None takes the run's, alone the optimizer's own.
        loss: the run's own loss of a candidate, `loss(model, batch)`, a mean over the trained tokens of one row; None
            is the negative log-likelihood.
        reference_loss: the same for the reference task, whose loss should fall. None is the negative log-likelihood,
            whatever the candidates' is; for a model without logits.
        progress: show a progress bar; None takes the run's, alone False.
        processes: those that call `measure` together on the same candidates and share the work; None takes the run's,
            alone this process does all of it.
    """

    max_grad_norm: float | None = None
    tokens_per_batch: int | None = None
    learning_rates: tuple[float, ...] | None = None
    loss: LossFunction | None = None
    reference_loss: LossFunction | None = None
    progress: bool | None = None
    processes: Processes | None = None

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ValueError(f"`max_grad_norm` must be None or at least 0, got {self.max_grad_norm!r}.")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"`tokens_per_batch` must be None or at least 1, got {self.tokens_per_batch!r}.")

    __repr__ = changed_fields

    def for_run(self, settings: RunSettings) -> OneStepProbe:
        """The probe with what it leaves open (None) taken from the run; what was set is kept."""
        return filled(self, settings)

    def measure(self, model: nn.Module, optimizer: Any, reference: ReferenceTask, candidates: Any) -> InfluenceLabels:
        """Influence of candidates on the reference task; model, optimizer and random streams stay as they are.

        Args:
            model: the live model, wrapped by accelerate or not.
            optimizer: any torch optimizer that needs no closure, after at least one step.
            reference: what the model should get better at.
            candidates: a dataset with `input_ids` (and `labels`), a candidate pool, or `TokenRows`.

        Returns:
            Labels of the candidates that have a trained token: reference loss after the null step minus reference loss
            after the step on the candidate, nats/token, > 0 helps. `loss` is the candidate's before the step. `info`
            has `reference_loss` (after the null step), `skipped`, `seconds`, `flops`.

        Raises:
            UnsupportedOptimizerError: the optimizer cannot take a step from gradients alone.
            FreshOptimizerError: the optimizer has not taken a step.
            ZeroLearningRateError: all learning rates are 0.
            InfluenceError: the labels are zero, equal or not finite.
            ProbeMemoryError: one row alone does not fit into memory.
        """
        started = time.perf_counter()
        check_measure(model, optimizer, reference, candidates)
        model, optimizer = unwrap(model), unwrap_optimizer(optimizer, unwrap(model))
        require_real_steps(optimizer)
        rates = group_learning_rates(optimizer, self.learning_rates)
        ids, rows, skipped, reference, loss, reading, num_compared = read_measurable(
            model, reference, candidates, loss=self.loss, reference_loss=self.reference_loss
        )
        tokens_per_batch = DEFAULT_TOKENS_PER_BATCH if self.tokens_per_batch is None else self.tokens_per_batch
        processes = self.processes or ALONE
        influence = np.zeros(len(rows), np.float64)
        losses = np.zeros(len(rows), np.float64)

        passages = reference.measured
        trained = np.flatnonzero(passages.num_targets)

        def reference_losses() -> FloatArray:
            return token_losses(
                model,
                passages,
                tokens_per_batch=tokens_per_batch,
                loss=self.reference_loss,
                processes=processes,
            )

        step = RealStep(optimizer, rates)
        with preserved(model, optimizer, copy_state=step.needs_copy) as snapshot:
            model.eval()
            had_stepped = has_stepped(optimizer)
            if step.take() and not had_stepped:
                raise FreshOptimizerError(optimizer)
            snapshot.written()
            at_null = reference_losses()
            null_loss = float(at_null.mean(dtype=np.float64))
            for i in tqdm(range(len(rows)), desc="one-step probe", unit="row", disable=not self.progress):
                snapshot.restore()
                row = rows.take(np.array([i]))
                with in_evaluation(model):
                    losses[i] = mean_loss_gradient(
                        model, row, tokens_per_batch=tokens_per_batch, loss=loss, processes=processes
                    )
                if self.max_grad_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
                step.take()
                snapshot.written()
                influence[i] = null_loss - float(reference_losses().mean(dtype=np.float64))
        means = np.zeros(len(passages))
        means[trained] = row_means(passages.take(trained), at_null)
        info = {
            "reference_loss": null_loss,
            "learning_rates": rates,
            "max_grad_norm": self.max_grad_norm,
            "reading": reading.to_dict(),
            "num_compared_tokens": num_compared,
            "num_skipped": len(skipped),
            "skipped": skipped.tolist(),
            "seconds": time.perf_counter() - started,
            "flops": one_step_flops(
                count_multiplied_parameters(model),
                num_candidates=len(rows),
                num_candidate_tokens=int(rows.lengths.sum()),
                num_reference_tokens=int(reference.measured.lengths.sum()),
            )
            + forward_flops(count_multiplied_parameters(model), num_compared),
        }
        logger.info("probed %d candidates by real steps in %.1f s", len(rows), info["seconds"])
        return InfluenceLabels(
            candidate_id=ids,
            influence=influence.astype(np.float32),
            influence_per_token=influence.astype(np.float32),
            loss=losses.astype(np.float32),
            num_tokens=rows.num_targets,
            probe=np.full(len(rows), "one_step"),
            reference_losses=passage_losses(passages, means),
            info=info,
        ).check()
