"""Influence models that `forget` deleted, fitted again from the probes that stay.

Where it is used: in the main process, when a run resumes, before a round's influence model is read. Trade-off: a model
pools the labels of the rounds before it, so they are fitted in the order of their rounds; those of rounds that
`keep_rounds` deleted are not in it any more.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from mates_hf.disk import json_bytes, read_json, sha256_of, write_json
from mates_hf.errors import MatesError
from mates_hf.round_files import CHECKSUMS_FILE, PROBES_FILE, find_rounds, read_checksums, read_labels
from mates_hf.training.redact import MODEL_DIR, REDACTED_FILE, write_checksums_of
from mates_hf.training.run import Run
from mates_hf.training.stages import fitted_model

logger = logging.getLogger(__name__)


def refit_models(run: Run) -> None:
    """Fit what was deleted, of every finished round, in their order.

    Args:
        run: the run's state.

    Raises:
        OSError: the disk failed; the next resume continues.
    """
    _, rounds = find_rounds(run.rounds_dir)
    todo = [number for number, path in rounds.items() if _state(path) == "removed"]
    if not todo:
        return
    latest, before = run.latest_model, None
    for number, path in rounds.items():
        if number in todo:
            run.latest_model = None if before is None else run.load_model(before)
            refit_model(run, path, number)
        if (path / MODEL_DIR).exists():
            before = path
    run.latest_model = latest


def refit_model(run: Run, path: Path, number: int) -> None:
    """Fit the influence model of one round again, with what the run remembers of the rounds before it.

    Args:
        run: the run's state.
        path: the finished round.
        number: Number of the round.
    """
    labels = read_labels(path / PROBES_FILE)
    state = "refitted"
    try:
        labels.check()
        fitted_model(run, path, labels, run.documents(labels.candidate_id), number)
    except (MatesError, ValueError) as error:  # too few probes stay, or they rank nothing
        state = "not fitted"
        logger.warning("Round %d has no influence model any more: %s", number, error)
    told = {**read_json(path / REDACTED_FILE), "influence_model": state}
    checksums = {name: each for name, each in read_checksums(path).items() if not name.startswith(f"{MODEL_DIR}/")}
    files = sorted(file for file in (path / MODEL_DIR).rglob("*") if file.is_file())
    checksums |= {file.relative_to(path).as_posix(): sha256_of(file) for file in files}
    checksums[REDACTED_FILE] = hashlib.sha256(json_bytes(told)).hexdigest()
    write_checksums_of(path / CHECKSUMS_FILE, checksums)
    write_json(path / REDACTED_FILE, told)  # last: until it is there, the next resume does this again


def _state(path: Path) -> Any:
    """What became of a round's influence model; None where nothing was taken out of the round."""
    return read_json(path / REDACTED_FILE).get("influence_model") if (path / REDACTED_FILE).exists() else None
