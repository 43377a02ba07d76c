"""Several optimizers as one, for a Trainer that takes one: Muon for the matrices, AdamW for the rest.

It steps its parts one after the other and does nothing else, so that a probe, which looks at each part by itself, sees
all that a step does. Parameter groups and state are those of the parts, never copies: a schedule, a checkpoint, a
gradient scaler or FSDP2 that changes them changes the parts. Trade-off: a part that is added to or taken away later is
not supported; combine the optimizers again.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mates_hf.display import card, html_card

_GROUPS, _STATE, _OTHER = "param_groups", "state", "other"


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers that step one after the other, each with its own parameters.

    `Trainer(..., optimizers=(CombinedOptimizer(muon, adamw), None))` trains with both. Learning-rate schedules,
    checkpoints and `Accelerator.prepare` work as with one optimizer, and both probes measure each part as they would
    alone. A checkpoint has the layout of torch's own: parameters are numbered through all parts, in their order.

    Args:
        *optimizers: The parts, in the order in which they step. A combined optimizer among them is taken apart.

    Attributes:
        optimizers: The parts.

    Raises:
        TypeError: A part is no `torch.optim.Optimizer`.
        ValueError: There is no part, two parts share a parameter, a part's step needs a closure (LBFGS), or a part is
            already wrapped by accelerate.
    """

    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        parts = [part for given in optimizers for part in _parts_of(given)]
        groups = [group for part in parts for group in part.param_groups]
        ids = [id(parameter) for group in groups for parameter in group["params"]]
        if not parts:
            raise ValueError("`optimizers` must be at least one optimizer, got none. Pass them one by one.")
        if len(set(ids)) != len(ids):
            raise ValueError(
                f"`optimizers` must not share a parameter, got {len(ids) - len(set(ids))} parameters in more than one "
                "of them. Give each parameter to one optimizer."
            )
        super().__init__(groups, {})
        self.optimizers = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, one part after the other; the parts' own dicts."""
        return [group for part in self.optimizers for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for part, own in zip(self.optimizers, self._by_part(groups), strict=True):
            part.param_groups = own

    @property  # type: ignore[override,unused-ignore]
    def state(self) -> dict[Any, Any]:
        """The state of every parameter; the parts' own dicts. A parameter without state is not in it."""
        return {key: value for part in self.optimizers for key, value in part.state.items()}

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        for part in self.optimizers:
            own = [parameter for group in part.param_groups for parameter in group["params"] if parameter in state]
            part.state = defaultdict(dict, {parameter: state[parameter] for parameter in own})

    def __repr__(self) -> str:
        return card(*self._facts())

    def _repr_html_(self) -> str:
        return html_card(*self._facts())

    def _facts(self) -> tuple[str, dict[str, str]]:
        """Title and a line for each part."""
        facts = {}
        for number, part in enumerate(self.optimizers, 1):
            sizes = [parameter.numel() for group in part.param_groups for parameter in group["params"]]
            rates = ", ".join(
                f"{float(group['lr']):.3g}" for group in part.param_groups if group.get("lr") is not None
            )
            rates = rates or "of its own"
            facts[f"{number} {type(part).__name__}"] = f"{len(sizes)} tensors, {sum(sizes):,} numbers, rate {rates}"
        return f"CombinedOptimizer: {len(self.optimizers)} optimizers, one after the other", facts

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported after construction, because nothing says which part is meant.

        Args:
            param_group: A group.

        Raises:
            ValueError: Always, once the parts are there.
        """
        if self.optimizers:
            raise ValueError(
                "`param_group` must be added to one of the parts, got it for all of them. Call `add_param_group` of "
                "one of `optimizers`."
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Each part's `zero_grad`.

        Args:
            set_to_none: Drop gradients, or fill them with zeros.
        """
        for part in self.optimizers:
            part.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Each part's step, on the gradients that are there.

        Args:
            closure: Computes the loss and its gradients; it is called once, before the first part steps.

        Returns:
            What the closure returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def train(self) -> None:
        """Tell the parts that know two modes (schedule-free ones) that training goes on."""
        self._tell("train")

    def eval(self) -> None:
        """Tell the parts that know two modes (schedule-free ones) that the model is evaluated."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        for part in self.optimizers:
            if callable(change := getattr(part, mode, None)):
                change()

    def state_dict(self) -> dict[str, Any]:
        """All parts in torch's own layout: `state` by the number of a parameter, and `param_groups`.

        Returns:
            What `load_state_dict` takes. State that belongs to no parameter has (number of the part, its name) as its
            key; what a part saves besides is in `other`.
        """
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        other: dict[int, Any] = {}
        for number, part in enumerate(self.optimizers):
            saved = part.state_dict()
            first = sum(len(group["params"]) for group in groups)
            ids = [key for group in saved[_GROUPS] for key in group["params"]]
            renumbered = {key: first + i for i, key in enumerate(ids)}
            state.update((renumbered.get(key, (number, key)), value) for key, value in saved[_STATE].items())
            groups += [{**group, "params": [renumbered[key] for key in group["params"]]} for group in saved[_GROUPS]]
            if rest := {key: value for key, value in saved.items() if key not in (_STATE, _GROUPS)}:
                other[number] = rest
        return {_STATE: state, _GROUPS: groups, **({_OTHER: other} if other else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned into the parts.

        Args:
            state_dict: Of a combined optimizer with the same parts, or of the class that docs/optimizers.md once had.

        Raises:
            ValueError: It has another number of groups, or a group has another number of parameters.
        """
        saved = list(state_dict[_GROUPS])
        if saved and all(_GROUPS in one for one in saved):  # one whole state dict for each part
            parts = saved
            if len(parts) != len(self.optimizers):
                raise ValueError(f"`state_dict` must be of {len(self.optimizers)} optimizers, got {len(parts)}.")
        else:
            parts = []
            for number, groups in enumerate(self._by_part(saved)):
                own = {key for group in groups for key in group["params"]}
                state = {key: value for key, value in state_dict[_STATE].items() if key in own}
                state.update(
                    (key[1], value)
                    for key, value in state_dict[_STATE].items()
                    if isinstance(key, tuple) and key[0] == number
                )
                parts.append({_STATE: state, _GROUPS: groups, **state_dict.get(_OTHER, {}).get(number, {})})
        for part, whole in zip(self.optimizers, parts, strict=True):
            part.load_state_dict(whole)

    def _by_part(self, groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Groups of all parts, cut into those of each."""
        counts = [len(part.param_groups) for part in self.optimizers]
        if self.optimizers and len(groups) != sum(counts):
            raise ValueError(
                f"`param_groups` must be {sum(counts)} groups, those of the optimizers one after the other, got "
                f"{len(groups)}. Combine the same optimizers in the same order."
            )
        rest = iter(groups)
        return [[next(rest) for _ in range(count)] for count in counts]


def _parts_of(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """An optimizer that can be a part, or the parts of a combined one."""
    if isinstance(optimizer, CombinedOptimizer):
        return optimizer.optimizers
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizers` must each be a torch.optim.Optimizer, got {type(optimizer).__name__}. Pass them one by "
            "one: `CombinedOptimizer(first, second)`."
        )
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("accelerate."):
        raise ValueError(
            f"`optimizers` must not be wrapped yet, got {name}. Combine them first, then call `Accelerator.prepare`."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"`optimizers` must step without a closure, got {name}, whose step evaluates the loss several times. Use "
            "another optimizer."
        )
    return (optimizer,)
