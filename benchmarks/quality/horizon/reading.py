"""What is read of every run of `horizon`: losses of passages that it does not train on, and of the pool's own text.

Trade-off: some hundred rows stand for the pool, the same number of each domain, weighted by what is there of it.

Losses in nats/token.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import nn

from benchmarks.lab.models import passage_losses
from benchmarks.lab.statistics import Ids
from benchmarks.quality.horizon.settings import Lab
from mates_hf.influence.passes import token_losses


class Reader:
    """Reads losses of a model, the same for every arm and not among its costs.

    Args:
        lab: The data of a setting.
        half: Which passages of each task are read.
        held: Pool rows that no arm trains on.
        last: Step of which losses are kept passage by passage.
    """

    def __init__(self, lab: Lab, half: Literal["development", "test"], held: Ids, last: int) -> None:
        self.lab, self.judged, self.held, self.last = lab, lab.judged[half], held, last
        self._share = np.bincount(lab.domain, minlength=len(lab.domain_names)) / len(lab.domain)

    def losses(self, model: nn.Module, step: int, flops: float) -> dict[str, Any]:
        """Losses of the passages by task, of the pool's own text, and of each domain, after this step."""
        found: dict[str, Any] = {"step": step, "flops": flops}
        for name, tasks in self.judged.items():
            for loss_on, (sums, tokens) in passage_losses(model, tasks, self.lab.tokens_per_batch).items():
                part = name if loss_on == "all" else f"{name}: answers"
                found[part] = float(sums.sum() / tokens.sum())
                if step == self.last:
                    found.setdefault("by_passage", {})[part] = [sums.round(1), tokens]
        losses = token_losses(model, self.lab.rows.take(self.held), tokens_per_batch=self.lab.tokens_per_batch)
        means, counts = self.lab.by_domain(self.held, losses.reshape(len(self.held), -1).mean(1, dtype=np.float64))
        found["pool"] = float((means * self._share)[counts > 0].sum() / self._share[counts > 0].sum())
        found["domains"] = means.round(4)
        return found
