"""A whole round launches no kernel for each parameter tensor, and waits for none of its micro-batches.

What a boundary of a real run does is counted: mean of the weights, digest, probe along a path, audit, reference loss,
fit, score, selection. It is counted in a run, and in others that have more layers, more probed candidates or more
points. The difference must be less than one more operation, or one more stop of the host, for each of those would
make. Passes of the model and steps of the optimizer are not this library's, and are counted apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, default_data_collator

from benchmarks.lab.models import llama, trainer_of
from benchmarks.lab.operations import CountOperations, counted
from mates_hf import DirectionalProbe, MatesCallback, MatesRounds, load_round
from mates_hf.engine import pieces
from mates_hf.engine.averaging import WeightAverage
from mates_hf.influence import passes, real_step
from mates_hf.influence.optimizer import together
from mates_hf.training.session import Session
from tests.training.kit import LENGTH, VOCAB, make_pool, make_reference, small_config

BOUNDARY, BATCH = 6, 4
IN_A_MICRO_BATCH = 7  # rows of logits that train, their losses, and torch's own question for a type
IN_A_POINT = 70  # a norm, a null step, a move: of each kind of parameter, which shares a list
MOST_CALLS, MOST_STOPS = 1_600, 60  # of all of a boundary
TOKENS = 4 * LENGTH  # of a micro-batch
Mutate = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a boundary came to, of which passes of the model and steps of the optimizer are no part.

    Attributes:
        calls: Operations; a list of tensors is one.
        stops: Times that the host waited; where the model's own passes do, that is counted apart.
        micro_batches: Passes of the model.
        tensors: Its parameters.
    """

    calls: int
    stops: int
    micro_batches: int
    tensors: int

    def __sub__(self, other: Counted) -> Counted:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counted(*(a - b for a, b in pairs))


class Apart:
    """Operations of the model's passes and of the optimizer's steps, with torch's clipping, while it is entered."""

    def __init__(self) -> None:
        self.passes, self.steps = CountOperations(), CountOperations()
        self._running = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Apart:
        for owner, name, count in (
            (LlamaForCausalLM, "forward", self.passes),
            (Tensor, "backward", self.passes),
            (torch.optim.AdamW, "step", self.steps),
            (torch.nn.utils, "clip_grad_norm_", self.steps),
        ):
            self._stack.enter_context(patch.object(owner, name, self._wrap(getattr(owner, name), count)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _wrap(self, original: Callable[..., Any], count: CountOperations) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return original(*args, **kwargs)
            self._running = True
            try:
                with count:
                    return original(*args, **kwargs)
            finally:
                self._running = False

        return run


def counted_look(found: list[Counted]) -> Callable[[Session, int], None]:
    """`Session._look`, which is all of a boundary, and what it did."""
    look = Session._look

    def run(session: Session, step: int) -> None:
        with Apart() as apart, counted() as mode, micro_batches_counted() as num:
            look(session, step)
        assert session.order is not None or session._pending is not None
        calls = mode.calls - apart.passes.calls - apart.steps.calls
        # A stop inside a pass of the model is ours, unless the model makes it where nobody probes.
        model = session.run.model
        ids = torch.zeros((1, LENGTH), dtype=torch.int64)
        with torch.no_grad(), counted() as plain:
            model(input_ids=ids, use_cache=False)
        stops = mode.syncs.total() - apart.steps.syncs.total() - num[0] * plain.syncs.total()
        found.append(Counted(calls, stops, num[0], len(list(model.parameters()))))

    return run


@contextlib.contextmanager
def lists_of_a_device() -> Iterator[pytest.MonkeyPatch]:
    """A processor works on what its cache holds; a device on so much that each kind of parameter is one list."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(together, "_LEAST_ENTRIES_CPU", together.MOST_ENTRIES_CPU)
        patches.setattr(real_step, "_MIN_PIECE", real_step._MAX_PIECE)
        patches.setattr(pieces, "_PARTS", 1)
        yield patches


def settings(num_probes: int = 40, points: int = 2) -> tuple[Any, DirectionalProbe]:
    config = small_config(
        num_probes=num_probes, switch_lead_steps=1, average_steps=2, probe_tokens_per_batch=TOKENS,
        update_steps=BOUNDARY,
    )  # fmt: skip
    return config, DirectionalProbe(path_steps=points)


def model_of(layers: int) -> Any:
    return llama(VOCAB, width=32, inner=64, layers=layers, heads=2, length=32, tied=False)


def in_a_trainer(folder: Path, layers: int = 2, mutate: Mutate = lambda patches: None, **changes: int) -> Counted:
    """The boundary of a Trainer's run, whose round is decided in it."""
    config, probe = settings(**changes)
    found: list[Counted] = []
    with lists_of_a_device() as patches:
        patches.setattr(Session, "_look", counted_look(found))
        mutate(patches)
        trainer = trainer_of(model_of(layers), make_pool(), folder, BOUNDARY + 3, BATCH)
        MatesCallback(make_reference(), config, probe=probe).attach(trainer)
        trainer.train()
    record = load_round(folder / "_mates" / "round-0001")
    assert record.info["fidelity"]["num_candidates"] == 16
    assert record.info["num_candidates"] > record.info["num_rows"]
    return found[0]


def in_a_loop(folder: Path, layers: int = 2) -> Counted:
    """The boundary of the same run in a loop without the Trainer, where the rest of the round goes on beside it."""
    config, probe = settings()
    found: list[Counted] = []
    pool, model = make_pool(), model_of(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rounds = MatesRounds(
        make_reference(),
        pool,
        config,
        output_dir=folder,
        collate_fn=default_data_collator,
        probe=probe,
        progress=False,
    )
    with lists_of_a_device() as patches:
        patches.setattr(Session, "_look", counted_look(found))
        for _, rows in rounds.order(model, optimizer, batch_size=BATCH, max_steps=BOUNDARY + 3, max_grad_norm=1.0):
            model(**default_data_collator([pool[int(i)] for i in rows])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found[0]


@contextlib.contextmanager
def micro_batches_counted() -> Iterator[list[int]]:
    num, original = [0], passes.batch_losses

    def losses(*args: Any, **kwargs: Any) -> Any:
        num[0] += 1
        return original(*args, **kwargs)

    with patch.object(passes, "batch_losses", losses):
        yield num


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return in_a_trainer(tmp_path_factory.mktemp("base"))


def test_more_layers_are_no_operation_more(base: Counted, tmp_path: Path) -> None:
    more = in_a_trainer(tmp_path, layers=6) - base
    assert more.tensors == 36
    assert more.micro_batches == 0
    assert more.calls < more.tensors  # one more for each tensor in all of a round
    assert more.stops == 0


def test_a_micro_batch_is_seven_operations_and_no_stop(base: Counted, tmp_path: Path) -> None:
    more = in_a_trainer(tmp_path, num_probes=80) - base
    assert more.micro_batches >= 20
    assert more.calls < (IN_A_MICRO_BATCH + 1) * more.micro_batches
    assert more.stops == 0
    assert base.calls < MOST_CALLS
    assert base.stops < MOST_STOPS


@pytest.mark.slow
def test_a_point_of_the_path_stops_twice(base: Counted, tmp_path: Path) -> None:
    more = in_a_trainer(tmp_path, points=4) - base
    assert more.calls <= 2 * IN_A_POINT + IN_A_MICRO_BATCH * more.micro_batches
    assert more.stops <= 2 * 2


@pytest.mark.slow
def test_a_loop_without_the_trainer_runs_the_same(base: Counted, tmp_path: Path) -> None:
    found = in_a_loop(tmp_path)
    assert abs(found.calls - base.calls) < base.tensors
    assert found.stops <= base.stops + 1
    assert found.micro_batches == base.micro_batches


def wait_in_each_micro_batch(patches: pytest.MonkeyPatch) -> None:
    original = passes.batch_losses

    def losses(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.sum().item()
        return found

    patches.setattr(passes, "batch_losses", losses)


def touch_each_tensor(patches: pytest.MonkeyPatch) -> None:
    original = WeightAverage.swapped_in

    def swapped_in(average: WeightAverage) -> Any:
        for parameter in average._parameters.values():
            parameter.detach().add_(0.0)
        return original(average)

    patches.setattr(WeightAverage, "swapped_in", swapped_in)


def test_one_stop_or_one_operation_more_is_seen(base: Counted, tmp_path: Path) -> None:
    """What the tests above bound, made worse by the least."""
    stopped = in_a_trainer(tmp_path / "stopped", num_probes=80, mutate=wait_in_each_micro_batch) - base
    assert stopped.stops >= 20
    assert stopped.calls >= (IN_A_MICRO_BATCH + 1) * stopped.micro_batches
    touched = in_a_trainer(tmp_path / "touched", layers=6, mutate=touch_each_tensor) - base
    assert touched.calls >= touched.tensors
