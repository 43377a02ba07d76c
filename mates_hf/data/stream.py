"""`MatesStream`: a streamed candidate pool that a Trainer takes as its `train_dataset`.

Where it is used: the user wraps a stream in it. `training/stream/sampler`, in the main process, reads the stream
buffer by buffer, chooses from each, spools what it chose, and hands out row numbers. The dataloader asks this object
for those, in its workers too. To it this is a map-style dataset with very many rows, so its batching, sharing out and
skipping are those of any dataset.

Trade-off: a row can be asked for only once the sampler has chosen it. The order of rows is a function of the stream,
the settings and the influence models alone: the same for any number of workers and processes, and over a resume.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mates_hf.data.spool import Spool
from mates_hf.data.stream_source import Resume, StreamSource
from mates_hf.display import card
from mates_hf.errors import UnsupportedSettingError

LENGTH = 2**60  # rows that it says it has: a run ends by `max_steps`, or where the stream does


class MatesStream:
    """A stream as candidate pool: the best rows of each buffer are trained on.

    Give it to the Trainer as `train_dataset`, with a `MatesCallback`. Each process reads the whole stream.

    Args:
        pool: The stream: a `datasets.IterableDataset`, or any object whose `__iter__` gives rows (dicts) and that has
            `state_dict` and `load_state_dict`.
        buffer_rows: Largest number of rows of a buffer. A round's selection takes effect with the next buffer, so
            buffers are smaller where the shortest round has fewer rows.
        resume: How a run that resumes finds its place in the stream. `state`: by its `state_dict`. `reread`: by
            reading it again from the beginning, for a source without one that gives the same rows each time.
        spool_dir: Folder of this machine for the rows of the buffers in use. None: a folder beside the rounds. With
            several machines without a shared disk, each has its own.
        num_rows: Number of rows of the stream, where it is known. A run that needs more is then refused before its
            first step. None: the stream's `len`, if it has one.

    Raises:
        TypeError: `pool` is no iterable of rows, or a dataset that is no stream.
        ValueError: a number is out of its range.
        UnsupportedSettingError: `pool` is shuffled by a buffer, split over processes, or cannot be read from a place
            on; the message names the way out.
    """

    def __init__(
        self,
        pool: Any,
        buffer_rows: int = 65_536,
        *,
        resume: Resume = "state",
        spool_dir: str | os.PathLike[str] | None = None,
        num_rows: int | None = None,
    ) -> None:
        for name, value, least in (("buffer_rows", buffer_rows, 2), ("num_rows", num_rows, 1)):
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not ok and (name == "buffer_rows" or value is not None):
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        self.buffer_rows, self.spool_dir = buffer_rows, None if spool_dir is None else Path(spool_dir)
        self._source: StreamSource | None = StreamSource(pool, resume)
        self.num_rows = self._source.length() if num_rows is None else num_rows
        self.spool: Spool | None = None  # once a run has opened it

    def __repr__(self) -> str:
        rows = "not known" if self.num_rows is None else f"{self.num_rows:,}"
        state = "not opened by a run" if self.spool is None else f"spooled to {self.spool.folder}"
        return card("MatesStream", {"buffer_rows": f"{self.buffer_rows:,}", "num_rows": rows, "state": state})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # workers read files, never the stream

    def __len__(self) -> int:
        """A very large number, which is not the stream's length: nobody knows that before its end."""
        return LENGTH

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row that was chosen, by its number in the stream."""
        if self.spool is None:
            raise UnsupportedSettingError(
                f"Rows of a MatesStream must be asked for by the sampler of a MatesCallback, got a request for row "
                f"{row} before one was there. Add a MatesCallback to the Trainer, and leave `train_sampling_strategy` "
                "as it is by default."
            )
        return self.spool.row(int(row))

    @property
    def source(self) -> StreamSource:
        """What is read, in the process that made it."""
        assert self._source is not None
        return self._source
