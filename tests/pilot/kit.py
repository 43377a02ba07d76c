"""What the tests of a pilot share: a small pool with a good group, passages, and results that are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.pilot.settings import PilotSettings

# Fresh weights of some ten thousand parameters, 48 steps: seconds a unit.
SMALL: dict[str, Any] = {
    "params": 410e6, "tokens": 26e9, "pilot_params": 1e4, "pilot_tokens": 48 * 4 * 16, "row_tokens": 16,
    "batch_rows": 4, "vocab_size": 300, "learning_rate": 5e-3, "update_steps": 12, "num_probes": 24,
    "reference_limit": 24, "held_out_limit": 24, "group_rows": 8, "evaluations": 4, "longer": 1.5, "seeds": 1,
    "static_filter": "linear", "device": "cpu",
}  # fmt: skip


def text(rng: np.random.Generator, good: bool, length: int = 30) -> str:
    """Words that count up, or words at random, so that hardly any two texts share 13."""
    if good:
        return " ".join(f"up{i}" for i in (rng.integers(40) + np.cumsum(rng.integers(1, 3, length))) % 40)
    return " ".join(f"any{i}" for i in rng.integers(0, 40, length))


def write_texts(folder: Path, num: int = 500) -> dict[str, str]:
    """A pool in which every fourth document is of the good kind, and passages of it; arguments of `run_pilot`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [{"text": text(rng, i % 4 == 0), "kind": "good" if i % 4 == 0 else "other"} for i in range(num)]
    passages = [{"text": text(rng, True, 20)} for _ in range(80)]
    found = {}
    for name, lines in (("pool", rows), ("reference", passages)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found


def settings(**changes: Any) -> PilotSettings:
    return PilotSettings(**{**SMALL, "seeds": 3, **changes})


def made_unit(
    arm: str, seed: int, losses: Sequence[float], *, spread: float = 0.01, groups: dict[str, float] | None = None,
    rounds: Sequence[tuple[float, float]] = (), steps: Sequence[int] = (10, 20, 30),
) -> dict[str, Any]:  # fmt: skip
    """The result of a unit whose mean losses at marks are given; passages spread around them, equally in all arms."""
    rng = np.random.default_rng(5)
    around = spread * rng.standard_normal(40)
    around -= around.mean()
    tokens = np.full(40, 10)
    kept = {name: loss for name, loss in (groups or {"a": 5.0, "b": 6.0}).items() for _ in range(6)}
    names = [name for name in kept for _ in range(6)]
    return {
        "arm": arm, "seed": seed, "setting": None, "part": "held_out", "steps": list(steps),
        "sums": [((loss + around) * tokens).tolist() for loss in losses], "tokens": tokens.tolist(),
        "kept_out": {"sums": [kept[name] * 10 for name in names], "tokens": [10] * len(names), "groups": names},
        "seconds": 7.0, "step_flops": 100.0, "num_parameters": 1000, "filter_seconds": 1.0,
        "rounds": [
            {
                "step": 12 + 5 * i, "decision": "select", "spearman": 0.5, "interval": list(one), "flops": 50.0,
                "seconds": 2.0,
            }
            for i, one in enumerate(rounds)
        ],
    }  # fmt: skip
