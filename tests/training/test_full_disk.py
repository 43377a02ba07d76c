"""A disk that is full, or fails, at each write of a round: the run ends by name, and a resume does the round again.

Each of the calls that write (open, write, flush, rename, make a folder) below the folder of the rounds fails once, one
in each run, with ENOSPC or EIO; a second kind of run has a real limit on the size of a file, a third one a file system
of its own that another program fills up, where the tests may mount one.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from mates_hf import MatesCallback
from mates_hf.training.disk_errors import DiskError
from mates_hf.training.lock import LOCK_FILE
from tests.training.kit import Result, Stop, make_arguments, make_reference, run, small_config

SETTINGS = {"save_strategy": "steps", "save_steps": 5, "max_steps": 13}
STRIDE = int(os.environ.get("MATES_HF_WRITE_STRIDE", "4"))  # 1: every single write
CONFIG = {"switch_lead_steps": 3, "average_steps": 2, "drift_check_steps": 5}


def mates() -> MatesCallback:
    return MatesCallback(make_reference(), small_config(**CONFIG))


class FailingDisk:
    """Counts the calls that write below a folder, and lets one of them fail.

    Args:
        folder: the folder.
        fails_at: number of the call that fails, from 0; None: none does.
        number: of the error.
    """

    def __init__(self, folder: Path, fails_at: int | None, number: int = errno.ENOSPC) -> None:
        self.folder, self.fails_at, self.number = folder, fails_at, number
        self.count = 0
        self.failed = ""

    def ask(self, call: str, path: Any) -> None:
        if Path(os.fspath(path)).is_relative_to(self.folder):
            if self.count == self.fails_at:
                self.failed = f"{call} of {Path(path).name}"
                self.count += 1
                raise OSError(self.number, os.strerror(self.number), None if call == "write" else str(path))
            self.count += 1


@contextlib.contextmanager
def on(disk: FailingDisk) -> Iterator[FailingDisk]:
    """What writes asks the disk first."""
    with pytest.MonkeyPatch.context() as patch:
        real_open, replace, mkdir, fsync = builtins.open, os.replace, os.mkdir, os.fsync

        def asked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                disk.ask(name, path)
                return real(path, *args, **kwargs)

            return call

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return real_open(file, mode, *args, **kwargs)
            disk.ask("open", file)
            found = real_open(file, mode, *args, **kwargs)
            return Written(found, disk, file) if mode == "xb" else found

        def flushed(handle: int) -> None:
            disk.ask("flush", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "replace", asked("rename", replace))
        patch.setattr(os, "mkdir", asked("mkdir", mkdir))
        patch.setattr(os, "fsync", flushed)
        yield disk


class Written:
    """A file that asks the disk at each write; numpy and Arrow then write through it, not past it."""

    def __init__(self, file: Any, disk: FailingDisk, path: Any) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, content: Any) -> int:
        self._disk.ask("write", self._path)
        return int(self._file.write(content))

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Result]:
    """A run with one round, at step 6."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(make_arguments(folder, **SETTINGS), [mates()], dropout=0.1)
    for path in folder.glob("checkpoint-1*"):
        shutil.rmtree(path)
    return folder, result


def before_the_round(whole_dir: Path, to: Path) -> Path:
    shutil.copytree(whole_dir / "checkpoint-5", to / "checkpoint-5")
    (to / "_mates").mkdir()
    shutil.copy(whole_dir / "_mates" / "average-5.safetensors", to / "_mates")
    return to / "checkpoint-5"


def train(folder: Path, checkpoint: Path) -> Result:
    return run(make_arguments(folder, **SETTINGS), [mates()], dropout=0.1, resume=str(checkpoint))


def fail_once(whole: tuple[Path, Result], folder: Path, disk: FailingDisk) -> bool:
    """Resume on a disk that fails, then on one that does not; True where it did not get as far as failing."""
    whole_dir, expected = whole
    checkpoint = before_the_round(whole_dir, folder)
    ended = ""
    with on(disk):
        try:
            rest = train(folder, checkpoint)
        except DiskError as error:
            ended = str(error)
    if not disk.failed:
        return True
    assert not (folder / "_mates" / LOCK_FILE).exists(), disk.failed
    assert not ended or (str(folder / "_mates") in ended and os.strerror(disk.number) in ended), disk.failed
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("_mates/round-0001.partial/[!s]*.*")}
    if ended:
        rest = train(folder, checkpoint)
    assert rest.losses == expected.losses, disk.failed
    assert rest.rows == expected.rows[20:], disk.failed
    assert not list((folder / "_mates").glob("round-*.stale*")), disk.failed
    rounds = [path / "_mates" / "round-0001" for path in (whole_dir, folder)]
    assert np.array_equal(*(np.load(path / "selection.npy") for path in rounds)), disk.failed
    kept = {path.name for path in rounds[1].iterdir()}
    assert kept - {"audit.json", "stages.json"} == {path.name for path in rounds[0].iterdir()} - {
        "audit.json", "stages.json",
    }, disk.failed  # fmt: skip
    for name in finished.keys() & {"probes.parquet", "sentinel.json"}:
        assert (rounds[1] / name).stat().st_mtime_ns == finished[name], disk.failed
    return False


@pytest.mark.parametrize(
    ("share", "number"), [(0.3, errno.ENOSPC), pytest.param(0.8, errno.EIO, marks=pytest.mark.slow)]
)
def test_a_write_that_fails_ends_the_run_by_name_and_the_round_is_done_again(tmp_path, whole, share, number):
    counted = FailingDisk(tmp_path / "counted" / "_mates", None)
    assert fail_once(whole, tmp_path / "counted", counted)
    assert counted.count > 60
    disk = FailingDisk(tmp_path / "part" / "_mates", int(share * counted.count), number)
    assert not fail_once(whole, tmp_path / "part", disk)


@pytest.mark.slow
def test_every_write_fails_once(tmp_path, whole):
    failed: list[str] = []
    for call in range(0, 1000, STRIDE):
        disk = FailingDisk(tmp_path / str(call) / "_mates", call, (errno.ENOSPC, errno.EIO)[call % 2])
        if fail_once(whole, tmp_path / str(call), disk):
            break
        failed.append(disk.failed)
        shutil.rmtree(tmp_path / str(call))
    assert len(failed) > 60 // STRIDE, failed


@pytest.mark.parametrize("limit", [600, pytest.param(4_000, marks=pytest.mark.slow)])
def test_a_real_limit_on_files_ends_the_run_by_name(tmp_path, whole, limit):
    whole_dir, expected = whole
    checkpoint = before_the_round(whole_dir, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    callback = mates()

    class Limits(Stop):
        """From step 6 on, before the round, no file may be larger."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(DiskError, match="File too large"):
            run(make_arguments(tmp_path, **SETTINGS), [Limits(99), callback], dropout=0.1, resume=str(checkpoint))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rest = train(tmp_path, checkpoint)
    assert rest.losses == expected.losses
    assert rest.rows == expected.rows[20:]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 MB, more than a round takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4_096, 16_384, 65_536])
def test_a_file_system_that_fills_up_ends_the_run_by_name(small_disk, whole, left):
    checkpoint = before_the_round(whole[0], small_disk)
    filler = small_disk / "filler"

    class Fills(Stop):
        """At step 6, before the round, another program takes all but a few bytes."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(4_096)):
                        pass
                os.truncate(filler, max(0, filler.stat().st_size - left))

    with pytest.raises(DiskError, match="No space left on device"):
        run(make_arguments(small_disk, **SETTINGS), [Fills(99), mates()], dropout=0.1, resume=str(checkpoint))
    assert not (small_disk / "_mates" / LOCK_FILE).exists()
    filler.unlink()
    rest = train(small_disk, checkpoint)
    assert rest.losses == whole[1].losses
    assert rest.rows == whole[1].rows[20:]


@pytest.mark.slow
def test_a_file_system_without_room_for_a_round_is_refused_before_the_first_step(small_disk):
    (small_disk / "filler").write_bytes(bytes(240 << 20))

    class Never(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise AssertionError("it began to train")

    with pytest.raises(DiskError, match="must have .* free for a round"):
        run(make_arguments(small_disk, **SETTINGS), [Never(), mates()])
