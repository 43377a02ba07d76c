"""Both probes under FSDP2 and DDP, two gloo processes, against one process alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import run_script

SCRIPT = """
import os
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from mates_hf import DirectionalProbe, LossReductionProbe, OneStepProbe, ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")


def rows(count, seed):
    return TokenRows.from_lists(np.random.default_rng(seed).integers(3, 64, (count, 8)))


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=2))


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def measure(model, processes=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for seed in range(3):
        ids = torch.from_numpy(rows(4, seed).values.reshape(4, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [local(p) for p in model.parameters()]
    reference = ReferenceTask(name="test", rows=rows(8, 10))
    probes = (
        DirectionalProbe(processes=processes),
        DirectionalProbe(path_steps=2, processes=processes),
        OneStepProbe(max_grad_norm=1.0, processes=processes),
        LossReductionProbe(max_grad_norm=1.0, passes=8, processes=processes),
    )
    state = [{name: local(value) for name, value in entry.items()} for entry in optimizer.state.values()]
    labels = [probe.measure(model, optimizer, reference, rows(5, 11)) for probe in probes]
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, local(parameter))
    for old, entry in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(value, local(entry[name])) for name, value in old.items())
    return [part.influence for part in labels]


alone = measure(build())
for wrap in (shard, torch.nn.parallel.DistributedDataParallel):
    for processes in (None, Processes.of_run()):
        # Each process measures everything, then its share: five candidates, so one of two has none at the end.
        for expected, found in zip(alone, measure(wrap(build()), processes), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())

together = Processes.of_run()
assert together.differing([1, rank]) == [1] and together.differing("same") == []
try:
    together.require_same("selection", np.arange(3) + rank)
except MatesError as error:
    assert "processes [1] differ" in str(error)
else:
    raise AssertionError("different selections passed for the same")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_and_replicated_models_give_the_labels_of_one_process(tmp_path: Path) -> None:
    run_script(tmp_path, SCRIPT)
