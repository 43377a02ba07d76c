"""How fast `DirectionalProbe` is against `OneStepProbe` and two plain forward passes, and what memory it takes.

Arms take turns within one process, and figures are medians over the turns of ratios within a turn, so they do not
depend on how fast the machine is. Two minutes on two cores.

Trade-off: a model of 1.3 M parameters and 2 cores, so that anyone can repeat it; larger models spend a smaller share
of their time outside of matrix products, which favours every ratio here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.lab.corpus import as_reference, as_rows, text_rows
from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import alternate
from benchmarks.lab.memory import micro_batch_bytes, peak_bytes
from benchmarks.lab.models import llama, trained
from benchmarks.lab.statistics import FloatArray
from benchmarks.lab.tables import figure
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.influence.difference import choose_epsilon
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe

LENGTH, NUM_REFERENCE = 256, 64


def plain_pass(model: Any, ids: torch.Tensor, batch: int) -> torch.Tensor:
    """Loss of every token by a plain loop, the quickest that is still plain: no cache, no copy of the logits."""
    labels = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = []
    with torch.no_grad():
        for i in range(0, len(ids), batch):
            logits = model(input_ids=ids[i : i + batch], use_cache=False).logits
            losses.append(
                functional.cross_entropy(logits.flatten(0, 1), labels[i : i + batch].flatten(), reduction="none")
            )
    return torch.cat(losses)


def probe_parts(model: Any, optimizer: Any, reference: ReferenceTask, rows: TokenRows) -> dict[str, Callable[[], Any]]:
    """The parts of `DirectionalProbe.measure`: what is paid once a round, and what is paid for each candidate."""
    probe = DirectionalProbe()
    direction = probe.compute_direction(model, optimizer, reference, rows)

    def either_side(part: TokenRows, epsilon: float) -> Any:
        return probe.directional_derivatives(model, direction, part, epsilon)

    return {
        "direction": lambda: probe.compute_direction(model, optimizer, reference, rows),
        "epsilon": lambda: choose_epsilon(model, direction, rows, either_side, seed=0),
        "derivatives": lambda: either_side(rows, 1e-3),
    }


def best_batch(model: Any, ids: torch.Tensor, repeats: int) -> tuple[int, dict[int, float]]:
    """The batch size at which `plain_pass` is quickest, and seconds a row for each that was tried."""
    sizes = (1, 2, 4, 8, 16, 32)
    arms = {str(size): functools.partial(plain_pass, model, ids, size) for size in sizes}
    found = {int(size): min(seconds) / len(ids) for size, seconds in alternate(arms, repeats).items()}
    return min(found, key=lambda size: found[size]), found


def measure_memory(quick: bool) -> dict[str, float]:
    """Peak extra memory of the probe in units of the parameters' bytes, on a model whose parameters dominate."""
    length, rows_per_batch = 32, 2
    width = 256 if quick else 512
    rng = np.random.default_rng(0)

    def random_rows(num: int) -> TokenRows:
        return as_rows(rng.integers(0, 1024, num * length), length)

    rows, reference = random_rows(16), as_reference(random_rows(8), 8)
    model, optimizer = trained(rows, 2, llama(1024, width=width, layers=6, heads=width // 32), rows_per_batch)
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    probe = DirectionalProbe(tokens_per_batch=rows_per_batch * length)
    whole = peak_bytes(lambda: probe.measure(model, optimizer, reference, rows))
    ids = torch.from_numpy(reference.rows.values).view(-1, length)[:rows_per_batch]
    micro = micro_batch_bytes(model, ids)
    return {
        "parameter_bytes": parameter_bytes,
        "peak": whole / parameter_bytes,
        "extra": (whole - micro) / parameter_bytes,
    }


def run(bench: Bench) -> dict[str, Any]:
    """Measure."""
    torch.set_num_threads(bench.options.threads)
    num_candidates, num_oracle, repeats = (64, 2, 2) if bench.quick else (512, 6, 3)
    memory = measure_memory(bench.quick)
    pool, reference_rows = text_rows()
    reference = as_reference(reference_rows)
    model, optimizer = trained(pool, 4 if bench.quick else 20)
    model.eval()
    rows = pool.take(np.arange(200, 200 + num_candidates))
    few = rows.take(np.arange(num_oracle))
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, LENGTH)
    plain_pass(model, ids[:32], 8)
    batch, tried = best_batch(model, ids[:32], 1 if bench.quick else 3)
    arms = probe_parts(model, optimizer, reference, rows)
    arms["measure"] = lambda: DirectionalProbe().measure(model, optimizer, reference, rows)
    arms["one_step"] = lambda: OneStepProbe().measure(model, optimizer, reference, few)
    arms["reference_loss"] = lambda: mean_loss(model, reference.rows)
    arms["plain_twice"] = lambda: (plain_pass(model, ids, batch), plain_pass(model, ids, batch))
    seconds = {name: np.array(values) for name, values in alternate(arms, repeats).items()}

    # The oracle's reading of the reference after the null step is paid once a round; without it, its rate is that of
    # many candidates.
    oracle = (seconds["one_step"] - seconds["reference_loss"]) / num_oracle
    once = seconds["direction"] + seconds["epsilon"]
    each = seconds["derivatives"] / num_candidates

    def median(values: FloatArray) -> float:
        return float(np.median(values))

    allowed = (3 * LENGTH + NUM_REFERENCE * LENGTH) / (2 * LENGTH)
    share = f"share of the {allowed:.1f} x that FLOPs allow each candidate"
    spread = {num: once / num + each for num in (512, 2000)}
    plain = seconds["plain_twice"] / num_candidates
    whole = seconds["measure"] / num_candidates
    goal = None if bench.quick else 20.0  # 60 % of what FLOPs allow
    against = "candidates/s, DirectionalProbe / OneStepProbe"
    parts = "gradient and ε"
    passes = "tokens/s of DirectionalProbe / two plain forward passes"
    extra = "peak extra memory / trainable parameters' bytes"
    figures = [
        figure(f"{against}, each candidate alone", median(oracle / each), "x"),
        figure(f"{against}, `measure` of {num_candidates} (all included)", median(oracle / whole), "x", least=goal),
        *(
            figure(f"{against}, from parts: {parts} spread over {num:,}", median(oracle / cost), "x", least=20.0)
            for num, cost in spread.items()
        ),
        figure(share, median(oracle / each) / allowed, least=0.6),
        figure(f"{passes}, without reference gradient and ε", median(plain / each), "x", least=0.9),
        *(figure(f"{passes}, {parts} spread over {num:,}", median(plain / cost), "x") for num, cost in spread.items()),
        figure("`measure` / the sum of its parts, seconds", median(whole / (once / num_candidates + each)), "x"),
        figure("tokens/s of DirectionalProbe, each candidate alone", LENGTH / median(each)),
        figure(f"{extra}, less one micro-batch", memory["extra"], "x", most=2.2),
        figure(f"{extra}, all of it", memory["peak"], "x"),
    ]
    settings = {
        "parameters": sum(p.numel() for p in model.parameters()), "candidates": num_candidates,
        "oracle candidates": num_oracle, "tokens each": LENGTH, "reference": f"{NUM_REFERENCE} x {LENGTH}",
        "turns": repeats, "plain batch": f"{batch} rows (best of {sorted(tried)})",
        "memory model": f"{memory['parameter_bytes'] / 2**20:.0f} MiB",
    }  # fmt: skip
    raw = {"seconds": {name: list(values) for name, values in seconds.items()}, "plain": tried, "memory": memory}
    return bench.figures(settings, figures, raw)
