"""Where a run of `kills` dies: executed lines by phase, and what a power cut takes back.

Trade-off: lines are counted by `sys.settrace`, which makes a run slower.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# Where a line belongs: the innermost function on the stack that is listed here (None: any function of the file).
PHASES = {
    ("mates_hf/disk.py", None): "write of a file",
    ("mates_hf/training/lock.py", None): "lock",
    ("mates_hf/engine/averaging.py", None): "averaging window",
    ("mates_hf/training/stages.py", "measured_labels"): "probe",
    ("mates_hf/training/audit.py", None): "audit",
    ("mates_hf/training/stages.py", "fitted_model"): "fit",
    ("mates_hf/training/scoring.py", None): "score",
    ("mates_hf/training/rounds.py", "_select"): "select",
    ("mates_hf/round_writer.py", "finish"): "rename of the round",
    ("mates_hf/training/session.py", "_prune"): "prune rounds",
    ("mates_hf/training/callback.py", "on_train_begin"): "start",
    ("mates_hf/training/measure.py", "assist"): "assisting in a round",
    ("transformers/trainer.py", "_save_checkpoint"): "checkpoint",
    ("torch/serialization.py", "_save"): "file of a checkpoint",
}
TRAINING = "training"
TRACED = {  # files beside the library's own whose lines are points (None: all of the file)
    "transformers/trainer.py": None,
    "transformers/trainer_callback.py": ("save_to_json",),
    "transformers/modeling_utils.py": ("save_pretrained",),
    "torch/serialization.py": ("save", "_save", "persistent_id"),
    "/shutil.py": None,
}


class LineKiller:
    """Counts executed lines by phase, and kills the process at one of them.

    `kill` is the phase and the number of the line in it, from 1; None counts only. The line is written to `note_path`
    before the process dies. `prefix` begins all phases of this process.
    """

    def __init__(self, kill: tuple[str, int] | None, note_path: Path, prefix: str = "") -> None:
        self.kill, self.note_path, self.prefix = kill, note_path, prefix
        self.counts: collections.Counter[str] = collections.Counter()
        self._pid = os.getpid()

    def start(self) -> None:
        """Count from here on, in this thread and in those that it starts."""
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        return self._line_counter(self._phase_of(frame)) if _is_traced(frame.f_code) else None

    def _line_counter(self, phase: str) -> Callable[..., Any]:
        """What the interpreter calls at each line of one frame: a frame stays in one phase as long as it runs."""

        def on_line(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            if event == "line":
                self.counts[phase] += 1
                if self.kill == (phase, self.counts[phase]) and os.getpid() == self._pid:
                    self._die(frame)
            return on_line

        return on_line

    def _phase_of(self, frame: FrameType | None) -> str:
        while frame is not None:
            phase = _listed_phase(frame.f_code)
            if phase is not None:
                return self.prefix + phase
            frame = frame.f_back
        return self.prefix + TRAINING

    def _die(self, frame: FrameType | None) -> None:
        sys.settrace(None)
        here = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""
        step = None
        while frame is not None and step is None:
            state = getattr(frame.f_locals.get("self"), "state", None)
            step = getattr(state, "global_step", None)
            frame = frame.f_back
        self.note_path.write_text(json.dumps({"line": here, "step": step}))
        os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def _is_traced(code: CodeType) -> bool:
    if "/mates_hf/" in code.co_filename:
        return True
    files = [names for ending, names in TRACED.items() if code.co_filename.endswith(ending)]
    return any(names is None or code.co_name in names for names in files)


@functools.cache
def _listed_phase(code: CodeType) -> str | None:
    for (ending, name), phase in PHASES.items():
        if code.co_filename.endswith(ending) and name in (None, code.co_name):
            return phase
    return None


class Journal:
    """Takes down what a process renames and flushes inside a folder, so that a power cut can be made up."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = str(folder)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def start(self) -> None:
        """Watch from here on."""
        replace, rename, fsync = os.replace, os.rename, os.fsync

        def renamed(real: Callable[..., None]) -> Callable[..., None]:
            def call(source: Any, target: Any, **kwargs: Any) -> None:
                real(source, target, **kwargs)
                self._note(["rename", os.path.abspath(source), os.path.abspath(target)])

            return call

        def flushed(handle: int) -> None:
            fsync(handle)
            self._note(["flush", os.readlink(f"/proc/self/fd/{handle}")])

        os.replace, os.rename, os.fsync = renamed(replace), renamed(rename), flushed

    def _note(self, entry: list[str]) -> None:
        if entry[1].startswith(self.folder):
            os.write(self._handle, json.dumps(entry).encode() + b"\n")


def cut_power(folder: Path) -> list[str]:
    """Undo what a power cut takes back: renames that were not flushed, and the last one that finished a round.

    Returns the names that are gone from the folder of the run.
    """
    path = folder / "journal.txt"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    undone: list[str] = []
    flushed: set[str] = set()
    last_round = False
    for what, *paths in reversed(entries):
        if what == "flush":
            flushed.add(paths[0])
            continue
        source, target = map(Path, paths)
        finishes = source.name == target.name + ".partial" and not last_round
        last_round = last_round or finishes
        if (str(target.parent) not in flushed or finishes) and target.exists() and not source.exists():
            os.rename(target, source)
            undone.append(target.name)
    return undone
