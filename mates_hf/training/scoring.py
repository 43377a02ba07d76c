"""Predicted influence of a round's candidates: a chunk at a time, shared out over the processes of the run.

Where it is used: between the guard and the selection in `rounds.run_round`. The main process asks, the others wait
for it in `beside.await_order`; each has the pool, so what is sent are the influence model's files and ids.

Trade-off: every process holds all that is found for a moment, 16 bytes a candidate, and gets the sum of all shares, in
which each value was made by one process alone. Sent are influence models that `runs_beside_training`, and those that
`reads_examples` where they do not run the model that trains, or each process has it whole. Others may predict a row by
the rows beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_array, write_array
from mates_hf.engine.model_traits import is_sharded
from mates_hf.engine.running_statistics import running_statistics, with_statistics
from mates_hf.records import FloatArray, IntArray
from mates_hf.selection.copies import Hashes
from mates_hf.training.duplicates import CopyMarks
from mates_hf.training.run import InfluenceModel, Run, bound_to_run, read_fitted, reads_examples
from mates_hf.training.score_column import SETTING, added, agreement, column_scores

# What is scored at a time, so that a large slice is never in memory at once: 9 to 23 bytes a token are.
SCORE_ROWS, SCORE_TOKENS, SCORE_EXAMPLES = 65_536, 1 << 22, 4_096


class Scored(NamedTuple):
    """M candidates; of each predicted influence (float32, > 0 helps), trained tokens (int32) and text (uint64).

    With a `score_column` its scores are on top of the predictions, and `found` says how far the two agree.
    """

    candidates: IntArray
    influence: FloatArray
    num_targets: npt.NDArray[np.int32]
    hashes: Hashes
    found: dict[str, Any] = {}  # what `round.json` says of the scores


def score_candidates(
    run: Run, path: Path, influence_model: InfluenceModel, candidates: IntArray, unit: float
) -> Scored:
    """Predict and write down the influence of a round's candidates, and how many tokens of them are trained.

    Args:
        run: the run's state.
        path: the round's directory.
        influence_model: which predicts.
        candidates: (M,) pool rows.
        unit: what predictions are multiplied by, to be in the unit of the round's labels.

    Returns:
        What was written, memory-mapped.
    """
    shared = run.side.size > 1 and _can_be_sent(run, influence_model)
    if shared:
        statistics = running_statistics(run.model) if reads_examples(influence_model) else {}
        files = _files_of(influence_model)
        run.side.publish({"score": True}, candidates=np.asarray(candidates, np.int64), **files, **statistics)
    influence, num_targets, hashes = _predict(run, influence_model, candidates, shared=shared)
    influence, found = _with_column(run, candidates, influence * np.float32(unit))
    write_array(path / "candidates.npy", candidates)
    write_array(path / "scores.npy", influence)
    write_array(path / "num_targets.npy", num_targets)
    write_array(path / "hashes.npy", hashes)
    del influence, num_targets, hashes  # 16 bytes a candidate; the files' pages are the system's to drop
    kept = [np.asarray(read_array(path / name)) for name in ("scores.npy", "num_targets.npy", "hashes.npy")]
    return Scored(candidates, kept[0], kept[1], kept[2], found)


def help_to_score(run: Run, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Predict this process's share of the candidates.

    Args:
        run: the run's state.
        arrays: what the main process sent: `candidates`, and the files of the influence model by their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in arrays.items():
            if name.startswith("file:"):
                file = Path(folder) / name.removeprefix("file:")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data.tobytes())
        influence_model = bound_to_run(read_fitted(run.influence_model, folder), run.model, run.tokenizer)
        with with_statistics(run.model, arrays):
            _predict(run, influence_model, arrays["candidates"], shared=True)


def predict_rows(run: Run, influence_model: InfluenceModel, ids: IntArray) -> FloatArray:
    """(P,) float32 predicted influence of some pool rows, by this process alone; > 0 helps.

    With a `score_column` its scores are on top, as where a round chooses.
    """
    chunks = _chunks(run, influence_model, ids)
    predicted = np.concatenate([np.zeros(0, np.float32), *(influence_model.predict(rows) for rows in chunks)])
    return _with_column(run, ids, predicted)[0]


def _with_column(run: Run, ids: IntArray, influence: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
    """Predicted influence with the pool's own scores on top, where a column has them, and what is said of it."""
    column = run.config.score_column
    if column is None:
        return influence, {}
    scores = column_scores(run.pool.dataset, column, ids)
    return added(influence, scores), {SETTING: {"column": column, "spearman": agreement(influence, scores)}}


def _chunks(run: Run, influence_model: InfluenceModel, ids: IntArray) -> Iterator[Any]:
    """Some pool rows, a chunk in memory at a time, in the form that an influence model reads."""
    if not reads_examples(influence_model):
        yield from run.pool.chunks(ids, SCORE_ROWS, max_tokens=SCORE_TOKENS)
        return
    for start in range(0, len(ids), SCORE_EXAMPLES):
        yield run.pool.candidates(ids[start : start + SCORE_EXAMPLES])


def _can_be_sent(run: Run, influence_model: InfluenceModel) -> bool:
    """Whether other processes can predict with a copy of it: by itself, or by a model that is whole in each."""
    if reads_examples(influence_model):
        return not is_sharded(run.model) or not getattr(influence_model, "runs_the_model", True)
    return bool(getattr(influence_model, "runs_beside_training", False))


def _files_of(influence_model: InfluenceModel) -> dict[str, npt.NDArray[np.uint8]]:
    """What `save_pretrained` writes, as bytes by name."""
    with tempfile.TemporaryDirectory() as folder:
        influence_model.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {
            f"file:{path.relative_to(folder).as_posix()}": np.frombuffer(path.read_bytes(), np.uint8) for path in files
        }


def _predict(
    run: Run, influence_model: InfluenceModel, candidates: IntArray, *, shared: bool
) -> tuple[FloatArray, npt.NDArray[np.int32], Hashes]:
    """Of all candidates, (M,) each: prediction, trained tokens and text; of which this process may do a share."""
    rank, size = (run.side.rank, run.side.size) if shared else (0, 1)
    start, end = len(candidates) * rank // size, len(candidates) * (rank + 1) // size
    influence, num_targets = np.zeros(len(candidates), np.float32), np.zeros(len(candidates), np.int32)
    hashes = np.zeros(len(candidates), np.uint64)
    marks = run.copy_marks or CopyMarks(run)
    for rows in _chunks(run, influence_model, candidates[start:end]):
        span = slice(start, start + len(rows))
        influence[span] = influence_model.predict(rows)
        num_targets[span] = rows.num_targets
        hashes[span] = marks.hashes(rows, candidates[span])
        start = span.stop
    if shared:
        for values in (influence, num_targets, hashes.view(np.int64)):
            run.side.sum(values)
    return influence, num_targets, hashes
