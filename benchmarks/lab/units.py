"""Units of work: what a benchmark of many trainings runs side by side, keeps one by one and goes on from.

Trade-off: a unit that is killed starts again from its beginning; units of minutes need nothing finer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.lab.harness import Bench, say
from benchmarks.lab.statistics import rounded
from mates_hf.disk import write_json

Result = dict[str, Any]


def keep(path: Path, result: Result) -> None:
    """Write the result of a unit, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def unit_path(work: Path, name: str) -> Path:
    """Where the result of a unit is kept."""
    return work / "units" / (name.replace("/", "--").replace(" ", "_").replace(",", "") + ".json")


def read_units(work: Path, names: Iterable[str]) -> dict[str, Result]:
    """Results by name, of the units that are there."""
    paths = {name: unit_path(work, name) for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def plain(value: Any) -> Any:
    """A value as a JSON file gives it back."""
    return json.loads(json.dumps(value))


def take_over(work: Path, results: Mapping[str, Result], wanted: Mapping[str, Result]) -> None:
    """Keep units of an earlier JSON that are not there yet and were made as they would be made now.

    A result has the `settings` it was made with; `wanted` has those of all units there are. A setting that a result
    does not know is new since then, and is the same if it has the default value, which the caller leaves out.
    """
    num = 0
    for name, result in results.items():
        same = name in wanted and plain(wanted[name]) == result.get("settings")
        if same and not unit_path(work, name).exists():
            keep(unit_path(work, name), result)
            num += 1
    say(f"{num} of {len(wanted)} units taken over from the JSON")


def recover(bench: Bench, sizes: Any, unit_of: type, arms: Mapping[str, Any], default: Any) -> dict[str, Result]:
    """All units that were made by arms as they are now, by name: of the newest JSON, and those that are kept.

    Units of a JSON of these sizes are kept from then on. `unit_of` is the record of a unit, and `arms` are records by
    name. A field that an older unit does not know has the value of the `default` arm there.
    """
    document = bench.earlier()
    same = document is not None and document["settings"]["sizes"] == plain(dataclasses.asdict(sizes))
    published = _as_now(document["units"] if document is not None and same else [], unit_of, arms, default)
    take_over(bench.work, published, {name: result["settings"] for name, result in published.items()})
    paths = sorted((bench.work / "units").glob("*.json"))
    kept_units = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {**published, **_as_now(kept_units, unit_of, arms, default)}


def _as_now(results: Iterable[Result], unit_of: type, arms: Mapping[str, Any], default: Any) -> dict[str, Result]:
    """Of these results those whose arm has the settings that it has now, by the unit's name."""
    keys = [field.name for field in dataclasses.fields(unit_of)]
    now = {name: plain(dataclasses.asdict(arm)) for name, arm in arms.items()}
    found = {}
    for result in results:
        unit = unit_of(**{key: result[key] for key in keys})
        settings = {**plain(dataclasses.asdict(default)), **result["settings"]}
        if now.get(unit.arm) == settings:
            found[unit.name] = {**result, "settings": settings}
    return found


@contextlib.contextmanager
def single_threads(num: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each: two that wait for each other on a busy machine are slower than one."""
    os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
    with ProcessPoolExecutor(num, mp_context=get_context("spawn")) as pool:
        yield pool


def side_by_side(
    work: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int, deadline: float
) -> Iterator[Any]:
    """Run `work(*call)` for each call in `workers` processes, begin none after the deadline; yields what is done."""
    todo = iter(calls if time.monotonic() < deadline else ())
    with single_threads(workers) as pool:
        running = {pool.submit(work, *call) for call in itertools.islice(todo, workers)}
        while running:
            done = next(as_completed(running))
            running.remove(done)
            if time.monotonic() < deadline:
                running |= {pool.submit(work, *call) for call in itertools.islice(todo, 1)}
            yield done.result()


def kept(work: Callable[..., Result], name: str, path: Path, call: tuple[Any, ...]) -> tuple[str, float]:
    """Run one unit in this process and keep its result with its seconds; name and seconds."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("mates_hf").setLevel(logging.ERROR)
    started = time.perf_counter()
    result = work(*call)
    seconds = time.perf_counter() - started
    keep(path, rounded({**result, "seconds": seconds}, 7))
    return name, seconds


def run_units(
    bench: Bench, work: Callable[..., Result], calls: Mapping[str, tuple[Any, ...]], workers: int | None = None
) -> dict[str, Result]:
    """Run the units that are not kept yet, and say how far it is; results of those that are done, by name.

    `bench` says where they are kept, until when one may begin, and how many run side by side where `workers` is None;
    it is told how many are left. `work` does one unit; `calls` has its arguments by name, in the order of worth.
    """
    paths = {name: unit_path(bench.work, name) for name in calls}
    todo = [(work, name, path, calls[name]) for name, path in paths.items() if not path.exists()]
    say(f"{len(todo)} units to do")
    started = time.perf_counter()
    done = side_by_side(kept, todo, workers or bench.options.workers, bench.deadline)
    for number, (name, seconds) in enumerate(done, 1):
        left = (time.perf_counter() - started) * (len(todo) - number) / number
        say(f"[{number}/{len(todo)}] {name}: {seconds:.0f} s, about {left / 60:.0f} min left")
    results = read_units(bench.work, calls)
    bench.left = len(calls) - len(results)
    return results
