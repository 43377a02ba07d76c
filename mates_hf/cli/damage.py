"""Which file of a run is not as the run wrote it, where a command that reads the run could not go on.

Where it is used: `main` asks it before it takes an error for a fault of this program. Trade-off: readers check what
they need, and this looks at the rest only where one failed: checksums of each round first, then what every version has
written into `round.json`, then the files of the Trainer. What it finds is one line; where all is well, the error keeps
its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import COPY_AGAIN, read_json, sha256_of
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.round_files import CHECKSUMS_FILE, PROBES_FILE, ROUND_FILE, find_rounds, read_checksums, read_labels

_STATE_FILE = "trainer_state.json"
_NUMBERS = ("number", "step", "from_step", "to_step", "from_position", "num_rows", "cursor", "seed")
_OBJECTS = ("config", "pool", "guard", "stages", "reference")


def find_damage(paths: list[str]) -> str | None:
    """The first file that is not as a run wrote it.

    Args:
        paths: Runs, folders of rounds, or rounds, as they were given to a command.

    Returns:
        What must be there and what is, in one line; None where nothing is wrong.
    """
    for given in paths:
        try:
            for wrong in _damage_of(expand_path(given)):
                return wrong
        except (MatesError, OSError, ValueError) as error:
            return str(error)
    return None


def _damage_of(path: Path) -> Iterator[str]:
    if (path / ROUND_FILE).exists():
        path = path.parent
    folder, rounds = find_rounds(path)
    for one in rounds.values():
        yield from _damage_of_round(one)
    homes = {path, folder.parent}
    for file in sorted(
        file for home in homes for file in [home / _STATE_FILE, *home.glob(f"checkpoint-*/{_STATE_FILE}")]
    ):
        if file.exists():
            yield from _damage_of_state(file)


def _damage_of_round(path: Path) -> Iterator[str]:
    """What is wrong with a round, the plainest first."""
    info = read_json(path / ROUND_FILE)
    for name in _NUMBERS:
        value = info.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"`{path / ROUND_FILE}` must have `{name}`, a whole number, got {value!r}. {COPY_AGAIN}"
    for name in _OBJECTS:
        if not isinstance(info.get(name), Mapping):
            yield f"`{path / ROUND_FILE}` must have `{name}`, an object, got {info.get(name)!r}. {COPY_AGAIN}"
    decision = info["guard"].get("decision")
    if not isinstance(decision, str):
        yield f"`{path / ROUND_FILE}` must have `decision` in `guard`, got {decision!r}. {COPY_AGAIN}"
    for name, digest in read_checksums(path).items():
        if sha256_of(path / name) != digest:
            what = f"its SHA-256 is not that in {CHECKSUMS_FILE}"
            yield f"`{path / name}` must be as the run wrote it, and {what}. {COPY_AGAIN}"
    read_labels(path / PROBES_FILE)


def _damage_of_state(file: Path) -> Iterator[str]:
    state = read_json(file)
    history: Any = state.get("log_history")
    if not isinstance(state.get("global_step"), int):
        yield f"`{file}` must have `global_step`, a whole number, got {state.get('global_step')!r}. {COPY_AGAIN}"
    if not isinstance(state.get("total_flos", 0), (int, float, type(None))):
        yield f"`{file}` must have `total_flos`, a number, got {state['total_flos']!r}. {COPY_AGAIN}"
    if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
        yield f"`{file}` must have `log_history`, a list of objects, got {type(history).__name__}. {COPY_AGAIN}"
