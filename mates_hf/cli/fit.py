"""`mates-hf fit`: a selector from a public checkpoint, a pool and a reference, without a training run.

Where it is used: by whoever has data to choose and no run. `accelerate launch -m mates_hf fit ...` uses several
devices. Trade-off: options are the fields of `FitSettings`, so that each is described in one place.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from mates_hf.cli.flags import add_flags, flags_of
from mates_hf.cli.printing import print_json, print_lines
from mates_hf.training.fit.settings import FitSettings

_EPILOG = """\
The same command again continues a fit that was killed. Where the guard refuses, the exit status is 1, no selector is
written, and the message says about how many probes would do.

  mates-hf fit --model EleutherAI/pythia-160m --pool 'data/*.parquet' --reference passages.jsonl --out selector/
  accelerate launch --num_processes 8 -m mates_hf fit ...
  mates-hf fit --tokenizer EleutherAI/pythia-160m --pool 'data/*.parquet' --reference passages.jsonl --out filter/
"""


def add_command(commands: Any) -> None:
    """Add `fit` to the subparsers."""
    command = commands.add_parser(
        "fit",
        help="fit a selector to a checkpoint, or a filter by words, without a training run",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "--model", metavar="DIR_OR_ID",
        help="causal language model: a folder or a Hub id; without one the selector is a filter by words",
    )  # fmt: skip
    add(
        "--pool", required=True, nargs="+", metavar="FILES",
        help="Parquet or JSON Lines files (.gz, .zst, .bz2), a glob in quotes, fsspec URLs, a folder, or a Hub id",
    )  # fmt: skip
    add(
        "--reference", required=True, metavar="FILE",
        help="what the model should get better at: a file of passages (also .txt, one a line), or lm-eval:TASK",
    )  # fmt: skip
    add("--out", required=True, metavar="DIR", help="folder of the selector; must not be there yet")
    add("--column", help="the pool's column; default: input_ids, text or messages")
    add("--reference-column", help="the passages' column; default: one of these, or prompt and completion")
    add("--tokenizer", metavar="DIR_OR_ID", help="where the model's folder has no tokenizer, or no model is named")
    add("--pool-split", default="train", help="split of a pool on the Hub (default: train)")
    add("--allow", metavar="RULE", help="rows that may be used at all: 'licence=cc-by,cc0;consent=yes'")
    add("--work", metavar="DIR", help="working folder (default: the one of --out with .fit behind its name)")
    add("--keep-work", action="store_true", help="leave the working folder where it is")
    add("--distil", action="store_true", help="also write DIR-text, a selector that reads texts without a tokenizer")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--quiet", action="store_true", help="show no progress bars")
    add_flags(command, FitSettings)
    command.set_defaults(run=_fit, parser=command)


def _fit(arguments: argparse.Namespace) -> int:
    """Fit, and print what came of it."""
    settings = flags_of(arguments, FitSettings)
    try:
        FitSettings(**settings)
    except ValueError as error:
        arguments.parser.error(str(error))  # usage: exit 2
    pool = arguments.pool if len(arguments.pool) > 1 else arguments.pool[0]
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print on the way; stdout is the result's
        from mates_hf.training.selector_fit import fit_selector

        found = fit_selector(
            arguments.model, pool, arguments.reference, arguments.out, column=arguments.column,
            reference_column=arguments.reference_column, tokenizer=arguments.tokenizer,
            pool_split=arguments.pool_split, work=arguments.work, keep_work=arguments.keep_work,
            distil=arguments.distil, progress=not arguments.quiet, allow=arguments.allow, **settings,
        )  # fmt: skip
    if int(os.environ.get("RANK", 0)):
        return 0  # the first process speaks for all
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_lines(found.lines())
    return 0
