"""`mates-hf round`, `verify`, `cost` and `groups`: what a run left on disk, read without torch.

Where it is used: by whoever looks at a run, while it trains or afterwards. Trade-off: rounds are read from their
directories alone, so these commands work on a machine without torch and show nothing that a round did not record.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mates_hf.cli.printing import print_json, print_lines


def add_commands(commands: Any) -> None:
    """Add `round`, `verify`, `cost` and `groups` to the subparsers."""
    command = commands.add_parser("round", help="print what a finished round did")
    command.add_argument("path", metavar="PATH", help="a run's output_dir, its _mates, or a round directory in it")
    command.add_argument("number", metavar="NUMBER", nargs="?", type=int, help="which round; the newest by default")
    command.add_argument("--json", action="store_true", help="print all that it recorded as one JSON object")
    command.set_defaults(run=_round)

    command = commands.add_parser("verify", help="recompute a run's selections and check everything its rounds left")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_verify)

    command = commands.add_parser("cost", help="print seconds and FLOPs of a run's training, rounds and evaluations")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--rounds-dir", help="where its rounds are, if not in RUN/_mates")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=_cost)

    command = commands.add_parser("groups", help="print what each group of rows got, and how its loss changed")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--json", action="store_true", help="print a JSON object by group instead of a table")
    command.set_defaults(run=_groups)


def _round(arguments: argparse.Namespace) -> int:
    """Print a round, the newest one of a run by default."""
    from mates_hf.reporting.lines import round_json, round_lines
    from mates_hf.round_files import load_round, newest_round

    record = load_round(newest_round(arguments.path, arguments.number))
    if arguments.json:
        print_json(round_json(record))
    else:
        print_lines(round_lines(record))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Print what `verify_run` found; 1 where something is wrong."""
    from mates_hf.training.verify import report_lines, verify_run

    result = verify_run(arguments.path)
    if arguments.json:
        print_json(result.to_dict())
    else:
        print_lines(report_lines(result))
        if result.problem is not None:
            print(f"mates-hf: {result.problem}", file=sys.stderr)
    return int(result.problem is not None)


def _cost(arguments: argparse.Namespace) -> int:
    """Print a run's ledger."""
    from mates_hf.reporting.cost import run_cost

    cost = run_cost(arguments.path, rounds_dir=arguments.rounds_dir)
    if arguments.json:
        print_json(cost.to_dict())
    else:
        print_lines(cost.lines())
    return 0


def _groups(arguments: argparse.Namespace) -> int:
    """Print who gained and who paid."""
    from mates_hf.reporting.group_table import group_lines, run_groups

    found = run_groups(arguments.path)
    if arguments.json:
        print_json({one.name: one.to_dict() for one in found})
    else:
        print_lines(group_lines(found))
    return 0
