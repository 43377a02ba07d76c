"""What holds over versions: floors, Python 3.10, deprecated calls, and whether the installed accelerate resumes."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import DataLoaderShard, SkipBatchSampler

from mates_hf import MatesCallback
from mates_hf.training.checks.trainer import resume_caveats
from tests.training.kit import make_arguments, make_pool, make_reference, run, small_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mates_hf"


def floors() -> dict[str, str]:
    """The lower bounds in pyproject.toml of the dependencies, and of those of evaluation."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    extra = re.search(r"^eval = \[(.*)\]$", text, re.MULTILINE)
    assert extra is not None
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', section[1] + extra[1]))


def test_the_oldest_lane_installs_the_floors() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    bounds = floors()
    assert bounds.pop("torch")  # the lane's torch is a variable of the Makefile
    assert bounds
    assert pins.keys() == bounds.keys()
    for name, floor in bounds.items():
        assert (pins[name] + ".").startswith(floor + "."), name
        assert set(pins[name].removeprefix(floor)) <= {".", "0"}, f"{name}: the lane must install the floor itself"


def imports_of(folder: Path) -> set[str]:
    """Top-level packages that the modules of a folder import, anywhere in them."""
    line = re.compile(r"^ *(?:from (\w+)[\w.]* import |import (\w+)[\w.]*(?: as \w+)?$)", re.MULTILINE)
    found = [line.findall(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    return (
        {name for pairs in found for pair in pairs for name in pair if name} - sys.stdlib_module_names - {"mates_hf"}
    )


def test_what_is_declared_is_imported_and_what_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    own, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        found = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}
        return {"PIL" if name == "pillow" else name for name in found}  # by what is imported

    package = imports_of(PACKAGE)
    assert names(own) <= package, "a dependency that nothing imports is one that users install for nothing"
    assert names(extras["eval"]) <= package
    assert names(extras["report"]) <= package | imports_of(ROOT / "examples") | imports_of(ROOT / "benchmarks")
    # What comes with a declared one, and what is imported only where the user has it.
    beside = {
        "axolotl",
        "datatrove",
        "fsspec",
        "llvmlite",
        "nemo_curator",
        "pandas",
        "pydantic",
        "ray",
        "wandb_workspaces",
    }
    beside |= {"typing_extensions", "tokenizers", "yaml"}
    of_pilot = {"fasttext_wheel": "fasttext", "jinja2": "jinja2", "scikit_learn": "sklearn"}  # by what is imported
    assert names(extras["pilot"]) == set(of_pilot)
    assert set(of_pilot.values()) <= package
    beside |= set(of_pilot.values())
    assert package - names(own + extras["eval"] + extras["report"]) <= beside
    patterns = project["tool"]["setuptools"]["package-data"]["mates_hf"]
    assert [pattern for pattern in patterns if not any(PACKAGE.glob(pattern))] == []


def too_new(package: str, minor: int) -> list[str]:
    """Syntax and names of the standard library that the Python this runs in does not have. Stands alone."""
    import ast
    import importlib
    import sys
    from pathlib import Path

    found = []
    for path in sorted(Path(package).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, minor))
            compile(tree, str(path), "exec")
        except SyntaxError as error:
            found.append(f"{path.name}: {error}")
            continue
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in sys.stdlib_module_names:
                module = importlib.import_module(node.module)
                found += [f"{path.name}: {node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in sys.stdlib_module_names:
                        modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                if not hasattr(modules[node.value.id], node.attr):
                    found.append(f"{path.name}: {node.value.id}.{node.attr}")
    return found


def oldest_python() -> str | None:
    """A Python 3.10 that runs, or None."""
    path = shutil.which("python3.10")
    works = path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    return path if works else None


@pytest.mark.parametrize("python", [sys.executable, oldest_python()], ids=["this-python", "python3.10"])
def test_the_package_is_python_3_10(python: str | None, tmp_path: Path) -> None:
    if python is None:
        pytest.skip("no python3.10 here")
    source = f"{inspect.getsource(too_new)}\nimport json, sys\nprint(json.dumps(too_new(sys.argv[1], 10)))"

    def check(package: Path) -> list[str]:
        command = [python, "-c", source, str(package)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    assert check(PACKAGE) == []
    (tmp_path / "newer.py").write_text("try:\n    pass\nexcept* ValueError:\n    pass\n")
    (tmp_path / "missing.py").write_text("from typing import NoSuchName\nimport os\nos.no_such_call()\n")
    assert [line.split(":")[0] for line in check(tmp_path)] == ["missing.py", "missing.py", "newer.py"]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_is_an_error(category: type[Warning]) -> None:
    def deprecated() -> None:
        warnings.warn("call the new one", category, stacklevel=2)

    def called_from(module: str) -> None:
        exec("call()", {"__name__": module, "call": deprecated})

    with pytest.raises(category, match="the new one"):
        called_from("mates_hf.training.made_up")
    with pytest.warns(category, match="the new one"):
        called_from("somebody.elses")


def blamed(warn: Callable[[], Any]) -> list[str]:
    """Deprecations for calls that our code made, whichever module the warning was told to blame."""
    found = []

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        names = [frame.frame.f_globals.get("__name__", "").split(".")[0] for frame in inspect.stack()]
        outside = [name for name in names if name not in (__name__.split(".")[0], "warnings", "contextlib", "inspect")]
        caller = next((name for name in outside if name != outside[0]), None)
        if "mates_hf" in (outside[0], caller):
            found.append(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        warn()
    return found


def test_no_library_is_called_in_a_deprecated_way(tmp_path: Path) -> None:
    """A whole run, with what libraries warn about in their own name counted as ours where we are the caller."""
    callback = MatesCallback(make_reference(), small_config(switch_lead_steps=3))
    assert blamed(lambda: run(make_arguments(tmp_path, max_steps=12), [callback])) == []
    module: dict[str, Any] = {"__name__": "torch.made_up"}
    exec("import warnings\ndef old(): warnings.warn('old', FutureWarning)", module)
    ours = {"__name__": "mates_hf.made_up", "old": module["old"]}
    theirs = {"__name__": "transformers.made_up", "old": module["old"]}
    assert blamed(lambda: exec("old()", ours)) == ["FutureWarning: old"]
    assert blamed(lambda: exec("old()", theirs)) == []


def test_caveats_are_told_exactly_where_a_plain_run_does_not_resume(tmp_path: Path) -> None:
    pool = make_pool(40)  # 10 steps an epoch: it stops inside the second one
    settings: dict[str, Any] = {"max_steps": 20, "save_strategy": "steps", "save_steps": 13}
    whole = run(make_arguments(tmp_path, **settings), [], pool)
    rest = run(make_arguments(tmp_path, **settings), [], pool, resume=str(tmp_path / "checkpoint-13"))
    assert (rest.rows == whole.rows[13 * 4 :]) == (resume_caveats() == [])


def test_a_caveat_names_the_version_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import data_loader

    from mates_hf.training.checks import trainer as checks

    def forgets(dataloader: Any, num_batches: int = 0) -> torch.utils.data.DataLoader[Any]:
        return data_loader.DataLoaderShard(dataloader.dataset)

    monkeypatch.setattr(checks, "version", {"transformers": "4.57.3", "accelerate": "1.14.2"}.__getitem__)
    monkeypatch.setattr(data_loader, "skip_first_batches", forgets)
    (caveat,) = resume_caveats()
    assert "accelerate 1.14.2 forgets" in caveat
    assert "Upgrade to accelerate 1.15" in caveat
    monkeypatch.setattr(checks, "version", {"transformers": "5.0.0"}.__getitem__)
    assert resume_caveats() == []


def test_our_run_resumes_exactly_where_the_epoch_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = DataLoaderShard.set_epoch

    def forgets(self: Any, epoch: int) -> None:
        tell(self, 0 if isinstance(self.batch_sampler, SkipBatchSampler) else epoch)

    pool = make_pool(80)  # 20 steps an epoch; it stops in the second one, in its own order
    settings: dict[str, Any] = {"max_steps": 30, "save_strategy": "steps", "save_steps": 23}

    def trained(resume: str | None = None) -> list[int]:
        callback = MatesCallback(make_reference(), small_config(update_steps=24, num_probes=10, switch_lead_steps=2))
        return run(make_arguments(tmp_path, **settings), [callback], pool, resume=resume).rows

    whole = trained()
    monkeypatch.setattr(DataLoaderShard, "set_epoch", forgets)
    assert trained(str(tmp_path / "checkpoint-23")) == whole[23 * 4 :]


def test_a_run_says_at_its_start_what_its_accelerate_cannot_resume(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("mates_hf.training.callback.resume_caveats", lambda: ["accelerate 0.1 forgets the epoch"])
    run(make_arguments(tmp_path, max_steps=10), [MatesCallback(make_reference(), small_config())])
    assert caplog.text.count("accelerate 0.1 forgets the epoch") == 1
