"""The probes of this library: what a run knows of the one it was given where it is one of these.

Where it is used: checks before a run, which hold what a probe reads against what the run trains on and ask what it
takes of memory. Trade-off: a tuple of classes to be kept up, in place of more methods that every probe must have.
"""

from __future__ import annotations

from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe

OWN_PROBES = (DirectionalProbe, OneStepProbe, LossReductionProbe)
"""All of them have `loss`, `reference_loss` and `tokens_per_batch`."""
STEPPING_PROBES = (OneStepProbe, LossReductionProbe)
"""Those that let the run's optimizer take real steps."""
