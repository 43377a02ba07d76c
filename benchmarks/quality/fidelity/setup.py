"""How much `fidelity` measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are the full run."""

    documents: int | None = None
    early: int = 40
    long: int = 1_000
    warm: int = 300
    per_domain: int = 7
    truth_batches: int = 3
    truth_passages: int = 48
    large_batch: int = 128
    large_batch_steps: int = 60
    horizons: tuple[int, ...] = (10, 100, 1000)
    set_probes: int = 1200
    round_steps: int = 40
    rounds: int = 5
    oracle_probes: int = 600
    oracle_passages: int = 64
    round_probes: int = 500
    fixed: int = 300
    fit_sizes: tuple[int, ...] = (250, 500, 1000, 2000)
    fit_test: int = 1000
    fit_repeats: int = 3
    cost_candidates: int = 1000
    cost_oracle: int = 40
    everything: bool = True


QUICK = Sizes(
    documents=3000, early=20, long=80, warm=60, per_domain=3, truth_batches=2, truth_passages=16, large_batch=32,
    large_batch_steps=20, horizons=(5, 20, 40), set_probes=300, round_steps=10, rounds=2, oracle_probes=50,
    oracle_passages=8, round_probes=150, fixed=60, fit_sizes=(100, 250), fit_test=200, fit_repeats=1,
    cost_candidates=50, cost_oracle=4, everything=False,
)  # fmt: skip
