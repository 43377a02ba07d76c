"""What is compiled is kept on disk, never given to other arguments, and no fault of a file is noticed by a caller."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

SOURCE = """
from mates_hf.prediction.compiled import compiled

@compiled
def total(values):
    found = {start}
    for value in values:
        found += value
    return found
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that compiled loops are kept in."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def fresh(tmp_path: Path, kept: Path) -> Callable[..., Any]:
    """The compiled function as a new process has it."""

    def imported(start: int = 0) -> Any:
        path = tmp_path / "loops.py"
        path.write_text(SOURCE.format(start=start))
        spec = importlib.util.spec_from_file_location("loops", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.total

    return imported


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hits(total: Any) -> int:
    return int(sum(total.stats.cache_hits.values()))


def test_a_second_process_does_not_compile(fresh: Callable[..., Any], kept: Path) -> None:
    first = fresh()
    assert first(np.arange(4)) == 6
    assert hits(first) == 0
    assert len(files(kept)) == 1
    second = fresh()
    assert second(np.arange(4)) == 6
    assert hits(second) == 1


def test_no_file_of_one_kind_of_arguments_has_the_name_of_another(
    fresh: Callable[..., Any], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each writes as if it were the first, as two that start at once do. Numba's own files would have the same names.
    assert fresh()(np.arange(4)) == 6
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "other"))
    assert fresh()(np.array([0.5, 0.25])) == 0.75
    first, second = ({path.name for path in files(folder)} for folder in (kept, tmp_path / "other"))
    assert len(first) == len(second) == 1
    assert not first & second


def test_each_kind_of_arguments_gets_its_own_code(fresh: Callable[..., Any]) -> None:
    first = fresh()
    assert (first(np.arange(4)), first(np.array([0.5, 0.25]))) == (6, 0.75)
    again = fresh()
    assert (again(np.array([0.5, 0.25])), again(np.arange(4))) == (0.75, 6)
    assert hits(again) == 2


def test_another_source_is_compiled_anew(fresh: Callable[..., Any]) -> None:
    assert fresh(start=0)(np.arange(4)) == 6
    changed = fresh(start=1)  # as many bytes, and the same code but for a constant
    assert changed(np.arange(4)) == 7
    assert hits(changed) == 0


@pytest.mark.parametrize("damage", [lambda found: found[:-40], lambda found: b"", lambda found: b"x" + found])
def test_a_damaged_file_is_compiled_anew(
    fresh: Callable[..., Any], kept: Path, damage: Callable[[bytes], bytes]
) -> None:
    fresh()(np.arange(4))
    (path,) = files(kept)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    again = fresh()
    assert again(np.arange(4)) == 6
    assert hits(again) == 0
    assert len(path.read_bytes()) == len(content)  # and is whole again


def test_a_folder_that_cannot_be_written_to_ends_nothing(fresh: Callable[..., Any], kept: Path) -> None:
    total = fresh()
    for path in kept.iterdir():
        path.rmdir()
    kept.rmdir()
    kept.write_text("as a disk that is full, or was taken away")
    assert total(np.arange(4)) == 6


def test_nothing_is_read_from_a_folder_that_others_may_write_to(fresh: Callable[..., Any], kept: Path) -> None:
    fresh()(np.arange(4))
    for path in kept.iterdir():
        path.chmod(0o777)
    again = fresh()
    assert again(np.arange(4)) == 6
    assert hits(again) == 0


def test_without_a_folder_it_is_compiled(fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    locators = [name for name in ("_CacheImpl", "CacheImpl") if hasattr(caching, name)]
    monkeypatch.setattr(getattr(caching, locators[0]), "_locator_classes", [])
    total = fresh()
    assert total(np.arange(4)) == 6
    assert total.stats.cache_path is None
