"""Each value of `optim` in a real run: it selects, or is refused by name before a step is taken or a file written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, default_data_collator

from mates_hf import CombinedOptimizer, DirectionalProbe, MatesCallback, OneStepProbe, load_round
from mates_hf.influence.preconditioner import UnsupportedOptimizerError
from tests.influence.test_optimizers import DIRECTIONAL, ONE_STEP, OPTIM_VALUES, REFUSED, hf_adafactor
from tests.training.kit import Result, Watch, make_arguments, make_model, make_pool, make_reference, run, small_config

STEPS, UPDATE_STEPS, BATCH = 12, 5, 4


def arguments(output_dir: Path, **changes: Any) -> Any:
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **changes}
    return make_arguments(output_dir, **settings)


def callback(probe: Any = None) -> MatesCallback:
    config = small_config(update_steps=UPDATE_STEPS, num_probes=16)
    return MatesCallback(make_reference(6), config, probe=probe)


def arguments_of(optim: str, output_dir: Path) -> Any:
    package = OPTIM_VALUES[optim].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if OPTIM_VALUES[optim].note == "needs a GPU" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    low_rank = optim.startswith(("galore", "apollo"))
    changes: dict[str, Any] = {"optim_target_modules": ["attn", "mlp"]} if low_rank else {}
    if optim == "sgd":
        changes = {"learning_rate": 0.1, "optim_args": "momentum=0.9,nesterov=true"}
    return arguments(output_dir, optim=optim, **changes)


def by_outcome(outcome: str) -> list[str]:
    return [name for name, value in OPTIM_VALUES.items() if value.outcome == outcome]


def assert_selected(result: Result, output_dir: Path, probe: str) -> None:
    """A round was measured by this probe, selected, and its rows were trained on in their order."""
    record = load_round(output_dir / "_mates" / "round-0001")
    assert set(record.labels.probe) == {probe}
    assert record.labels.influence.std() > 0
    start = record.info["from_step"] * BATCH
    selection = record.selection[: STEPS * BATCH - start]
    np.testing.assert_array_equal(result.rows[start : start + len(selection)], selection)


@pytest.mark.quick("adamw_torch", "adafactor", "sgd")
@pytest.mark.parametrize("optim", by_outcome(DIRECTIONAL))
def test_directional(optim: str, tmp_path: Path) -> None:
    result = run(arguments_of(optim, tmp_path), [callback()])
    assert_selected(result, tmp_path, "directional")
    # Few candidates early in training: a wrong sign or a wrong P is what this sees; the forms have tests of their own.
    assert load_round(tmp_path / "_mates" / "round-0001").info["fidelity"]["spearman"] > 0.5


@pytest.mark.parametrize("optim", by_outcome(ONE_STEP))
def test_one_step_only(optim: str, tmp_path: Path) -> None:
    refused, used, plain = (tmp_path / name for name in ("refused", "used", "plain"))
    with pytest.raises(UnsupportedOptimizerError, match=r"probe=OneStepProbe\(\)"):
        run(arguments_of(optim, refused), [callback()])
    assert not refused.exists() or not list(refused.iterdir())
    result = run(arguments_of(optim, used), [callback(OneStepProbe())])
    assert_selected(result, used, "one_step")
    # The real steps left no trace: what is trained between the boundary and the switch is as without them.
    before = load_round(used / "_mates" / "round-0001").info["from_step"]
    assert result.losses[:before] == run(arguments_of(optim, plain), []).losses[:before]


@pytest.mark.parametrize("optim", by_outcome(REFUSED))
@pytest.mark.parametrize("probe", [None, OneStepProbe()], ids=["directional", "one_step"])
def test_refused(optim: str, probe: Any, tmp_path: Path) -> None:
    args = arguments_of(optim, tmp_path / "out")
    with pytest.raises((UnsupportedOptimizerError, ValueError, AssertionError)) as caught:
        run(args, [callback(probe)])
    # Two of them do not get so far: the installed package refuses the Trainer's arguments, or a machine without CUDA.
    if optim not in ("galore_adafactor_layerwise", "adalomo"):
        assert "backward pass" in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def run_with(optimizer_of: Any, output_dir: Path, probe: Any = None, resume: Any = None, **changes: Any) -> Result:
    """A run with an optimizer that the user made."""
    watch, model = Watch(), make_model()
    watch.watch(model)
    trainer = Trainer(
        model=model,
        args=arguments(output_dir, **changes),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        optimizers=(optimizer_of(model), None),
        callbacks=[callback(probe), watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return Result(trainer, watch)


def muon_and_adamw(model: Any) -> torch.optim.Optimizer:
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return CombinedOptimizer(torch.optim.Muon(hidden, lr=0.01), torch.optim.AdamW(rest, lr=1e-3))


def test_muon_and_adamw_with_a_schedule_and_a_resume(tmp_path: Path) -> None:
    """A linear schedule moves both parts' rates; the resumed run ends with the same bits."""
    changes = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 7}
    whole = run_with(muon_and_adamw, tmp_path / "whole", **changes)
    assert_selected(whole, tmp_path / "whole", "directional")
    rates = load_round(tmp_path / "whole" / "_mates" / "round-0001").info["probe"]["learning_rates"]
    assert len(rates) == 2
    assert rates[0] == pytest.approx(10 * rates[1])
    resumed = run_with(muon_and_adamw, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-7"), **changes)
    assert resumed.rows == whole.rows[7 * BATCH :]
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name


def test_own_optimizer_that_is_not_known(tmp_path: Path) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        return torch.optim.Rprop(model.parameters(), lr=1e-4)

    with pytest.raises(UnsupportedOptimizerError, match=r"Rprop.*probe=OneStepProbe\(\)"):
        run_with(make, tmp_path / "refused")
    assert not list((tmp_path / "refused").iterdir())
    assert_selected(run_with(make, tmp_path / "used", OneStepProbe()), tmp_path / "used", "one_step")


@pytest.mark.parametrize("probe", [DirectionalProbe(), OneStepProbe()], ids=["directional", "one_step"])
def test_own_adafactor_without_a_learning_rate(probe: Any, tmp_path: Path) -> None:
    from transformers.optimization import AdafactorSchedule

    model = make_model()
    optimizer = hf_adafactor(lr=None, scale_parameter=True, relative_step=True)(list(model.parameters()))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        optimizers=(optimizer, AdafactorSchedule(optimizer)),
        callbacks=[callback(probe)],
    )
    with pytest.raises(UnsupportedOptimizerError, match="relative_step=False"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "_mates").exists()


@pytest.mark.parametrize("probe", [DirectionalProbe(), OneStepProbe()], ids=["directional", "one_step"])
def test_a_schedule_that_is_at_zero_at_the_boundary(probe: Any, tmp_path: Path) -> None:
    """A sawtooth: the rate is 0 exactly when the round is run; the step before it counts."""
    watch, model = Watch(), make_model()
    watch.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    teeth = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (UPDATE_STEPS - step) % UPDATE_STEPS / UPDATE_STEPS
    )
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=make_pool(),
        data_collator=default_data_collator,
        optimizers=(optimizer, teeth),
        callbacks=[callback(probe), watch],
    )
    trainer.train()
    (rate,) = load_round(tmp_path / "_mates" / "round-0001").info["probe"]["learning_rates"]
    assert rate == pytest.approx(1e-3 / UPDATE_STEPS)
    assert_selected(
        Result(trainer, watch), tmp_path, "directional" if isinstance(probe, DirectionalProbe) else "one_step"
    )
