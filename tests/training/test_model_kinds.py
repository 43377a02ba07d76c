"""Three steps of many kinds of models in a real Trainer: the losses of a round's labels are the run's own, row by row.

The comparison is made without the library: at the weights of the round, in eval mode, each labelled row goes through
the run's collator alone and then through the model (or the Trainer that makes the loss).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from mates_hf import DirectionalProbe, MatesCallback, MatesConfig, load_round
from mates_hf.data.collated import forked_rng
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from tests.training import zoo_kinds, zoo_losses  # noqa: F401 (each enters its kinds)
from tests.training.kit import leave_modules_to_themselves, make_arguments
from tests.training.settings import Steps
from tests.training.zoo import KINDS, Kind

STEPS, BOUNDARY, NUM_PROBES = 4, 2, 10
CLOSE = 1e-5
# The labels' losses are means of those at either side of the weights; so near, curvature is below rounding.
EPSILON = 1e-5
# A router chooses anew at either side. Where a token is at such a border the loss jumps, and a label is the mean of
# both; this near to the weights no token is at one.
EPSILON_OF_MIXTURES = 1e-8


class Weights(TrainerCallback):
    """Keeps the weights of the round's step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == BOUNDARY:
            self.kept = {key: value.clone() for key, value in kwargs["model"].state_dict().items()}


def is_mixture(model: torch.nn.Module) -> bool:
    return any("router" in name or "expert" in name for name, _ in model.named_modules())


def make_trainer(kind: Kind, output_dir: Path, callbacks: list[TrainerCallback]) -> Any:
    leave_modules_to_themselves()
    torch.manual_seed(0)
    model = kind.model()
    config = MatesConfig(
        update_steps=BOUNDARY, num_probes=NUM_PROBES, selection_ratio=0.5, on_weak_signal="select", average_steps=0
    )
    epsilon = EPSILON_OF_MIXTURES if is_mixture(model) else EPSILON
    probe = DirectionalProbe(**{"epsilon": epsilon, **kind.probe})
    columns = kind.columns()
    seen = {"pixel_values", "input_ids"} <= columns.keys()
    influence_model = NgramInfluenceModel(text_only=True) if seen else None
    mates = MatesCallback(kind.reference(), config, probe=probe, influence_model=influence_model)
    trainer = kind.trainer(
        model=model,
        args=make_arguments(
            output_dir, **{"max_steps": STEPS, "per_device_train_batch_size": 2, **copy.deepcopy(kind.args)}
        ),
        train_dataset=Dataset.from_dict(columns),
        data_collator=kind.collator(model),
        callbacks=[*callbacks, mates],
        **kind.given,
    )
    if kind.attach:
        mates.attach(trainer)
    return trainer


def own_loss(kind: Kind, trainer: Any, batch: dict[str, Any]) -> float:
    if not kind.made_by_trainer:
        return float(trainer.model(**batch, **kind.without).loss)
    return float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items(trainer, batch)))


def num_items(trainer: Any, batch: dict[str, Any]) -> Any:
    """What the Trainer says how many labels the loss is over; older ones count a first label that it is not over."""
    if hasattr(trainer, "_loss_shifts_labels"):
        return trainer._get_num_items_in_batch([batch], trainer.args.device)
    if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return None
    labels = batch["labels"]
    return ((labels[:, 1:] if type(trainer.model).__name__.endswith("CausalLM") else labels) != -100).sum()


def num_trained(kind: Kind, batch: dict[str, Any]) -> int:
    labels = batch["labels"]
    if "loss_mask" in batch:
        labels = labels.masked_fill(batch["loss_mask"] == 0, -100)
    return int(((labels[:, 1:] if kind.reading == "shifted" and not kind.trains_first else labels) != -100).sum())


def rows_alone(kind: Kind, trainer: Any, ids: list[int]) -> tuple[list[float], list[int]]:
    """The run's own loss of each row, and how many tokens it is a mean over (0 where no likelihood tells)."""
    trainer.model.eval()
    losses, counts = [], []
    for i in ids:
        with forked_rng(i):
            batch = dict(trainer.data_collator([trainer.train_dataset[i]]))
        counts.append(num_trained(kind, batch) if kind.reading in ("shifted", "unshifted") else 0)
        with torch.no_grad():
            losses.append(own_loss(kind, trainer, batch))
    return losses, counts


@pytest.mark.quick(
    "LlamaForCausalLM", "Gemma2*", "MambaForCausalLM", "FalconForCausalLM", "GPT2*", "BertLMHeadModel*",
    "MixtralForCausalLM", "BartFor*", "BertForMaskedLM", "ModernBert*", "T5*", "Llava", "pictures*", "LoRA",
    "GPTNeoXForC*", "LoRA of*", "prefix*", "left padding", "left*given", "padded without*", "ALiBi*", "token types",
    "packed", "labels shifted*", "z-loss*", "a mask*", "weights*", "a loss of*", "`loss_type*", "`compute_loss_func`",
    "a Trainer*", "classes", "label smoothing, attached", "tags*", "answers*",
)  # fmt: skip
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=name, marks=[pytest.mark.slow] * kind.slow) for name, kind in KINDS.items()]
)
def test_what_is_probed_is_what_is_trained(kind: Kind, tmp_path: Path) -> None:
    weights, steps = Weights(), Steps()
    trainer = make_trainer(kind, tmp_path, [weights, steps])
    if kind.refused:
        with pytest.raises(kind.error, match=kind.refused):
            trainer.train()
        assert steps.count == 0
        assert not (tmp_path / "_mates").exists()
        return
    trainer.train()
    assert steps.count == STEPS
    record = load_round(tmp_path / "_mates" / "round-0001")
    assert record.info["step"] == BOUNDARY
    labels, said = record.labels, record.info["loss"]
    assert said["candidates"].startswith(kind.reading)
    trainer.model.load_state_dict(weights.kept)
    losses, counts = rows_alone(kind, trainer, labels.candidate_id.tolist())
    assert len(losses) >= NUM_PROBES // 2
    off = np.abs(labels.loss - losses)
    assert off.max() <= CLOSE, off
    if any(counts):
        assert labels.num_tokens.tolist() == counts
    assert np.isfinite(labels.influence).all()
    if record.info["probe"]["epsilon"] > 1e-6:  # else rounding alone decides
        assert labels.influence.std() > 0
