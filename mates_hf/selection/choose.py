"""Choose k of N candidates: the highest influence, the highest with Gumbel noise, or any.

Where it is used: in the select stage, after a data influence model has predicted. Sign: > 0 helps, higher is better,
so every function here keeps the **largest** values. Trade-off: positions come back sorted, not ranked, because a
selection is a set whose training order is shuffled anyway; and the noise of a position depends on the seed and the
position alone, so a longer candidate list never changes the noise of the earlier ones, at the price of one generator a
block.

Memory beyond the input: an array of its size (the noisy influence, or the worth of rows), a byte a candidate of masks,
and a few numbers for each that is chosen: everything else goes through the candidates in blocks.

Shape suffix: N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.errors import InfluenceError
from mates_hf.records import InfluenceLabels, IntArray

BLOCK = 1 << 20  # candidates handled at once; also the noise's unit, so changing it changes every noisy selection
NOISE, TIES, UNIFORM = 0x6E6F, 0x7469, 0x756E  # keep the streams of one seed apart; never 0, which seeds like no word

GroupOf = Callable[[IntArray], IntArray]  # the number of each row's group
Seed = int | Sequence[int]


def gumbel_top_k(influence: npt.ArrayLike, k: int, temperature: float = 0.0, seed: Seed = 0) -> IntArray:
    """The k candidates of highest influence; with a temperature, of highest `influence / temperature + Gumbel(0, 1)`.

    With a temperature it draws k candidates one after another without replacement, each with probability proportional
    to exp(influence / temperature) among those left (Plackett-Luce). A candidate of higher influence is always the
    more likely one; temperature 0 is `top_k`, and a growing temperature approaches `uniform`.

    Args:
        influence: (N,) finite numbers, > 0 helps, higher is better; any unit.
        k: How many to choose, from 0 to N.
        temperature: In the unit of `influence` as passed. Influence is a small number (a standard deviation of 0.001
            nats/token is usual), so a temperature of 0.5 draws at random. `MatesConfig.temperature` is in standard
            deviations of the labels: for one of 0.5, pass `0.5 * labels.influence.std()`.
        seed: Seed of the noise and of the order among ties; a sequence such as (selection seed, round) is one seed.

    Returns:
        (k,) int64 positions in `influence`, ascending.

    Raises:
        ValueError: k, temperature or seed out of range, or `influence` not one-dimensional.
        TypeError: `influence` holds no real numbers, or another argument is no number.
        InfluenceError: influence is not finite; names the first positions.
    """
    check_temperature(temperature)
    _check_seed(seed)
    values_N = _checked(influence, k)
    if temperature == 0 or k in (0, len(values_N)):
        return largest(values_N, k, seed)
    return largest(noisy(values_N, temperature, seed), k, seed)


def ranked(influence: npt.ArrayLike, temperature: float = 0.0, seed: Seed = 0) -> IntArray:
    """All candidates, best first: its first k are the choice of `gumbel_top_k`, but among equals.

    Args:
        influence: (N,) finite numbers, > 0 helps, higher is better.
        temperature: Temperature of the noise in the unit of the values; 0 takes the highest.
        seed: Random seed of the noise, and of the one random order in which equals stand.

    Returns:
        (N,) int64 positions.

    Raises:
        TypeError: `influence` holds no real numbers.
        ValueError: `influence` is not one-dimensional.
        InfluenceError: influence is not finite; names the first positions.
    """
    values_N = _checked(influence, 0)
    if not len(values_N):
        return np.zeros(0, np.int64)
    if temperature:
        values_N = noisy(values_N, temperature, seed)
    shuffled = _generator(seed, TIES).permutation(len(values_N))
    order = shuffled[np.argsort(values_N[shuffled], kind="stable")[::-1]]
    return order.astype(np.int64, copy=False)


def noisy(values_N: npt.NDArray[Any], temperature: float, seed: Seed) -> npt.NDArray[Any]:
    """Values that rank like `values / temperature + Gumbel(0, 1)`; at least one."""
    # Adding temperature * noise ranks like dividing by temperature; divided by the larger of 1 and temperature,
    # neither overflows. Counted from the maximum, float32 is finest where the choice is made.
    scale = max(1.0, float(temperature))
    top = float(values_N.max())
    noisy_N = np.empty(len(values_N), np.result_type(values_N.dtype, np.float32))
    with np.errstate(over="ignore"):
        for block, span in _blocks(len(values_N)):
            noise = -np.log(_generator(seed, NOISE, block).standard_exponential(span.stop - span.start))
            noisy_N[span] = (values_N[span].astype(np.float64) - top) / scale + noise * (temperature / scale)
    return noisy_N


def top_k(influence: npt.ArrayLike, k: int, seed: Seed = 0) -> IntArray:
    """The k candidates of highest influence; equals are chosen among at random, never by position.

    Args:
        influence: (N,) finite numbers, > 0 helps, higher is better.
        k: How many candidates to choose, from 0 to N.
        seed: Random seed of the order among ties.

    Returns:
        (k,) int64 positions in `influence`, ascending.

    Raises:
        ValueError: k out of range, or `influence` not one-dimensional.
        TypeError: `influence` holds no real numbers.
        InfluenceError: influence is not finite; names the first positions.
    """
    _check_seed(seed)
    return largest(_checked(influence, k), k, seed)


def uniform(num: int, k: int, seed: Seed = 0) -> IntArray:
    """Any k of `num` candidates, each set equally likely: the control arm of every comparison.

    Args:
        num: How many candidates there are.
        k: How many candidates to choose, from 0 to `num`.
        seed: Random seed of the draw.

    Returns:
        (k,) int64 positions, ascending.

    Raises:
        ValueError: k out of range.
    """
    _check_seed(seed)
    _check_k(k, num)
    chosen = _generator(seed, UNIFORM).choice(num, k, replace=False, shuffle=False) if k else np.zeros(0)
    return np.sort(chosen.astype(np.int64, copy=False))


def with_others(chosen: IntArray, free: npt.NDArray[np.bool_], num: int, seed: Seed) -> IntArray:
    """Some positions and random free ones, each alike: `num` in all, or as many as there are.

    Args:
        chosen: (k,) int64 positions that are taken already.
        free: (N,) bool, True where a position may be drawn; False at the taken ones.
        num: Number of positions, at least k.
        seed: Random seed of the draw.

    Returns:
        Int64 positions, ascending.
    """
    num_free = int(np.count_nonzero(free))
    drawn = nth_true(free, uniform(num_free, min(num - len(chosen), num_free), seed))
    return np.sort(np.concatenate([chosen, drawn]))


def stage_seed(selection_seed: int, round_number: int, stage: str) -> int:
    """A seed of its own for each stage of each round."""
    words = [selection_seed, round_number, int.from_bytes(stage.encode()[:8], "little")]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def nth_true(mask: npt.NDArray[np.bool_], which: npt.NDArray[np.integer[Any]]) -> IntArray:
    """Where some of a mask's True entries are, without a list of all of them.

    Args:
        mask: (N,) bool.
        which: (k,) integer, numbers of True entries counted from 0, in any order.

    Returns:
        (k,) int64 positions in `mask`, in the order of `which`.
    """
    ends = np.cumsum([np.count_nonzero(mask[span]) for _, span in _blocks(len(mask))])
    block_of = np.searchsorted(ends, which, side="right")
    order = np.argsort(block_of, kind="stable")
    cuts = np.searchsorted(block_of, np.arange(len(ends) + 1), sorter=order)
    positions = np.empty(len(which), np.int64)
    for block, span in _blocks(len(mask)):
        asked = order[cuts[block] : cuts[block + 1]]
        if len(asked):
            local = np.flatnonzero(mask[span])
            positions[asked] = local[which[asked] - (ends[block] - len(local))] + span.start
    return positions


def _generator(seed: Seed, stream: int, block: int = 0) -> np.random.Generator:
    """The generator of one stream of a seed, and of one block in it."""
    words = [seed] if isinstance(seed, (int, np.integer)) else list(seed)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, stream], spawn_key=(block,))))


def _blocks(num: int) -> Iterator[tuple[int, slice]]:
    """Number and span of each block of candidates."""
    for block, start in enumerate(range(0, num, BLOCK)):
        yield block, slice(start, min(start + BLOCK, num))


def _check_k(k: int, num: int) -> None:
    """Raise unless k of `num` can be chosen."""
    if isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)):
        raise TypeError(
            f"`k` must be a whole number of candidates, got {k!r}. For a share of them, pass "
            "`int(share * len(influence))`."
        )
    if not 0 <= k <= num:
        raise ValueError(f"`k` must be from 0 to the number of candidates ({num}), got {k}.")


def _checked(influence: npt.ArrayLike, k: int) -> npt.NDArray[Any]:
    """Influence as a one-dimensional array of finite real numbers from which k can be chosen."""
    if isinstance(influence, InfluenceLabels):
        raise TypeError(
            "`influence` must be an array of numbers, got InfluenceLabels. Pass `labels.influence` to choose among "
            "the probed candidates, or an influence model's predictions to choose among all."
        )
    values_N = _as_array(influence)
    if values_N.ndim != 1:
        raise ValueError(f"`influence` must be one-dimensional, one number a candidate, got shape {values_N.shape}.")
    if values_N.dtype.kind not in "fiu":
        raise TypeError(f"`influence` must hold real numbers, got dtype {values_N.dtype}.")
    _check_k(k, len(values_N))
    bad: list[int] = []
    num_bad = 0
    for _, span in _blocks(len(values_N)):
        where = np.flatnonzero(~np.isfinite(values_N[span]))
        num_bad += len(where)
        bad += (where[: 8 - len(bad)] + span.start).tolist()
    if num_bad:
        raise InfluenceError(
            f"`influence` must be finite; {num_bad} of {len(values_N)} candidates are not, first at position "
            f"{', '.join(f'{i} ({values_N[i]})' for i in bad)}. Look at how these candidates were predicted, or leave "
            "them out."
        )
    return values_N


def _as_array(influence: Any) -> npt.NDArray[Any]:
    """Influence as an array, also from a torch tensor on any device, of any type, in a graph or not."""
    if callable(getattr(influence, "detach", None)):
        influence = influence.detach().cpu()
        if str(influence.dtype) == "torch.bfloat16":  # numpy has no such type
            influence = influence.float()
    try:
        return np.asarray(influence)
    except (ValueError, TypeError) as error:  # rows of several lengths, or an object that is no array
        raise TypeError(f"`influence` must be an array of one number a candidate, and is not ({error}).") from error


def check_temperature(temperature: Any) -> None:
    """Raise unless `temperature` is a finite number of at least 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, np.integer, np.floating)):
        raise TypeError(f"`temperature` must be a number, got {type(temperature).__name__}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"`temperature` must be a finite number of at least 0, got {temperature!r}. 0 takes the highest "
            "influence; for a choice that ignores influence use `uniform`."
        )


def _check_seed(seed: Any) -> None:
    """Raise unless `seed` is a whole number of at least 0, or several of them."""
    whole = (int, np.integer)
    words = [seed] if isinstance(seed, whole) else list(seed) if isinstance(seed, (list, tuple, np.ndarray)) else []
    if not words or not all(isinstance(word, whole) and not isinstance(word, bool) for word in words):
        raise TypeError(f"`seed` must be a whole number, or a sequence of them, got {seed!r}.")
    if min(words) < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed!r}.")


def largest(values_N: npt.NDArray[Any], k: int, seed: Seed) -> IntArray:
    """Ascending positions of the k largest values; which of those equal to the k-th is drawn at random."""
    num = len(values_N)
    if k in (0, num):
        return np.arange(k, dtype=np.int64)
    threshold = _kth_largest(values_N, k)
    above = np.flatnonzero(values_N > threshold)
    ties = np.flatnonzero(values_N == threshold)
    missing = k - len(above)
    if missing < len(ties):  # the first of one random order, so that a choice of k is part of that of k + 1
        ties = _generator(seed, TIES).permutation(ties)[:missing]
    return np.sort(np.concatenate([above, ties])).astype(np.int64, copy=False)


def _kth_largest(values_N: npt.NDArray[Any], k: int) -> Any:
    """The k-th largest value; k from 1. Holds 2k values and a block, or a copy of all where that is less."""
    num, room = len(values_N), 2 * k + BLOCK
    if room >= num:
        return np.partition(values_N, num - k)[num - k]
    largest, size, lowest = np.empty(room, values_N.dtype), 0, None
    for _, span in _blocks(num):
        values = values_N[span]
        if lowest is not None:
            values = values[values > lowest]  # k that are at least as large are held already
        largest[size : size + len(values)] = values
        size += len(values)
        if size >= 2 * k or span.stop == num:
            largest[:size].partition(size - k)
            largest[:k] = largest[size - k : size]
            lowest, size = largest[:k].min(), k
    return lowest


def even_places(codes: IntArray, num: int, generator: np.random.Generator) -> IntArray:
    """Places of some rows of a random order in which each group has its share, but for rounding.

    Args:
        codes: (R,) number of each row's group.
        num: Number of rows to take, at most R.
        generator: What draws how shares are rounded, so that each row is as likely as any other.

    Returns:
        (num,) int64 places, ascending.
    """
    by_group = np.argsort(codes, kind="stable")
    steps = (generator.random() + np.arange(num)) * (len(codes) / max(num, 1))
    return np.sort(by_group[np.minimum(steps.astype(np.int64), len(codes) - 1)])
