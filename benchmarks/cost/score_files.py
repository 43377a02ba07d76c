"""How fast is a corpus of files scored and cut to its best fifth, and in what memory?

A text influence model scores a folder of Parquet files (zstd), and a fifth of the rows is written: in one process with
all cores, and in two worker processes. The peer is a copy of the same files by pyarrow (`read_table`, `write_table`
with zstd), which is what has to be read and written anyway. Arms take turns, each in a process of its own that has
scored a small file before, so that compiling is not counted; starting two workers is, and is shown.

Memory is the largest resident set of a process that scores a file, and one of four times its size, each a single row
group, and of a worker; also of workers that score gigabytes each, a row group repeated. Thousands of small files
are scored and copied too. `--huge` scores one file of 50 GB of text alone, and adds that to the results that are
there: its footer lists one row group again and again, so it is read at full length and is small on disk. With `--data`
the corpus there is read, else the built-in one; each file has it in another order. Trade-off: the page cache holds
most files, so this is the cost of the work and not of a disk.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.corpus import read_documents
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import alternate, in_its_own_process, median_ratio, num_cores, temporary_folder, versions
from benchmarks.lab.memory import MIB
from benchmarks.lab.tables import markdown, table, title

DATA = False
COPY, ONE, TWO = "pyarrow copy", "scored, one process", "scored, two workers"
NUM_FILES, SMALL_FILES, SMALL_ROWS = 4, 10_000, 5
LARGE_FILES, LARGE_GROUPS = 2, 16  # of the part `large`, each group all texts
HUGE_BYTES, HUGE_RATIO = 50e9, 0.02  # of text, of the part `huge`, and what is kept of it


def write_files(folder: Path, texts: list[str], num_files: int, **options: Any) -> None:
    """Parquet files that each hold all the texts, in an order of their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number in range(num_files):
        order = np.random.default_rng(number).permutation(len(texts))
        rows = {
            "id": [f"{number}-{i}" for i in order], "url": [f"https://example.org/{i}" for i in order],
            "text": [texts[i] for i in order],
        }  # fmt: skip
        pq.write_table(pa.table(rows), folder / f"{number:05d}.parquet", compression="zstd", **options)


def repeat_file(path: Path, folder: Path, num_files: int, times: int) -> None:
    """Files that each hold the rows of one many times, a row group each."""
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = pq.read_table(path)
    for number in range(num_files):
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", rows.schema, compression="zstd") as writer:
            for _ in range(times):
                writer.write_table(rows, row_group_size=rows.num_rows)


def list_again(path: Path, target: Path, times: int) -> None:
    """A file whose footer lists the one row group of another `times` times: so long to read, and no longer on disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target.parent.mkdir()
    once, whole = pq.read_metadata(path), pq.read_metadata(path)
    for _ in range(times - 1):
        whole.append_row_groups(once)
    footer = pa.BufferOutputStream()
    whole.write_metadata_file(footer)  # with the four bytes that a file begins with
    content = path.read_bytes()
    pages = content[: -8 - int.from_bytes(content[-8:-4], "little")]
    target.write_bytes(pages + footer.getvalue().to_pybytes()[4:])


def distil(texts: list[str], folder: Path) -> str:
    """Save a selector of what a few pairs of words are worth; the units that its model counts."""
    from mates_hf.prediction.text_model import TextInfluenceModel
    from mates_hf.selection.selector import MatesSelector

    worth = [text.count(" the ") + text.count(", and ") - text.count(" of the ") for text in texts]
    shares = [value / (1 + len(text)) for value, text in zip(worth, texts, strict=True)]
    model = TextInfluenceModel.distil(shares, texts)
    MatesSelector(model).save_pretrained(folder)
    return model.units


def copied(source: Path, out: Path) -> None:
    """Read and write each file."""
    import pyarrow.parquet as pq

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in sorted(source.iterdir()):
        pq.write_table(pq.read_table(path), out / path.name, compression="zstd")


def scored(selector: Any, source: Path, out: Path, workers: int, ratio: float = 0.2) -> dict[str, Any]:
    """Score a folder into a new one."""
    from mates_hf.selection.file_scoring import score_files

    shutil.rmtree(out, ignore_errors=True)
    return score_files(selector, source, out, ratio=ratio, workers=workers).to_dict()


def speed(folder: str, name: str, repeats: int) -> dict[str, Any]:
    """Seconds of each arm on the files of a folder; in a process of its own."""
    from mates_hf.selection.selector import MatesSelector

    work = Path(folder)
    selector = MatesSelector.from_pretrained(work / "selector")
    scored(selector, work / "few", work / "out", 1)  # compiles
    report: dict[str, Any] = {}
    arms: dict[str, Callable[[], Any]] = {
        COPY: lambda: copied(work / name, work / "copy"),
        ONE: lambda: report.update(scored(selector, work / name, work / "out", 1)),
        TWO: lambda: scored(selector, work / name, work / "out", 2),
    }
    seconds = alternate(arms, repeats)
    return {"seconds": seconds, "report": {**report, "out": ""}}


def peak_of(process: str) -> int:
    """Bytes that a process had resident at most, files it maps included."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory(folder: str, name: str, workers: int) -> dict[str, Any]:
    """Largest resident sets after scoring the files of a folder; in a process of its own."""
    from mates_hf.selection.selector import MatesSelector

    work = Path(folder)
    peaks = {"own": 0, "worker": 0}

    def watch() -> None:
        while True:
            for process in multiprocessing.active_children():
                with contextlib.suppress(OSError, StopIteration):  # it has ended
                    peaks["worker"] = max(peaks["worker"], peak_of(str(process.pid)))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    ratio = HUGE_RATIO if name == "huge" else 0.2
    report = scored(MatesSelector.from_pretrained(work / "selector"), work / name, work / "out", workers, ratio)
    peaks["own"] = peak_of("self")
    sizes = {"files": name, "bytes": report["bytes_read"], "scored": report["bytes_scored"], "workers": workers}
    if name == "huge":
        sizes |= {"seconds": report["seconds"], "rows": report["rows"], "kept": report["rows_kept"]}
    return {**sizes, **peaks}


def measured(work: Path, name: str, workers: int) -> dict[str, Any]:
    """`memory` in a process of its own."""
    return in_its_own_process(memory, str(work), name, workers, threads=num_cores(), steady=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The part that takes long."""
    parser.add_argument(
        "--huge", action="store_true", help="only the file of 50 GB, added to the results that are there"
    )


def with_huge(bench: Bench, texts: list[str]) -> dict[str, Any]:
    """The newest document with the memory of a process that scores one file of 50 GB."""
    document = bench.earlier()
    if document is None:
        raise SystemExit("`--huge` adds to results, and there are none: run it without first.")
    times = 3 if bench.quick else 1 + int(HUGE_BYTES / sum(len(text.encode()) for text in texts))
    with temporary_folder(bench.work) as work:
        distil(texts[:2_000], work / "selector")
        write_files(work / "one", texts, 1, row_group_size=len(texts))
        list_again(work / "one" / "00000.parquet", work / "huge" / "00000.parquet", times)
        say(f"Scoring one row group {times} times")
        found = {**measured(work, "huge", 1), "times": times, "load": os.getloadavg()[0]}
    others = [one for one in document["memory"] if one["files"] != "huge"]
    return {**document, "memory": [*others, found]}


def run(bench: Bench) -> dict[str, Any]:
    """Make the files, and take times and memory."""
    data = bench.data
    large = data / "large" / "corpus.jsonl.gz"
    documents = read_documents(large if large.exists() else data / "corpus.jsonl.gz", 2_000 if bench.quick else None)
    texts = [document["text"] for document in documents]
    if bench.options.huge:
        return with_huge(bench, texts)
    num_small, repeats = (50, 1) if bench.quick else (SMALL_FILES, 3)
    load = os.getloadavg()[0]
    with temporary_folder(bench.work) as work:
        say("Making files")
        units = distil(texts[:20_000], work / "selector")
        write_files(work / "few", texts[:50], 2)
        write_files(work / "files", texts, NUM_FILES)
        write_files(work / "small", texts[:SMALL_ROWS], num_small)
        for name, times in (("one", 1), ("four", 4)):
            write_files(work / name, texts * times, 1, row_group_size=len(texts) * times)
        found = {}
        for name, turns in (("files", repeats), ("small", 1)):
            say(f"Taking times of {name}")
            found[name] = in_its_own_process(speed, str(work), name, turns, threads=num_cores())
        say("Measuring memory")
        peaks = [
            measured(work, name, workers) for name, workers in (("few", 1), ("one", 1), ("four", 1), ("files", 2))
        ]
        repeat_file(work / "one" / "00000.parquet", work / "large", LARGE_FILES, 2 if bench.quick else LARGE_GROUPS)
        peaks.append(measured(work, "large", LARGE_FILES))
    return {
        "settings": {
            "quick": bench.quick, "cores": num_cores(), "load_before": load, "load_after": os.getloadavg()[0],
            "units": units, "texts": len(texts), "files": NUM_FILES, "small": num_small,
            **versions("pyarrow", "numba"),
        },
        "speed": found,
        "memory": peaks,
    }  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings = document["settings"]
    blocks = []
    for name, found in document["speed"].items():
        report = found["report"]
        rows = []
        for arm, times in found["seconds"].items():
            middle = statistics.median(times)
            hourly = report["bytes_read"] / 1e9 / middle * 3600
            against = median_ratio(found["seconds"][COPY], times)
            megabytes = report["bytes_scored"] / 1e6 / middle
            rows.append([arm, f"{middle:,.1f}", f"{megabytes:,.0f}", f"{hourly:,.0f}", f"{against:.2f}"])
        what = f"{report['files']:,} files of {report['bytes_read'] / report['files'] / 1e6:,.3g} MB"
        blocks += [
            f"{'Files' if name == 'files' else 'Small files'}: {what}, {report['rows']:,} rows, "
            f"{report['bytes_scored'] / 1e6:,.0f} MB of text. Starting the workers is in their time.",
            table(["what", "seconds", "MB of text a second", "GB of files an hour", "speed of a copy"], rows),
        ]
    huge = next((one for one in document["memory"] if one["files"] == "huge"), None)
    shown = [
        [
            one["files"], f"{one['bytes'] / 1e6:,.0f}", f"{one['scored'] / 1e6:,.0f}", one["workers"],
            f"{one['own'] / MIB:,.0f}", f"{one['worker'] / MIB:,.0f}" if one["worker"] else "",
        ]
        for one in document["memory"]
    ]  # fmt: skip
    return markdown(
        title("score_files", settings["quick"]),
        f"{settings['cores']} cores, beside other work (load before: {settings['load_before']:.1f}, after: "
        f"{settings['load_after']:.1f}), Python {settings['python']}, pyarrow {settings['pyarrow']}. The model counts "
        f"{settings['units']}. The best fifth of the rows is written.",
        *blocks,
        "Largest resident set: `one` and `four` are one file of a single row group, `files` are those above."
        + (
            " `large` repeats the row group of `one`."
            if any(one["files"] == "large" for one in document["memory"])
            else ""
        ),
        table(["files", "MB", "MB of text", "workers", "MiB of the process", "MiB of a worker"], shown),
        ""
        if huge is None
        else f"`huge`: a file whose footer lists the row group of `one` {huge['times']} times, {huge['rows']:,} rows. "
        f"Of these {huge['kept']:,} were kept, in {huge['seconds']:,.0f} s at a load of {huge['load']:.1f}.",
    )
