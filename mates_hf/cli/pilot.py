"""`mates-hf pilot`: a small experiment with a verdict, before anybody pays for the large one.

Where it is used: by whoever decides on a run. Trade-off: options are the fields of `PilotSettings`, so that each is
described in one place; a YAML file may give them, and flags win over it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import typing
from pathlib import Path
from typing import Any

from mates_hf.cli.flags import add_flags, flags_of
from mates_hf.cli.plan import number
from mates_hf.cli.printing import print_json, print_lines
from mates_hf.pilot.settings import PilotSettings

_EPILOG = """\
The same command again continues a pilot that was killed. Settings and kill criteria are in OUT/pilot.json before the
first step; a call with others is refused, and `--seeds` alone may be raised. The page is OUT/pilot.html. The exit
status is 0 for every verdict.

  mates-hf pilot --out pilot/ --tiny
  mates-hf pilot --out pilot/ --params 410M --tokens 26B --price 2.5 --pool 'data/*.parquet' --reference passages.jsonl
"""
_INPUTS = ("pool", "reference", "held_out")


def add_command(commands: Any) -> None:
    """Add `pilot` to the subparsers."""
    command = commands.add_parser(
        "pilot",
        help="run a small experiment that says go, no-go or measure more",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the pilot")
    add("--config", metavar="FILE", help="YAML file with any of the settings below; flags win over it")
    add("--tiny", action="store_true", help="sizes that take about a quarter of an hour on a CPU")
    add("--pool", nargs="+", metavar="FILES", help="Parquet or JSON Lines files (.gz, .zst), a folder, or a Hub id")
    add("--reference", metavar="FILE", help="passages of what the model should get better at (also .txt, one a line)")
    add("--held-out", metavar="FILE", help="passages that arms are judged by (default: a part of the reference)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="show no progress bar")
    add_flags(command, PilotSettings, given_alone=True)
    command.set_defaults(run=_pilot, parser=command)


def _pilot(arguments: argparse.Namespace) -> int:
    """Run the pilot, and print its page."""
    options = flags_of(arguments, PilotSettings) | {name: getattr(arguments, name) for name in _INPUTS}
    flags = {name: value for name, value in options.items() if value is not None}
    given = {**_from_file(arguments.config, (*options, "tiny")), **flags}
    pool = given.pop("pool", "built-in")
    pool = pool[0] if isinstance(pool, list) and len(pool) == 1 else pool
    tiny = bool(given.pop("tiny", False)) or arguments.tiny
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print on the way; stdout is the result's
        from datasets import disable_progress_bars
        from transformers.utils import logging

        from mates_hf.pilot.run import run_pilot

        logging.disable_progress_bar()
        disable_progress_bars()
        found = run_pilot(
            arguments.out, pool, given.pop("reference", None), held_out=given.pop("held_out", None), tiny=tiny,
            progress=not arguments.quiet, **given,
        )  # fmt: skip
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_lines([*found.lines(), f"page: {found.page}"])
    return 0


def _from_file(path: str | None, names: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a YAML file; numbers may be written as on the command line, such as 410M."""
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` must be YAML, and is not ({' '.join(str(error).split())}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{path}` must hold settings with their values, got {type(found).__name__}.")
    wrong = sorted(set(map(str, found)) - set(names))
    if wrong:
        raise ValueError(
            f"`{path}` must hold settings of a pilot, got {', '.join(wrong)}. There are {', '.join(names)}."
        )
    return {name: _read_number(name, value) for name, value in found.items() if value is not None}


def _read_number(name: str, value: Any) -> Any:
    """A number that YAML reads as text, such as 410M or 5e-4."""
    if isinstance(value, str) and "float" in str(typing.get_type_hints(PilotSettings).get(name)):
        try:
            return number(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"`{name}` {error}.") from error
    return value
