"""Where a pilot lies: what was asked, what is trained on, and one file a unit, each whole or absent.

Where it is used: `run_pilot`. A pilot that was killed continues with the unit that was not done; another one in the
same folder is refused with the setting that differs. Seeds alone may grow, and the file keeps every number of seeds
that was asked for, since somebody who adds seeds has seen a result.

```
OUT/pilot.json     settings with the kill criteria, and names of the inputs; written before the first step
OUT/pilot-data/    rows, passages and the tokenizer, as all arms read them
OUT/units/         one JSON file an arm and seed, when it is done
OUT/runs/          output folders of the Trainer; `mates-hf round`, `verify` and `cost` read those of `ours`
OUT/result.json    the summary and the verdict; OUT/pilot.html is its page
```

Trade-off: data are copied into the folder, so that a pilot does not change when its sources do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import make_directory, read_json, write_json
from mates_hf.errors import MatesError
from mates_hf.pilot.settings import MAY_GROW
from mates_hf.training.lock import LOCK_FILE, RoundsLock, lock_for_one

ASKED_FILE, RESULT_FILE, PAGE_FILE = "pilot.json", "result.json", "pilot.html"
FORMAT_VERSION = 1
_DATA = "pilot-data"


class PilotPlace:
    """The folder of a pilot.

    Args:
        out: The folder.
        asked: Settings and names of the inputs, JSON values.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.out = out
        self.asked: dict[str, Any] = json.loads(json.dumps(dict(asked)))
        self._lock: RoundsLock | None = None

    @property
    def data(self) -> Path:
        """Where rows and passages are."""
        return self.out / _DATA

    def run_dir(self, name: str) -> Path:
        """The Trainer's output folder of a unit."""
        return self.out / "runs" / name

    def check(self) -> None:
        """Refuse a folder of something else, before anything is read or written.

        Raises:
            MatesError: it holds another pilot, or no pilot; says what differs.
        """
        path = self.out / ASKED_FILE
        if not path.exists():
            ours = (".", LOCK_FILE, _DATA)  # the last: a pilot that was killed before its first step
            if self.out.exists() and any(not one.name.startswith(ours) for one in self.out.iterdir()):
                raise MatesError(
                    f"`out` must be a new folder, or one of a pilot, and `{self.out}` holds something else. Name "
                    "another folder."
                )
            return
        found = read_json(path)
        old = found.get("asked", {})
        differing = [
            f"`{name}` (there {old.get(name)!r}, here {self.asked.get(name)!r})"
            for name in dict.fromkeys((*self.asked, *old))
            if old.get(name) != self.asked.get(name) and name != MAY_GROW
        ]
        if differing:
            raise MatesError(
                f"`{self.out}` holds a pilot that was begun with other settings; they differ in "
                f"{', '.join(differing)}. Criteria and settings are fixed before the first step: give the same again, "
                "or name another folder."
            )
        if self.asked[MAY_GROW] < max(found["seeds_asked"]):
            raise MatesError(
                f"`seeds` must be at least {max(found['seeds_asked'])} in `{self.out}`, got {self.asked[MAY_GROW]}: "
                "seeds may be added and never left out."
            )

    def open(self) -> None:
        """Make the folder this pilot's own, and keep others out.

        Raises:
            MatesError: it belongs to another pilot, or one that lives writes to it.
        """
        make_directory(self.out)
        self._lock = lock_for_one(self.out, self, "pilot", "name another folder")
        self.check()
        if not (self.out / ASKED_FILE).exists():  # data that no settings are known of
            shutil.rmtree(self.data, ignore_errors=True)

    def write_asked(self, made: Mapping[str, Any]) -> None:
        """Write down what was asked, before the first step; of a pilot that was begun, its new number of seeds.

        Args:
            made: What this version of the library makes of it: steps, rounds and settings of filters, JSON values.

        Raises:
            MatesError: the pilot was begun by a version that makes something else of it.
        """
        path, seeds, made = self.out / ASKED_FILE, self.seeds_asked, json.loads(json.dumps(dict(made)))
        begun = read_json(path) if seeds else {"asked": self.asked, "made": made}
        if begun["made"] != made:
            differing = [f"`{name}`" for name in made if begun["made"].get(name) != made[name]]
            raise MatesError(
                f"`{self.out}` holds a pilot that another version of this library began, which differs in "
                f"{', '.join(differing)}. Continue it with that version, or name another folder."
            )
        if not seeds or self.asked[MAY_GROW] > seeds[-1]:
            found = {"version": FORMAT_VERSION, "asked": begun["asked"], "made": made}
            write_json(path, {**found, "seeds_asked": [*seeds, self.asked[MAY_GROW]]})

    @property
    def seeds_asked(self) -> list[int]:
        """Every number of seeds that was asked for, in order; more than one says that somebody looked in between."""
        path = self.out / ASKED_FILE
        return [int(number) for number in read_json(path)["seeds_asked"]] if path.exists() else []

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def unit(self, name: str) -> dict[str, Any] | None:
        """The result of a unit; None where it is not done."""
        path = self._unit_path(name)
        return read_json(path) if path.exists() else None

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Write the result of a unit, and delete the checkpoints that are no longer needed."""
        make_directory(self._unit_path(name).parent)
        write_json(self._unit_path(name), result)
        for path in self.run_dir(name).glob("checkpoint-*"):
            shutil.rmtree(path)

    def _unit_path(self, name: str) -> Path:
        return self.out / "units" / f"{name}.json"
