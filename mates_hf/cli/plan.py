"""`mates-hf plan`: what selecting would cost a run that has not begun, and what it must gain to pay.

Where it is used: by whoever decides on a run. Trade-off: a few numbers of the run are asked for, and the rest is
assumed and printed; `--json` has all of them.
"""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

from mates_hf.cli.printing import print_json, print_lines

_SIZES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def add_command(commands: Any) -> None:
    """Add `plan` to the subparsers."""
    command = commands.add_parser("plan", help="say what selecting would cost a run, and when it pays")
    run = command.add_argument_group("the run")
    run.add_argument("--params", type=number, required=True, metavar="N", help="parameters, such as 410M or 410e6")
    run.add_argument("--tokens", type=number, required=True, metavar="N", help="tokens of the whole run, such as 26B")
    run.add_argument("--batch-tokens", type=number, required=True, metavar="N", help="tokens of an optimizer step")
    run.add_argument("--row-tokens", type=number, default=1024.0, metavar="N", help="tokens of a row (1,024)")
    run.add_argument(
        "--looked-up", type=number, default=0.0, metavar="N",
        help="parameters in tables that ids are looked up in: vocabulary times width, unless the head is tied (0)",
    )  # fmt: skip
    run.add_argument("--pool-tokens", type=number, metavar="N", help="tokens of the pool, to see whether they suffice")
    run.add_argument("--passages", type=number, default=1024.0, metavar="N", help="reference passages (1,024)")
    run.add_argument("--passage-tokens", type=number, default=100.0, metavar="N", help="tokens of each (100)")
    machine = command.add_argument_group("what it runs on")
    machine.add_argument("--devices", type=int, default=8, metavar="N", help="number of devices (8)")
    machine.add_argument(
        "--device-flops", type=number, default=4e14, metavar="N",
        help="FLOPs a second that a device reaches in training (4e14: 40 %% of an H100 in bf16)",
    )  # fmt: skip
    machine.add_argument("--price", type=number, metavar="X", help="price of one device for an hour, any currency")
    rounds = command.add_argument_group("rounds; left out, a config is proposed")
    rounds.add_argument("--update-steps", type=int, metavar="N", help="optimizer steps of a round")
    rounds.add_argument("--num-probes", type=int, metavar="N", help="candidates that a round probes")
    rounds.add_argument("--selection-ratio", type=float, metavar="X", help="share of the candidates that is chosen")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from mates_hf.config import MatesConfig
    from mates_hf.reporting.forecast import RunSize
    from mates_hf.reporting.payback import Machine, plan_selection

    row, batch = int(arguments.row_tokens), arguments.batch_tokens
    if row < 1:
        raise ValueError(f"`--row-tokens` must be at least 1, got {arguments.row_tokens:g}.")
    if batch < row:
        raise ValueError(f"`--batch-tokens` must be at least a row's `--row-tokens` ({row}), got {batch:.0f}.")
    rows = max(1, round(batch / row))
    size = RunSize(
        num_parameters=int(arguments.params),
        num_looked_up=int(arguments.looked_up),
        tokens_per_row=row,
        batch_rows=rows,
        max_steps=int(arguments.tokens / (rows * row)),
        num_passages=int(arguments.passages),
        tokens_per_passage=arguments.passage_tokens,
    )
    names = ("update_steps", "num_probes", "selection_ratio")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given and "update_steps" not in given:
        raise ValueError(f"`--update-steps` must be given with {', '.join(_flag(name) for name in given)}.")
    machine = Machine(
        num_devices=arguments.devices, flops_per_second=arguments.device_flops, price=arguments.price
    )  # fmt: skip
    plan = plan_selection(
        size, machine, MatesConfig(**given) if given else None, pool_tokens=arguments.pool_tokens
    )  # fmt: skip
    if arguments.json:
        print_json(plan.to_dict())
    else:
        print_lines(plan.lines())
    return 0


def _flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def number(text: str) -> float:
    """A number as people write it: 410M, 26B, 5e5, 524,288."""
    found = re.fullmatch(r"([0-9][0-9,_]*\.?[0-9]*(?:e[+-]?[0-9]+)?)([kmbgt]?)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a number such as 410M, 26B or 5e5, got {text!r}")
    value = float(found[1].replace(",", "").replace("_", "")) * _SIZES[found[2]]
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number that is no larger than 1e308, got {text!r}")
    return value
