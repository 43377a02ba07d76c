"""The one round of a fit without a run: influence of some rows at the warm model, and the influence model of them.

Where it is used: `selector_fit` calls `probe_and_fit` in all processes, before the second Trainer takes a step. The
stages are those of a round (`stages`, `measure`, `audit`), in a directory of their own; the judge is a round's guard.

Trade-off: it is no call of `run_round`. A round belongs to a schedule: it draws candidates, selects and is replayed,
and a checkpoint of a run with rounds binds every setting of them. A fit selects nothing, and one that the guard
refused should be given more probes without training again. So there is no `round.json`, and `mates-hf round` reads
none; what was measured is in the selector's `fit_selector.json`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mates_hf.config import MatesConfig
from mates_hf.data.pool import CandidatePool
from mates_hf.engine.averaging import WeightAverage
from mates_hf.engine.model_traits import hub_name, unwrap
from mates_hf.engine.processes import Processes
from mates_hf.engine.weight_store import adopt_engine
from mates_hf.errors import UnrankableError
from mates_hf.flops import PATH_STEPS, gradient_flops
from mates_hf.influence.path_length import MAX_STEPS
from mates_hf.influence.preconditioner import require_known, unwrap_optimizer
from mates_hf.influence.probe import RunSettings, count_multiplied_parameters, count_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import IntArray
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.ledger import Ledger
from mates_hf.training.audit import audit_round
from mates_hf.training.fit.inputs import Inputs
from mates_hf.training.fit.place import Place
from mates_hf.training.fit.settings import FitSettings
from mates_hf.training.fit.warm_up import PadRows
from mates_hf.training.measure import assist, release
from mates_hf.training.run import Run, Stages
from mates_hf.training.stages import fitted_model, measured_labels, why_unrankable

logger = logging.getLogger(__name__)

_NUMBER = 1  # of the round that this stands for, which its seeds depend on


def split_rows(num_rows: int, settings: FitSettings) -> tuple[IntArray, IntArray]:
    """Which rows are trained on in the warm-up and which are probed; none is both.

    The warm-up's do not depend on `num_probes`, so that a fit can be given more probes without training again.

    Args:
        num_rows: Rows that can be trained on.
        settings: How the selector is fitted.

    Returns:
        (T,) and (P,) int64 row numbers.

    Raises:
        ValueError: there are too few rows; says how many would do, and the `num_probes` that fits.
    """
    batch = settings.batch_size
    num_train = min(settings.warm_steps * batch, num_rows // 2) // batch * batch
    left = num_rows - num_train
    if not num_train or left < settings.num_probes:
        probes = settings.num_probes
        needed = max(2 * batch, min(2 * probes, probes + settings.warm_steps * batch))
        ways = [f"give a pool with at least {needed:,} rows of text, and `pool_rows` of as many"]
        if num_train and left >= 10:
            ways.append(f"set `num_probes` to at most {left}")
        elif not num_train and num_rows >= 20:
            ways.append(f"set `batch_size` to at most {num_rows // 2}")
        raise ValueError(
            f"The pool must have rows enough to train on and to probe, and {num_rows:,} can be used: the warm-up "
            f"takes {num_train:,} of them (`warm_steps`, `batch_size`; half at most), and `num_probes` is {probes:,}. "
            f"{_capital(', or '.join(ways))}."
        )
    order = np.random.default_rng([settings.seed, 0x666974]).permutation(num_rows)
    return np.sort(order[num_rows - num_train :]), order[: settings.num_probes]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def probe_and_fit(
    inputs: Inputs,
    settings: FitSettings,
    place: Place,
    probes: IntArray,
    *,
    model: nn.Module,
    optimizer: Any,
    average: WeightAverage,
    arguments: Any,
    progress: bool,
) -> dict[str, Any]:
    """Measure some rows, fit the influence model, and say how good it is. All processes must call it.

    Args:
        inputs: What the fit works with.
        settings: How the selector is fitted.
        place: The folders of the fit.
        probes: (P,) int64 rows of `inputs.dataset`.
        model: The model at the end of the warm-up, unwrapped.
        optimizer: Its optimizer, with the moments of the warm-up.
        average: The mean of the last weights.
        arguments: The Trainer's arguments.
        progress: Whether to show progress bars.

    Returns:
        In the main process what was found, JSON values: `fit` is the report, or None where labels rank nothing, with
        the `reason`. Empty in the others.
    """
    run = _make_run(inputs, settings, place, model, optimizer, arguments, progress)
    with average.swapped_in():
        if not run.processes.is_main:
            assist(run)
            return {}
        found = _measure_and_fit(run, place.probe, probes)
        release(run, None)
    return {**found, "model": _about_model(model, settings, inputs)}


def _measure_and_fit(run: Run, path: Path, probes: IntArray) -> dict[str, Any]:
    """The stages of a round, up to the influence model."""
    stages, fidelity, fit = Stages(), {}, None
    stages.load(path)
    with stages.timed("probe") as cost:
        labels = measured_labels(run, path, probes)
        cost["flops"] = float(labels.info.get("flops") or 0.0)
    reason = why_unrankable(labels)
    if not reason:
        with stages.timed("audit") as cost:
            fidelity = audit_round(run, path, labels, _NUMBER)
            cost["flops"] = float(fidelity.get("flops", 0.0))
        try:
            with stages.timed("fit") as cost:
                fitted = fitted_model(run, path, labels, run.documents(labels.candidate_id), _NUMBER)
                cost["flops"] = float(fitted.report.flops or 0.0)
            fit = fitted.report.to_dict()
        except UnrankableError as error:
            reason = str(error)
    return {
        "num_probes": len(probes),
        "num_probed": len(labels),
        "reason": reason,
        "fit": fit,
        "fidelity": fidelity,
        "reference": {**run.reference.description, "name": run.reference.name, "digest": run.reference.digest()},
        "num_passages": len(run.reference),
        "reference_loss": labels.info.get("reference_loss"),
        "path_points": labels.info.get("path_points"),
        "seconds": {name: stage["seconds"] for name, stage in stages.seconds_and_flops.items()},
        "flops": {name: stage.get("flops", 0.0) for name, stage in stages.seconds_and_flops.items()},
    }


def _about_model(model: nn.Module, settings: FitSettings, inputs: Inputs) -> dict[str, Any]:
    """Name and size of the model, and the FLOPs of its warm-up."""
    tokens = settings.warm_steps * settings.batch_size * inputs.facts["mean_tokens"]
    return {
        "name": hub_name(model),
        "num_parameters": count_parameters(model),
        "warm_up_flops": gradient_flops(count_multiplied_parameters(model), tokens),
    }


def _make_run(
    inputs: Inputs,
    settings: FitSettings,
    place: Place,
    model: nn.Module,
    optimizer: Any,
    arguments: Any,
    progress: bool,
) -> Run:
    """What the stages of a round ask for."""
    adopt_engine(model, optimizer)
    optimizer = unwrap_optimizer(optimizer, unwrap(model))
    require_known(optimizer)
    processes = Processes.of_run()
    pool = CandidatePool(inputs.dataset, PadRows(model))
    run = Run(
        model=model,
        optimizer=optimizer,
        reference=inputs.reference,
        pool=pool,
        pool_identity=pool.identity(),
        probe=DirectionalProbe(path_steps=PATH_STEPS),
        influence_model=NgramInfluenceModel(),
        config=MatesConfig(
            num_probes=settings.num_probes,
            min_spearman=settings.min_spearman,
            selection_seed=settings.seed,
            probe_tokens_per_batch=settings.probe_tokens_per_batch,
        ),
        settings=RunSettings(
            max_grad_norm=arguments.max_grad_norm or None,
            batch_rows=settings.batch_size,
            rate_steps=MAX_STEPS,  # nobody knows the run to come: as far as a path may look
            tokens_per_batch=settings.probe_tokens_per_batch,
            seed=stage_seed(settings.seed, _NUMBER, "probe"),
            progress=progress and processes.is_main,
            processes=processes,
        ),
        ledger=Ledger(len(pool), settings.seed),
        rounds_dir=place.probe,
        processes=processes,
        tokenizer=inputs.tokenizer,
    )
    processes.require_same("model, pool and reference", run.identity())
    return run
