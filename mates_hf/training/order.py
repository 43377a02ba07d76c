"""What a round decided, in memory: the rows to train on next, or, of a stream, the model that chooses them.

Where it is used: a round returns it, `session` schedules it and `beside` tells it to the other processes. Trade-off:
it holds all rows of a round, because its file may be deleted while they are trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import COPY_AGAIN, read_array, read_json
from mates_hf.errors import MatesError
from mates_hf.round_files import ROUND_FILE

Files = dict[str, npt.NDArray[np.uint8]]  # bytes of files by their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a round decided: the rows to train on next.

    Attributes:
        number: the round.
        from_position: pool rows before it takes effect; its global row position where no passages are mixed in.
        rows: (k,) int64 pool rows in training order.
        info: the round's `round.json`.
        files: Files of the influence model that buffers of a stream are selected by; there are no rows then.
    """

    number: int
    from_position: int
    rows: npt.NDArray[Any]
    info: Mapping[str, Any]
    files: Files = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of what the round decided, which `round.json` has as `order_sha256`."""
        if "stream" in self.info:
            return stream_digest(self.info["weights"], self.info["stream"], self.files)
        return hashlib.sha256(np.ascontiguousarray(self.rows, np.int64).tobytes()).hexdigest()

    def rows_from(self, position: int) -> npt.NDArray[Any]:
        """The rows at and after a position, counted as `from_position`."""
        rows: npt.NDArray[Any] = self.rows[max(0, position - self.from_position) :]
        return rows


def stream_digest(weights: str, stream: Mapping[str, Any], files: Files) -> str:
    """SHA-256 of the rule that a round of a stream decided: the weights it probed, what it says, and its model.

    Of the model its numbers count; what it tells of its fit holds seconds, which no two fits share.
    """
    digest = hashlib.sha256(json.dumps([weights, dict(stream)], sort_keys=True).encode())
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        digest.update(name.encode() + files[name].tobytes())
    return digest.hexdigest()


def load_order(path: Path) -> Order:
    """The order a finished round decided, in memory: its file may be deleted while it is trained on."""
    info = read_json(path / ROUND_FILE)
    rows = read_array(path / "selection.npy", np.int64)
    if rows is None:
        rows = read_array(path / "own_order.npy", np.int64)
    if rows is None:
        raise FileNotFoundError(f"`{path}` has neither selection.npy nor own_order.npy.")
    for name in ("number", "from_position", "cursor"):
        if not isinstance(info.get(name), int):
            raise MatesError(
                f"`{path / ROUND_FILE}` must hold the number `{name}`, got {info.get(name)!r}. {COPY_AGAIN}"
            )
    return Order(number=info["number"], from_position=info["from_position"], rows=np.array(rows), info=info)
