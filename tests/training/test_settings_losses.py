"""Models and losses: what is probed is what trains, and labels are those of the plain setting where they should be."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from mates_hf import DirectionalProbe, OneStepProbe
from mates_hf.errors import MatesError
from mates_hf.flops import PATH_STEPS
from tests.training.kit import OLD_TRAINER, make_model, make_pool, make_reference
from tests.training.settings import (
    NO_FILE,
    NO_TRACE,
    STEPS,
    Setup,
    assert_refused,
    assert_selected,
    check,
    declare,
    mates,
    proves,
    rounds_of,
)

WARNING = "probes measure the plain negative log-likelihood"
# Of labels at equal weights: compilers fuse and reorder float32 sums, and the loss is at either side of the weights.
SAME_RANKS, SAME_LOSS = 0.99, {"rtol": 1e-3}


def first_labels(setup: Setup, output_dir, **changes):
    """Labels of the round after 5 steps in the Trainer's own order."""
    setup.run(output_dir, [mates(**changes)])
    return rounds_of(output_dir)[0].labels


def spearman(a, b) -> float:
    return float(spearmanr(a, b).statistic)


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]


def likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token but the first."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(DirectionalProbe):
    """Keeps the weights that it measured at."""

    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def measure(self, model, optimizer, reference, candidates):
        for key, value in model.state_dict().items():
            self.weights.setdefault(key, value.clone())
        return super().measure(model, optimizer, reference, candidates)

    def expected(self, labels, formula) -> np.ndarray:
        """Mean losses of the labelled candidates by a formula, at the weights that were kept."""
        model = make_model()
        model.load_state_dict(self.weights)
        rows = torch.tensor(make_pool(200)["input_ids"])[labels.candidate_id.tolist()]
        with torch.no_grad():
            return formula(model.eval()(input_ids=rows).logits, rows).mean(1).numpy()


@proves("NEFTune (`neftune_noise_alpha`)", "probed losses are those without the noise")
def test_probes_see_no_noise(tmp_path):
    spy = Spy()
    labels = first_labels(Setup(args={"neftune_noise_alpha": 5.0}), tmp_path, probe=spy)
    assert np.allclose(labels.loss, spy.expected(labels, likelihood), **SAME_LOSS)


@proves("`torch_compile`", "compiled and eager give the same labels")
@pytest.mark.parametrize(
    "backend",
    ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))],
)
def test_compiled_and_eager_give_the_same_labels(tmp_path, backend):
    plain = first_labels(Setup(), tmp_path / "plain")
    compiled = first_labels(Setup(args={"torch_compile_backend": backend}), tmp_path / "compiled")
    assert np.array_equal(plain.candidate_id, compiled.candidate_id)
    if backend == "inductor":
        assert spearman(plain.influence, compiled.influence) > SAME_RANKS
    else:
        assert np.array_equal(plain.influence, compiled.influence)


@pytest.mark.quick("True")
@proves("activation checkpointing, reentrant", "labels equal those without, to the bit")
@proves("activation checkpointing, not reentrant", "labels equal those without, to the bit")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_labels(tmp_path, reentrant):
    plain = first_labels(Setup(), tmp_path / "plain")
    args = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = first_labels(Setup(args=args), tmp_path / "checkpointed")
    assert np.array_equal(plain.influence, checkpointed.influence)


class HalfTrainer(Trainer):
    """Does on the CPU what `fp16` does on a GPU, where alone accelerate has it: float16 autocast and a scaled loss."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)


class GentleHalfTrainer(HalfTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)


HALF = Setup(args={"fp16": True}, trainer_class=HalfTrainer)


@proves("fp16 autocast (`fp16`)", NO_TRACE, note="tested with float16 autocast and a gradient scaler on the CPU")
@proves("fp16 autocast (`fp16`)", "steps that the scaler skips are counted as the Trainer counts them")
def test_fp16_and_its_scaler(tmp_path):
    ours, _ = check(tmp_path, HALF)
    scale = ours.trainer.accelerator.scaler.get_scale()
    assert scale < 2.0**20  # some steps overflowed
    skipped = STEPS - int(next(iter(ours.optimizer["state"].values()))["step"])
    assert 0 < skipped < 5


@pytest.mark.quick("bf16")
@proves("fp16 autocast (`fp16`)", "labels rank candidates as those of a float32 run do")
@proves("bf16 autocast (`bf16`)", "labels rank candidates as those of a float32 run do")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_ranks_as_float32_does(tmp_path, precision):
    low_setup = Setup(args={"bf16": True})
    if precision == "fp16":  # without skipped steps, which would leave other weights
        low_setup = dataclasses.replace(HALF, trainer_class=GentleHalfTrainer)
    plain = first_labels(Setup(), tmp_path / "plain")
    low = first_labels(low_setup, tmp_path / "low")
    assert not np.array_equal(plain.influence, low.influence)
    assert spearman(plain.influence, low.influence) > 0.9


@proves("pure bf16 weights", NO_TRACE)
def test_bf16_weights(tmp_path):
    ours, _ = check(tmp_path, Setup(model=lambda: make_model().to(torch.bfloat16)))
    assert {value.dtype for value in ours.weights.values() if value.is_floating_point()} == {torch.bfloat16}


@proves("pure bf16 weights", "labels rank candidates as float32 weights of the same values do",
        note="rounding makes labels noisier (Spearman 0.8 there): prefer float32 weights with autocast")  # fmt: skip
def test_bf16_weights_rank_as_float32_ones_do():
    influence = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = make_model().to(torch.bfloat16).to(dtype)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.tensor(make_pool(8, seed=1)["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.load_state_dict(start)
        influence[dtype] = DirectionalProbe().measure(model, optimizer, make_reference(8), make_pool(60)).influence
    assert spearman(*influence.values()) > 0.7


@proves("tied embeddings", NO_TRACE)
@proves("tied embeddings", "the shared weight has one direction, with both uses in it; labels agree with real steps")
def test_tied_embeddings(tmp_path):
    def model():
        torch.manual_seed(0)
        config = make_model().config
        config.tie_word_embeddings = True
        return LlamaForCausalLM(config)

    ours, record = check(tmp_path, Setup(model=model))
    trained = ours.trainer.model
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    candidates, reference = make_pool(40), make_reference(8)
    live = trained, ours.trainer.optimizer, reference, candidates
    fast = DirectionalProbe(learning_rates=(1e-4, 1e-4)).measure(*live)
    real = OneStepProbe(learning_rates=(1e-4, 1e-4)).measure(*live)
    assert spearman(fast.influence, real.influence) > 0.9


@proves("LoRA (`peft`)", NO_TRACE)
@proves("LoRA (`peft`)", "base weights stay to the bit; u has adapters alone; resumes exactly")
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(make_model(), config)

    setup = Setup(model=model, args={"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4})
    ours, _ = check(tmp_path, setup)
    start = model().state_dict()
    for name, value in ours.weights.items():
        assert torch.equal(value, start[name]) is ("lora_" not in name), name
    trainer = ours.trainer
    direction = DirectionalProbe(learning_rates=(1e-3, 1e-3)).compute_direction(
        trainer.model, trainer.optimizer, make_reference(8)
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    moved = {names[id(parameter)] for parameter in direction.by_parameter}
    assert moved == {name for name in names.values() if "lora_" in name}
    for step in (4, 8):
        rest = setup.run(tmp_path / "ours", [mates()], resume=str(tmp_path / "ours" / f"checkpoint-{step}"))
        assert rest.rows == ours.rows[step * 4 :]
        assert rest.losses == ours.losses


# Losses that are not the model's own.


def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Focal loss of every token: what the model is sure of counts less."""
    losses = likelihood(logits, labels)
    return losses * (1 - (-losses).exp()) ** 2


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Label smoothing by 0.3."""
    return 0.7 * likelihood(logits, labels) - 0.3 * functional.log_softmax(logits[:, :-1], -1).mean(-1)


def loss_function(outputs, labels, num_items_in_batch):
    return weighted(outputs["logits"], labels).sum() / num_items_in_batch


class OwnTrainer(Trainer):
    """Has a loss of its own, and sums up what it sees of it, as TRL's trainers do."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.calls += 1
        self._metrics = getattr(self, "_metrics", {"train": {"rows": []}})
        self._metrics["train"]["rows"].append(len(inputs["input_ids"]))
        loss = weighted(outputs["logits"], inputs["labels"]).mean()
        return (loss, outputs) if return_outputs else loss


class PoppingTrainer(OwnTrainer):
    """Does not even give the model its labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = weighted(outputs["logits"], inputs["labels"]).mean()
        return (loss, outputs) if return_outputs else loss


SUBCLASS = "a `Trainer` subclass with its own `compute_loss`"
OWN_LOSSES = [
    ("label smoothing (`label_smoothing_factor`)", smoothed, Setup(args={"label_smoothing_factor": 0.3})),
    ("`compute_loss_func`", weighted, Setup(trainer=lambda: {"compute_loss_func": loss_function})),
    (SUBCLASS, weighted, Setup(trainer_class=OwnTrainer)),
    (SUBCLASS, weighted, Setup(trainer_class=PoppingTrainer)),
]
for name, _, _ in OWN_LOSSES:
    for what in (
        NO_TRACE,
        "the loss of each candidate is the run's own by its formula, the reference loss stays plain",
    ):
        declare(name, "supported", what, note="own losses are probed a row at a time; labels have no token detail")


@pytest.mark.quick("*0-False", "*1-False", "*2-True")
@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize(("setting", "formula", "setup"), OWN_LOSSES)
def test_an_own_loss_is_probed(tmp_path, setting, formula, setup, attach, caplog):
    spy = Spy(path_steps=PATH_STEPS)
    own = dataclasses.replace(setup, attach=attach).run(tmp_path / "own", [mates(probe=spy)])
    assert warnings_in(caplog) == []
    record = assert_selected(own, tmp_path / "own")
    labels, plain = record.labels, first_labels(Setup(), tmp_path / "plain")
    assert np.array_equal(plain.candidate_id, labels.candidate_id)
    assert 0.5 < spearman(plain.influence, labels.influence)
    assert not np.allclose(plain.influence, labels.influence)
    assert np.allclose(labels.loss, spy.expected(labels, formula), **SAME_LOSS)
    assert not np.allclose(labels.loss, spy.expected(labels, likelihood), **SAME_LOSS)
    assert labels.token_derivatives is not None
    assert record.info["loss"]["candidates"].startswith("row by row: ")
    assert record.info["loss"]["reference"] == "shifted"
    if type(own.trainer).__mro__[1] is OwnTrainer:  # nothing of the probes in what it will log
        assert own.trainer.calls == STEPS
        assert own.trainer._metrics == {"train": {"rows": [4] * STEPS}}


@pytest.mark.quick("*0", "*2")
@pytest.mark.parametrize(("setting", "formula", "setup"), OWN_LOSSES)
def test_an_own_loss_leaves_no_trace(tmp_path, setting, formula, setup):
    check(tmp_path, setup)


def test_a_loss_given_to_the_probe_is_kept(tmp_path):
    def squared(model, batch):
        return weighted(model(input_ids=batch["input_ids"]).logits, batch["labels"]).mean() ** 2

    setup = Setup(trainer_class=OwnTrainer)
    apart = first_labels(setup, tmp_path / "apart", probe=DirectionalProbe(loss=squared))
    attached = dataclasses.replace(setup, attach=True)
    assert np.array_equal(
        first_labels(attached, tmp_path / "attached", probe=DirectionalProbe(loss=squared)).influence, apart.influence
    )


@pytest.mark.parametrize("attach", [False, True])
def test_the_models_own_loss_is_not_warned_of(tmp_path, attach, caplog):
    seen = {}

    class Hooks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = len(model._forward_hooks)

    args = {"eval_on_start": True}
    setup = Setup(args=args, attach=attach, trainer=lambda: {"eval_dataset": make_pool(8)})
    setup.run(tmp_path, [mates(), Hooks()])
    assert warnings_in(caplog) == []
    assert set(seen.values()) == {0}  # the hook that looked is gone


def test_attached_to_another_trainer_is_refused(tmp_path):
    callback = mates()
    callback.attach(Setup().build(tmp_path / "other", []))
    assert_refused(tmp_path, Setup(), "the Trainer that trains", error=MatesError, callbacks=lambda: [callback])


# Logits that are not there.


def fuse_head(model: Any, *, always: bool = False) -> Any:
    """As Liger's kernels do to a model: a loss, and no logits, where it trains with labels."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        if always or (model.training and kwargs.get("labels") is not None):
            output["logits"] = None
            return type(output)(**{key: value for key, value in output.items() if value is not None})
        return output

    model.forward = forward
    return model


@proves("`use_liger_kernel`", NO_TRACE, note="tested with a model that returns no logits while it trains; its kernels "
        "need a GPU")  # fmt: skip
@proves("`use_liger_kernel`", "labels equal those of the model with logits")
def test_a_model_without_logits_in_training(tmp_path, monkeypatch):
    if OLD_TRAINER:
        pytest.skip("transformers 4 puts Liger's kernels in by Liger's own function, which is not here to be replaced")
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: fuse_head(model))
    setup = Setup(args={"use_liger_kernel": True})
    _, record = check(tmp_path, setup)
    assert np.array_equal(record.labels.influence, first_labels(Setup(), tmp_path / "with").influence)


@proves("a model that never returns logits", NO_FILE, outcome="refused",
        note="set `reference_loss` (and `loss`) of the probe, or pass a probe of your own")  # fmt: skip
def test_a_model_that_never_returns_logits(tmp_path):
    setup = Setup(model=lambda: fuse_head(make_model(), always=True))
    assert_refused(tmp_path, setup, "must give logits")


def test_a_model_without_logits_is_probed_by_losses_of_its_own(tmp_path):
    def own(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    setup = Setup(model=lambda: fuse_head(make_model(), always=True))
    result = setup.run(tmp_path, [mates(probe=DirectionalProbe(path_steps=PATH_STEPS, loss=own, reference_loss=own))])
    record = assert_selected(result, tmp_path)
    plain = first_labels(Setup(), tmp_path / "plain")
    assert spearman(plain.influence, record.labels.influence) > SAME_RANKS


@proves("TRL's `SFTTrainer`", NO_TRACE)
@proves("TRL's `SFTTrainer`", "its losses are the model's likelihood; its metrics keep no trace")
def test_sft_trainer(tmp_path, tiny_tokenizer, caplog):
    trl = pytest.importorskip("trl")
    pool = make_pool(200)

    @dataclasses.dataclass(frozen=True)
    class Sft(Setup):
        def build(self, output_dir, callbacks, **changes):
            torch.manual_seed(0)
            args = Setup().build(output_dir, []).args.to_dict()
            config = trl.SFTConfig(**{**{key: args[key] for key in KEPT}, "output_dir": str(output_dir), **changes})
            trainer = sft(trl)(
                model=make_model(), args=config, train_dataset=pool.select_columns(["input_ids"]),
                processing_class=tiny_tokenizer, callbacks=callbacks,
            )  # fmt: skip
            if self.attach:
                callbacks[0].attach(trainer)
            return trainer

    ours, record = check(tmp_path, Sft())
    assert warnings_in(caplog) == []
    assert record.info["loss"]["candidates"] == "shifted"  # TRL 1 computes its loss outside of the model: the same one
    own = Sft(attach=True).run(tmp_path / "own", [mates()])
    labels = assert_selected(own, tmp_path / "own").labels
    assert np.allclose(labels.loss, record.labels.loss, **SAME_LOSS)
    assert spearman(labels.influence, record.labels.influence) > SAME_RANKS
    logged = [[entry.get("num_tokens") for entry in run.trainer.state.log_history] for run in (ours, own)]
    assert [value for value in logged[0] if value] == [value for value in logged[1] if value]
    assert not own.trainer._metrics["eval"]


KEPT = ("max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "save_strategy", "report_to",
        "disable_tqdm", "use_cpu")  # fmt: skip


def sft(trl: Any) -> type[Trainer]:
    from tests.training.settings import watched

    return watched(trl.SFTTrainer)
