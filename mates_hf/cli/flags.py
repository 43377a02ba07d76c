"""The options of a command, made from the fields of the settings that it fills.

Where it is used: `fit` and `pilot`. Trade-off: a field's help is written once, at the field, and its type says what
the option takes; what a field cannot say, such as a position or a file, the command adds itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from mates_hf.cli.plan import number


def add_flags(command: argparse.ArgumentParser, settings: type, *, given_alone: bool = False) -> None:
    """Add an option for each field of a dataclass.

    Args:
        command: The command's parser.
        settings: A dataclass whose fields have a `help` in their metadata, and types that are whole numbers, numbers
            (which may be `410M`), names, switches, a `Literal`, or a tuple of names; or one of these or None.
        given_alone: Whether what was not given stays None, for a command with other sources of settings; else it gets
            the field's default.
    """
    types = typing.get_type_hints(settings)
    for one in dataclasses.fields(settings):
        kind, origin = types[one.name], typing.get_origin(types[one.name])
        kinds = [part for part in typing.get_args(kind) if part is not type(None)] or [kind]
        default = None if one.default is dataclasses.MISSING else one.default
        hidden = default in (None, ()) or isinstance(default, bool)
        shown = "" if hidden else f" (default: {f'{default:g}' if isinstance(default, float) else default})"
        options: dict[str, Any] = {"help": one.metadata["help"].replace("`", "").replace("%", "%%") + shown}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if given_alone else "store_true"
        elif origin is tuple:
            options |= {"nargs": "+", "metavar": "NAME"}
        elif origin is typing.Literal:
            options["choices"] = kinds
        else:
            options |= {"type": _signed if kinds[0] is float else kinds[0], "metavar": "X" if kinds[0] is str else "N"}
        command.add_argument("--" + one.name.replace("_", "-"), default=None if given_alone else default, **options)


def flags_of(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """What the options that `add_flags` made were given, by field; None where one was not.

    Args:
        arguments: What the command was called with.
        settings: The dataclass.

    Returns:
        A value for each field.
    """
    return {one.name: getattr(arguments, one.name) for one in dataclasses.fields(settings)}


def _signed(text: str) -> float:
    """A number as people write it, which may be below 0."""
    return -number(text[1:]) if text.startswith("-") else number(text)
