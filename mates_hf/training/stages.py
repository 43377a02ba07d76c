"""The stages of a round that a fit without rounds has as well: labels, measured or read back, and the model of them.

Where it is used: `rounds.run_round` and `fit.probe`, each with a directory of its own. What a stage leaves there
appears whole or not at all, so that what was killed continues behind it. Trade-off: a stage trusts the directory that
it is given; whose it is, its owner has found out (`RoundWriter`, `fit.place`).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from mates_hf.disk import replace_path, sync_tree
from mates_hf.errors import UnrankableError
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import read_labels, write_labels
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.saved import write_round_model
from mates_hf.training.measure import measure_labels
from mates_hf.training.run import InfluenceModel, Run, takes
from mates_hf.training.static_evidence import evidence_for


def measured_labels(run: Run, path: Path, probes: IntArray) -> InfluenceLabels:
    """Labels of the probed candidates, measured or read back.

    Args:
        run: the run's state.
        path: the round's directory.
        probes: (P,) int64 pool rows of the candidates.

    Returns:
        The labels.
    """
    shards = path / "probe_shards"
    if (path / "probes.parquet").exists():
        labels = read_labels(path / "probes.parquet")
    else:
        labels = measure_labels(run, probes, shards)
        write_labels(path / "probes.parquet", labels)
    shutil.rmtree(shards, ignore_errors=True)
    return labels


def why_unrankable(labels: InfluenceLabels) -> str:
    """Why labels rank no candidate, or an empty string. Labels that are not finite end the run, where measured."""
    try:
        labels.check()
    except UnrankableError as error:
        return str(error)
    return ""


def fitted_model(run: Run, path: Path, labels: InfluenceLabels, documents: IntArray, number: int) -> InfluenceModel:
    """The round's influence model, fitted with earlier rounds' labels pooled in, or read back.

    Args:
        run: the run's state.
        path: the round's directory.
        labels: Labels of the probed candidates.
        documents: (P,) int64 document of each.
        number: Number of the round.

    Returns:
        The fitted model, which the directory holds.

    Raises:
        UnrankableError: the labels rank nothing.
    """
    final = path / "influence_model"
    if final.exists():
        return run.load_model(path)
    partial = path / "influence_model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unfitted = copy.deepcopy(run.influence_model)
    fitted: InfluenceModel = unfitted.fit(
        run.read_by(unfitted, labels.candidate_id),
        labels,
        held_out_fraction=run.config.held_out_fraction,
        previous=run.latest_model,
        seed=stage_seed(run.config.selection_seed, number, "fit"),
        **({"documents": documents} if takes(unfitted.fit, "documents") else {}),
        **evidence_for(run),
    )
    # Renamed when all of it is there: which of a model's files comes last is the model's business.
    write_round_model(partial, fitted, run.tokenizer)
    sync_tree(partial)
    replace_path(partial, final)
    return fitted
