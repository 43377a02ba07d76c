"""`mates-hf score`: files in, files out, by a fitted selector.

Where it is used: by data engineers, on corpora of any size, on one machine. Trade-off: a thin use of `score_files`,
which says what is done; what is about the shell is here.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mates_hf.cli.printing import print_json, print_lines

_EXAMPLE = "example: mates-hf score selector/ 'data/*.parquet' --out kept/ --ratio 0.2 --workers 8"


def add_command(commands: Any) -> None:
    """Add `score` to the subparsers."""
    command = commands.add_parser(
        "score", help="score files and write the rows that help most", epilog=_EXAMPLE,
        description="Score Parquet and JSON Lines files, and write them again with the rows that help most.",
    )  # fmt: skip
    command.add_argument("selector", metavar="SELECTOR", help="a saved selector, a run, a round, or a Hub id")
    command.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="files, quoted patterns or folders; s3://, gs:// and hf:// too"
    )
    command.add_argument("--out", required=True, help="the output folder: new, or begun by the same command")
    amount = command.add_mutually_exclusive_group(required=True)
    amount.add_argument("--ratio", type=float, help="share of the rows to keep, over all files")
    amount.add_argument("--tokens", type=int, dest="num_tokens", help="number of trained tokens to keep")
    amount.add_argument("--threshold", type=float, help="lowest influence to keep; --threshold=-1e-3 if negative")
    amount.add_argument("--top-k", type=int, dest="k", help="number of rows to keep")
    amount.add_argument("--add-scores", action="store_true", help="write all rows, with a column `influence`")
    command.add_argument("--random-share", type=float, default=0.0, help="share of it drawn at random from the rest")
    command.add_argument("--temperature", type=float, default=0.0, help="noise, in standard deviations of the labels")
    command.add_argument("--seed", type=int, default=0, help="random seed of noise and of the order among equals")
    command.add_argument("--group-column", help="column that says which group a row is of: source, language, licence")
    command.add_argument("--max-group-boost", type=float, help="most times its share of the rows a group may get")
    command.add_argument("--min-group-boost", type=float, default=0.0, help="least times its share it must get")
    command.add_argument("--allow", metavar="RULE", help="rows that may be used: 'licence=cc-by,cc0;consent=yes'")
    command.add_argument("--column", help="column to score; input_ids, text or messages by default")
    command.add_argument("--workers", type=int, default=1, help="processes of one thread; 1 uses all cores in one")
    command.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at what cannot be read")
    command.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    command.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> int:
    """Score the files and print the summary; 2 where the arguments cannot be."""
    from mates_hf.allow import parse_allow
    from mates_hf.selection.budget import Budget, require_rows
    from mates_hf.selection.options import bounds_of

    drawn = {name: getattr(arguments, name) for name in ("random_share", "temperature", "seed")}
    amount = {name: getattr(arguments, name) for name in ("ratio", "k", "threshold", "num_tokens")}
    groups = {name: getattr(arguments, name) for name in ("group_column", "max_group_boost", "min_group_boost")}
    try:
        budget = Budget(**({"ratio": 1.0} if arguments.add_scores else amount), **drawn)
        bounds = bounds_of(*groups.values())
        if bounds is not None and bounds.bind:
            require_rows(budget)
        parse_allow(arguments.allow)
        if arguments.workers < 1:
            raise ValueError(f"`workers` must be a whole number of at least 1, got {arguments.workers}.")
    except ValueError as error:
        print(f"mates-hf score: {error}", file=sys.stderr)
        return 2
    from mates_hf.selection.file_scoring import score_files
    from mates_hf.selection.selector import MatesSelector

    report = score_files(
        MatesSelector.from_pretrained(arguments.selector), arguments.inputs, arguments.out, **amount, **drawn,
        **groups, add_scores=arguments.add_scores, allow=arguments.allow, column=arguments.column,
        workers=arguments.workers, on_error=arguments.on_error,
    )  # fmt: skip
    if arguments.json:
        print_json(report.to_dict())
    else:
        print_lines(f"{name:<12} {words}" for name, words in report.facts().items())
    return 0
