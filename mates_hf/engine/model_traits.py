"""What a model takes and how it is run: what probes, evaluation and checks ask of any causal language model.

Where it is used: whoever runs the live model asks here. Trade-off: a model that does not tell (no config, no
embedding) is given the benefit of the doubt: None, and whoever asked goes on without that check.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.data.batches import moved_to

_ANSWERS = ("start_positions", "end_positions")  # the labels of answers in a text


def unwrap(model: nn.Module) -> nn.Module:
    """The module to run: without `torch.compile`, `DistributedDataParallel` or DeepSpeed's engine around it.

    Forward passes of ours run eagerly, because every new shape would be compiled again, and outside of DDP, whose
    backward would average gradients over processes that may be looking at different rows. What accelerate wraps around
    `forward` itself (autocast) stays.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel) or _is_deepspeed(model):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _is_deepspeed(model: nn.Module) -> bool:
    """True of DeepSpeed's engine around a model, without importing it."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def context_length(model: Any) -> int | None:
    """Most positions the model takes, or None where its config does not say."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:  # XLNet says -1, having no limit
                return value
    return None


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's input embedding, or None where it has none."""
    size = getattr(_input_embedding(model), "num_embeddings", None)
    return int(size) if size is not None else None


def _input_embedding(model: Any) -> Any:
    """The module that reads a model's inputs; None where it does not tell, as models of images and sound may not."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def require_known_tokens(model: Any, values: npt.NDArray[Any]) -> None:
    """Raise a `ValueError` where a token id is not in the model's vocabulary.

    Args:
        model: one that does not tell its vocabulary knows all.
        values: (T,) integer token ids.
    """
    known = vocabulary_size(model)
    if known is None or not len(values):
        return
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= known:
        raise ValueError(
            f"Token ids must be below the model's {known}, 0 to {known - 1}, got {lowest} to {highest}. Use the "
            "tokenizer the model is trained with, or resize its embeddings."
        )


def logits_of(
    model: nn.Module, ids_BL: npt.NDArray[np.int64], here_BL: npt.NDArray[np.bool_], last: int | None = None
) -> Tensor:
    """Logits of rows that are padded on the right, by a plain forward pass.

    Args:
        model: a causal language model.
        ids_BL: token ids; any where there is padding.
        here_BL: True where there is a token of the row.
        last: positions at the end to have logits of; None is all. A model that can leaves out the others' logits.

    Returns:
        (B, L, V), or (B, last, V), as the model gives them.
    """
    device = input_device(model)
    inputs: dict[str, Any] = {"input_ids": moved_to(torch.from_numpy(ids_BL), device)}
    if not here_BL.all():
        inputs["attention_mask"] = moved_to(torch.from_numpy(here_BL.astype(np.int64)), device)
    if last is not None and accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = last
    logits = run_inputs(model, without_needless_mask(model, inputs))
    return logits if last is None else logits[:, -last:]


def without_needless_mask(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs padded on the right, without their mask where the model has no use for it: attention takes its fast path.

    Args:
        model: one that is causal in every attention module, or that takes no mask, has none.
        inputs: `input_ids` and perhaps `attention_mask`, and nothing that was not padded here.

    Returns:
        The same, or without the mask.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and (is_causal(model) or not accepts(model, "attention_mask") or bool(mask.all())):
        return {name: value for name, value in inputs.items() if name != "attention_mask"}
    return inputs


def run_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of a plain forward pass, without a cache; inputs that the model does not take are left out."""
    given = {name: value for name, value in inputs.items() if accepts(model, name)}
    if accepts(model, "use_cache"):
        given["use_cache"] = False
    output = model(**given)
    logits = output if isinstance(output, Tensor) else named_output(output, "logits")
    if not isinstance(logits, Tensor):
        raise KeyError("logits")
    return logits


def named_output(output: Any, name: str) -> Any:
    """What a forward pass returned under a name, or first in a tuple; None where it returned nothing of the kind.

    A model may set `output.loss` on an output that had none. In transformers 4 that makes an attribute and no item.
    """
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    value = output.get(name) if isinstance(output, Mapping) else None
    return getattr(output, name, None) if value is None else value


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the input embedding; an accelerator where sharded weights rest on a host."""
    embedding = _input_embedding(model)
    first = next(iter(embedding.parameters()), None) if isinstance(embedding, nn.Module) else None
    parameter = next(model.parameters()) if first is None or first.device.type == "meta" else first
    if parameter.device.type == "cpu" and _in_parts(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def hub_name(model: Any) -> str:
    """The repository a model was loaded from; its class where that was a folder, whose path is nobody's business."""
    inner = unwrap(model)
    name = getattr(getattr(inner, "config", None), "name_or_path", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or os.path.exists(name):
        return type(inner).__name__
    return name


def is_sharded(model: nn.Module) -> bool:
    """True where a process holds a part of each parameter (FSDP2, ZeRO), so that all must run the model together."""
    return any(_in_parts(parameter) for parameter in model.parameters())


def _in_parts(parameter: nn.Parameter) -> bool:
    # ZeRO 1 and 2 cut what the optimizer holds of each parameter, ZeRO 3 the parameter.
    return any(hasattr(parameter, name) for name in ("to_local", "_hp_mapping", "ds_tensor"))


def accepts(model: nn.Module, name: str) -> bool:
    """True where the model's forward takes an argument of that name."""
    kind: Any = type(model)
    return _accepts(kind, name)


def takes_labels(model: nn.Module) -> bool:
    """True where the model's forward takes what a loss is made of, under one of the names that transformers knows."""
    kind: Any = type(model)
    names = inspect.signature(kind.forward).parameters
    return accepts(model, "labels") or any("label" in name or name in _ANSWERS for name in names)


@functools.cache
def _accepts(kind: Any, name: str) -> bool:
    # The class's forward: accelerate hides the signature of the instance's own.
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def is_low_precision(model: nn.Module) -> bool:
    """True where a forward pass rounds to 16 bits: its parameters, an autocast around us or inside `forward`."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        return True
    return torch.is_autocast_enabled(next(model.parameters()).device.type) or hasattr(model, "_original_forward")


def is_causal(model: nn.Module) -> bool:
    """True where padding on the right cannot reach an earlier token, as every attention module says of itself.

    Then no mask is needed, and attention takes its fast causal path.
    """
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(flags) and all(isinstance(flag, bool) and flag for flag in flags)


def is_out_of_memory(error: RuntimeError) -> bool:
    """True where torch says that memory ran out, on any device."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
