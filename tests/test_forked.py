"""Forked processes of tests end, fail, are killed and are told things as fresh interpreters are."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.launch import free_port, start_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
SOURCE = """
import os, sys, threading, time
if __name__ == "__main__":
    what = sys.argv[1]
    print("rank", os.environ.get("RANK"), file=sys.stderr)
    if what == "exit":
        sys.exit(3)
    if what == "fail":
        raise ValueError("on purpose")
    if what == "thread":
        threading.Thread(target=lambda: (time.sleep(0.3), print("late", file=sys.stderr))).start()
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "sleep":
        time.sleep(60)
    if what == "talk":
        print("a line of a log\\n" * 100_000)
    if what == "hash":
        print("hash", hash("a text"), file=sys.stderr)
    if what == "threads":
        print("threads", threading.active_count(), "torch" in sys.modules, file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("nothing", 0, ""),
        ("talk", 0, ""),
        ("exit", 3, ""),
        ("fail", 1, "ValueError: on purpose"),
        ("thread", 0, "late"),
        ("die", -9, ""),
    ],
)
def test_a_fork_ends_as_an_interpreter_does(script, what, code, said):
    for fresh in (False, True):
        (process,) = start_processes([script, what], 1, free_port(), fresh=fresh)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert said in errors
        assert "rank None" in errors or what == "die"  # what is not flushed dies with it


def test_ranks_are_told_apart_and_do_not_share_a_hash_seed(script):
    processes = start_processes([script, "hash"], 2, free_port())
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert ["rank 0" in errors[0], "rank 1" in errors[1]] == [True, True]
    assert errors[0].split()[-1] != errors[1].split()[-1]


def test_a_fork_begins_with_one_thread_and_everything_imported(script):
    (process,) = start_processes([script, "threads"], 1, free_port())
    assert process.communicate(timeout=60)[1].split("\n")[1] == "threads 1 True"


def test_a_fork_that_does_not_end_is_killed(script):
    (process,) = start_processes([script, "sleep"], 1, free_port())
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_a_fork_runs_a_line_of_code_too():
    code = "import sys; sys.stderr.write(f'{__name__} {sys.argv}')"
    for fresh in (False, True):
        (process,) = start_processes(["-c", code, "given"], 1, free_port(), fresh=fresh)
        assert "__main__ ['-c', 'given']" in process.communicate(timeout=60)[1]
