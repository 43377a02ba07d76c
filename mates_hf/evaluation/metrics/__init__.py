"""`evaluate` modules for fits of influence: rank correlation, precision of the best fraction, calibration.

Where it is used: for people who judge an influence model of their own, or a fit anywhere, with the figures of the fit
reports. `evaluate.load(f"{metrics_dir()}/influence_spearman")` needs no network; `predictions` is predicted influence
and `references` measured influence, both > 0 helps, nats/token. `python -m mates_hf.evaluation.metrics` prints the
folder. Trade-off: `evaluate` copies such a module into its cache and runs it from there, so a module is a thin shell
and the arithmetic is in `agreement`, in the version that is installed.
"""

from __future__ import annotations

from pathlib import Path


def metrics_dir() -> Path:
    """The folder of the modules, one subfolder each."""
    return Path(__file__).parent
