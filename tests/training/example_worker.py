"""One process of a run on images, for the tests that start several: settings in as JSON, what it saw out as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.lab.small_run import shard_with_fsdp2
from mates_hf import FeatureInfluenceModel, MatesCallback, MatesConfig
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.training import scoring
from tests.training.kit import small_config
from tests.training.modalities import KINDS, PixelRidge, trainer

torch.set_num_threads(1)


class Statistics(TrainerCallback):
    """Running means of the first batch norm at the end of each step, which processes keep for themselves."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        means = [buffer for name, buffer in kwargs["model"].named_buffers() if name.endswith("running_mean")]
        self.seen += [float(means[0].sum())] if means else []


def main(settings: dict[str, Any]) -> None:
    """Train as told and write what this process saw."""
    kind, rank = KINDS[settings["kind"]], os.environ.get("RANK", "0")
    config: MatesConfig = small_config(num_probes=24, average_steps=0)
    model = FeatureInfluenceModel("inputs") if settings.get("fsdp2_layer") else PixelRidge()
    callback = MatesCallback(kind.reference(8), config, influence_model=model, probe=DirectionalProbe(epsilon=1e-2))
    shared = {"scored": 0}
    predict = scoring._chunks

    def counted(run: Any, model: Any, ids: Any) -> Any:
        shared["scored"] += len(ids)
        return predict(run, model, ids)

    scoring._chunks = counted
    statistics = Statistics()
    made = trainer(
        kind.model(), kind.rows(120), Path(settings["output_dir"]), [callback, statistics], max_steps=8,
        per_device_train_batch_size=settings["batch_rows"],
    )  # fmt: skip
    if settings.get("fsdp2_layer") and "RANK" in os.environ:
        shard_with_fsdp2(made, settings["fsdp2_layer"])
    made.train()
    sums = [parameter.double().abs().sum() for parameter in made.model.parameters()]
    weights = sum(float(part.full_tensor() if hasattr(part, "full_tensor") else part) for part in sums)
    found = {"weights": weights, "statistics": statistics.seen, **shared}
    Path(f"{settings['result']}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
