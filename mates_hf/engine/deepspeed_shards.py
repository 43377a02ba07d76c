"""The weights of a model that DeepSpeed trains: ZeRO 1, 2 and 3, in float32, bfloat16 and float16, offloaded or not.

Where it is used: `weight_store` opens it where an optimizer is DeepSpeed's, and nothing else imports it. DeepSpeed's
optimizer updates float32 copies of the weights, of which each process has a flat part. One `Fragment` a parameter is a
view of that part. A probe writes to the fragments; `written` rounds them into what forward passes read and gathers it,
as the end of DeepSpeed's own step does. Putting the fragments back and writing once more leaves every bit as it was.

Gradients are taken by hooks on the parameters, which keep this process's part and pass zeros on. They are never
accumulated in `.grad`, so no hook, bucket or counter of DeepSpeed sees them.

Trade-off: a gradient is added up over processes whole and cut afterwards, parameter by parameter, which every kind of
process group can do; scattering it would take half of the traffic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mates_hf.engine.fragments import Fragment, whole_shape
from mates_hf.engine.weight_store import Exact
from mates_hf.errors import UnsupportedSettingError

_KEPT = "_mates_hf_weights"  # attribute of DeepSpeed's optimizer
_BY_CLASS = {"DeepSpeedZeroOptimizer": 2, "BF16_Optimizer": 1, "DeepSpeedZeroOptimizer_Stage3": 3}
# DeepSpeed's own optimizers that step as torch's do, and the attribute that says that weight decay is decoupled.
_AS_ADAM = ("DeepSpeedCPUAdam", "FusedAdam")


def weights_of(engine: Any, model: nn.Module) -> DeepSpeedWeights:
    """The weights that DeepSpeed's optimizer holds, the same object while they are of the same model."""
    found: DeepSpeedWeights | None = vars(engine).get(_KEPT)
    if found is None or found.model is not model:
        found = DeepSpeedWeights(model, engine)
        setattr(engine, _KEPT, found)
    return found


def require_known_engine(engine: Any) -> None:
    """Refuse an optimizer of DeepSpeed whose buffers are not known, by exact class.

    Args:
        engine: DeepSpeed's optimizer.

    Raises:
        UnsupportedSettingError: names it and the way out.
    """
    kind = type(engine)
    if kind.__name__ in _BY_CLASS:
        return
    if "FP16" in kind.__name__:
        way = "in 16 bits without sharding the optimizer: set `zero_optimization.stage` to 1, 2 or 3"
    else:
        way = "set `zero_optimization.stage` to 1, 2 or 3, without ZenFlow and SuperOffload"
    raise UnsupportedSettingError(
        f"DeepSpeed must train with its ZeRO optimizer, or in float32 at stage 0, got {kind.__module__}."
        f"{kind.__qualname__}, whose buffers are not known: {way}."
    )


class DeepSpeedWeights:
    """The float32 weights that DeepSpeed's optimizer updates, one fragment a parameter.

    Args:
        model: the live model, unwrapped.
        engine: DeepSpeed's optimizer.
    """

    def __init__(self, model: nn.Module, engine: Any) -> None:
        require_known_engine(engine)
        self.model, self._engine = model, engine
        self._is_stage3 = _BY_CLASS[type(engine).__name__] == 3
        self._places = {name: self._place(name, p) for name, p in model.named_parameters() if p.requires_grad}
        self._fragments = {
            name: Fragment.of(place.source, place.whole, place.start, place.master())
            for name, place in self._places.items()
        }
        self._by_source = {id(fragment.source): fragment for fragment in self._fragments.values()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The fragments, where the engine has them now: a checkpoint that is loaded may bring new buffers."""
        for name, place in self._places.items():
            fragment, master = self._fragments[name], place.master()
            if fragment.data_ptr() != master.data_ptr() or fragment.device != master.device:
                fragment.data = master
        return dict(self._fragments)

    def forget_derived(self) -> None:
        """Drop what an enclosing autocast keeps."""
        torch.clear_autocast_cache()

    @torch.no_grad()
    def remember(self) -> Exact:
        """Entries that forward passes read and that are not the float32 ones rounded; there are none usually."""
        found = []
        for place in self._places.values():
            low, master = place.low(), place.master()
            if not torch.equal(low, master.to(low.device, low.dtype)):
                found.append((low, low.clone()))
        return found

    @torch.no_grad()
    def written(self, exact: Exact | None = None) -> None:
        """Round the fragments into what forward passes read, in every process. All processes must call it.

        Args:
            exact: what `remember` gave, to be put back as it was.
        """
        self.forget_derived()
        self._release()
        for place in self._places.values():
            place.low().copy_(place.master())
        for low, bits in exact or ():
            low.copy_(bits)
        self._spread()

    def backward(self, values: Tensor, weights: Tensor) -> None:
        """Add the mean over processes of the gradient to the fragments' `.grad`. All processes must call it.

        Args:
            values: losses, with a graph.
            weights: of the same shape.

        Raises:
            UnsupportedSettingError: a part of the graph is recomputed by reentrant checkpointing.
        """
        _refuse_reentrant(values)
        sources = [fragment.source for fragment in self._fragments.values()]
        sums = _Sums([id(source) for source in reversed(sources)], self._add)
        handles = [source.register_hook(functools.partial(sums.take, id(source))) for source in sources]
        try:
            torch.autograd.grad(values, sources, grad_outputs=weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        sums.finish()
        if self._is_stage3:  # what the backward pass gathered and nothing of DeepSpeed's lets go
            self._release()
            self._spread()

    def sharded_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer as if it held the fragments."""
        return ShardedOptimizer(self, self._engine)

    def groups(self) -> list[list[str]]:
        """Names of the parameters in each group of the optimizer."""
        found: list[list[str]] = [[] for _ in self._engine.optimizer.param_groups]
        for name, place in self._places.items():
            found[place.group].append(name)
        return found

    def state(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps of a parameter's fragment, sharing its storage; nothing before the first step."""
        return self._places[name].state()

    @torch.no_grad()
    def _add(self, key: int, gradient: Tensor | None) -> None:
        """Add up one parameter's gradient over processes, and keep this process's part."""
        fragment = self._by_source[key]
        if gradient is None:
            device = fragment.source.device
            whole = torch.zeros(fragment.whole.numel() + 1, device=device)
        else:
            whole = torch.cat([gradient.reshape(-1).float(), gradient.new_ones(1, dtype=torch.float32)])
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size > 1:
            dist.all_reduce(whole)
        if not float(whole[-1]):
            return  # no process reached it
        part = whole.narrow(0, fragment.start, fragment.numel()).to(fragment.device).div(size)
        fragment.grad = part if fragment.grad is None else fragment.grad.add_(part)

    def _place(self, name: str, parameter: nn.Parameter) -> _Place:
        make = _Stage3Place if self._is_stage3 else _Stage12Place
        try:
            return make(parameter, self._engine)
        except (AttributeError, KeyError) as error:
            raise UnsupportedSettingError(
                f"Every parameter that trains must be in DeepSpeed's optimizer, but `{name}` is not ({error}). Set "
                "`requires_grad` before the Trainer makes the optimizer, or freeze the parameter."
            ) from error

    def _release(self) -> None:
        """Let go of gathered parameters, persistent ones too: they have the old values."""
        if self._is_stage3:
            self._engine.empty_partition_cache()

    def _spread(self) -> None:
        """Give every process what the others wrote, as the end of DeepSpeed's step does."""
        if self._is_stage3:
            persistent = self._engine.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
            return
        flat = getattr(self._engine, "parallel_partitioned_bit16_groups", None) or self._engine.bf16_partitioned_groups
        for number, parts in enumerate(flat):
            group = self._engine.real_dp_process_group[number]
            if len(parts) > 1:
                dist.all_gather(list(parts), parts[dist.get_rank(group)].clone(), group=group)


class _Place:
    """Where the engine keeps what belongs to a parameter.

    Attributes:
        source: the parameter.
        whole: its shape.
        start: place of this process's first entry in the flattened parameter.
        num: how many entries it has.
        group: number of its group in the optimizer.
    """

    source: nn.Parameter
    whole: torch.Size
    start: int
    num: int
    group: int

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        self.source, self._engine, self.whole = source, engine, whole_shape(source)

    def master(self) -> Tensor:
        """The entries that the optimizer updates."""
        flat, offset = self._flat()
        return flat.detach().narrow(0, offset, self.num)

    def low(self) -> Tensor:
        """The entries that forward passes are gathered from."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        flat, offset = self._flat()
        held = self._engine.optimizer.state.get(flat, {})
        return {
            key: value.narrow(0, offset, self.num)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else value
            for key, value in held.items()
        }

    def _flat(self) -> tuple[Tensor, int]:
        """The flat buffer that the optimizer steps with, and where this parameter's entries begin in it."""
        raise NotImplementedError


class _Stage12Place(_Place):
    """ZeRO 1 and 2: the model's parameters are views of a flat buffer, of which each process updates a part."""

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        super().__init__(source, engine)
        mapping: Any = source._hp_mapping  # type: ignore[attr-defined]
        self.start = self.num = self._offset = 0
        if mapping is not None:
            self.start, self.num = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            self._offset = mapping.hp_fragment_address.start
        self.group = _group_of(source, getattr(engine, "bit16_groups", None) or engine.bf16_groups)

    def low(self) -> Tensor:
        return self.source.data.view(-1).narrow(0, self.start, self.num)

    def _flat(self) -> tuple[Tensor, int]:
        flats = getattr(self._engine, "single_partition_of_fp32_groups", None)
        return (flats or self._engine.fp32_groups_flat_partition)[self.group], self._offset


class _Stage3Place(_Place):
    """ZeRO 3: each process has an equal part of every parameter, the last of them padded."""

    def __init__(self, source: nn.Parameter, engine: Any) -> None:
        super().__init__(source, engine)
        of: Any = source
        size = of.ds_tensor.ds_numel
        rank = dist.get_rank(engine.dp_process_group) if dist.is_initialized() else 0
        self.start = min(size * rank, of.ds_numel)
        self.num = max(0, min(size, of.ds_numel - self.start))
        self._sub, self._offset, _ = engine.grad_position[engine.get_param_id(source)]
        self.group = engine.sub_group_to_group_id[self._sub]

    def low(self) -> Tensor:
        of: Any = self.source
        part: Tensor = of.ds_tensor.data.view(-1).narrow(0, 0, self.num)
        return part

    def _flat(self) -> tuple[Tensor, int]:
        return self._engine.fp32_partitioned_groups_flat[self._sub], self._offset


def _group_of(parameter: nn.Parameter, groups: list[list[nn.Parameter]]) -> int:
    """Number of the group that a parameter is in."""
    for number, group in enumerate(groups):
        if any(each is parameter for each in group):
            return number
    raise KeyError("it is in none of its groups")


class _Sums:
    """Adds up gradients over processes in one order, whichever the backward pass of a process finds them in.

    A gradient waits for those before it. Parameters that this process's rows do not reach (experts) count as zero.

    Args:
        order: keys of all parameters, in the order they are added up in.
        add: adds up the gradient of a key over processes; None where this process has none.
    """

    def __init__(self, order: list[int], add: Callable[[int, Tensor | None], None]) -> None:
        self._order, self._add, self._next = order, add, 0
        self._waiting: dict[int, Tensor] = {}

    def take(self, key: int, gradient: Tensor) -> Tensor:
        """Take a gradient from the backward pass, and give it zeros that take no memory."""
        self._waiting[key] = gradient.detach()
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            first = self._order[self._next]
            self._next += 1
            self._add(first, self._waiting.pop(first))
        return gradient.new_zeros(()).expand_as(gradient)

    def finish(self) -> None:
        """Add up what is left, after the backward pass."""
        for key in self._order[self._next :]:
            self._add(key, self._waiting.pop(key, None))


def _refuse_reentrant(values: Tensor) -> None:
    """Parameters inside of reentrant checkpointing get no gradient here, and torch does not say so."""
    pending, seen = [values.grad_fn], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("CheckpointFunction"):
            raise UnsupportedSettingError(
                "Under DeepSpeed activations must be recomputed without reentrant checkpointing, whose gradients a "
                "probe cannot take. Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        pending += [following for following, _ in node.next_functions]


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
