from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

import mates_hf
from mates_hf.cli import main
from mates_hf.cli.report import open_dataset
from mates_hf.disk import write_array, write_json
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import load_round, write_labels
from mates_hf.round_writer import RoundWriter
from tests.reporting.made_run import round_info, write_rounds, write_state

KEY = {"config": {}, "pool": {}, "step": 8, "weights": "w"}


def write_round(rounds_dir: Path, *, selects: bool) -> Path:
    influence = np.array([0.25, -0.5, 0.75], np.float32)
    labels = InfluenceLabels(
        candidate_id=np.array([4, 0, 9]),
        influence=influence,
        influence_per_token=influence,
        loss=np.ones(3, np.float32),
        num_tokens=np.array([2, 3, 4], np.int32),
        probe=np.array(["directional"] * 3),
    )
    writer = RoundWriter(rounds_dir, 3, KEY)
    write_labels(writer.path / "probes.parquet", labels)
    decision = "own_order"
    if selects:
        decision = "select"
        write_array(writer.path / "candidates.npy", np.array([1, 2, 3, 5]))
        write_array(writer.path / "scores.npy", np.array([-4.0, 1.0, -4.0, 3.0], np.float32))
        write_array(writer.path / "selection.npy", np.array([5, 2]))
    guard = {"decision": decision, "spearman": 0.5, "interval": [0.25, 0.75]}
    return writer.finish({"guard": guard, "seconds": {"probe": 1.5}, "seeds": [1, 2, 3, 4, 5]})


def test_round_is_five_lines_with_the_decision_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(write_round(tmp_path, selects=True))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split("   ")[0] == "round 3 · selected 2 rows"
    assert lines[0].endswith("   OK")
    assert lines[1].split("   ")[1] == "held-out Spearman 0.50 [0.25, 0.75]"
    assert lines[1].endswith("   above the guard")
    assert len({line.rindex("   ") for line in lines[:2]}) == 1  # judgements stand below one another
    assert lines[2].startswith("  labels   3 probed, sd 0.514")
    # The mean over rows 5 and 2, not over the highest of some other order.
    assert lines[4].startswith("  chosen   predicted influence +2.00e+00 on average, -1.00e+00 over all candidates   ")
    assert lines[4].endswith("mates-hf report")


def test_round_in_own_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(write_round(tmp_path, selects=False))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("   ")[0] == "round 3 · selected nothing"
    assert lines[0].endswith("   kept the Trainer's own order")
    assert "below the guard" in lines[1]
    assert lines[4].startswith("  chosen   nothing; the run went on in the Trainer's own order")


def test_all_of_a_round_is_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path, selects=True)
    info = json.loads((path / "round.json").read_text()) | {"fit": {"slope": float("nan")}}
    write_json(path / "round.json", info)
    assert main(["round", str(path), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told["decision"] == "select"
    assert told["labels"]["num"] == 3
    assert told["labels"]["influence"]["mean"] == pytest.approx(1 / 6)
    assert told["selection"] == {"num": 2, "mean_score": 2.0}
    assert told["info"]["seeds"] == [1, 2, 3, 4, 5]
    assert told["info"]["fit"] == {"slope": None}


def test_a_run_its_rounds_and_a_number_name_a_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    third = write_round(run / "_mates", selects=True)
    shutil.copytree(third, third.with_name("round-0012"))
    (run / "_mates" / "round-0013.partial").mkdir()
    (run / "_mates" / "round-0012.stale").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (run, run / "_mates", "~/run"):
        assert main(["round", str(path)]) == 0, path
        assert capsys.readouterr().out.startswith("round 12 ·"), path
        assert main(["round", str(path), "3"]) == 0, path
        assert capsys.readouterr().out.startswith("round 3 ·"), path
    for arguments in (["run", "4"], ["run/_mates/round-0004"], ["run/_mates/round-0013.partial"]):
        assert main(["round", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert "Finished rounds there: 3, 12; the newest is" in output.err
        assert "round-0012`" in output.err
    for path in (run, run / "_mates"):
        with pytest.raises(FileNotFoundError, match="is not a finished round, but holds some. .*: 3, 12;"):
            load_round(path)


@pytest.mark.parametrize("command", ["round", "verify", "cost", "report"])
def test_directories_without_a_finished_round_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "_mates" / "round-0001.partial").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("empty", "begun", "begun/_mates", "file", "missing"):
        assert main([command, str(tmp_path / name)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("mates-hf: `")
        assert output.err.count("\n") == 1
        if name.startswith("begun"):
            assert "round-0001.partial" in output.err


def test_cost_and_verify_take_a_run_and_its_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "_mates" / "round-0001").mkdir(parents=True)
    write_json(tmp_path / "_mates/round-0001/round.json", {"step": 8, "stages": {"fit": {"seconds": 1.0}}})
    write_json(tmp_path / "trainer_state.json", {"global_step": 16, "total_flos": 2e11, "log_history": []})
    told = []
    for path in (tmp_path, tmp_path / "_mates"):
        assert main(["cost", str(path)]) == 0
        told.append(capsys.readouterr().out)
        assert "16" in told[-1].splitlines()[0]
        assert main(["verify", str(path)]) == 1  # what it finds is wrong, not where it looks
        assert "holds no round" not in capsys.readouterr().err
    assert told[0] == told[1]


def test_report_writes_a_page_or_prints_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_rounds(run, [round_info(1), round_info(2)])
    write_state(run, 80, {20: 5.0, 40: 4.0, 60: 3.0})
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--no-verify", "--out", str(out), "--price", "2.5", "--devices", "8"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("The run selects.")
    assert told[1] == f"written: {out}"
    assert "Money at 2.50 for an hour of a device, 8 devices" in out.read_text(encoding="utf-8")
    assert main(["report", str(run / "_mates"), "--no-verify"]) == 0
    assert (run / "_mates/report.html").exists()
    capsys.readouterr()
    assert main(["report", str(run), "--json", "--redact"]) == 1  # what was made by hand does not verify
    output = capsys.readouterr()
    data = json.loads(output.out)
    assert [row["number"] for row in data["rounds"]] == [1, 2]
    assert data["verdict"]["level"] == "look"
    assert "round-0001/" in output.err
    assert main(["report", str(run), "--dataset", str(tmp_path / "nowhere")]) == 1
    assert "must be a folder of `save_to_disk`" in capsys.readouterr().err
    assert main(["report", str(run), "--price", "0"]) == 1
    assert "`price` must be above 0" in capsys.readouterr().err


def test_report_takes_the_pool_from_disk(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]]})
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.to_json(str(tmp_path / "rows.jsonl"))
    (tmp_path / "many").mkdir()
    for i in range(2):
        rows.select([i]).to_parquet(str(tmp_path / f"many/{i}.parquet"))
    for name in ("saved", "rows.parquet", "rows.jsonl", "many", "many/*.parquet"):
        assert open_dataset(str(tmp_path / name))["input_ids"] == rows["input_ids"], name
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="one split, got train, test"):
        open_dataset(str(tmp_path / "splits"))


def test_compare_prints_lines_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, last in (("a", 3.0), ("b", 3.5)):
        write_state(tmp_path / name, 60, {20: 5.0, 40: 4.0, 60: last})
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 0
    assert "A has the lower loss at equal tokens, by 0.5000" in capsys.readouterr().out
    assert "eval_loss" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["compare", *runs, "--json", "--metric", "eval_loss"]) == 0
    assert json.loads(capsys.readouterr().out)["equal_tokens"]["difference"] == -0.5
    assert main(["compare", *runs, "--metric", "none"]) == 1
    assert "they share eval_loss" in capsys.readouterr().err


def test_without_a_command_there_is_help_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verify" in capsys.readouterr().err
    for arguments in (["nonsense"], ["round"], ["round", "x", "y"], ["--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mates-hf {mates_hf.__version__}\n"


def run_module(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m mates_hf`, or code, in a process of its own."""
    given = ["-m", "mates_hf", *arguments] if code is None else ["-c", code, *arguments]
    root = Path(mates_hf.__file__).parents[1]
    return subprocess.run([sys.executable, *given], cwd=root, capture_output=True, text=True, check=False)


def test_python_m_is_the_command() -> None:
    told = run_module("--version")
    assert (told.returncode, told.stdout) == (0, f"mates-hf {mates_hf.__version__}\n")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    path = write_round(tmp_path, selects=True)
    read, write = os.pipe()
    os.close(read)
    root = Path(mates_hf.__file__).parents[1]
    for arguments in (["round", str(path)], ["round", str(path), "--json"], ["--version"]):
        given = [sys.executable, "-m", "mates_hf", *arguments]
        told = subprocess.run(given, cwd=root, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        assert (told.returncode, told.stderr) == (0, ""), arguments
    os.close(write)


def test_a_package_that_is_missing_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['numpy'] = None; from mates_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    told = run_module("round", str(tmp_path), code=code)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == "mates-hf: `numpy` must be installed and is not: `pip install numpy`\n"
    assert run_module("--version", code=code).returncode == 0


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mates_hf.cli.env.describe_environment", lambda: (1 / 0 for _ in range(1)))
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_a_path_that_is_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mates-hf: ")
    assert "is not a finished round" in output.err


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("torch", "transformers", "accelerate", "datasets", "numpy", "numba", "pyarrow"):
        assert f"{name}: {importlib.metadata.version(name)}" in lines
    for start in ("python: ", "platform: ", "torch build: ", "accelerators: ", "torch threads: ", "threads: "):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert all(line.partition(": ")[2] for line in lines)


def test_environment_names_variables_and_tells_no_value_or_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"MASTER_ADDR": "secret-host", "WORLD_SIZE": "876543", "NCCL_SOCKET_IFNAME": "secret-card"}
    untold = {"HF_TOKEN": "secret-token", "WANDB_API_KEY": "secret-key"}
    for name, value in {**told, **untold}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("set in the environment: "))
    assert set(told) <= set(line.partition(": ")[2].split(", "))
    assert not any(name in out for name in untold)
    assert not any(value in out for value in {**told, **untold}.values())
    assert "OMP_NUM_THREADS=3" in out
    assert str(Path.home()) not in out
    assert str(Path(mates_hf.__file__).parents[1]) not in out


def test_environment_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env"]) == 0
    assert "accelerators: unknown, torch cannot be imported (ModuleNotFoundError)" in capsys.readouterr().out


def test_a_damaged_round_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path, selects=True)
    (path / "scores.npy").write_bytes(b"\x93NUMPY")
    assert main(["round", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"mates-hf: `{path / 'scores.npy'}` must be a whole .npy file")
    assert output.err.count("\n") == 1


def test_the_cost_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere" / "round-0001").mkdir(parents=True)
    stages = {"probe": {"seconds": 2.0, "flops": 5e9}, "fit": {"seconds": 1.0}}
    write_json(tmp_path / "elsewhere/round-0001/round.json", {"step": 8, "stages": stages})
    write_json(tmp_path / "trainer_state.json", {"global_step": 16, "total_flos": 2e11, "log_history": []})
    assert main(["cost", str(tmp_path)]) == 1
    assert "must hold a finished round" in capsys.readouterr().err
    assert main(["cost", str(tmp_path), "--rounds-dir", str(tmp_path / "elsewhere")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (probe,) = [line for line in lines if line.startswith("probe")]
    assert probe.split() == ["probe", "2.00", "not", "recorded", "5.000e+09", "2.50%"]
    assert main(["cost", str(tmp_path), "--json", "--rounds-dir", str(tmp_path / "elsewhere")]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["probe"]["share_of_training_flops"] == 0.025


def test_score_reads_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.selection.files_kit import kept_ids, make_texts, text_selector, write_parquet

    selector = text_selector()
    selector.save_pretrained(tmp_path / "selector")
    texts = make_texts(50, 0)
    write_parquet(tmp_path / "in" / "a.parquet", texts)
    given = ["score", str(tmp_path / "selector"), str(tmp_path / "in" / "*.parquet"), "--out", str(tmp_path / "out")]
    assert main([*given, "--ratio", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "rows kept    10 of 50 (ratio=0.2)"
    assert len(lines) == 6
    assert main([*given, "--top-k", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows_kept"] == 3
    dataset = importlib.import_module("datasets").Dataset.from_dict({"id": range(50), "text": texts})
    assert kept_ids(tmp_path / "out") == selector.filter(dataset, k=3)["id"]
    assert main([*given, "--add-scores"]) == 0
    assert "50 of 50 (all rows)" in capsys.readouterr().out


def test_score_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mates_hf import MatesSelector, TextInfluenceModel
    from tests.selection.files_kit import make_texts, text_selector, write_parquet

    text_selector().save_pretrained(tmp_path / "selector")
    write_parquet(tmp_path / "a.parquet", make_texts(5, 0))
    selector, source, out = (str(tmp_path / name) for name in ("selector", "a.parquet", "out"))
    for arguments, words in (
        ([selector, source], "--out"),
        ([selector, source, "--out", out], "--ratio --tokens --threshold --top-k --add-scores is required"),
        ([selector, source, "--out", out, "--ratio", "0.2", "--top-k", "3"], "not allowed with argument"),
        ([selector, source, "--out", out, "--ratio", "0.2", "--on-error", "ignore"], "invalid choice: 'ignore'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["score", *arguments])
        assert words in capsys.readouterr().err
    for arguments, status, words in (
        ([selector, source, "--out", out, "--ratio", "1.5"], 2, "mates-hf score: `ratio` must be in (0, 1], got 1.5."),
        ([selector, source, "--out", out, "--ratio", "1", "--workers", "0"], 2, "`workers` must be a whole number"),
        ([selector, source, "--out", out, "--top-k", "9"], 1, "mates-hf: `k` must be at most the number of rows (5)"),
        ([selector, source + "x", "--out", out, "--top-k", "9"], 1, "names files or folders"),
        ([selector + "x", source, "--out", out, "--top-k", "9"], 1, "selectorx"),
        ([selector, source, "--out", out, "--top-k", "9", "--column", "txt"], 1, "got the columns ['id', 'text'"),
    ):
        assert main(["score", *arguments]) == status
        told = capsys.readouterr().err
        assert words.replace("names", "must name") in told
        assert told.count("\n") == 1
    assert not list(Path(out).glob("*.parquet"))

    given = [selector, source, "--out", out, "--top-k", "3"]
    assert main(["score", *given]) == 0
    texts = make_texts(50, 1)
    other = TextInfluenceModel.distil([len(text) for text in texts], texts, num_buckets=2**10)
    MatesSelector(other).save_pretrained(tmp_path / "other")
    before = Path(out, "a.parquet").read_bytes()
    capsys.readouterr()
    assert main(["score", str(tmp_path / "other"), *given[1:]]) == 1
    assert "`out` must be a folder of this selector" in capsys.readouterr().err
    write_parquet(tmp_path / "a.parquet", make_texts(6, 0))
    assert main(["score", *given]) == 1
    told = capsys.readouterr().err
    assert "`a.parquet` was changed" in told
    assert told.count("\n") == 1
    assert Path(out, "a.parquet").read_bytes() == before
