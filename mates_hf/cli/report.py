"""`mates-hf report` and `compare`: what a run selected, whether to trust it, and what it cost; and two runs together.

Where it is used: by whoever must trust a run, answer for it or pay for it. Trade-off: texts are shown as far as the
run kept some or `--dataset` has them; a report never asks for anything else than files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mates_hf.cli.printing import print_json, print_lines


def add_command(commands: Any) -> None:
    """Add `report` and `compare` to the subparsers."""
    command = commands.add_parser("report", help="write what a run selected, and what it cost, as one HTML file")
    add = command.add_argument
    add("path", metavar="RUN", help="a run's output_dir, or its _mates; while it trains or afterwards")
    add("--out", metavar="FILE", help="the file to write (default: report.html next to the rounds)")
    add("--open", action="store_true", help="show it in the browser afterwards")
    add("--redact", action="store_true", help="leave all texts and pictures of the pool out")
    add("--price", type=float, metavar="X", help="price of one device for an hour, any currency")
    add("--devices", type=int, default=1, metavar="N", help="number of devices that the run trained on (1)")
    add(
        "--dataset",
        metavar="PATH",
        help="the pool, for texts: a folder of save_to_disk, or Parquet or JSON Lines files",
    )
    add("--rounds-dir", help="where its rounds are, if not in RUN/_mates")
    add("--no-verify", action="store_true", help="do not recompute the selections, which takes long for many rounds")
    add("--json", action="store_true", help="print the data as one JSON object, and write no file")
    command.set_defaults(run=_report)

    command = commands.add_parser("compare", help="compare two runs at equal tokens and at equal FLOPs")
    command.add_argument("a", metavar="A", help="output_dir of a run")
    command.add_argument("b", metavar="B", help="output_dir of another, such as one that did not select")
    command.add_argument(
        "--metric", help="what both logged, such as eval_loss (default: the first loss that both have)"
    )
    command.add_argument("--out", metavar="FILE", help="write an HTML page as well")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_compare)


def _report(arguments: argparse.Namespace) -> int:
    """Write the page and say where it is; 1 where the run's files are not as they must be."""
    from mates_hf.training.run_report import read_report, save_report

    given: dict[str, Any] = {
        "price": arguments.price, "num_devices": arguments.devices, "redact": arguments.redact,
        "rounds_dir": arguments.rounds_dir, "verify": not arguments.no_verify,
        "dataset": None if arguments.dataset is None else open_dataset(arguments.dataset),
    }  # fmt: skip
    data = read_report(arguments.path, **given)
    if arguments.json:
        print_json(data)
    else:
        target = save_report(data, arguments.path, arguments.out, rounds_dir=arguments.rounds_dir)
        print_lines([f"{data['verdict']['text']} {data['verdict']['reason']}", f"written: {target}"])
        if arguments.open:
            import webbrowser

            webbrowser.open(Path(target).resolve().as_uri())
    if data["verify"] is not None and not data["verify"]["ok"]:
        print(f"mates-hf: {data['verify']['problem_text']}", file=sys.stderr)
        return 1
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """Print the comparison, and write its page where one is asked for."""
    from mates_hf.disk import written_whole
    from mates_hf.paths import expand_path
    from mates_hf.prediction.artifacts import library_version
    from mates_hf.reporting.comparison import compare_html, compare_lines, compare_runs

    data = compare_runs(arguments.a, arguments.b, metric=arguments.metric)
    if arguments.out is not None:
        page = compare_html(data, library_version())
        with written_whole(expand_path(arguments.out)) as file:
            file.write(page.encode())
    if arguments.json:
        print_json(data)
    else:
        print_lines(compare_lines(data))
    return 0


def open_dataset(path: str) -> Any:
    """The pool of a run from disk.

    Args:
        path: A folder that `save_to_disk` wrote, a folder of Parquet or JSON Lines files, or such a file or glob.

    Returns:
        A `datasets.Dataset`.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: the folder holds several splits.
    """
    import glob

    from datasets import Dataset, load_dataset, load_from_disk

    from mates_hf.paths import expand_path

    place = expand_path(path)
    if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        found = load_from_disk(str(place))
        if not isinstance(found, Dataset):
            raise ValueError(
                f"`--dataset` must be one split, got {', '.join(found)} in `{path}`: give the folder of one."
            )
        return found
    files = sorted(glob.glob(str(place / "*") if place.is_dir() else str(place)))
    for kind, ends in (("parquet", (".parquet",)), ("json", (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst"))):
        mine = [name for name in files if name.endswith(ends)]
        if mine:
            return load_dataset(kind, data_files=mine, split="train")
    raise FileNotFoundError(
        f"`--dataset` must be a folder of `save_to_disk`, or Parquet or JSON Lines files; `{path}` is none."
    )
