"""How many kernels does a round launch, and how often does the host wait for the device?

Operations are counted on the CPU, in pieces as large as a GPU gets, part by part: what a probe's forward passes add to
the model's own, what a path does at each of its points, saving and putting back, averaging, and all of a round in a
real `Trainer`. A launch costs microseconds of the host whatever the tensor's size, and a stop leaves the device
without work: on a fast card both show before any arithmetic does.

`--before FILE` puts the counts of an earlier JSON next to the new ones.

Trade-off: counts, no seconds, since no GPU was at hand. A wide model shows what grows with the size of a parameter, a
deep one what grows with their number.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.lab.boundary import stages_wrapped
from benchmarks.lab.corpus import as_dataset, as_reference, as_rows
from benchmarks.lab.harness import Bench, read
from benchmarks.lab.machine import hardware, temporary_folder
from benchmarks.lab.models import llama, trained, trainer_of
from benchmarks.lab.operations import CountOperations, counted
from benchmarks.lab.tables import settings_page, table
from mates_hf import MatesCallback, MatesConfig
from mates_hf.engine import digest
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.digest import weights_digest
from mates_hf.engine.preserve import preserved
from mates_hf.influence import cross_entropy, passes, real_step
from mates_hf.influence.passes import mean_loss_gradient, token_losses
from mates_hf.influence.probe_directional import DirectionalProbe

LENGTH, VOCAB, NUM_REFERENCE = 32, 512, 64
TOKENS_PER_BATCH = 8 * LENGTH
TOGETHER = "mates_hf.influence.optimizer.together"
Counts = dict[str, int]


def add_options(parser: argparse.ArgumentParser) -> None:
    """An earlier result to compare with."""
    parser.add_argument("--before", type=Path, help="JSON of an earlier run, whose counts stand next to the new ones")


@contextlib.contextmanager
def micro_batches_counted() -> Iterator[list[int]]:
    """The micro-batches that are run inside."""
    num, original = [0], passes.batch_losses

    def losses(*args: Any, **kwargs: Any) -> Any:
        num[0] += 1
        return original(*args, **kwargs)

    with patch.object(passes, "batch_losses", losses):
        yield num


@contextlib.contextmanager
def pieces_of_a_device() -> Iterator[None]:
    """Work in pieces as large as a device gets; a processor gets those that its cache holds."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(digest, "CPU_BLOCK", digest.CHUNK))
        stack.enter_context(patch.object(cross_entropy, "_CHUNK_LOGITS_CPU", cross_entropy._CHUNK_LOGITS))
        stack.enter_context(patch.object(real_step, "_MIN_PIECE", real_step._MAX_PIECE))
        if importlib.util.find_spec(TOGETHER) is not None:  # versions before had one size for all
            module = importlib.import_module(TOGETHER)
            of_device, cuda = module.most_entries, torch.device("cuda")
            stack.enter_context(patch.object(module, "most_entries", lambda device, total: of_device(cuda, total)))
        yield


def count(work: Callable[[], Any]) -> Counts:
    """Launches, stops and micro-batches of a call."""
    with micro_batches_counted() as num, counted() as mode:
        work()
    return as_counts(mode, num[0])


def as_counts(mode: CountOperations, num_micro_batches: int = 0) -> Counts:
    """What was counted, as the document has it."""
    return {"launches": mode.launches, "stops": mode.syncs.total(), "micro_batches": num_micro_batches}


def random_rows(num: int, seed: int) -> Any:
    """Rows of one length."""
    return as_rows(np.random.default_rng(seed).integers(3, VOCAB, num * LENGTH), LENGTH)


def count_parts(model: Any, optimizer: Any, quick: bool) -> dict[str, Counts]:
    """Everything that a round is made of."""
    model.eval()
    rows, reference = random_rows(32 if quick else 128, 1), as_reference(random_rows(NUM_REFERENCE, 2), NUM_REFERENCE)
    probe = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, epsilon=1e-3)
    path = DirectionalProbe(tokens_per_batch=TOKENS_PER_BATCH, epsilon=1e-3, path_steps=16)
    direction = probe.compute_direction(model, optimizer, reference, rows)
    average = WeightAverage(model)
    average.update()
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, LENGTH)[: TOKENS_PER_BATCH // LENGTH]

    def shift_twice() -> None:
        with preserved(model) as snapshot:
            snapshot.shift(direction.by_parameter, 1e-3)
            snapshot.shift(direction.by_parameter, -1e-3)

    def trace() -> None:
        with preserved(model):
            pass

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def backward() -> None:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
        model.zero_grad()

    parts = {
        "a plain forward pass": count(forward),
        "a plain forward and backward pass": count(backward),
        "losses of all candidates": count(lambda: token_losses(model, rows, tokens_per_batch=TOKENS_PER_BATCH)),
        "gradient of all candidates": count(
            lambda: mean_loss_gradient(model, rows, tokens_per_batch=TOKENS_PER_BATCH)
        ),
        "save and put back (`preserved`)": count(trace),
        "the same with both shifts": count(shift_twice),
        "a further update of the mean": count(average.update),
        "digest of the weights": count(lambda: weights_digest(model)),
        "direction at one point": count(lambda: probe.compute_direction(model, optimizer, reference, rows)),
        "direction along a path of 16 points": count(
            lambda: path.compute_direction(model, optimizer, reference, rows)
        ),
        "a probe (`measure`) with that path": count(lambda: path.measure(model, optimizer, reference, rows)),
    }
    model.zero_grad(set_to_none=True)
    return parts


def count_round(quick: bool, layers: int, width: int) -> dict[str, Counts]:
    """A round of a real `Trainer`, stage by stage."""
    modes: dict[str, list[tuple[CountOperations, int]]] = {}

    def wrap(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with micro_batches_counted() as num, counted() as mode:
                found = work(*args, **kwargs)
            modes.setdefault(name, []).append((mode, num[0]))
            return found

        return run

    config = MatesConfig(
        update_steps=3, num_probes=32 if quick else 128, selection_ratio=0.5, average_steps=2,
        on_weak_signal="select", probe_tokens_per_batch=TOKENS_PER_BATCH,
    )  # fmt: skip
    model = make_model(layers, width)
    with temporary_folder(None) as folder, stages_wrapped(wrap):
        trainer = trainer_of(model, as_dataset(random_rows(500, 3)), folder, 5, 4)
        MatesCallback(as_reference(random_rows(NUM_REFERENCE, 2), NUM_REFERENCE), config).attach(trainer)
        trainer.train()
    names = {"probe": "round: probe", "audit": "round: audit", "boundary": "round: all of it"}
    return {label: as_counts(*modes[name][0]) for name, label in names.items()}


def make_model(layers: int, width: int) -> Any:
    """A Llama with a head of its own."""
    return llama(VOCAB, width=width, layers=layers, length=LENGTH, tied=False)


def run(bench: Bench) -> dict[str, Any]:
    """Count."""
    torch.set_num_threads(bench.options.threads)
    sizes = {"deep": (4 if bench.quick else 12, 64), "wide": (1, 512 if bench.quick else 1536)}
    settings: dict[str, Any] = {"tokens a micro-batch": TOKENS_PER_BATCH, "reference": f"{NUM_REFERENCE} x {LENGTH}"}
    counts = {}
    for name, (layers, width) in sizes.items():
        model, optimizer = trained(random_rows(64, 0), 2, make_model(layers, width), 4)
        tensors = list(model.parameters())
        settings[name] = f"{layers} layers, width {width}, {len(tensors)} parameter tensors, the largest of " + (
            f"{max(p.numel() for p in tensors):,} entries"
        )
        with pieces_of_a_device():
            counts[name] = count_parts(model, optimizer, bench.quick)
            del model, optimizer
            counts[name] |= count_round(bench.quick, layers, width)
    before = read(bench.options.before)["counts"] if bench.options.before else None
    return {
        "quick": bench.quick, "hardware": hardware(bench.options.threads), "settings": settings, "counts": counts,
        "before": before,
    }  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """A table a model; counts before stand left of those after."""
    blocks = []
    before = document["before"] or {}
    for name, parts in document["counts"].items():
        rows = []
        for part, found in parts.items():
            old = before.get(name, {}).get(part)
            each = found["micro_batches"]
            rows.append(
                [
                    part, f"{each:,}" if each else "", *_pair(old, found, "launches"), *_pair(old, found, "stops"),
                    f"{found['stops'] / each:.2f}" if each else "",
                ]
            )  # fmt: skip
        heads = [
            "part",
            "micro-batches",
            "launches before",
            "launches",
            "stops before",
            "stops",
            "stops a micro-batch",
        ]
        if not before:
            heads, rows = heads[:2] + [heads[3], *heads[5:]], [row[:2] + [row[3], *row[5:]] for row in rows]
        blocks += [f"## A {name} model", table(heads, rows)]
    about = (
        "Launches are operations that read or write memory, those of the model among them. Stops are where the host "
        "waits for the device. Counted on a CPU; seconds on a device are not known."
    )
    return settings_page("kernels", document, about, *blocks)


def _pair(old: Counts | None, new: Counts, key: str) -> list[str]:
    return ["" if old is None else f"{old[key]:,}", f"{new[key]:,}"]
