"""The forward-only probe: influence as a directional derivative of the candidate's own loss.

Where it is used: the default probe of a round. With θ the weights, g_x the gradient of candidate x's mean loss and
c · P the optimizer's linear response to one more gradient (`preconditioner`), a step on x ends at θ_null − c P g_x, so

    influence(x) = L_ref(θ_null) − L_ref(θ_null − c P g_x)
                 ≈ c · ∇L_ref(θ_null)ᵀ P g_x = c · d/dε L(x; θ + ε u) at ε = 0

with u = Pᵀ ∇L_ref(θ_null). A candidate whose own loss rises where the reference loss rises has positive influence:
training on it takes both down again. The derivative is (L(x; θ + ε u) − L(x; θ − ε u)) / 2ε, token by token.

What lowers the reference loss in one step need not be what lowers it over a round. With `path_steps` > 1, u is the
mean of Pᵀ ∇L_ref along the way that training on the reference itself would take (`reference_path`), at a third
more than the cost of one reading. Such labels tell less of a single step and pick better data for many: figures in
benchmark `selection`; `MatesCallback` uses them. How a candidate's loss falls while a model trains on the
reference is also what CoLoR-Filter (arXiv:2406.10670) ranks by, from two finished models.

Trade-off: two plain forward passes a candidate and one backward pass over the reference task a round, for a value of
first order. It leaves out what shortens a step on x *alone*: clipping, and Adam's (1−β2) g_x² in the second moment,
far above that of a batch. Ranks hardly change, but `OneStepProbe` plotted over this one has a slope below 1; in a
batch, where the candidate will be trained on, neither happens. The round's audit records both probes' agreement.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from mates_hf.data.arguments import check_measure
from mates_hf.data.batches import Candidates
from mates_hf.display import changed_fields
from mates_hf.engine.model_traits import is_sharded, unwrap
from mates_hf.engine.preserve import in_evaluation, preserved
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.engine.weight_store import adopt_engine, ids_in_store
from mates_hf.errors import InfluenceError
from mates_hf.flops import forward_flops, gradient_flops
from mates_hf.influence.difference import (
    Direction,
    EpsilonChoice,
    FloatArray,
    choose_epsilon,
    losses_on_either_side,
    passage_losses,
    row_means,
    smallest_step,
)
from mates_hf.influence.gradient_sum import add_gradient_of_sum
from mates_hf.influence.passes import (
    DEFAULT_TOKENS_PER_BATCH,
    LossFunction,
    mean_loss_gradient,
    token_losses,
)
from mates_hf.influence.path_length import steps_per_stride
from mates_hf.influence.preconditioner import (
    group_learning_rates,
    parameter_steps,
    rarely_reached_parameters,
    unwrap_optimizer,
)
from mates_hf.influence.probe import RunSettings, count_multiplied_parameters, filled, read_measurable
from mates_hf.influence.reference_path import PathReader, ReferencePath, shares_of_path
from mates_hf.influence.shards import Shards
from mates_hf.influence.usual_batches import UsualBatches
from mates_hf.records import InfluenceLabels, IntArray

if TYPE_CHECKING:
    from mates_hf.data.reference import ReferenceTask

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionalProbe:
    """Measure influence by two forward passes a candidate, along the preconditioned gradient of the reference loss.

    Extra memory: 2 × the trainable parameters' bytes (their copy, and u) and one micro-batch of the reference task
    forward and backward, whatever `path_steps` is; with `second_moment="batches"` 3 ×, since E[g_B²] is held as well.
    Activations that the run recomputes are recomputed here.

    Attributes:
        tokens_per_batch: padded tokens in one forward pass; None takes the run's, alone 8,192.
        learning_rates: one a parameter group, of the step to come; None takes the run's, alone the optimizer's own.
        epsilon: step to either side as a share of the parameters' norm, ε‖u‖/‖θ‖; None chooses it by the agreement of
            the derivatives at ε and 2ε on a few candidates.
        second_moment: where Adam's E[g_B²] comes from: `"state"`, the running average in the optimizer's state, free;
            `"batches"`, the gradients of 4 batches of `batch_rows` candidates at the present weights.
        path_steps: points at which the reference gradient is taken, each on its share of the passages; 1 is θ_null
            alone, the first-order value of one optimizer step. There are fewer where a share would have less than four
            passages, or, where weights are sharded, less than one for each process.
        path_rate: length of the strides from one to the next, in steps of the run at its learning rate; None makes all
            of them together as long as the coming round is by its schedule, but no longer than 32 steps at the run's
            peak rate. Alone 0.5.
        rate_steps: the coming round in steps at the present learning rate, by the sums of the rates; None takes the
            run's, alone it is not known.
        max_grad_norm: to what the run clips the gradient of a batch; used where batches are drawn here; None takes the
            run's, and alone None and 0 are off.
        parameters: `"all"`, or `"blocks"`: u is 0 on input embeddings and output head.
        batch_rows: rows in one optimizer step; needed for `second_moment="batches"`, and to tell how long a step of
            SGD without momentum is; None takes the run's.
        loss: the run's own loss of a candidate, `loss(model, batch)`, a mean over the trained tokens of one row;
            candidates then run one by one, and every token of a row gets the row's derivative. None is the negative
            log-likelihood.
        reference_loss: the same for the reference task, whose loss should fall. None is the negative log-likelihood,
            whatever the candidates' is; for a model without logits.
        seed: Random seed of the candidates that choose ε and make up batches, and of which passages a point reads;
            None takes the run's, alone 0.
        progress: show a progress bar; None takes the run's, alone False.
        processes: those that call `measure` together on the same candidates and share the work; None takes the run's,
            alone this process does all of it.
        shards_dir: where the main process keeps the losses of each 512 candidates, so that a killed probe goes on
            behind them; None takes the run's, alone nothing is kept.
        compile_layers: Whether candidates of one length run through compiled layers (`compiled`).
    """

    tokens_per_batch: int | None = None
    learning_rates: tuple[float, ...] | None = None
    epsilon: float | None = None
    second_moment: Literal["state", "batches"] = "state"
    path_steps: int = 1
    path_rate: float | None = None
    rate_steps: float | None = None
    max_grad_norm: float | None = None
    parameters: Literal["all", "blocks"] = "all"
    batch_rows: int | None = None
    loss: LossFunction | None = None
    reference_loss: LossFunction | None = None
    seed: int | None = None
    progress: bool | None = None
    processes: Processes | None = None
    shards_dir: Path | None = None
    compile_layers: bool = False

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ValueError(f"`epsilon` must be None or in (0, 1), a share of ‖θ‖, got {self.epsilon!r}.")
        if self.second_moment not in ("state", "batches"):
            raise ValueError(f"`second_moment` must be 'state' or 'batches', got {self.second_moment!r}.")
        if self.parameters not in ("all", "blocks"):
            raise ValueError(f"`parameters` must be 'all' or 'blocks', got {self.parameters!r}.")
        if self.path_rate is not None and not 0 < self.path_rate <= 10:
            raise ValueError(f"`path_rate` must be None or in (0, 10], in steps of the run, got {self.path_rate!r}.")
        for name in ("rate_steps", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be None or at least 0 and finite, got {value!r}.")
        for name in ("tokens_per_batch", "batch_rows", "path_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be None or at least 1, got {value!r}.")

    __repr__ = changed_fields

    def for_run(self, settings: RunSettings) -> DirectionalProbe:
        """The probe with what it leaves open (None) taken from the run; what was set is kept."""
        return filled(self, settings)

    def measure(self, model: nn.Module, optimizer: Any, reference: ReferenceTask, candidates: Any) -> InfluenceLabels:
        """Influence of candidates on the reference task; model, optimizer and random streams stay as they are.

        Args:
            model: the live model, wrapped by accelerate or not.
            optimizer: its AdamW, SGD, Muon or another one with a closed form (`preconditioner`), wrapped by accelerate
                or not, after at least one step.
            reference: what the model should get better at.
            candidates: a dataset with `input_ids` (and `labels`), a candidate pool, or `TokenRows`.

        Returns:
            Labels of the candidates that have a trained token, with their tokens' derivatives; `info` has `epsilon`,
            `epsilon_agreement` (None where too few candidates tell), `reference_loss`, `skipped`, `seconds`, `flops`;
            of a path `path_losses` at its points, `path_start_losses` of the same passages at θ_null, `path_points`,
            `path_stopped` (the loss rose along a longer one), `path_stride` in steps of the run, and `path_check`, the
            loss of the last quarter of the passages at θ_null and one stride down u.

        Raises:
            UnsupportedOptimizerError: the preconditioner of the optimizer is not known.
            FreshOptimizerError: the optimizer has not taken a step.
            ZeroLearningRateError: all learning rates are 0.
            InfluenceError: the direction or the labels are zero, equal or not finite.
            ProbeMemoryError: one row alone does not fit into memory.
        """
        started = time.perf_counter()
        check_measure(model, optimizer, reference, candidates)
        ids, rows, skipped, reference, loss, reading, num_compared = read_measurable(
            unwrap(model), reference, candidates, loss=self.loss, reference_loss=self.reference_loss
        )
        probe = dataclasses.replace(self, loss=loss)
        direction = probe.compute_direction(model, optimizer, reference, rows)
        shards = self._shards(direction, ids)
        choice = shards.choice(lambda: probe._choose_epsilon(model, direction, rows))
        plus, minus = shards.measured(
            rows, lambda some: probe.directional_derivatives(model, direction, some, choice.epsilon)
        )
        derivatives = direction.derivatives(plus, minus, choice.epsilon)
        per_candidate = row_means(rows, derivatives)
        num_tokens = 2 * int(rows.lengths.sum()) + choice.num_tokens + num_compared
        info = {
            "epsilon": choice.epsilon,
            "epsilon_agreement": choice.agreement,
            "reference_loss": direction.reference_loss,
            "learning_rates": group_learning_rates(unwrap_optimizer(optimizer, unwrap(model)), self.learning_rates),
            "second_moment": self.second_moment,
            **direction.path_info(),
            "parameters": self.parameters,
            "reading": reading.to_dict(),
            "num_compared_tokens": num_compared,
            "num_skipped": len(skipped),
            "skipped": skipped.tolist(),
            "seconds": time.perf_counter() - started,
            "flops": direction.flops + forward_flops(count_multiplied_parameters(unwrap(model)), num_tokens),
        }
        logger.info(
            "probed %d candidates (%d without a trained token) in %.1f s, epsilon %.1e, agreement %s",
            len(rows), len(skipped), info["seconds"], choice.epsilon, choice.agreement,
        )  # fmt: skip
        return InfluenceLabels(
            candidate_id=ids,
            influence=(per_candidate * direction.step_size).astype(np.float32),
            influence_per_token=per_candidate.astype(np.float32),
            loss=row_means(rows, (plus.astype(np.float64) + minus) / 2).astype(np.float32),
            num_tokens=rows.num_targets,
            probe=np.full(len(rows), "directional"),
            step_size=direction.step_size,
            token_derivatives=derivatives.astype(np.float32),
            reference_losses=passage_losses(reference.measured, direction.passage_losses),
            info=info,
        ).check()

    def compute_direction(
        self, model: nn.Module, optimizer: Any, reference: ReferenceTask, candidates: Candidates | None = None
    ) -> Direction:
        """The first half of `measure`: u = (c_p / step_size) · P · ∇L_ref, parameter by parameter, mean over the path.

        Args:
            model: the live model.
            optimizer: its optimizer.
            reference: what the model should get better at.
            candidates: rows that batches are drawn from; needed for `second_moment="batches"`.

        Returns:
            The direction; its tensors are new.

        Raises:
            InfluenceError: the gradient of the reference loss is zero or not finite.
            ValueError: `second_moment="batches"` without `batch_rows` or candidates.
        """
        adopt_engine(model, optimizer)
        model, optimizer = unwrap(model), unwrap_optimizer(optimizer, unwrap(model))
        together = self._processes.size if is_sharded(model) else 1
        num_points = len(shares_of_path(reference.measured, self.path_steps, 0, together))
        seed = self.seed or 0
        with preserved(model) as snapshot, in_evaluation(model):
            rarely = ids_in_store(model, rarely_reached_parameters(model))
            steps = parameter_steps(optimizer, snapshot.parameters, self.learning_rates, rarely)
            batches = UsualBatches(
                model,
                candidates,
                batch_rows=self.batch_rows,
                max_grad_norm=self.max_grad_norm,
                seed=seed,
                mean_gradient=lambda rows: mean_loss_gradient(
                    model,
                    rows,
                    tokens_per_batch=self._tokens_per_batch,
                    loss=self.loss,
                    processes=self._processes,
                ),
            )
            path = ReferencePath(
                snapshot,
                steps,
                reference.measured,
                self._reader(model),
                squares=batches.mean_squares(steps) if self.second_moment == "batches" else {},
                left_out=ids_in_store(model, self._left_out(model)),
                batch_squares=batches.square_of_one,
            )
            if num_points > 1:
                rates = group_learning_rates(optimizer, self.learning_rates)
                rate = self.path_rate or steps_per_stride(num_points, self.rate_steps, optimizer, rates)
                direction = path.walk(num_points, rate, seed)
            else:
                direction = path.read_once()
        num_parameters = count_multiplied_parameters(model)
        direction = dataclasses.replace(
            direction,
            flops=gradient_flops(num_parameters, path.num_tokens_backward + batches.num_tokens)
            + forward_flops(num_parameters, path.num_tokens_forward),
        )
        if not np.isfinite(direction.norm) or direction.norm == 0:
            raise InfluenceError(
                "The preconditioned gradient of the reference loss must be finite and not zero, got norm "
                f"{direction.norm} at reference loss {direction.reference_loss:.4g}. Look for NaN in the model or in "
                "the optimizer's state, and check that the parameters the optimizer holds reach the loss."
            )
        return direction

    def directional_derivatives(
        self, model: nn.Module, direction: Direction, rows: Candidates, epsilon: float
    ) -> tuple[FloatArray, FloatArray]:
        """The second half of `measure`: losses of all trained tokens at θ + ε u, then at θ − ε u.

        Args:
            model: the live model.
            direction: u.
            rows: candidates with T trained tokens.
            epsilon: ε‖u‖/‖θ‖.

        Returns:
            Two arrays (T,), nats. Their difference over 2ε is the derivative: > 0 helps.
        """
        model = unwrap(model)

        def losses() -> FloatArray:
            return token_losses(
                model,
                rows,
                tokens_per_batch=self._tokens_per_batch,
                loss=self.loss,
                progress=bool(self.progress),
                processes=self._processes,
                compile_layers=self.compile_layers,
            )

        return losses_on_either_side(model, direction, epsilon, losses)

    def _choose_epsilon(self, model: nn.Module, direction: Direction, rows: Candidates) -> EpsilonChoice:
        if self.epsilon is not None:
            return EpsilonChoice(epsilon=self.epsilon)
        few = dataclasses.replace(self, progress=False).directional_derivatives
        return choose_epsilon(
            model,
            direction,
            rows,
            lambda r, e: few(model, direction, r, e),
            seed=self.seed or 0,
            processes=self._processes,
        )

    def _shards(self, direction: Direction, ids: IntArray) -> Shards:
        """What an interrupted probe of these candidates with these settings left."""
        # Labels are the same with any of these.
        left_out = {"processes", "shards_dir", "progress", "tokens_per_batch"}
        settings = {name: value for name, value in vars(self).items() if name not in left_out}
        return Shards(self.shards_dir, direction, settings, ids, self._processes)

    @property
    def _processes(self) -> Processes:
        return self.processes or ALONE

    @property
    def _tokens_per_batch(self) -> int:
        return DEFAULT_TOKENS_PER_BATCH if self.tokens_per_batch is None else self.tokens_per_batch

    def _left_out(self, model: nn.Module) -> set[int]:
        """Ids of parameters that do not move: embeddings and output head under `parameters="blocks"`."""
        if self.parameters == "all":
            return set()
        modules = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
        if modules[0] is None:
            raise ValueError(
                f"`parameters='blocks'` needs a model whose get_input_embeddings() tells them, got "
                f"{type(model).__name__}. Use `parameters='all'`."
            )
        return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}

    def _reader(self, model: nn.Module) -> PathReader:
        settings: dict[str, Any] = {"loss": self.reference_loss, "processes": self._processes}
        tokens = self._tokens_per_batch

        def add_gradient(rows: Candidates) -> float | None:
            nonlocal tokens
            found = add_gradient_of_sum(model, rows, tokens_per_batch=tokens, **settings)
            if found is None:
                tokens = max(1, tokens // 2)
            return found

        return PathReader(
            mean_gradient=lambda rows, sums: mean_loss_gradient(
                model, rows, tokens_per_batch=tokens, row_sums=sums, **settings
            ),
            add_gradient=add_gradient,
            token_losses=lambda rows: token_losses(model, rows, tokens_per_batch=tokens, **settings),
            smallest_step=smallest_step(model),
        )
