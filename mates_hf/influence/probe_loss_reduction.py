"""A label with a horizon: what a candidate's loss loses when the model trains on the reference task.

Where it is used: given to a run, `MatesCallback(..., probe=LossReductionProbe())`. `DirectionalProbe`, the default,
prices a row at the margin: its direction is where the reference loss falls now. Tens of steps use that up, and what is
bought next is another kind of row. This probe lets the run's own optimizer take some tens of real steps on the
passages, reads the candidates before and after, and puts everything back. A step on a row and a step on a passage help
each other alike, so a row whose loss falls when passages are trained on is one whose training lowers the reference
loss, and of many steps only what lasts is left. Labels of this kind agree with themselves after the run has trained on
what they chose, if there are passages enough (0.9 with a thousand, where labels along a path had 0.4; docs/LOG.md).

It is the conditional loss reduction of CoLoR-Filter (arXiv:2406.10670), read anew from the live model each round and
of a few hundred candidates, in place of two models that read the whole pool.

Trade-off: a copy of the optimizer's state beside that of the parameters, for the steps change it. It is put back once
a round, so it is in the host's memory, and a device holds no more than for the other probes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from mates_hf.data.arguments import check_measure
from mates_hf.data.batches import Candidates
from mates_hf.display import changed_fields
from mates_hf.engine.model_traits import unwrap
from mates_hf.engine.preserve import Snapshot, in_evaluation, preserved
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import InfluenceError
from mates_hf.flops import PASSAGES_PER_STEP, loss_reduction_flops
from mates_hf.influence.difference import FloatArray, mean_of, passage_losses, row_means
from mates_hf.influence.passes import DEFAULT_TOKENS_PER_BATCH, LossFunction, mean_loss_gradient, token_losses
from mates_hf.influence.preconditioner import (
    FreshOptimizerError,
    group_learning_rates,
    require_real_steps,
    unwrap_optimizer,
)
from mates_hf.influence.probe import RunSettings, count_multiplied_parameters, filled, read_measurable
from mates_hf.influence.real_step import RealStep, has_stepped
from mates_hf.records import LOSS_REDUCTION, InfluenceLabels, IntArray

if TYPE_CHECKING:
    from mates_hf.data.reference import ReferenceTask

logger = logging.getLogger(__name__)

MAX_RISE = 0.5  # nats/token that passages may lose by training on others, before it is tried again at half the rate
MAX_TRIES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReductionProbe:
    """Measure influence by what training on the reference task takes off each candidate's own loss.

    Steps are the run's own: its optimizer by its own code, its learning rate and its clipping, `PASSAGES_PER_STEP`
    passages each. Extra memory: the trainable parameters and their gradient, and on the host the optimizer's state.

    Attributes:
        passes: how often each passage is trained on, in (0, 64]; the horizon of the labels.
        max_grad_norm: clip gradients to this norm as the Trainer does; None takes the run's, and alone None and 0 are
            off.
        tokens_per_batch: padded tokens in one forward pass; None takes the run's, alone 8,192.
        learning_rates: one a parameter group, of the step to come; None takes the run's, alone the optimizer's own.
        loss: the run's own loss of a candidate, `loss(model, batch)`, a mean over the trained tokens of one row;
            candidates then run one by one, and every token of a row gets the row's reduction. None is the negative
            log-likelihood.
        reference_loss: the same for the reference task, whose loss should fall. None is the negative log-likelihood,
            whatever the candidates' is; for a model without logits.
        seed: Random seed of the order of the passages; None takes the run's, alone 0.
        progress: show a progress bar; None takes the run's, alone False.
        processes: those that call `measure` together on the same candidates and share the work; None takes the run's,
            alone this process does all of it.
    """

    passes: float = 4.0
    max_grad_norm: float | None = None
    tokens_per_batch: int | None = None
    learning_rates: tuple[float, ...] | None = None
    loss: LossFunction | None = None
    reference_loss: LossFunction | None = None
    seed: int | None = None
    progress: bool | None = None
    processes: Processes | None = None

    def __post_init__(self) -> None:
        if not 0 < self.passes <= 64:
            raise ValueError(f"`passes` must be in (0, 64], got {self.passes!r}.")
        if self.max_grad_norm is not None and not 0 <= self.max_grad_norm < math.inf:
            raise ValueError(f"`max_grad_norm` must be None or at least 0 and finite, got {self.max_grad_norm!r}.")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"`tokens_per_batch` must be None or at least 1, got {self.tokens_per_batch!r}.")

    __repr__ = changed_fields

    def for_run(self, settings: RunSettings) -> LossReductionProbe:
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
            Labels of the candidates that have a trained token: its loss before minus its loss after, nats/token, with
            the reduction of each token in `token_derivatives`. They give an order: higher is better, and 0 means
            nothing. `loss` is the candidate's before. `info` has `reference_loss` (before), `num_steps`,
            `step_losses`, the mean loss of what each step read, `start_losses` of the same passages before, and
            `rate`, the share of the learning rates that was taken; `skipped`, `seconds`, `flops`.

        Raises:
            UnsupportedOptimizerError: the optimizer cannot take a step from gradients alone.
            FreshOptimizerError: the optimizer has not taken a step.
            ZeroLearningRateError: all learning rates are 0.
            InfluenceError: training on the passages diverges, or the labels are zero, equal or not finite.
            ProbeMemoryError: one row alone does not fit into memory.
        """
        started = time.perf_counter()
        check_measure(model, optimizer, reference, candidates)
        model, optimizer = unwrap(model), unwrap_optimizer(optimizer, unwrap(model))
        require_real_steps(optimizer, type(self).__name__)
        rates = group_learning_rates(optimizer, self.learning_rates)
        ids, rows, skipped, reference, loss, reading, num_compared = read_measurable(
            model, reference, candidates, loss=self.loss, reference_loss=self.reference_loss
        )
        passages, shares = reference.measured, self._shares(reference.measured)

        def losses() -> FloatArray:
            return self._losses(model, rows, loss, progress=bool(self.progress))

        with preserved(model, optimizer, state_on_host=True) as snapshot:
            model.eval()
            starts = np.zeros(len(passages))
            trained = np.flatnonzero(passages.num_targets)
            starts[trained] = row_means(
                passages.take(trained), self._losses(model, passages.take(trained), self.reference_loss)
            )
            before = losses().astype(np.float64)
            before_steps = [mean_of(starts, passages, share) for share in shares]
            for tries in range(1, MAX_TRIES + 1):
                rate = 0.5 ** (tries - 1)
                path = self._train(model, snapshot, optimizer, [rate * one for one in rates], passages, shares)
                if _rise(path, before_steps) <= MAX_RISE or tries == MAX_TRIES:
                    break
                snapshot.restore()
            self._require_trained(path, before_steps)
            model.eval()
            reductions = before - losses()
        means = row_means(rows, reductions)
        num_read = int(passages.lengths[np.concatenate(shares)].sum()) * tries
        info = {
            "reference_loss": mean_of(starts, passages, trained),
            "learning_rates": rates,
            "max_grad_norm": self.max_grad_norm,
            "passes": self.passes,
            "num_steps": len(shares),
            "rate": rate,
            "step_losses": path,
            "start_losses": before_steps,
            "reading": reading.to_dict(),
            "num_compared_tokens": num_compared,
            "num_skipped": len(skipped),
            "skipped": skipped.tolist(),
            "seconds": time.perf_counter() - started,
            "flops": loss_reduction_flops(
                count_multiplied_parameters(model),
                num_candidate_tokens=int(rows.lengths.sum()),
                num_reference_tokens=int(passages.lengths.sum()),
                num_trained_tokens=num_read,
                num_compared_tokens=num_compared,
            ),
        }
        logger.info(
            "probed %d candidates by %d steps on the passages in %.1f s", len(rows), len(shares), info["seconds"]
        )
        return InfluenceLabels(
            candidate_id=ids,
            influence=means.astype(np.float32),
            influence_per_token=means.astype(np.float32),
            loss=row_means(rows, before).astype(np.float32),
            num_tokens=rows.num_targets,
            probe=np.full(len(rows), LOSS_REDUCTION),
            token_derivatives=reductions.astype(np.float32),
            reference_losses=passage_losses(passages, starts),
            info=info,
        ).check()

    def _shares(self, passages: Candidates) -> list[IntArray]:
        """Numbers of the passages that each step reads: of about as many, and one for each process at least."""
        rng, trained = np.random.default_rng(self.seed or 0), np.flatnonzero(passages.num_targets)
        order = np.concatenate([rng.permutation(trained) for _ in range(math.ceil(self.passes))])
        order = order[: max(1, round(self.passes * len(trained)))]
        size = max(PASSAGES_PER_STEP, (self.processes or ALONE).size)
        return [np.sort(share) for share in np.array_split(order, max(1, len(order) // size))]

    def _losses(
        self, model: nn.Module, rows: Candidates, loss: LossFunction | None, *, progress: bool = False
    ) -> FloatArray:
        return token_losses(
            model,
            rows,
            tokens_per_batch=self._tokens_per_batch,
            loss=loss,
            progress=progress,
            processes=self.processes or ALONE,
        )

    def _train(
        self,
        model: nn.Module,
        snapshot: Snapshot,
        optimizer: Any,
        rates: list[float],
        passages: Candidates,
        shares: list[IntArray],
    ) -> list[float]:
        """Take the steps; the mean loss of what each read, up to one that is not finite."""
        step, had_stepped, found = RealStep(optimizer, rates, stays=True), has_stepped(optimizer), []
        for share in shares:
            with in_evaluation(model):
                mean = mean_loss_gradient(
                    model,
                    passages.take(share),
                    tokens_per_batch=self._tokens_per_batch,
                    loss=self.reference_loss,
                    processes=self.processes or ALONE,
                )
            found.append(mean)
            if not np.isfinite(mean):
                break
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
            if step.take() and not had_stepped:
                raise FreshOptimizerError(optimizer)
            snapshot.written()
        for parameter in snapshot.parameters:
            parameter.grad = None
        return found

    def _require_trained(self, path: list[float], starts: list[float]) -> None:
        rise = _rise(path, starts)
        if rise <= MAX_RISE:
            return
        text = (
            f"Training on the reference task must not raise the loss of its passages by more than {MAX_RISE} "
            f"nats/token, got {rise:.3g} with an eighth of the learning rate. Look at whether the run's learning rate "
            "is too high, or take `DirectionalProbe`."
        )
        if not np.isfinite(rise):
            raise InfluenceError(text)
        logger.warning("%s Labels may be noise.", text)

    @property
    def _tokens_per_batch(self) -> int:
        return DEFAULT_TOKENS_PER_BATCH if self.tokens_per_batch is None else self.tokens_per_batch


def _rise(path: list[float], starts: list[float]) -> float:
    """How far the loss of what the last quarter of the steps read was above where it had been; not finite as such."""
    if len(path) < len(starts) or not np.isfinite(path[-1]):
        return math.inf
    few = -max(1, len(path) // 4)
    return float(np.mean(path[few:]) - np.mean(starts[few:]))
