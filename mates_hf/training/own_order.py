"""The Trainer's own order of rows: where its sampler is, how it is drawn whole, and that all processes drew the same.

Where it is used: `MatesCallback` takes the sampler out of the dataloader through this and puts it back; the
`ScheduledSampler` draws each pass with `draw_pass`.

Trade-off: a sampler is asked for all its rows at once, so that later rows may be replaced; torch's `RandomSampler`
would make a Python list of them (36 bytes a row), so for exactly that class, and accelerate's seedable one, the same
permutation is drawn as an array. Whether the installed versions draw it so is tried on a small one first.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, RandomSampler

from mates_hf.engine.processes import Processes
from mates_hf.errors import UnsupportedSettingError
from mates_hf.training.mixed_in import replace_dataset

logger = logging.getLogger(__name__)

Rows = npt.NDArray[np.integer[Any]]

BLOCK = 1 << 20  # rows looked at at once
_ABSENT = object()
_TRIED = 1000  # rows of the permutation by which an installed version is tried


def find_sampler(dataloader: Any) -> Any:
    """The sampler of a prepared dataloader, or None where it has none that could be replaced.

    In several processes `get_sampler` knows of accelerate's seedable sampler only; any other one lies a level deeper,
    in the batch sampler that is shared out.
    """
    sampler = dataloader.get_sampler()
    return sampler if sampler is not None else getattr(_holders(dataloader)[-1], "sampler", None)


def install(dataloader: Any, sampler: Any, dataset: Any = None) -> Callable[[], None]:
    """Let a prepared dataloader take its rows from `sampler`; returns what undoes it.

    Args:
        dataloader: The dataloader, as accelerate prepared it.
        sampler: The sampler that is to give its rows.
        dataset: The dataset that answers them; None leaves the one that is there.

    Returns:
        A function that puts back what was there.

    Raises:
        UnsupportedSettingError: the dataset cannot be replaced.
    """
    put_back = None if dataset is None else replace_dataset(dataloader, dataset)
    holders = _holders(dataloader)
    before = [getattr(holder, "sampler", _ABSENT) for holder in holders]
    dataloader.set_sampler(sampler)
    holders[-1].sampler = sampler

    def restore() -> None:
        if put_back is not None:
            put_back()
        for holder, own in zip(holders, before, strict=True):
            if own is not _ABSENT:
                holder.sampler = own
            elif hasattr(holder, "sampler"):
                del holder.sampler

    return restore


def _holders(dataloader: Any) -> list[Any]:
    """The batch sampler of a dataloader and, where it is shared out over processes, the one inside."""
    own = getattr(dataloader, "sampler", None)
    outer = own if isinstance(own, BatchSampler) else dataloader.batch_sampler
    inner = getattr(outer, "batch_sampler", None)
    return [outer] if inner is None else [outer, inner]


class OwnPass(NamedTuple):
    """One pass of a sampler.

    Attributes:
        rows: (N,) integer, its rows in order.
        each_once: true where no row can be in it twice, by how it is drawn.
        finish: does what the sampler does after its last row, where it does anything.
    """

    rows: Rows
    each_once: bool
    finish: Callable[[], Any] | None


def draw_pass(sampler: Any, num_rows: int) -> OwnPass:
    """All rows that a sampler yields, drawn as it draws them: same rows, same random streams.

    Args:
        sampler: with a length.
        num_rows: rows in the pool; decides how small the integers may be.

    Returns:
        The pass, in int32 where that holds the pool's row numbers.

    Raises:
        UnsupportedSettingError: the sampler yields fewer rows than its length, or rows that are not in the pool.
    """
    dtype = np.dtype(np.int32 if num_rows <= 2**31 else np.int64)
    kind: Any = type(sampler)
    if _is_plain_random(sampler) and _is_drawn_by_randperm(kind):
        return _permutation(sampler, dtype)
    rows = iter(sampler)
    try:
        found = np.fromiter(rows, np.int64, count=len(sampler))
    except (ValueError, TypeError) as error:
        raise UnsupportedSettingError(
            f"The training sampler ({type(sampler).__name__}) must yield as many row numbers as its length says "
            f"({len(sampler)}), and does not ({error}). Mend its `__len__` or its `__iter__`."
        ) from error
    if len(found) and (found.min() < 0 or found.max() >= num_rows):
        raise UnsupportedSettingError(
            f"The training sampler ({type(sampler).__name__}) must yield rows of the pool, 0 to {num_rows - 1}, got "
            f"{found.min()} to {found.max()}. Make it of the dataset that is trained on."
        )
    is_generator = inspect.isgenerator(rows)  # others have nothing left to do, and may hold a list of all rows
    return OwnPass(found.astype(dtype), False, functools.partial(_exhaust, rows) if is_generator else None)


def _exhaust(rows: Any) -> None:
    for _ in rows:
        pass


def _is_plain_random(sampler: Any) -> bool:
    """Whether a sampler is one of the two known ones, without replacement, drawn on the CPU."""
    if type(sampler) not in (RandomSampler, SeedableRandomSampler) or sampler.replacement:
        return False
    generator = sampler.generator
    is_on_cpu = torch.get_default_device().type == "cpu" if generator is None else generator.device.type == "cpu"
    return is_on_cpu and sampler.num_samples <= len(sampler.data_source)


def _permutation(sampler: Any, dtype: np.dtype[Any]) -> OwnPass:
    """What the two known samplers do, without a list."""
    num, generator = len(sampler.data_source), sampler.generator
    finish: Callable[[], Any] | None = None
    if isinstance(sampler, SeedableRandomSampler):
        if generator is None:
            generator = sampler.generator = torch.Generator()
        generator.manual_seed(sampler.epoch + sampler.initial_seed)
        finish = functools.partial(sampler.set_epoch, sampler.epoch + 1)
    elif generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    elif sampler.num_samples == num:
        # It draws one more permutation and takes nothing of it; the next pass is drawn from where that leaves off.
        finish = functools.partial(torch.randperm, num, generator=generator)
    kind = torch.int32 if dtype == np.int32 else torch.int64
    rows = torch.randperm(num, generator=generator, dtype=kind).numpy()
    return OwnPass(rows[: sampler.num_samples], True, finish)


@functools.cache
def _is_drawn_by_randperm(kind: Any) -> bool:
    """Whether the installed version of a known sampler yields what `_permutation` draws, and leaves what it leaves."""

    def tried(with_generator: bool, draw: Callable[[Any], list[int]]) -> list[Any]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(3) if with_generator else None
        sampler = kind(range(_TRIED), generator=generator)
        found = [draw(sampler), draw(sampler), torch.get_rng_state().tolist()]
        # A sampler that is told its epoch seeds its generator anew at each pass: what it leaves there says nothing.
        if generator is None or hasattr(sampler, "set_epoch"):
            return found
        return [*found, generator.get_state().tolist()]

    def as_array(sampler: Any) -> list[int]:
        own = _permutation(sampler, np.dtype(np.int32))
        if own.finish is not None:
            own.finish()
        return [int(row) for row in own.rows]

    with torch.random.fork_rng(devices=[]):
        try:
            return all(tried(given, list) == tried(given, as_array) for given in (False, True))
        except Exception:  # another signature or other fields: it is asked row by row then
            return False


class OrderHash:
    """SHA-256 of an order of rows as int64, made in a thread where it is long, so that training need not wait."""

    def __init__(self, rows: Rows) -> None:
        self._digest = hashlib.sha256()
        self._thread: threading.Thread | None = None
        if len(rows) > BLOCK:
            self._thread = threading.Thread(target=self._read, args=(rows,), daemon=True, name="mates-order-hash")
            self._thread.start()
        else:
            self._read(rows)

    def _read(self, rows: Rows) -> None:
        for start in range(0, len(rows), BLOCK):
            self._digest.update(rows[start : start + BLOCK].astype("<i8").data)

    def hexdigest(self) -> str:
        """The hash; waits for it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._digest.hexdigest()


def require_one_order(processes: Processes, sampler: Any, sha256: str) -> None:
    """Refuse a sampler that draws another order in each process: rows would be trained on twice, and others never.

    Args:
        processes: The processes of the run; all must call it at the same point.
        sampler: the Trainer's own.
        sha256: SHA-256 of the order that this process drew.

    Raises:
        UnsupportedSettingError: names the sampler, the processes that differ, and the way out.
    """
    different = processes.differing(sha256)
    if different:
        raise UnsupportedSettingError(
            f"All processes must draw one order of rows, but the training sampler ({type(sampler).__name__}) draws "
            f"another one in processes {different} than in the main one: they would train on some rows twice and on "
            "others never. Seed it equally in every process: give it a `set_epoch` and draw from a generator that is "
            "seeded by `data_seed` and the epoch, or give it a `generator` attribute and set "
            "`accelerator_config.use_seedable_sampler=False`, by which accelerate gives every process the main one's."
        )


def warn_of_own_streams(processes: Processes, sampler: Any, num_passes: int) -> None:
    """Say beforehand that a sampler may draw another order in each process in a later epoch.

    In the first one torch's stream is the same in all of them. Dropout on rows of several lengths moves it otherwise.

    Args:
        processes: The processes of the run.
        sampler: the Trainer's own.
        num_passes: how many passes of it are begun before the first selection.
    """
    draws_from_torch = getattr(sampler, "generator", _ABSENT) is None and not hasattr(sampler, "set_epoch")
    if processes.size > 1 and num_passes > 1 and draws_from_torch:
        logger.warning(
            "The training sampler (%s) draws from the random stream of each process, which need not be equal after "
            "the first epoch; a run whose processes draw different orders ends there. Set "
            "`accelerator_config.use_seedable_sampler=False`, by which accelerate gives it one generator.",
            type(sampler).__name__,
        )


def require_one_clock(processes: Processes, counts: dict[str, Any]) -> None:
    """Refuse a run whose processes count steps and rows differently.

    Args:
        processes: The processes of the run; all must call it at the same point.
        counts: batches an epoch, accumulation, rows a batch, and where the run starts.

    Raises:
        UnsupportedSettingError: names the processes that differ, and the way out.
    """
    different = processes.differing(counts)
    if different:
        raise UnsupportedSettingError(
            "All processes must take as many batches in an epoch and start at the same row; processes "
            f"{different} count otherwise than the main one ({counts}). With "
            "`accelerator_config.even_batches=False` some have a batch more than others: set it to True, or "
            "`dataloader_drop_last=True`; and give every process the same arguments and checkpoint."
        )


def check_rows_once(rows: Rows) -> None:
    """Refuse a sampler that repeats rows in its first pass, which is drawn before the first step.

    Cost: one byte a pool row, for as long as it looks.

    Args:
        rows: (N,) integer, the Trainer's own order of the pool.

    Raises:
        UnsupportedSettingError: a row is in it twice.
    """
    if not len(rows):
        return
    seen = np.zeros(int(rows.max()) + 1, np.bool_)
    repeated: list[int] = []
    num = 0
    for start in range(0, len(rows), BLOCK):
        block = np.sort(rows[start : start + BLOCK])
        again = block[seen[block] | (np.diff(block, prepend=-1) == 0)]
        seen[block] = True
        num += len(again)
        repeated += again[: 8 - len(repeated)].tolist()
    if num:
        raise UnsupportedSettingError(
            f"The training sampler must give each row at most once in a pass, got {num} that it gave before, first "
            f"rows {sorted(set(repeated))}. Use a sampler without replacement, and leave it to the selection to "
            "prefer some rows."
        )
