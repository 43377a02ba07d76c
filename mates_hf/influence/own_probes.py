"""The probes of this library: which one a run takes, and what a run knows of the one it has where it is one of these.

Where it is used: `default_probe` at the start of a run; the tuples in checks before it, which hold what a probe reads
against what the run trains on and ask what it takes of memory. Trade-off: tuples of classes to be kept up, in place of
more methods that every probe must have.
"""

from __future__ import annotations

from typing import Any

from mates_hf.engine.weight_store import engine_optimizer
from mates_hf.flops import MANY_PASSAGES, PATH_STEPS
from mates_hf.influence.probe import Probe
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe

OWN_PROBES = (DirectionalProbe, OneStepProbe, LossReductionProbe)
"""All of them have `loss`, `reference_loss` and `tokens_per_batch`."""
STEPPING_PROBES = (OneStepProbe, LossReductionProbe)
"""Those that let the run's optimizer take real steps."""


def default_probe(optimizer: Any, num_passages: int) -> Probe:
    """The probe of a run that was given none.

    Args:
        optimizer: the live optimizer, wrapped or not.
        num_passages: how many the reference task has.

    Returns:
        `LossReductionProbe()`, whose labels look furthest, where the reference task has `MANY_PASSAGES`. With fewer,
        and with DeepSpeed, whose engine alone takes steps, `DirectionalProbe(path_steps=32)`.
    """
    if num_passages < MANY_PASSAGES or engine_optimizer(optimizer) is not None:
        return DirectionalProbe(path_steps=PATH_STEPS)
    return LossReductionProbe()
