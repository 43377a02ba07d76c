"""Running a transformer over rows of many lengths, down to one state a row.

Where it is used: under `folding` (texts through an encoder) and `hidden_states` (rows through the training model).
Trade-off: rows of like length go together, so that little is padded; which rows share a pass depends on the whole
call, so a prediction may differ in its last bits from one of the row alone (of bf16, where passes run in that).

Shape suffixes: N rows, B rows of one pass, L tokens of the longest of them, D width of a state.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.collated import forked_rng
from mates_hf.engine.model_traits import is_out_of_memory, unwrap
from mates_hf.engine.preserve import undisturbed
from mates_hf.records import IntArray


def length_buckets(lengths: IntArray, counts: IntArray, tokens_per_batch: int) -> list[IntArray]:
    """Divide rows into passes of like lengths, longest first, ties in row order.

    Args:
        lengths: (N,) int64 tokens that each row is padded from.
        counts: (N,) int64 sequences of that length that each row is made of.
        tokens_per_batch: padded tokens in one pass at most; a row beyond that goes alone.

    Returns:
        Row numbers of each pass; together every row once.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    batches, start, sequences = [], 0, 0
    for position, row in enumerate(order):
        sequences += int(counts[row])
        if position > start and sequences * int(lengths[order[start]]) > tokens_per_batch:
            batches.append(order[start:position])
            start, sequences = position, int(counts[row])
    return [*batches, order[start:]] if len(order) else []


def mean_states(states_BLD: Tensor, counted_BL: Tensor, owner_B: Tensor, num: int) -> Tensor:
    """Mean state over the counted tokens of each owner.

    Args:
        states_BLD: states, of any floating type.
        counted_BL: bool, the tokens that count.
        owner_B: int64, which of the `num` owners a sequence belongs to; each has a counted token.
        num: number of owners.

    Returns:
        (num, D) float32.
    """
    with torch.autocast(states_BLD.device.type, enabled=False):
        weight = counted_BL.float()
        sums = torch.einsum("bld,bl->bd", states_BLD.float(), weight)
        total = sums.new_zeros(num, sums.shape[1]).index_add(0, owner_B, sums)
        return total / sums.new_zeros(num).index_add(0, owner_B, weight.sum(1))[:, None]


def collect(
    batches: list[IntArray],
    pooled: Callable[[IntArray], Tensor],
    of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda states: states,
    *,
    width: int | None,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Run the passes without gradient and put what each row gives where it belongs; half a pass if memory runs out.

    Args:
        batches: Batches that `length_buckets` made.
        pooled: row numbers to their (B, D) pooled states.
        of: what to keep of (B, D) float32 states; all of them by default.
        width: D where states are kept, None where `of` gives one number a row.
        progress: show a progress bar.

    Returns:
        (N, D) float32, or (N,) float64.
    """
    num = sum(len(batch) for batch in batches)
    kept = np.empty(num) if width is None else np.empty((num, width), np.float32)
    with torch.no_grad(), tqdm(total=num, desc="states", unit="row", disable=not progress) as bar:
        pending = deque(batches)
        while pending:
            batch, out_of_memory = pending.popleft(), False
            try:
                kept[batch] = of(pooled(batch).float().cpu().numpy())
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                out_of_memory = True
            if out_of_memory:  # outside of the handler, whose traceback holds the tensors of the pass that failed
                torch.cuda.empty_cache()
                pending.extendleft([batch[len(batch) // 2 :], batch[: len(batch) // 2]])
            else:
                bar.update(len(batch))
    return kept


def fitting_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the device multiplies in it; elsewhere none, also inside of an autocast of the caller's."""
    # Not cached: within an autocast of the caller's, copies of weights would outlive the steps that change them.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bf16(device), cache_enabled=False)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32: a processor without instructions for it converts back and forth."""
    if device.type == "cpu":
        find: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older torch has none
        capabilities = find()
        return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@contextlib.contextmanager
def own_streams(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from streams seeded by `seed`; those of python, numpy, torch and the device are put back as found.

    The caller's autocast and `inference_mode` do not reach the body.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), forked_rng(seed):
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            if devices:
                generator = torch.Generator(device)
                torch.get_device_module(device).set_rng_state(generator.manual_seed(seed).get_state(), device)
            yield


@contextlib.contextmanager
def left_as_found(model: nn.Module, seed: int) -> Iterator[None]:
    """Run a live model in eval mode, on random streams of its own, and put every bit of it back.

    Args:
        model: The live model, wrapped or not; the body must not write to its parameters.
        seed: Random seed of the streams.

    Yields:
        Nothing.
    """
    # transformers collects hidden states through hooks that it leaves in the modules, and notes there that it did.
    found = [(module, dict(module._forward_hooks), set(vars(module))) for module in model.modules()]
    try:
        with undisturbed(unwrap(model)), own_streams(seed, next(model.parameters()).device):
            unwrap(model).eval()
            yield
    finally:
        for module, hooks, names in found:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)
            for name in vars(module).keys() - names:
                delattr(module, name)
