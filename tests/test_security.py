"""Ratchets: nothing that is read can run code, no name in a file becomes a path, no file is opened to others."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mates_hf
from mates_hf.disk import read_array, read_json, sha256_of, write_array, write_json
from mates_hf.errors import MatesError
from mates_hf.prediction.artifacts import read_artifact, write_artifact
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.round_files import load_round, read_labels, round_path, write_labels
from mates_hf.round_writer import RoundWriter, set_aside

PACKAGE = Path(mates_hf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TEMPLATES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".jinja", ".html", ".j2"))

# Modules that unpickle, or exist to: by name of the module, whatever is taken from it.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# Calls, by their last names, that run text as code or a shell, or change who may read a file.
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "os.chmod": "file modes are the umask's",
    "os.umask": "file modes are the umask's",
    "os.fchmod": "file modes are the umask's",
    "yaml.load": "can build any object; `yaml.safe_load` cannot",
    "yaml.unsafe_load": "can build any object",
    "yaml.full_load": "can build any object",
    "torch.hub.load": "runs code from a repository",
    "torch.jit.load": "runs code from a file",
    "pd.read_pickle": "unpickles",
    "pandas.read_pickle": "unpickles",
}
# The temporary files of these are for their owner alone, so a rename would leave a file that a group cannot read.
PRIVATE_FILES = {"mkstemp", "NamedTemporaryFile"}


def findings(source: str) -> list[str]:
    """What a module must not do, one line each."""
    return [f"line {line}: {what}" for line, what in _findings(ast.parse(source))]


def _findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in UNPICKLERS:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "passes trust_remote_code"  # left out, transformers asks at the terminal
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield node.lineno, "names trust_remote_code"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node))
        elif isinstance(node, ast.Attribute) and node.attr == "chmod":
            yield node.lineno, "changes the mode of a file"


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"{name}: {FORBIDDEN_CALLS[name]}"
    if name.split(".")[-1] in PRIVATE_FILES:
        yield f"{name}: its file is its owner's alone"
    if name == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and ast.unparse(given.get("allow_pickle", ast.Constant(None))) != "False":
        yield "np.load without allow_pickle=False"
    if name in ("np.save", "numpy.save") and ast.unparse(given.get("allow_pickle", ast.Constant(None))) != "False":
        yield "np.save without allow_pickle=False"
    if name.split(".")[0] == "subprocess" and "shell" in given:
        yield f"{name} with a shell"
    if name.split(".")[-1] == "mkdir" and ("mode" in given or len(call.args) > int(name == "os.mkdir")):
        yield f"{name} with a mode"
    if name.split(".")[-1] == "Environment" and ast.unparse(given.get("autoescape", ast.Constant(None))) not in (
        "True",
        "select_autoescape()",
    ):
        yield f"{name} without autoescape: text of documents would be HTML"
    if name.split(".")[-1] in ("Template", "Markup"):
        yield f"{name}: text of documents would be HTML; render through an Environment that escapes"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import dill.source",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, mmap_mode='r')",
        "np.save(path, value)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "load_dataset(name, **{'trust_remote_code': True})",
        "yaml.load(file)",
        "yaml.load(file, Loader=yaml.Loader)",
        "os.chmod(path, 0o777)",
        "Path(path).chmod(0o777)",
        "os.umask(0)",
        "path.mkdir(0o777)",
        "os.mkdir(path, 0o777)",
        "tempfile.NamedTemporaryFile(delete=False)",
        "subprocess.run(command, shell=True)",
        "jinja2.Environment()",
        "Environment(autoescape=False)",
        "jinja2.Template(text)",
        "Markup(text)",
    ],
)
def test_the_ratchet_sees_what_it_must(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "model.eval()",
        "ast.literal_eval(text)",
        "re.compile(pattern)",
        "yaml.safe_load(file)",
        "path.mkdir(parents=True, exist_ok=True)",
        "Environment(loader=loader, autoescape=True)",
    ],
)
def test_the_ratchet_lets_the_rest_pass(source: str) -> None:
    assert findings(source) == []


def test_html_is_made_by_templates_that_escape_alone() -> None:
    """Documents are other people's text: no module builds HTML by hand, and no template lets text through."""
    tags = ("<html", "<body", "<div", "<td", "<span", "<p>", "<script", "<table")
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and any(tag in node.value for tag in tags)
    ]
    assert found == []
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        assert "safe" not in [part.strip() for part in text.replace("}", "|").split("|")], path
        assert "autoescape false" not in text, path


# --- names and paths ---


@pytest.mark.parametrize("number", ["../../x", "1", -1, 1.0, True, None])
def test_a_round_number_from_a_file_never_leaves_its_folder(tmp_path: Path, number: object) -> None:
    with pytest.raises(ValueError, match="whole number of at least 0"):
        round_path(tmp_path, number)  # type: ignore[arg-type]


def test_only_its_own_files_of_a_saved_model_are_read(tmp_path: Path) -> None:
    report = FitReport(num_labels=8, num_held_out=2, spearman=0.1, interval=(-0.5, 0.5))
    write_artifact(tmp_path / "m", "Kind", {}, {"a": np.zeros(2, np.float32)}, report)
    assert read_artifact(tmp_path / "m", "Kind", ())[2].interval == report.interval
    secret = tmp_path / "secret"
    secret.write_text("secret")
    config = read_json(tmp_path / "m" / "config.json")
    for names in (
        {**config["sha256"], "../secret": sha256_of(secret)},
        {str(secret): sha256_of(secret), "fit.json": config["sha256"]["fit.json"]},
        ["model.safetensors", "fit.json"],
        "model.safetensors",
    ):
        write_json(tmp_path / "m" / "config.json", {**config, "sha256": names})
        with pytest.raises(MatesError, match="must hold every setting and checksum"):
            read_artifact(tmp_path / "m", "Kind", ())


# --- what is not a plain file ---


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it to read would wait for a writer that never comes
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        for read in (read_json, read_array, sha256_of):
            with pytest.raises(MatesError, match=f"`{tmp_path / name}` must be a plain file"):
                read(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "loop")


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, a=np.arange(3))
    with pytest.raises(MatesError, match="got a zip archive"):
        read_array(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(4611686018427387904,)", "<f4"),
        ("(-3,)", "<f4"),
        ("(9, 9)", "<f4"),
        ("(3,)", "|O"),
        ("(3,)", "<f8"),
        ("3", "<f4"),
    ],
)
def test_a_header_that_claims_more_than_there_is(tmp_path: Path, shape: str, descr: str) -> None:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.ljust(117) + "\n"
    (tmp_path / "a.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 12
    )
    with pytest.raises(MatesError, match=r"a\.npy` must"):
        read_array(tmp_path / "a.npy", np.float32)


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.json.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / "b.npy.tmp").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "a.json", {"a": 1})
    write_array(tmp_path / "b.npy", np.arange(3))
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a.json").is_symlink()


def test_setting_a_round_aside_deletes_nothing_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "_mates" / "round-0001").mkdir(parents=True)
    (tmp_path / "_mates" / "round-0001.stale").symlink_to(tmp_path / "precious")
    assert set_aside(tmp_path / "_mates" / "round-0001").name == "round-0001.stale-2"
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["file"]


# --- who may read ---

WRITE = """
import os, sys
from pathlib import Path
import numpy as np
os.umask(int(sys.argv[2], 8))
from mates_hf.prediction.artifacts import write_artifact
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.disk import write_array
from mates_hf.round_files import write_labels
from mates_hf.round_writer import RoundWriter
values = np.array([0.25, -0.5], np.float32)
labels = InfluenceLabels(
    candidate_id=np.arange(2), influence=values, influence_per_token=values, loss=values,
    num_tokens=np.ones(2, np.int32), probe=np.array(["a", "b"]), token_derivatives=values,
)
writer = RoundWriter(Path(sys.argv[1]) / "_mates", 1, {"step": 1})
write_labels(writer.path / "probes.parquet", labels)
write_array(writer.path / "scores.npy", values)
report = FitReport(num_labels=8, num_held_out=2, spearman=0.1, interval=(-0.5, 0.5))
write_artifact(writer.path / "influence_model", "Kind", {}, {"a": values}, report)
writer.finish({"number": 1})
"""


@pytest.mark.parametrize("umask", ["027", "022", "077"])
def test_file_modes_are_the_umasks(tmp_path: Path, umask: str) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path), umask]
    subprocess.run(command, check=True, cwd=PACKAGE.parent)
    paths = [path for path in (tmp_path / "_mates").rglob("*")]
    assert len(paths) == 11
    for path in (tmp_path / "_mates", *paths):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~int(umask, 8), path
    assert load_round(tmp_path / "_mates" / "round-0001").info == {"number": 1}


def test_a_round_writer_refuses_a_damaged_key(tmp_path: Path) -> None:
    writer = RoundWriter(tmp_path, 1, {"step": 1})
    for content in ("{", "[1]", "[" * 100_000):
        (writer.path / "key.json").write_text(content)
        with pytest.raises(MatesError, match=r"key\.json` must be a"):
            RoundWriter(tmp_path, 1, {"step": 1})


def test_labels_of_a_negative_length_are_refused(tmp_path: Path) -> None:
    """Lengths that sum up right and would cut one candidate's derivatives out of another's."""
    labels = InfluenceLabels(
        candidate_id=np.arange(2),
        influence=np.ones(2, np.float32),
        influence_per_token=np.ones(2, np.float32),
        loss=np.ones(2, np.float32),
        num_tokens=np.array([-1, 4], np.int32),
        probe=np.array(["directional"] * 2),
        token_derivatives=np.ones(3, np.float32),
    )
    write_labels(tmp_path / "probes.parquet", labels)
    with pytest.raises(MatesError, match="`num_tokens` must not be negative, got -1"):
        read_labels(tmp_path / "probes.parquet")
