"""The optimizer inside DeepSpeed's, as one that holds the fragments of the weights.

Where it is used: `preconditioner` reads groups, rates and state of any optimizer; of DeepSpeed's it is given this one.
Trade-off: it can be read and not stepped, because DeepSpeed's engine takes every step itself.
"""

from __future__ import annotations

from typing import Any

import torch

from mates_hf.engine.deepspeed_shards import DeepSpeedWeights
from mates_hf.errors import UnsupportedSettingError

# DeepSpeed's own optimizers that step as torch's Adam and AdamW do.
_AS_ADAM = ("DeepSpeedCPUAdam", "FusedAdam")


class ShardedOptimizer(torch.optim.Optimizer):
    """What DeepSpeed's optimizer wraps, as if it held the fragments: its groups, rates and state, to be read only.

    `optimizers` has one optimizer of the class that steps, by which its closed form is found.

    Args:
        weights: the fragments.
        engine: DeepSpeed's optimizer.
    """

    def __init__(self, weights: DeepSpeedWeights, engine: Any) -> None:
        # Without torch's own: this one holds nothing and never steps.
        self._weights, self.engine = weights, engine
        self._kind = _kind_of(engine.optimizer)
        fragments = weights.parameters()
        self._groups = [{"params": [fragments[name] for name in names]} for names in weights.groups()]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups with the settings of now."""
        self._weights.parameters()
        for own, group in zip(self._groups, self.engine.optimizer.param_groups, strict=True):
            own.update({"amsgrad": False} | {key: value for key, value in group.items() if key != "params"})
        return self._groups

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The one that steps, with its state of now."""
        view: torch.optim.Optimizer = self._kind.__new__(self._kind)
        view.param_groups = self.param_groups
        view.state = {}  # type: ignore[assignment]
        for names, group in zip(self._weights.groups(), view.param_groups, strict=True):
            for name, fragment in zip(names, group["params"], strict=True):
                state = self._weights.state(name)
                if state:
                    view.state[fragment] = state
        return [view]

    def step(self, closure: Any = None) -> Any:
        """Refuse.

        Args:
            closure: not used.

        Returns:
            Nothing.

        Raises:
            UnsupportedSettingError: always.
        """
        raise UnsupportedSettingError(
            "No real steps can be taken with DeepSpeed's optimizer beside its engine's. Use `DirectionalProbe`."
        )


def _kind_of(inner: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """The class by which an optimizer's closed form is known."""
    kind = type(inner)
    if kind.__name__ not in _AS_ADAM or not kind.__module__.startswith("deepspeed.ops.adam."):
        return kind
    if not all(group.get("bias_correction", True) for group in inner.param_groups):
        raise UnsupportedSettingError(
            f"{kind.__name__} must correct the bias of its moments, got `bias_correction` false. Leave it out of the "
            "DeepSpeed config."
        )
    return torch.optim.AdamW if getattr(inner, "adam_w_mode", True) else torch.optim.Adam
