"""One process of runs under DeepSpeed, one after the other: settings in as JSON, what this process saw out as JSON.

RANK=0 WORLD_SIZE=2 ... python tests/training/deepspeed_worker.py '{"output_dir": ..., "runs": [...], "result": ...}'
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
os.environ.pop("ACCELERATE_USE_CPU", None)  # which would leave DeepSpeed out

import deepspeed.ops
import torch
import transformers.training_args
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, default_data_collator

from mates_hf import MatesCallback, MatesRounds
from mates_hf.engine import deepspeed_shards
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.digest import weights_digest
from mates_hf.engine.preserve import preserved, undisturbed
from mates_hf.engine.processes import Processes
from mates_hf.engine.weight_store import adopt_engine, weight_store
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe_directional import DirectionalProbe
from tests.training import kit
from tests.training.kit import make_arguments, make_pool, make_reference, run, small_config

torch.set_num_threads(1)
MAX_STEPS, LOOK_AT = 8, 5


def let_deepspeed_run_on_a_cpu() -> None:
    """Neither library has such a backend: with `use_cpu` accelerate would train without DeepSpeed, and say nothing."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    # Not built at the first start, which needs a compiler, and leaves a lock that all wait for if it is killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_digest(engine: Any) -> str:
    """All that training reads: gathered weights, float32 copies, moments, gradients and counters."""
    found = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        for parameter in parameters:
            add(parameter)
            if parameter.grad is not None:
                add(parameter.grad)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for flat, state in inner.state.items():
        add(flat)
        for key in sorted(state):
            add(torch.as_tensor(state[key]))
    for name in ("global_steps", "micro_steps", "global_samples", "skipped_steps"):
        found.update(str(getattr(engine, name)).encode())
    found.update(str(torch.get_rng_state().sum()).encode())
    return found.hexdigest()


class Look(TrainerCallback):
    """Probes, averages and evaluates in the middle of a run, and compares all that training reads before and after."""

    def __init__(self, probes: bool, chunks: bool = False) -> None:
        self.probes, self.chunks = probes, chunks
        self.trainer: Any = None
        self.seen: dict[str, Any] = {}
        self.average: WeightAverage | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.probes or state.global_step < LOOK_AT - 2 or state.global_step > LOOK_AT:
            return
        engine, model, processes = self.trainer.model_wrapped, given["model"], Processes.of_run()
        adopt_engine(model, given["optimizer"])
        if self.average is None:
            self.average = WeightAverage(model, processes)
        before = engine_digest(engine) if hasattr(engine, "zero_optimization_stage") else ""
        self.average.update()
        if state.global_step < LOOK_AT:
            return
        reference, pool = make_reference(), make_pool(48)
        probe = DirectionalProbe(processes=processes, epsilon=3e-3, progress=False)
        labels = probe.measure(model, given["optimizer"], reference, pool)
        half = DirectionalProbe(processes=processes, path_steps=3, parameters="blocks", second_moment="batches",
                                batch_rows=8, max_grad_norm=1.0)  # fmt: skip
        path = half.measure(model, given["optimizer"], reference, pool)
        twice = probe.measure(model, given["optimizer"], reference, pool)
        with undisturbed(model):
            model.eval()
            here = mean_loss(model, reference.measured, processes=processes)
        digest = weights_digest(model, processes)
        with self.average.swapped_in():
            averaged = probe.measure(model, given["optimizer"], reference, pool)
            with undisturbed(model):
                model.eval()
                mean = mean_loss(model, reference.measured, processes=processes)
            moved = weights_digest(model, processes) != digest
        self.average = None
        chunked = kit.labels_in_chunks(model, given["optimizer"], processes) if self.chunks else None
        self.seen = {
            "same": (not before or engine_digest(engine) == before) and weights_digest(model, processes) == digest,
            "labels": labels.influence.tolist(),
            "path": path.influence.tolist(),
            "chunked": chunked,
            "averaged": averaged.influence.tolist(),
            "equal": labels.influence.tolist() == twice.influence.tolist(),
            "mean_losses": [here, mean],
            "moved": moved,
            "digest": digest,
            "stored": sum(p.numel() for p in weight_store(model).parameters().values()),
        }


def forget_the_engine() -> None:
    """The next run of this process makes its own; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=False)


class FailingProbe(DirectionalProbe):
    """Process 1 alone fails, inside of what puts the weights back."""

    def directional_derivatives(self, model: Any, *args: Any) -> Any:
        if os.environ.get("RANK") == "1":
            with preserved(model):
                raise RuntimeError("process 1 broke")
        return super().directional_derivatives(model, *args)


def train(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run as told, with DeepSpeed unless `deepspeed` is missing."""
    if "loop" in settings:
        return own_loop(settings, folder)
    config = settings.get("deepspeed")
    changes: dict[str, Any] = {"max_steps": MAX_STEPS, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    if config is not None:
        changes |= {"deepspeed": with_defaults(config), "bf16": "bf16" in config}
    if "RANK" in os.environ:
        changes["use_cpu"] = False
    changes |= settings.get("args", {})
    if "evaluation" in settings:
        from tests.evaluation import worker

        given = {**settings["evaluation"], "args": changes | {"max_steps": 4}, "output_dir": str(folder / "evaluated")}
        try:
            return worker.main(given)
        finally:
            forget_the_engine()
    look = Look(settings.get("looks", False), settings.get("chunks", False))
    callbacks: list[Any] = [look]
    if settings.get("selects"):
        probe = FailingProbe() if settings.get("fails") else None
        callbacks.append(MatesCallback(make_reference(), small_config(**settings.get("config", {})), probe=probe))
    make_model = kit.make_model
    kit.make_model = lambda *args, **kwargs: changed_model(make_model(*args, **kwargs), settings)
    try:
        args = make_arguments(folder / settings.get("folder", "out"), **changes)
        done = run(args, callbacks, make_pool(settings.get("num_rows", 400)), resume=settings.get("resume"),
                   prepare=lambda trainer: setattr(look, "trainer", trainer))  # fmt: skip
    finally:
        kit.make_model = make_model
    engine = done.trainer.model_wrapped
    optimizer = getattr(done.trainer.optimizer, "optimizer", None)
    found = {
        "rows": done.rows,
        "losses": done.losses,
        "engine": type(engine).__name__,
        "optimizer": type(optimizer).__name__,
        "inner": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "end": engine_digest(engine) if hasattr(engine, "zero_optimization_stage") else "",
        "weights": weights_digest(done.trainer.model, Processes.of_run()),
        "rounds": [entry for entry in done.trainer.state.log_history if "mates/round" in entry],
        **look.seen,
    }
    forget_the_engine()
    return found


def own_loop(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A loop of one's own with `MatesRounds`, under DeepSpeed in several processes."""
    plugin = None
    if "RANK" in os.environ:
        plugin = DeepSpeedPlugin(
            hf_ds_config={**settings["loop"], "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
        )
    accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
    pool, model = make_pool(), kit.make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    rounds = MatesRounds(make_reference(), pool, small_config(switch_lead_steps=3), output_dir=folder / "loop",
                         progress=False)  # fmt: skip
    rows, losses = [], []
    for _, mine in rounds.order(model, optimizer, batch_size=8, max_steps=20):
        batch = default_data_collator([pool[int(i)] for i in mine])
        loss = model(**batch).loss
        accelerator.backward(loss)
        if plugin is None:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(float(accelerator.gather(loss.detach().reshape(1)).mean()))
        optimizer.step()
        optimizer.zero_grad()
        rows.append(accelerator.gather(torch.tensor(mine)).tolist())
    forget_the_engine()
    return {"rows": rows, "losses": losses, "optimizer": type(optimizer.optimizer).__name__}


def changed_model(model: Any, settings: dict[str, Any]) -> Any:
    """The model of the tests, with tied embeddings where that is asked."""
    if settings.get("tied"):
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer fills in."""
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    bf16 = {"bf16": {"enabled": True}} if "bf16" in config else {}
    return {**{name: "auto" for name in auto}, **config, **bf16}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        let_deepspeed_run_on_a_cpu()
    deepspeed_shards.MEETING_SECONDS = 3
    results = [train(settings, Path(given["output_dir"])) for settings in given["runs"]]
    Path(f"{given['result']}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
