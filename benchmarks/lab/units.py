"""Units of work: what a benchmark of many trainings runs side by side, keeps one by one and goes on from.

Place in the flow: `selection.py`, `fidelity.py`, `influence_models.py` and `selector_gain.py` say what a unit is and
what the page looks like; this says how units run, where they are kept and how the page is written and checked.

Trade-off: a unit that is killed starts again from its beginning; units of minutes need nothing finer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lab import rounded, write_built_in

Result = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MALLOC_SETTINGS = {
    # glibc otherwise gives each logits tensor back to the kernel and page-faults it in anew. Read at process start.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A benchmark that has begun.

    Attributes:
        options: of the command line.
        page: Markdown file; its JSON is beside it.
        data: folder of the data, or of text of the Python installation in its place; `work` where it reads neither.
        work: folder of this run's units.
    """

    options: argparse.Namespace
    page: Path
    data: Path
    work: Path


def say(text: str) -> None:
    """One line to standard output, at once."""
    print(text, flush=True)


# --- kept results ---


def keep(path: Path, result: Result) -> None:
    """Write the result of a unit, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(path)


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


def take_over(work: Path, results: Mapping[str, Result], wanted: Mapping[str, Result]) -> int:
    """Keep units of an earlier JSON that are not there yet and were made as they would be made now.

    Args:
        work: folder of this run.
        results: by name, each with the `settings` it was made with.
        wanted: settings by name, of all units there are.

    Returns:
        How many were taken.
    """
    num = 0
    for name, result in results.items():
        same = name in wanted and plain(wanted[name]) == result.get("settings")
        if same and not unit_path(work, name).exists():
            keep(unit_path(work, name), result)
            num += 1
    return num


# --- running them ---


@contextlib.contextmanager
def single_threads(num: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each: two that wait for each other on a busy machine are slower than one."""
    os.environ.update(MALLOC_SETTINGS, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with ProcessPoolExecutor(num, mp_context=get_context("spawn")) as pool:
        yield pool


def side_by_side(
    work: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int, deadline: float
) -> Iterator[Any]:
    """Run `work(*call)` for each call in `workers` processes, begin none after the deadline; yields what is done."""
    todo = iter(calls)
    with single_threads(workers) as pool:
        running = {pool.submit(work, *call) for call in itertools.islice(todo, workers)}
        while running:
            done = next(as_completed(running))
            running.remove(done)
            if time.perf_counter() < deadline:
                running |= {pool.submit(work, *call) for call in itertools.islice(todo, 1)}
            yield done.result()


def run_units(
    bench: Opened,
    work: Callable[..., tuple[str, float]],
    calls: Mapping[str, tuple[Any, ...]],
    cost: Mapping[str, float] | None = None,
) -> int:
    """Run the units that are not kept yet, and say how far it is.

    Args:
        bench: says where they are kept, in how many processes they run, and until when one may begin.
        work: runs a unit and keeps its result; name and seconds.
        calls: its arguments, by name, in the order of worth.
        cost: what each takes relative to the others; None takes all for the same.

    Returns:
        How many are left.
    """
    calls = {name: call for name, call in calls.items() if not unit_path(bench.work, name).exists()}
    say(f"{len(calls)} units to do")
    workers, minutes = bench.options.workers, bench.options.minutes
    weight = {name: 1.0 if cost is None else cost[name] for name in calls}
    started, done, number = time.perf_counter(), 0.0, 0
    for number, (name, seconds) in enumerate(side_by_side(work, calls.values(), workers, started + 60 * minutes), 1):
        done += weight.pop(name)
        left = (time.perf_counter() - started) * sum(weight.values()) / done
        say(f"[{number}/{len(calls)}] {name}: {seconds:.0f} s, about {left / 60:.0f} min left")
    return len(calls) - number


# --- the command line and the page ---


def parser_of(doc: str | None, *, workers: int | None = 2, data: bool = True) -> argparse.ArgumentParser:
    """The options that a benchmark of units has.

    Args:
        doc: of the script; its first line is the description.
        workers: how many by default; None where units use what earlier ones left, so that they run one by one.
        data: whether it reads the folder of the data.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if data:
        parser.add_argument("--data", type=Path, help="folder with corpus.jsonl.gz and eval/; --quick needs none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for the JSON and the page")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for units already done")
    if workers is None:
        parser.set_defaults(workers=1)
    else:
        parser.add_argument("--workers", type=int, default=workers, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no unit after this many")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="recompute the page from the JSON, and compare")
    return parser


def opened(
    parser: argparse.ArgumentParser,
    name: str | Callable[[argparse.Namespace], str],
    write: Callable[[Result], str],
    differences: Callable[[Result], list[str]] | None = None,
) -> Opened:
    """Parse the options; where `--check` asks for it, compare the page with its JSON and end the program.

    Args:
        parser: `parser_of`, with what the benchmark adds.
        name: of the benchmark, or what makes it from the options.
        write: the page of a document.
        differences: statistics of the JSON that its own arrays do not give; None where the page has all of them.

    Returns:
        The options and places.
    """
    options = parser.parse_args()
    name = name if isinstance(name, str) else name(options)
    page = options.out / f"{name}{'-quick' if options.quick else ''}.md"
    if options.check:
        check_page(page, write, differences)
    logging.basicConfig(level=logging.ERROR)
    work = options.work / name / ("quick" if options.quick else "full")
    data = work
    if "data" in options:
        if options.data is None and not options.quick:
            parser.error("--data must name the folder of the data")
        data = options.data or write_built_in(work / "built-in")
    return Opened(options=options, page=page, data=data.resolve(), work=work.resolve())


def write_results(page: Path, document: Result, write: Callable[[Result], str], digits: int) -> Result:
    """Write the JSON and, from what was written, the page; the document as a reader finds it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(document, digits), ensure_ascii=False, separators=(",", ":")) + "\n"
    page.with_suffix(".json").write_text(text, encoding="utf-8")
    found: Result = json.loads(text)
    page.write_text(write(found), encoding="utf-8")
    say(page.read_text(encoding="utf-8"))
    return found


def read_results(page: Path) -> Result | None:
    """The JSON document beside a page; None where there is none."""
    path = page.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_page(
    page: Path, write: Callable[[Result], str], differences: Callable[[Result], list[str]] | None = None
) -> None:
    """End the program: well if the committed page is what its JSON gives, and the JSON's statistics its arrays."""
    document = read_results(page)
    assert document is not None, f"no JSON beside {page}"
    found = [] if differences is None else differences(document)
    if write(document) != page.read_text(encoding="utf-8"):
        found.append("The page differs.")
    sys.exit("\n".join(found) or None)


def end(num_left: int) -> None:
    """End the program with code 3 where units are left."""
    if num_left:
        say(f"{num_left} units are left; the same command goes on")
        sys.exit(3)
