"""Does a round fit into the device beside the training that has just been seen? Known at the end of the first step.

Where it is used: `session` asks once, after the first optimizer step of a `train()` call, when the device's peak is
that of training. Where the running mean of the weights finds no room, `averaging` keeps it in the host's memory. Where
the probe at a boundary would find none, the run ends here, and not thousands of steps later.

Trade-off: a run is refused only by what is certain: copies of parameters, which can be counted, and the logits of the
least that a probe can run at once. Activations are not known beforehand, and a probe halves its micro-batches.

All sizes are in bytes, of this process and its device.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from mates_hf.engine.averaging import trainable_parameters
from mates_hf.engine.model_traits import is_low_precision, is_sharded, vocabulary_size
from mates_hf.engine.pieces import MAX_PIECE, mean_dtype
from mates_hf.engine.preserve import local_shard, optimizer_parts
from mates_hf.influence.micro_batches import ProbeMemoryError, max_tokens
from mates_hf.influence.output_head import CHUNK_BYTES, has_plain_head
from mates_hf.influence.own_probes import OWN_PROBES
from mates_hf.influence.passes import DEFAULT_TOKENS_PER_BATCH
from mates_hf.influence.preconditioner import stepped_alone
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

_SPARE = 20  # the mean stays on the device only where one part in so many is left over, for an allocator's gaps


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What a device has and what training takes of it.

    Attributes:
        total: that this process can have: what is free, and what it has reserved.
        allocated: now, between two steps: parameters, optimizer state and what else stays.
        peak: the highest that was allocated so far.
    """

    total: int
    allocated: int
    peak: int


@dataclasses.dataclass(frozen=True)
class RoundMemory:
    """What a round adds.

    Attributes:
        mean: the running mean of the weights, during the averaging window.
        live: the model's own weights, kept while it has the averaged ones.
        probe: copies of parameters, and of the optimizer's state, that the probe holds.
        logits: Bytes of the logits of the smallest micro-batch that the probe can run, with their gradient; or what a
            whole row took, where that was measured because training sees parts of rows.
        num_tokens: in that micro-batch.
        longest_row: tokens of the reference task's longest passage, which no micro-batch can be smaller than.
    """

    mean: int
    live: int
    probe: int
    logits: int
    num_tokens: int
    longest_row: int = 0


def place_on_host(device: DeviceMemory, needed: RoundMemory, *, has_host: bool) -> bool:
    """Where the running mean of the weights goes.

    Args:
        device: at the end of the first step.
        needed: by a round.
        has_host: whether the mean can be kept in the host's memory.

    Returns:
        True for the host: the device has no room for the mean in the window, or not for the live weights at a
        boundary, or hardly.

    Raises:
        ProbeMemoryError: a round does not fit, wherever the mean is.
    """
    probing = device.allocated + needed.probe + needed.logits
    window = device.peak + needed.mean + min(needed.mean, 2 * MAX_PIECE)  # and the group of pieces that is worked on
    spare = device.total // _SPARE if has_host else 0
    if max(window if needed.mean else 0, probing + needed.live) + spare <= device.total:
        return False
    if has_host:
        if probing <= device.total:
            return bool(needed.mean)
        window, needed = 0, dataclasses.replace(needed, mean=0, live=0)
    raise ProbeMemoryError(_refusal(device, needed, window))


def _refusal(device: DeviceMemory, needed: RoundMemory, window: int) -> str:
    """What does not fit, in numbers, and the ways out. It must not read as torch's own error (`own_memory`)."""
    boundary = device.allocated + needed.live + needed.probe + needed.logits
    parts = [
        f"Training and the rounds of this run must fit into the device's {_gib(device.total)}. The first step took "
        f"{_gib(device.peak)} at its peak and leaves {_gib(device.allocated)} allocated"
    ]
    ways = []
    if needed.mean and window > device.total:
        parts.append(f"in the averaging window training takes {_gib(window)}, with the mean of the weights")
        ways.append("lower the batch size of the run")
    if boundary > device.total:
        parts.append(
            f"at a boundary a round takes {_gib(boundary)}: {_gib(needed.live + needed.probe)} more for copies of "
            f"what trains, and {_gib(needed.logits)} to run {needed.num_tokens:,} tokens"
        )
        ways.append("train fewer parameters (LoRA), shard them (FSDP2), or take an optimizer with less state")
        if needed.num_tokens > needed.longest_row:
            ways.append("lower `probe_tokens_per_batch`")
        ways.append("shorten the passages of the reference task")
    if needed.mean:
        ways.append(
            f"set `average_steps=0`, which saves {_gib(needed.mean)} in the window and {_gib(needed.live)} at a "
            "boundary"
        )
    return ". ".join(part[0].upper() + part[1:] for part in parts) + ". Ways out: " + "; ".join(ways) + "."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def round_memory(run: Run) -> RoundMemory:
    """What a round of this run takes on the device at least, beside the training."""
    shards = [(p, local_shard(p)) for p in trainable_parameters(run.model).values()]
    size = sum(shard.nbytes for _, shard in shards)
    averages = run.config.window_steps > 0
    # Of whole parameters each process averages its share.
    mean = sum(
        shard.numel() * mean_dtype(shard).itemsize // (1 if hasattr(p, "to_local") else run.processes.size)
        for p, shard in shards
    )
    num_tokens, longest_row, logits = _logits(run)
    return RoundMemory(
        mean=mean if averages else 0,
        live=size if averages else 0,
        probe=_probe_memory(run.probe, run.optimizer, size),
        logits=max(logits, run.row_memory),
        num_tokens=num_tokens,
        longest_row=longest_row,
    )


def copied_by_probe(model: nn.Module) -> int:
    """Bytes of a copy of what trains and of its gradient, in this process."""
    return 2 * sum(local_shard(parameter).nbytes for parameter in trainable_parameters(model).values())


def _probe_memory(probe: Any, optimizer: Any, size: int) -> int:
    """What a probe of ours holds: a copy to go back to and a gradient, of `size` each; of others nothing is known."""
    if isinstance(probe, DirectionalProbe):
        return (3 if probe.second_moment == "batches" else 2) * size
    if isinstance(probe, LossReductionProbe):
        return 2 * size  # its copy of the optimizer's state is on the host
    if isinstance(probe, OneStepProbe):
        parts = optimizer_parts(optimizer)
        copied = not all(stepped_alone(part) for part in parts)
        return 2 * size + (_state_memory([part.state for part in parts]) if copied else 0)
    return 0


def _state_memory(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        local = local_shard(value)
        return 0 if local.device.type == "cpu" else local.nbytes
    if isinstance(value, dict):
        return sum(_state_memory(entry) for entry in value.values())
    return sum(_state_memory(entry) for entry in value) if isinstance(value, (list, tuple)) else 0


def _logits(run: Run) -> tuple[int, int, int]:
    """Tokens of the least that a probe runs backward at once, those of a row, bytes of logits and their gradient."""
    width, lengths = vocabulary_size(run.model), run.reference.measured.lengths
    if not isinstance(run.probe, OWN_PROBES) or width is None or not len(lengths):
        return 0, 0, 0
    num_tokens = longest_row = int(lengths.max())
    if is_sharded(run.model) and run.processes.size > 1 and run.probe.reference_loss is None:
        # Micro-batches cannot be halved there.
        limit = run.probe.tokens_per_batch or run.settings.tokens_per_batch or DEFAULT_TOKENS_PER_BATCH
        num_tokens = max(num_tokens, min(limit, int(lengths.sum()) // run.processes.size))
    logits = 2 * num_tokens * width * (2 if is_low_precision(run.model) else 4)
    if num_tokens > max_tokens(run.model) and has_plain_head(run.model):
        logits = min(logits, 2 * CHUNK_BYTES)
    return num_tokens, longest_row, logits


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What a device has and what this process takes of it; None where its module does not tell."""
    module: Any = torch.get_device_module(device) if hasattr(torch, "get_device_module") else torch.cuda
    names = ("mem_get_info", "memory_reserved", "memory_allocated", "max_memory_allocated")
    if device.type == "cpu" or not all(hasattr(module, name) for name in names):
        return None
    free, whole = module.mem_get_info(device)
    total = free + module.memory_reserved(device)
    if hasattr(module, "get_per_process_memory_fraction"):
        total = min(total, int(whole * module.get_per_process_memory_fraction(device)))
    return DeviceMemory(int(total), int(module.memory_allocated(device)), int(module.max_memory_allocated(device)))


def forget_peak(device: torch.device) -> None:
    """Let the highest that a device had allocated begin anew, where its module can."""
    module: Any = torch.get_device_module(device) if hasattr(torch, "get_device_module") else torch.cuda
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def starts_on_host(model: nn.Module) -> bool:
    """Whether a mean read from a checkpoint goes to the host first, as long as training's peak is not known."""
    device = only_device(model)
    return device is not None and device.type == "cuda"


def place_average(run: Run) -> bool:
    """Check that rounds fit beside the training; all processes must call it, at the end of the first step.

    Args:
        run: the run's state.

    Returns:
        Whether this process keeps the mean of the weights in the host's memory. Its values do not depend on it.

    Raises:
        ProbeMemoryError: a round does not fit in this process, or in another one.
    """
    device = only_device(run.model)
    if device is None or device.type == "cpu":
        return False
    memory, refusal, on_host = device_memory(device), None, False
    if memory is not None:
        try:
            on_host = place_on_host(memory, round_memory(run), has_host=device.type == "cuda")
        except ProbeMemoryError as error:
            refusal = error
    short = run.processes.sum((np.arange(run.processes.size) == run.processes.rank) * int(refusal is not None))
    if refusal is not None:
        raise refusal
    if short.any():
        raise ProbeMemoryError(
            f"A round must fit into the device of every process, but does not in processes "
            f"{np.flatnonzero(short).tolist()}: their errors have the numbers."
        )
    if on_host:
        logger.info("The running mean of the weights goes to the host's memory: the device has no room for it.")
    return on_host


def only_device(model: nn.Module) -> torch.device | None:
    """The device of all that trains, or None where there are several."""
    devices = {local_shard(parameter).device for parameter in trainable_parameters(model).values()}
    return devices.pop() if len(devices) == 1 else None
