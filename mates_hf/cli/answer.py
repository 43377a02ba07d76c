"""`mates-hf where`, `forget` and `audit`: for whoever must answer for what a model was trained on.

Where it is used: on a run that is over, or while it trains. Trade-off: rows are named by their numbers in the pool, as
a run's files name them; ids need the dataset as well, because no file of a run holds them.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mates_hf.cli.printing import print_json, print_lines

_NOT_PROVEN = (
    "warning: the tokens of the dataset are not those that the run recorded. It holds other rows, or the collator of "
    "the run made the tokens or labels: make sure that it is the pool, in its order."
)
_ROWS = "rows of the pool: numbers with commas, or a file (.npy, .json, or one number a line)"


def add_commands(commands: Any) -> None:
    """Add `where`, `forget` and `audit` to the subparsers."""
    command = commands.add_parser("where", help="print at which step rows of the pool were trained on")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    _add_rows(command)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=_where)

    command = commands.add_parser("forget", help="keep rows out of all that a run still does, and out of its rounds")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates; it must not train now")
    _add_rows(command)
    command.add_argument(
        "--drop-models", action="store_true", help="delete influence models for good that cannot be fitted again"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_forget)

    command = commands.add_parser("audit", help="list what a run trained on, to be signed off")
    command.add_argument("path", metavar="RUN", help="a run's output_dir, or its _mates")
    command.add_argument("--column", help="count rows by this column, such as their licence; needs --dataset")
    command.add_argument("--dataset", metavar="FILES", nargs="+", help="the pool, as the run had it")
    command.add_argument("--rows-out", metavar="FILE", help="write the numbers of the rows to this .npy file")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the listing")
    command.set_defaults(run=_audit)


def _add_rows(command: argparse.ArgumentParser) -> None:
    """The ways to say which rows are meant."""
    named = command.add_mutually_exclusive_group(required=True)
    named.add_argument("--rows", metavar="ROWS", help=_ROWS)
    named.add_argument("--ids", metavar="IDS", help="ids with commas between them; needs --id-column and --dataset")
    command.add_argument("--id-column", metavar="COLUMN", help="column of the dataset with the id of each row")
    command.add_argument("--dataset", metavar="FILES", nargs="+", help="the pool, as the run had it")


def _rows_of(arguments: argparse.Namespace) -> Any:
    """The rows that are meant."""
    from mates_hf.answering.rows_asked import open_dataset, rows_of_argument, rows_of_ids
    from mates_hf.answering.where import open_run

    if arguments.rows is not None:
        return rows_of_argument(arguments.rows)
    if not arguments.id_column or not arguments.dataset:
        raise ValueError(
            "`--ids` needs `--id-column` and `--dataset`, which say in which column of which files to look."
        )
    pool = open_run(arguments.path, f"mates-hf {arguments.command}").pool
    dataset = open_dataset(arguments.dataset)
    found = rows_of_ids(dataset, arguments.id_column, arguments.ids.split(","), pool)
    if not found.proven:
        print(f"mates-hf: {_NOT_PROVEN}", file=sys.stderr)
    return found.rows


def _where(arguments: argparse.Namespace) -> int:
    """Print when rows were trained on."""
    from mates_hf.answering.where import where_rows

    found = where_rows(arguments.path, _rows_of(arguments))
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_lines(found.lines())
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    """Remove rows and print what was done."""
    from mates_hf.answering.forget import forget_rows

    found = forget_rows(arguments.path, _rows_of(arguments), drop_models=arguments.drop_models)
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_lines(found.lines())
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    """Print the listing; 1 where a check does not hold."""
    from mates_hf.answering.audit import audit_run

    found = audit_run(arguments.path, column=arguments.column, dataset=arguments.dataset, rows_out=arguments.rows_out)
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_lines(found.lines())
    if not found.ok:
        print(f"mates-hf: {found.facts['verify']['problem']}", file=sys.stderr)
    return int(not found.ok)
