"""The weights of a model that DeepSpeed trains: ZeRO 1, 2 and 3, in float32 and in 16 bits, offloaded or not.

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
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mates_hf.engine.deepspeed_gradient import Sums, refuse_reentrant
from mates_hf.engine.deepspeed_places import Place, Stage3Place, Stage12Place
from mates_hf.engine.fragments import Exact, Fragment
from mates_hf.engine.processes import ProcessError
from mates_hf.errors import UnsupportedSettingError

MEETING_SECONDS = 60.0  # that processes which fail alike may be apart
_KEPT = "_mates_hf_weights"  # attribute of DeepSpeed's optimizer
_BY_CLASS = {"DeepSpeedZeroOptimizer": 2, "BF16_Optimizer": 1, "DeepSpeedZeroOptimizer_Stage3": 3}


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
    def written(self, exact: Exact | None = None, *, failing: bool = False) -> None:
        """Round the fragments into what forward passes read, in every process. All processes must call it.

        Args:
            exact: what `remember` gave, to be put back as it was.
            failing: an error is on its way, so the other processes are not waited for without end.

        Raises:
            ProcessError: they did not come.
        """
        self.forget_derived()
        self._release()
        for place in self._places.values():
            place.low().copy_(place.master())
        for low, bits in exact or ():
            low.copy_(bits)
        self._spread(failing)

    def backward(self, values: Tensor, weights: Tensor) -> None:
        """Add the mean over processes of the gradient to the fragments' `.grad`. All processes must call it.

        Args:
            values: losses, with a graph.
            weights: What each loss is multiplied with, of the same shape.

        Raises:
            UnsupportedSettingError: a part of the graph is recomputed by reentrant checkpointing.
        """
        refuse_reentrant(values)
        sources = [fragment.source for fragment in self._fragments.values()]
        fresh = [fragment for fragment in self._fragments.values() if fragment.grad is None]
        sums = Sums([id(source) for source in reversed(sources)], self._add)
        handles = [source.register_hook(functools.partial(sums.take, id(source))) for source in sources]
        try:
            torch.autograd.grad(values, sources, grad_outputs=weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        sums.finish()
        self._forget_unreached(fresh, sums.reached)
        if self._is_stage3:  # what the backward pass gathered and nothing of DeepSpeed's lets go
            self._release()
            self._spread()

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
        size = dist.get_world_size() if dist.is_initialized() else 1
        if gradient is None:
            whole = torch.zeros(fragment.whole.numel(), device=fragment.source.device)
        else:
            whole = gradient.reshape(-1).to(torch.float32, copy=True)
        if size > 1:
            dist.all_reduce(whole)
        part = fragment.part_of(whole).to(fragment.device).div(size).to(fragment.dtype)
        fragment.grad = part if fragment.grad is None else fragment.grad.add_(part)

    def _forget_unreached(self, fresh: list[Fragment], reached: set[int]) -> None:
        """Leave those without a gradient that no process reached, and that had none before; one small sum."""
        if not fresh:
            return
        counts = torch.tensor([float(id(each.source) in reached) for each in fresh], device=fresh[0].source.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        for fragment, count in zip(fresh, counts.tolist(), strict=True):
            if not count:
                fragment.grad = None

    def _place(self, name: str, parameter: nn.Parameter) -> Place:
        make = Stage3Place if self._is_stage3 else Stage12Place
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

    def _spread(self, failing: bool = False) -> None:
        """Give every process what the others wrote, as the end of DeepSpeed's step does."""
        if self._is_stage3:
            persistent = self._engine.persistent_parameters
            if persistent and not failing:  # else the next forward pass gathers them
                persistent[0].all_gather(persistent)
            return
        flat = getattr(self._engine, "parallel_partitioned_bit16_groups", None) or self._engine.bf16_partitioned_groups
        for number, parts in enumerate(flat):
            group = self._engine.real_dp_process_group[number]
            if len(parts) > 1:
                mine = parts[dist.get_rank(group)].clone()
                work = dist.all_gather(list(parts), mine, group=group, async_op=failing)
                if work is not None:
                    _wait_a_while(work)


def _wait_a_while(work: Any) -> None:
    """Wait for the other processes, which fail with the same error or never come."""
    deadline = time.monotonic() + MEETING_SECONDS
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise ProcessError(
                "The weights must be put back in all processes after an error, but another process did not come. The "
                "error above is this process's."
            )
        time.sleep(0.01)
    work.wait()
