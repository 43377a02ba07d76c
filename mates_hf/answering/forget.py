"""`mates-hf forget`: rows that a run must not use any more, and files of finished rounds without them.

Where it is used: on a run that does not train at the moment, on somebody's request. The run reads the rows when it
resumes: it draws none of them, and replaces those in the order that it has not come to (`restore`). What the model has
learned from rows that were trained on stays in its weights: nothing here makes a model unlearn.

Trade-off: an influence model is made of the probed texts, so it is deleted where a removed row was among them. It is
fitted again from the probes that stay when the run resumes, because that takes the pool. A model that reads the live
model's states cannot be fitted again later: `drop_models` leaves it out for good.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.answering.where import RunFiles, check_rows, open_run, where_rows
from mates_hf.disk import read_json, write_array, write_json
from mates_hf.errors import UnsupportedSettingError
from mates_hf.records import IntArray
from mates_hf.round_files import ROUND_FILE
from mates_hf.round_writer import is_set_aside
from mates_hf.training.blocked import EVENTS_FILE, REMOVED_FILE, read_removed
from mates_hf.training.journal import Change, carry_out, finish_pending, held
from mates_hf.training.kept_page import leave_out
from mates_hf.training.redact import MODEL_DIR, event_of, is_touched, redact_round


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What `forget_rows` did.

    Attributes:
        rounds_dir: the directory that holds the rounds.
        rows: (R,) int64 rows that were removed now, ascending.
        num_before: rows of those asked for that had been removed before.
        num_trained_on: rows of `rows` that are known to be trained on.
        rounds: names of the rounds that were written again.
        models: names of the rounds whose influence model was deleted.
        dropped: whether those are not fitted again.
        page: whether the run's page was deleted, which may have shown the rows.
    """

    rounds_dir: Path
    rows: IntArray
    num_before: int
    num_trained_on: int
    rounds: tuple[str, ...]
    models: tuple[str, ...]
    dropped: bool
    page: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "rounds_dir": str(self.rounds_dir), "rows": len(self.rows)}

    def lines(self) -> Iterator[str]:
        """For a person: what was done, and what was not."""
        again = f" {self.num_before:,} others had been removed before." if self.num_before else ""
        yield f"{len(self.rows):,} rows are kept out of all that follows.{again}"
        if self.rounds:
            yield f"{len(self.rounds)} finished rounds were written again without them: {_some(self.rounds)}."
        if self.models:
            what = "are not fitted again" if self.dropped else "are fitted again when the run resumes"
            yield f"The influence models of {len(self.models)} rounds were deleted and {what}: {_some(self.models)}."
        if self.page:
            yield "The run's page was deleted, for it may show them: `mates-hf report` writes it again."
        if self.num_trained_on:
            yield (
                f"{self.num_trained_on:,} of the rows had been trained on already. What the model learned from them "
                "stays in its weights and checkpoints: it did not unlearn."
            )


def forget_rows(path: str | os.PathLike[str], rows: Any, *, drop_models: bool = False) -> Forgotten:
    """Keep rows of the pool out of all that follows, and take them out of what finished rounds left.

    It happens whole or not at all: killed before it is decided, nothing was changed; killed later, the next call, or
    the run when it resumes, finishes it.

    Args:
        path: a run's `output_dir`, or the directory that holds its rounds.
        rows: (N,) row numbers in the pool.
        drop_models: Whether influence models that cannot be fitted again from labels alone are deleted for good.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a row is not in the pool, or is no whole number.
        UnsupportedSettingError: the run trains on a stream, or its influence model cannot be fitted again.
        LockedError: the run trains at the moment.
        MatesError: a file is damaged.
    """
    run = open_run(path, "mates-hf forget")
    wanted = check_rows(rows, run.num_rows)
    finish_pending(run.rounds_dir)
    with held(run.rounds_dir):
        carry_out(run.rounds_dir)  # throws away what a killed call had not decided
        return _forget(open_run(run.rounds_dir, "mates-hf forget"), wanted, drop_models)


def _forget(run: RunFiles, wanted: IntArray, drop_models: bool) -> Forgotten:
    """Under the lock: decide and carry out."""
    removed = read_removed(run.rounds_dir, run.num_rows)
    new = np.setdiff1d(wanted, removed)
    paths = [*run.rounds.values(), *_set_aside(run.rounds_dir)]
    affected = _models_affected(run.rounds, new) if len(new) else []
    if affected and not drop_models:
        _require_refittable(run.rounds)
    uses = where_rows(run.rounds_dir, new).uses if len(new) else ()
    trained_on = len({use.row for use in uses if use.done})
    touched: list[Path] = []
    models: list[Path] = []
    page = False
    if len(new):
        event = event_of(new, datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
        change = Change(run.rounds_dir)
        write_array(change.put(REMOVED_FILE), np.concatenate([removed, new]))
        write_json(change.put(EVENTS_FILE), {"events": [*_events(run.rounds_dir), event]})
        for at in paths:
            in_labels, in_candidates = is_touched(at, new)
            aside = is_set_aside(at)
            has_model = (at / MODEL_DIR).exists() and (at in affected or aside)
            if in_labels or in_candidates or has_model:
                state = ("dropped" if drop_models or aside else "removed") if has_model else None
                redact_round(change, at, new, event, state)
                touched.append(at)
                models += [at] if has_model else []
        for partial in run.rounds_dir.glob("round-*.partial"):  # a resume makes it again from its checkpoint
            change.delete(partial.name)
        page = leave_out(change, new, with_model=not models)
        change.decide(event)
        carry_out(run.rounds_dir)
    return Forgotten(
        run.rounds_dir,
        new,
        len(wanted) - len(new),
        trained_on,
        tuple(path.name for path in touched),
        tuple(path.name for path in models),
        drop_models,
        page,
    )


def _set_aside(rounds_dir: Path) -> list[Path]:
    """Finished rounds of other attempts."""
    found = [path for path in sorted(rounds_dir.glob("round-*")) if is_set_aside(path)]
    return [path for path in found if (path / ROUND_FILE).exists()]


def _models_affected(rounds: Mapping[int, Path], rows: IntArray) -> list[Path]:
    """Rounds whose influence models were made of some rows: each pools the labels of the rounds before it.

    One that was given static evidence has counted rows of the whole pool.
    """
    found: list[Path] = []
    begun = False
    for path in rounds.values():
        fit = read_json(path / ROUND_FILE).get("fit")
        evidence = isinstance(fit, Mapping) and fit.get("evidence") is not None
        begun = begun or evidence or is_touched(path, rows)[0]
        found += [path] if begun and (path / MODEL_DIR).exists() else []
    return found


def _require_refittable(rounds: Mapping[int, Path]) -> None:
    """Refuse an influence model that cannot be fitted again from labels and the pool alone."""
    names = {_class_of(read_json(path / ROUND_FILE)) for path in rounds.values()}
    wrong = sorted(name for name in names if not _is_refittable(name))
    if wrong:
        raise UnsupportedSettingError(
            f"`mates-hf forget` must be able to fit the influence models again without the rows, and {wrong[0]} reads "
            "more than labels and tokens, or is not known. `--drop-models` (`drop_models=True`) deletes them for "
            "good; the next round of the run then fits a new one."
        )


def _class_of(info: Mapping[str, Any]) -> str:
    measured = info.get("measured_with")
    model = measured.get("influence_model") if isinstance(measured, Mapping) else None
    return str(model.get("class", "an unknown class")) if isinstance(model, Mapping) else "an unknown class"


def _is_refittable(name: str) -> bool:
    """Whether a class of this library is fitted on labels and tokens alone."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("mates_hf."):
        return False
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError):
        return False
    return bool(getattr(found, "runs_beside_training", False))


def _events(rounds_dir: Path) -> list[Any]:
    path = rounds_dir / EVENTS_FILE
    return list(read_json(path).get("events", [])) if path.exists() else []


def _some(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names if len(names) <= 8 else [*names[:3], "...", *names[-3:]])
