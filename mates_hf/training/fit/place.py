"""Where a fit keeps what it has done, and where its selector goes: whole or absent, and of one fit alone.

Where it is used: `selector_fit`, in the main process. The selector's folder appears by a rename, when all of it is
there. Until then everything is in the working folder, which says what it belongs to: the same fit continues there,
another one is refused with what differs.

```
WORK/asked.json       what was asked for: names, and settings that count
WORK/read.json        what was read: digests of model, pool and reference
WORK/lock.json        a fit that lives writes here
WORK/warm-up/         checkpoints of the Trainer
WORK/probe/           labels as they are measured, the fitted model, and what the guard said of it
OUT/fit_selector.json what it was fitted with (names as digests alone), what it cost and how good it is
```

Trade-off: a working folder holds two checkpoints and a mean, up to 28 bytes a parameter, until the fit is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import make_directory, read_json, replace_path, sync_tree, write_json
from mates_hf.errors import MatesError
from mates_hf.training.fit.settings import ABOUT_PROBES
from mates_hf.training.lock import LOCK_FILE, RoundsLock, lock_for_one

ABOUT_FILE = "fit_selector.json"
FORMAT_VERSION = 1
_ASKED, _READ, _VERDICT = "asked.json", "read.json", "verdict.json"
_NAMES = ("model", "tokenizer", "pool", "pool_split", "column", "reference", "reference_column")


class Place:
    """The folders of a fit; only the main process touches them.

    Args:
        out: The selector's folder.
        work: The working folder; None is next to it, with `.fit` behind its name.
        asked: What was asked for, JSON values: names, and settings that count.
    """

    def __init__(self, out: Path, work: Path | None, asked: Mapping[str, Any]) -> None:
        self.out = out if out.name not in ("", "..") else out.resolve()
        self.work = self.out.with_name(self.out.name + ".fit") if work is None else work
        self.asked: dict[str, Any] = json.loads(json.dumps(dict(asked)))
        self._lock: RoundsLock | None = None

    @property
    def warm_up(self) -> Path:
        """Where the Trainer's checkpoints go."""
        return self.work / "warm-up"

    @property
    def probe(self) -> Path:
        """Where labels and the fitted model go."""
        return self.work / "probe"

    def finished(self) -> dict[str, Any] | None:
        """Look whether the fit is done.

        Returns:
            What the selector's folder says of it; None where there is no selector yet.

        Raises:
            MatesError: the folder holds something else, or the selector of another fit; says what differs.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        if not (self.out / ABOUT_FILE).exists():
            raise MatesError(
                f"`out` must be a folder that is not there yet, or one that this command wrote, and `{self.out}` "
                "holds something else. Name another folder."
            )
        about = read_json(self.out / ABOUT_FILE)
        differing = _differing(about.get("asked", {}), _sealed(self.asked), ())
        if differing:
            raise MatesError(
                f"`{self.out}` holds the selector of another fit; they differ in {differing}. Name another folder as "
                "`out`, or delete it."
            )
        return about

    def check(self) -> None:
        """Refuse a working folder of something else, before anything is read or written.

        Raises:
            MatesError: it holds another fit, or no fit; says what differs.
        """
        path = self.work / _ASKED
        if path.exists():
            differing = _differing(read_json(path), self.asked, ABOUT_PROBES)
            if differing:
                raise MatesError(
                    f"`{self.work}` holds a fit that is not done, and was begun otherwise: they differ in "
                    f"{differing}. Give the same again, or delete the folder to begin anew."
                )
        elif self.work.exists() and any(not one.name.startswith((".", LOCK_FILE)) for one in self.work.iterdir()):
            raise MatesError(
                f"`work` must be a new folder, or one of a fit, and `{self.work}` holds something else. Name another "
                "folder."
            )

    def open(self) -> None:
        """Make the working folder this fit's own, and keep others out.

        Raises:
            MatesError: it belongs to another fit, or one that lives writes to it.
        """
        make_directory(self.work)
        self._lock = lock_for_one(self.work, self, "fit", "name another folder as `out`")
        self.check()
        write_json(self.work / _ASKED, self.asked)

    def require_read(self, read: Mapping[str, Any]) -> None:
        """Refuse to continue with another model, pool or reference than this fit was begun with.

        Args:
            read: Digests of what was read, by name.

        Raises:
            MatesError: says which of them is another one.
        """
        path = self.work / _READ
        if not path.exists():
            write_json(path, read)
            return
        found = read_json(path)
        changed = sorted(name for name in read if read[name] != found.get(name))
        if changed:
            raise MatesError(
                f"`{self.work}` holds a fit that was begun with another content of {' and '.join(changed)}: the files "
                "have changed since. Delete the folder to begin anew."
            )

    def prepare_probe(self, num_probes: int) -> None:
        """Make room for labels of so many rows; those of another number of rows are deleted."""
        path = self.probe / "num_probes.json"
        if path.exists() and read_json(path).get("num_probes") != num_probes:
            shutil.rmtree(self.probe)
        if not path.exists():
            make_directory(self.probe)
            write_json(path, {"num_probes": num_probes})

    def verdict(self, num_probes: int) -> dict[str, Any] | None:
        """What an earlier attempt found with so many probes; None where it was not done."""
        path = self.probe / _VERDICT
        found = read_json(path) if path.exists() else None
        return found if found is not None and found.get("num_probes") == num_probes else None

    def keep_verdict(self, verdict: Mapping[str, Any]) -> None:
        """Write down what the fit found; the fitted model is there already."""
        write_json(self.probe / _VERDICT, verdict)

    def publish(self, selector: Any, about: Mapping[str, Any]) -> None:
        """Write the selector and what is known of it, whole or not at all.

        Args:
            selector: The `MatesSelector`.
            about: What was measured, JSON values.
        """
        partial = self.out.with_name(self.out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_directory(partial)
        selector.save_pretrained(partial)
        write_json(partial / ABOUT_FILE, {"version": FORMAT_VERSION, "asked": _sealed(self.asked), **about})
        sync_tree(partial)
        make_directory(self.out.parent)
        replace_path(partial, self.out)

    def clear(self) -> None:
        """Delete what this fit left in the working folder, and the folder where nothing else is in it."""
        self.close()
        path = self.work / _ASKED
        if not path.exists() or _differing(read_json(path), self.asked, ABOUT_PROBES):
            return
        for folder in (self.warm_up, self.probe):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (_READ, "stages.json", _ASKED):
            (self.work / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something of the user's
            self.work.rmdir()

    def close(self) -> None:
        """Let others write to the working folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def write_beside(selector: Any, folder: Path) -> None:
    """Write a further selector, whole or not at all, over what is there.

    Args:
        selector: The `MatesSelector`.
        folder: Its folder.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    selector.save_pretrained(partial)
    sync_tree(partial)
    if folder.exists():
        shutil.rmtree(folder)
    replace_path(partial, folder)


def _sealed(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for with a digest in place of each name: paths are nobody's business where a selector is."""
    return {name: _digest(value) if name in _NAMES else value for name, value in asked.items()}


def _digest(value: Any) -> Any:
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _differing(old: Any, new: Mapping[str, Any], may_differ: tuple[str, ...]) -> str:
    """What differs, with both values; empty where nothing does."""
    old = old if isinstance(old, Mapping) else {}
    names = [n for n in (*new, *(o for o in old if o not in new)) if old.get(n) != new.get(n) and n not in may_differ]
    sealed = any(name in _NAMES and isinstance(old.get(name), str) and len(old[name]) == 16 for name in names)
    return ", ".join(
        f"`{name}`" if sealed and name in _NAMES else f"`{name}` (there {old.get(name)!r}, here {new.get(name)!r})"
        for name in names
    )
