"""What a probe has measured so far, kept on disk, so that one that was killed continues behind it.

Where it is used: `DirectionalProbe.measure` has found its direction u and measures candidates along it, 512 at a
time; the main process keeps the losses of each of these shards and what they were measured with.

A direction that is found again is not the same to the last bit on a GPU, whose backward passes add up in any order.
So shards are told by what the direction comes from (a round's directory is of one digest of the weights, one probe
and one step; the rest is in `shards.json`), and by ‖u‖ and the reference loss within 1e-4. Shards of anything else are
deleted, never mixed in. ε is read back as well: chosen again it could come out as another step of the ladder.

Trade-off: a probe that was killed on a GPU mixes directions that differ in the seventh digit, far below the noise of
its labels. On a CPU they are equal, and so are the labels, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.batches import Candidates
from mates_hf.disk import make_directory, read_array, read_json, write_array, write_json
from mates_hf.engine.processes import Processes
from mates_hf.errors import MatesError
from mates_hf.influence.difference import Direction, EpsilonChoice, FloatArray
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

SHARD_ROWS = 512  # candidates measured at a time; a killed probe loses no more than these
SHARDS_FILE = "shards.json"
TOLERANCE = 1e-4  # relative, between a direction and the same one found again
_OURS = re.compile(r"\d+(-[\d.e+-]+)*\.npy(\.tmp)?")  # also the names of earlier versions


class Shards:
    """The losses that a probe left in a folder, as far as they belong to the direction at hand.

    All processes make one and call its methods together; the main one alone has the folder.

    Args:
        folder: where they are kept; None keeps nothing.
        direction: u.
        settings: Settings of the probe, JSON values.
        ids: (N,) candidates, in the order they are measured.
        processes: those that measure together.
    """

    def __init__(
        self,
        folder: Path | None,
        direction: Direction,
        settings: Mapping[str, Any],
        ids: IntArray,
        processes: Processes,
    ) -> None:
        self._folder = folder if processes.is_main else None
        self._processes = processes
        content = json.dumps({**settings, "rows": SHARD_ROWS}, sort_keys=True, default=_name_of).encode()
        key = hashlib.sha256(content + np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
        self._about: dict[str, Any] = {
            "key": key,
            "norm": direction.norm,
            "reference_loss": direction.reference_loss,
        }

    def choice(self, choose: Callable[[], EpsilonChoice]) -> EpsilonChoice:
        """ε as it was chosen for the shards that are there, else what `choose` finds; other shards are deleted.

        Args:
            choose: called by all processes, or by none.

        Returns:
            The choice, the same in every process.
        """
        stored = self._read_choice()
        if not self._processes.agree(float(stored is not None)):
            choice = choose()
            if self._folder is not None:
                self._begin(self._folder, choice)
            return choice
        chosen = [math.nan] * 4
        if stored is not None:
            found = (stored.epsilon, stored.agreement, stored.num_rows, stored.num_tokens)
            chosen = [math.nan if value is None else float(value) for value in found]
        epsilon, agreement, num_rows, num_tokens = (self._processes.agree(value) for value in chosen)
        return EpsilonChoice(
            epsilon=epsilon,
            agreement=None if math.isnan(agreement) else agreement,
            num_rows=int(num_rows),
            num_tokens=int(num_tokens),
        )

    def measured(
        self, rows: Candidates, measure: Callable[[Candidates], tuple[FloatArray, FloatArray]]
    ) -> tuple[FloatArray, FloatArray]:
        """Losses at either side of all rows, some at a time; those that are there are read back.

        Args:
            rows: candidates with T trained tokens.
            measure: losses at either side of some of them; called by all processes.

        Returns:
            Two arrays (T,), nats.
        """
        parts = []
        for start in range(0, len(rows), SHARD_ROWS):
            shard = rows.take(np.arange(start, min(start + SHARD_ROWS, len(rows))))
            shape = (2, int(shard.num_targets.sum()))
            stored = self._read(start, shape)
            if self._processes.agree(float(stored is not None)):
                both = np.zeros(shape)
                if stored is not None:
                    both[:] = stored
                parts.append(self._processes.sum(both))
                continue
            parts.append(np.stack(measure(shard)))
            self._keep(start, parts[-1])
        plus, minus = np.concatenate(parts, axis=1)
        return plus, minus

    def _read_choice(self) -> EpsilonChoice | None:
        if self._folder is None or not (self._folder / SHARDS_FILE).exists():
            return None
        try:
            found = read_json(self._folder / SHARDS_FILE)
            same = found["key"] == self._about["key"] and all(
                math.isclose(found[name], self._about[name], rel_tol=TOLERANCE) for name in ("norm", "reference_loss")
            )
            return EpsilonChoice(**found["epsilon"]) if same else None
        except (OSError, MatesError, KeyError, TypeError, ValueError):
            return None

    def _begin(self, folder: Path, choice: EpsilonChoice) -> None:
        """Make room for the shards of this direction: none of another one stays."""
        try:
            make_directory(folder)
            for path in folder.iterdir():
                if _OURS.fullmatch(path.name):
                    path.unlink()
            write_json(folder / SHARDS_FILE, {**self._about, "epsilon": dataclasses.asdict(choice)})
        except OSError as error:
            self._give_up(error)

    def _read(self, start: int, shape: tuple[int, int]) -> npt.NDArray[Any] | None:
        if self._folder is None:
            return None
        try:
            found = read_array(self._folder / f"{start}.npy")
        except (OSError, MatesError) as error:
            logger.warning("Measured once more: %s", error)
            return None
        return found if found is not None and found.shape == shape else None

    def _keep(self, start: int, losses: FloatArray) -> None:
        if self._folder is not None:
            try:
                write_array(self._folder / f"{start}.npy", losses)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Nothing that is kept here is needed but by a rerun: go on without."""
        logger.warning("What is measured is not kept on its way (%s): a probe that is killed starts anew.", error)
        self._folder = None


def _name_of(value: Any) -> str:
    """The name of a function, or of an object's class: the same in every process and every start."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
