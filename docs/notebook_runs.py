"""The small run that the notebooks share: the cells of `quickstart.md` make it, the other notebooks read it.

Where it is used: in a hidden first cell of each notebook. Trade-off: a notebook that is executed alone trains first.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

RUN = Path("runs/quickstart")
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```", re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[str]:
    """The visible code cells of a notebook, in order."""
    found = CELL.findall(page.read_text(encoding="utf-8"))
    return [source for options, source in found if "remove-cell" not in options]


def enter(*, needs_run: bool) -> None:
    """Go to the folder that the notebooks share, and make the run there if it is needed and missing.

    Args:
        needs_run: Whether the notebook reads the run.
    """
    here = Path(__file__).parent
    folder = Path(os.environ.get("MATES_DOCS_RUNS", here / "_build" / "notebooks"))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if needs_run and not (RUN / "trainer_state.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n".join(cells(here / "quickstart.md")), "quickstart.md", "exec"), {"display": repr})
