"""`mates-hf`: what a person asks from a shell, one module a command.

A finished run: `round`, `verify`, `cost` and `groups` print what its rounds did; `report` makes a page of it all, and
`compare` one of two runs. Its data: `where` says when rows were trained on, `forget` keeps rows out from now on, and
`audit` lists what was used. Before a run: `plan` says what selecting would cost, and `pilot` whether it would pay.
Without a run: `fit` fits a selector, and `score` writes files again with the rows that help most. `env` prints what a
bug report needs.

Where it is used: right of all, and the only folder that prints. Trade-off: what a command needs is imported when it
runs, so that `mates-hf env` works in an installation that is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mates_hf.cli import answer, env, fit, pilot, plan, report, runs, score
from mates_hf.errors import MatesError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0; 1 with one line on stderr where the command cannot be done or a run is not as it must be; 2
        with the help where no command was given (and, as `SystemExit`, where arguments are wrong).
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = int(arguments.run(arguments))
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        what = f"`{missing}` must be installed and is not: `pip install {missing}`" if missing else str(error)
        print(f"mates-hf: {what}", file=sys.stderr)
        return 1
    except Exception as error:
        said = _said_of(error, arguments)
        if said is None:
            raise
        print(f"mates-hf: {said}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the arguments that returns the exit status."""
    parser = argparse.ArgumentParser(prog="mates-hf", description="Model-aware pretraining data selection.")
    parser.add_argument("--version", action="version", version=f"mates-hf {_own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    env.add_command(commands)
    runs.add_commands(commands)
    report.add_command(commands)
    answer.add_commands(commands)
    fit.add_command(commands)
    plan.add_command(commands)
    pilot.add_command(commands)
    score.add_command(commands)
    return parser


def _own_version() -> str:
    """The version of the package that runs, which need not be the one that is installed."""
    return str(getattr(sys.modules.get("mates_hf"), "__version__", None) or env.version_of("mates-hf") or "unknown")


def _said_of(error: Exception, arguments: argparse.Namespace) -> str | None:
    """An error in one line: what it says, or which file of a run is damaged; None for a fault of this program."""
    if isinstance(error, _expected_errors()):
        return " ".join(str(error).split()) or type(error).__name__
    from mates_hf.cli.damage import find_damage

    given = [getattr(arguments, name, None) for name in ("rounds_dir", "path", "a", "b")]
    return find_damage([path for path in given if isinstance(path, str)])


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is said in one line; anything else is a fault of this program and keeps its traceback."""
    return (OSError, ValueError, MatesError)
