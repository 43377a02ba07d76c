"""What is released: the wheel and the sdist hold the package and nothing else, and the wheel alone runs the README."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import mates_hf

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_{0}; build_{0}(sys.argv[1])"
USE = """
import importlib.metadata, json, sys, mates_hf
names = [getattr(mates_hf, name).__name__ for name in mates_hf.__all__]
urls = importlib.metadata.metadata("mates-hf").get_all("Project-URL")
print(json.dumps([mates_hf.__file__, mates_hf.__version__, names, urls]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}  # no PYTHONPATH of this test's
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout


def tracked(*paths: str) -> list[str]:
    """Files of the repository that git knows."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--", *paths], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A copy of what git knows, and the wheel and sdist made of it."""
    pytest.importorskip("setuptools", minversion="77")
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for kind in ("sdist", "wheel"):
        run(sys.executable, "-c", BUILD.format(kind), dist, cwd=source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return source, wheel, sdist


def packaged(wheel: Path) -> set[str]:
    """Files of a wheel, without the folder of its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built, tmp_path: Path) -> None:
    _, wheel, sdist = built
    assert packaged(wheel) == set(tracked("mates_hf"))
    assert "mates_hf/py.typed" in packaged(wheel)
    assert sum(name.endswith(".yaml") for name in packaged(wheel)) >= 10
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "README.md", "pyproject.toml"} <= names
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.iterdir()
    run(sys.executable, "-c", BUILD.format("wheel"), tmp_path / "again", cwd=unpacked)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert packaged(again) == packaged(wheel)
    assert not [name for name in names if re.match(r"\.venv|runs/|data/|\.git/", name)]


@pytest.mark.slow
def test_the_wheel_alone_runs_the_readme(built, tmp_path: Path) -> None:
    source, wheel, _ = built
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    # What it depends on is taken from here; a path in a .pth file comes last and runs no .pth file of that folder.
    (packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    file, version, names, urls = json.loads(run(python, "-c", USE, cwd=tmp_path))
    assert Path(file).is_relative_to(packages)
    assert version == mates_hf.__version__
    assert names == mates_hf.__all__
    assert {url.split(",")[0] for url in urls} == {"Homepage", "Repository", "Issues", "Changelog", "Documentation"}
    assert run(python.with_name("mates-hf"), "--version", cwd=tmp_path).strip() == f"mates-hf {version}"

    shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("mates_hf", "*.egg-info", "build"))
    block = ("-k", "run_in_order", "-p", "no:cacheprovider")
    said = run(python, "-m", "pytest", "-q", "tests/test_readme.py", *block, cwd=tmp_path / "copy")
    assert "1 passed" in said


def test_the_version_is_one() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mates_hf.__version__}\n" in text
    assert f"\n## [{mates_hf.__version__}]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
