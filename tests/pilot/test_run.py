"""A pilot on disk: what is refused before its first step, what a kill leaves, and the whole of one in small."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mates_hf.cli import main
from mates_hf.errors import MatesError
from mates_hf.pilot.filters import NAMES, SETTINGS, fit_filter, require_filter
from mates_hf.pilot.inputs import read_pilot_inputs
from mates_hf.pilot.place import PilotPlace
from mates_hf.pilot.run import run_pilot
from mates_hf.pilot.settings import PilotSettings, settings_of
from mates_hf.training.checkpoints import last_complete_checkpoint
from tests.pilot.kit import SMALL, settings, text, write_texts
from tests.training.fit_kit import tokenizer, write_model

ROOT = Path(__file__).parents[2]


# --- settings ---


def test_a_planned_run_gives_its_pilot_sizes() -> None:
    found = settings_of({"params": 410e6, "tokens": 26e9}, tiny=False)
    assert (found.pilot_params, found.pilot_tokens) == (41e6, 260e6)
    tiny = settings_of({"seeds": 2, "params": 1e9}, tiny=True)
    assert (tiny.params, tiny.seeds, tiny.row_tokens) == (1e9, 2, 64)
    assert tiny.pilot_params < 1e6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 0}, "`seeds` must be a whole number of at least 1, got 0"),
        ({"max_idle": 0}, "`max_idle` must be a number above 0"),
        ({"looked_up": 5e8}, r"`looked_up` must be below `params` \(4.1e\+08\)"),
        ({"selection_ratio": 1.0}, r"`selection_ratio` must be in \(0, 1\)"),
        ({"update_steps": 2}, "`update_steps` must be None or a whole number of at least 4"),
        ({"longer": 0.5}, "`longer` must be from 1 to 20"),
        ({"static_filter": "dsir"}, "`static_filter` must be 'moore-lewis', 'fasttext' or 'linear'"),
        ({"protected": "pool"}, "`protected` must be names of groups"),
        ({"price": -1}, "`price` must be None or a number above 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        settings(**changes)


def test_settings_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(ValueError, match="must know the planned run, and `params` and `tokens` is not given"):
        settings_of({}, tiny=False)
    with pytest.raises(TypeError, match="`sedes` is no setting of a pilot"):
        settings_of({"sedes": 3}, tiny=True)


# --- filters ---


def test_each_setting_of_a_filter_finds_what_is_like_the_reference() -> None:
    rng = np.random.default_rng(0)
    good, background = [text(rng, True) for _ in range(30)], [text(rng, i % 4 == 0) for i in range(200)]
    judged = [text(rng, i < 20) for i in range(40)]
    for kind in SETTINGS:
        if kind == "fasttext":
            pytest.importorskip("fasttext")
        for setting in SETTINGS[kind]:
            scores = fit_filter(kind, setting, good, background, 0)(judged)
            assert scores.shape == (40,)
            assert scores[:20].min() > scores[20:].max(), (kind, setting)
            again = fit_filter(kind, setting, good, background, 0)(judged)
            assert np.array_equal(scores, again)


@pytest.mark.parametrize(("kind", "module"), [("fasttext", "fasttext"), ("linear", "sklearn")])
def test_a_filter_that_is_not_installed_says_what_to_do(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "mates-hf\[pilot\]"'):
        run_pilot(tmp_path / "out", tiny=True, static_filter=kind, progress=False)
    assert not (tmp_path / "out").exists()
    if kind == "fasttext":  # the way out that it names
        require_filter("moore-lewis")
        assert "log-odds of words" in NAMES["moore-lewis"]


# --- what is read ---


def read(tmp_path: Path, **changes: Any) -> Any:
    given = write_texts(tmp_path / "texts")
    return read_pilot_inputs(tmp_path / "data", given["pool"], given["reference"], None, settings(**changes))


def test_parts_are_disjoint_and_rows_are_of_one_group(tmp_path: Path) -> None:
    given = write_texts(tmp_path / "texts")
    pool = [json.loads(line) for line in Path(given["pool"]).read_text().splitlines()]
    passages = [json.loads(line) for line in Path(given["reference"]).read_text().splitlines()]
    pool += [
        dict(pool[0]),
        {"text": "before " + passages[3]["text"] + " after", "kind": "good"},
        {"text": " ", "kind": "x"},
    ]
    Path(given["pool"]).write_text("".join(json.dumps(row) + "\n" for row in pool))
    found = read_pilot_inputs(tmp_path / "data", given["pool"], given["reference"], None, settings())
    assert found.facts["copies"] == 1
    assert found.facts["shared_with_passages"] >= 1
    counts = {name: found.facts[name]["passages"] for name in ("reference", "tuning", "held_out")}
    assert counts == {"reference": 24, "tuning": 16, "held_out": 24}
    whole = {}
    for name, part in found.passages.items():
        assert part.rows.lengths.max() <= 16
        assert len(part) == counts[name]
        ids = [
            np.concatenate([part.rows.row(i)[0] for i in np.flatnonzero(part.owner == j)]) for j in range(len(part))
        ]
        whole[name] = set(found.tokenizer.batch_decode(ids))
    assert not whole["reference"] & whole["held_out"]
    assert not whole["tuning"] & whole["held_out"]
    assert set().union(*whole.values()) <= {row["text"] for row in passages}  # cut, and nothing of them is lost
    assert {len(row) for row in found.pool["input_ids"]} == {16}
    kept, groups = found.kept_out
    assert sorted(groups) == ["good"] * 8 + ["other"] * 8
    rows = {tuple(row) for row in found.pool["input_ids"]}
    words = [found.tokenizer.decode(found.pool[i]["input_ids"]) for i in range(50)]
    for row, group in zip(words, found.pool["group"][:50], strict=True):
        assert ("any" in row) == (group == "other")
    assert sum(tuple(kept.row(i)[0]) in rows for i in range(len(kept))) == 0
    # Read again, it is what was written, whatever has become of the sources.
    Path(given["pool"]).unlink()
    again = read_pilot_inputs(tmp_path / "data", given["pool"], given["reference"], None, settings())
    assert again.pool["input_ids"][:] == found.pool["input_ids"][:]


def test_passages_to_judge_by_may_be_of_another_file(tmp_path: Path) -> None:
    given, rng = write_texts(tmp_path / "texts"), np.random.default_rng(7)
    judged = [text(rng, True, 20) for _ in range(20)]
    (tmp_path / "judged.txt").write_text("\n".join(judged))
    found = read_pilot_inputs(
        tmp_path / "data",
        given["pool"],
        given["reference"],
        str(tmp_path / "judged.txt"),
        settings(reference_limit=99),
    )
    held_out, pieces = found.passages["held_out"], found.passages["held_out"].rows
    ids = [
        np.concatenate([pieces.row(i)[0] for i in np.flatnonzero(held_out.owner == j)]) for j in range(len(held_out))
    ]
    assert found.tokenizer.batch_decode(ids) == judged
    assert found.facts["reference"]["passages"] + found.facts["reference"]["left_out"] == 60
    assert found.facts["tuning"]["passages"] + found.facts["tuning"]["left_out"] == 20


def test_names_of_groups_are_short_printable_and_few(tmp_path: Path) -> None:
    given = write_texts(tmp_path / "texts")
    pool = [json.loads(line) for line in Path(given["pool"]).read_text().splitlines()]
    names = ["\u202e<b>\0", "x" * 10_000, None, *(f"g{i}" for i in range(60))]
    pool = [{**row, "kind": names[i % 63] if i < 126 else names[i % 3]} for i, row in enumerate(pool)]
    Path(given["pool"]).write_text("".join(json.dumps(row) + "\n" for row in pool))
    found = read_pilot_inputs(tmp_path / "data", given["pool"], given["reference"], None, settings())
    groups = found.facts["groups"]
    assert len(groups) == 41
    assert {"?<b>?", "x" * 59 + "…", "(no group)", "(other groups)"} <= set(groups)
    assert sum(groups.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"column": "txt"}, "`pool` must have the column `txt`, got the columns"),
        ({"group_column": "source"}, "`pool` must have the column `source`"),
        ({"reference_column": "passage"}, "`reference` must have the column `passage`"),
        ({"batch_rows": 4_000}, "`pool` must have rows to train on"),
        ({"tokenizer": "no/such"}, "`tokenizer` must be a folder or a repository"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        read(tmp_path, **changes)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"protected": ["wiki"]}, r"`protected` must be groups of the pool \(pool, good, other\), got 'wiki'"),
        ({"pilot_tokens": 5e6}, "so that none is trained on twice"),
        ({"tokens": 1e6}, "The planned run must have rounds, and has none"),
        ({"model": "no/such", "tokenizer": None}, "must be a folder or a repository"),
    ],
)
def test_nothing_is_asked_for_before_it_can_be_run(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    given = write_texts(tmp_path / "texts")
    with pytest.raises(ValueError, match=match) as found:
        run_pilot(tmp_path / "out", given["pool"], given["reference"], progress=False, **{**SMALL, **changes})
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out" / "pilot.json").exists()
    # So that the same folder takes what was mended.
    PilotPlace(tmp_path / "out", settings().to_dict()).check()


def test_a_checkpoint_must_be_able_to_read_the_rows(tmp_path: Path) -> None:
    given = write_texts(tmp_path / "texts")
    model = str(write_model(tmp_path / "model"))  # reads 64 tokens, and knows 64 ids
    asked = {**SMALL, "model": model, "pilot_tokens": 2_000}
    for changes, words in (
        ({"row_tokens": 65}, "`row_tokens` must be at most the model's context of 64, got 65"),
        ({"tokenizer": str(write_tokenizer(tmp_path / "other"))}, "the model knows 64 ids and the tokenizer has 128"),
        ({"pilot_tokens": 5e6}, "so that none is trained on twice"),  # the model is taken
    ):
        with pytest.raises(ValueError, match=words):
            run_pilot(tmp_path / "out", given["pool"], given["reference"], progress=False, **{**asked, **changes})


def write_tokenizer(folder: Path) -> Path:
    tokenizer(128).save_pretrained(folder)
    return folder


def test_too_many_tokens_are_answered_with_a_number_that_fits(tmp_path: Path) -> None:
    given = write_texts(tmp_path / "texts", 120)
    asked = {**SMALL, "pilot_tokens": 30_000, "num_probes": 20}
    with pytest.raises(ValueError, match="take about `pilot_tokens=") as found:
        run_pilot(tmp_path / "out", given["pool"], given["reference"], progress=False, **asked)
    fits = float(str(found.value).partition("pilot_tokens=")[2].partition("`")[0])
    asked = {**asked, "pilot_tokens": fits, "protected": ["nobody"]}  # refused behind the rows, before the first step
    with pytest.raises(ValueError, match="`protected` must be"):
        run_pilot(tmp_path / "out", given["pool"], given["reference"], progress=False, **asked)


# --- the folder ---


def begun(out: Path, made: dict[str, Any] | None = None, **changes: Any) -> PilotPlace:
    place = PilotPlace(out, {"pool": "p", **settings(**changes).to_dict()})
    place.check()
    place.open()
    place.write_asked(made or {"schedule": 1})
    place.close()
    return place


def test_another_setting_is_refused_by_name_with_both_values(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    begun(tmp_path / "out")
    with pytest.raises(MatesError, match=r"they differ in `max_harm` \(there 0.1, here 0.5\)") as found:
        begun(tmp_path / "out", max_harm=0.5)
    assert "\n" not in str(found.value)
    with pytest.raises(MatesError, match=r"`weak_rounds` \(there 2, here 9\), `max_idle`"):
        begun(tmp_path / "out", max_idle=0.5, weak_rounds=9)


def test_seeds_may_be_added_and_never_left_out(tmp_path: Path) -> None:
    begun(tmp_path / "out", seeds=2)
    place = begun(tmp_path / "out", seeds=5)
    assert place.seeds_asked == [2, 5]
    assert begun(tmp_path / "out", seeds=5).seeds_asked == [2, 5]
    with pytest.raises(MatesError, match=r"`seeds` must be at least 5 in .*, got 3"):
        begun(tmp_path / "out", seeds=3)


def test_another_version_that_makes_other_steps_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "out", {"schedule": {"steps": 3}, "filters": ["a"]})
    with pytest.raises(MatesError, match="which differs in `filters`"):
        begun(tmp_path / "out", {"schedule": {"steps": 3}, "filters": ["b"]})
    with pytest.raises(MatesError, match="which differs in `schedule`"):  # nor with more seeds
        begun(tmp_path / "out", {"schedule": {"steps": 4}, "filters": ["a"]}, seeds=9)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MatesError, match="holds something else"):
        PilotPlace(tmp_path, settings().to_dict()).check()
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_pilots_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom mates_hf.pilot.place import PilotPlace\n"
        "place = PilotPlace(Path(sys.argv[1]), {'seeds': 3})\nplace.open()\nprint('open', flush=True)\ninput()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(MatesError, match="must be written to by one pilot"):
        begun(tmp_path / "out")
    other.communicate("\n")
    begun(tmp_path / "out")


def test_every_setting_and_criterion_is_in_the_file_before_the_first_step(tmp_path: Path) -> None:
    begun(tmp_path / "out", protected=["pool"])
    asked = json.loads((tmp_path / "out" / "pilot.json").read_text())["asked"]
    assert PilotSettings(**{name: value for name, value in asked.items() if name != "pool"}) == settings(
        protected=["pool"]
    )
    assert asked["weak_rounds"] == 2
    assert asked["protected"] == ["pool"]


# --- the command ---


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    path = tmp_path / "pilot.yaml"
    for content, words in (
        ("seeds: 0\nparams: 410M\ntokens: 26B\n", "`seeds` must be"),
        ("sedes: 3\n", "must hold settings of a pilot, got sedes"),
        ("- 3\n", "must hold settings with their values, got list"),
        ("params: many\n", "`params` must be a number such as 410M"),
        ("a: [\n", "must be YAML"),
        ("seeds: 3\n", "`params` and `tokens` is not given"),
    ):
        path.write_text(content)
        assert main(["pilot", "--out", out, "--config", str(path)]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("mates-hf: ")
        assert words in said
    assert main(["pilot", "--out", out, "--params", "410M", "--tokens", "26B", "--pool", str(tmp_path)]) == 1
    assert not (tmp_path / "out" / "pilot.json").exists()


# --- the whole of it ---


def finished(place: Path) -> dict[str, Any]:
    """What units left, without seconds, which no two runs share."""
    found = {}
    for path in sorted((place / "units").glob("*.json")):
        unit = json.loads(path.read_text())
        timed = ("seconds", "filter_seconds", "idle_seconds", "selecting_seconds")
        unit = {name: value for name, value in unit.items() if name not in timed}
        unit["rounds"] = [{k: v for k, v in one.items() if k != "seconds"} for one in unit.get("rounds", ())]
        found[path.stem] = unit
    return found


def kill_when(given: dict[str, Any], out: Path, seen: Any) -> None:
    """Start a pilot, and kill it as soon as `seen()` is true."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps({**given, "out": str(out)})]
    with open(out.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    limit = time.monotonic() + 180
    while process.poll() is None and not seen() and time.monotonic() < limit:
        time.sleep(0.005)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert alive, out.with_suffix(".log").read_text()
    assert seen()


@pytest.mark.slow
def test_a_pilot_that_was_killed_in_a_unit_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "texts")
    given = {**SMALL, **texts}
    arguments = {name: value for name, value in given.items() if name not in texts}
    whole = run_pilot(tmp_path / "whole", given["pool"], given["reference"], progress=False, **arguments)
    assert whole.decision in ("measure more", "no-go")  # of one seed
    assert whole.page.read_text().startswith("<!doctype html>")
    assert len(finished(tmp_path / "whole")) == 3 + 3
    # A pilot that lacks its last unit; that one is killed behind its second round, with a checkpoint on disk.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    ours = tmp_path / "killed" / "runs" / "ours-seed-0"
    shutil.rmtree(ours)
    (tmp_path / "killed" / "units" / "ours-seed-0.json").unlink()
    kill_when(given, tmp_path / "killed", lambda: (ours / "mark-00000036.json").exists())
    assert last_complete_checkpoint(ours) is not None
    assert "ours-seed-0" not in finished(tmp_path / "killed")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "units").iterdir()}
    with pytest.raises(MatesError, match=r"they differ in `learning_rate` \(there 0.005, here 0.1\)"):
        run_pilot(tmp_path / "killed", given["pool"], given["reference"], **{**arguments, "learning_rate": 0.1})
    killed = run_pilot(tmp_path / "killed", given["pool"], given["reference"], progress=False, **arguments)
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")
    assert killed.data["verdict"] == whole.data["verdict"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # what was done is not done again
    assert not list((tmp_path / "killed").glob("runs/*/checkpoint-*"))
    # A further seed leaves the first as it was, and gives an interval.
    first = finished(tmp_path / "whole")
    more = run_pilot(
        tmp_path / "whole", given["pool"], given["reference"], progress=False, **{**arguments, "seeds": 2}
    )
    assert {name: unit for name, unit in finished(tmp_path / "whole").items() if name in first} == first
    assert more.data["summary"]["findings"]["difference"]["low"] is not None
    assert more.data["seeds_asked"] == [1, 2]
    start = [more.data["summary"]["curves"][arm]["losses"][0] for arm in ("random", "filter", "ours")]
    assert len(set(start)) == 1  # the arms of a seed part from the same weights
    assert main(["verify", str(tmp_path / "whole" / "runs" / "ours-seed-0")]) == 0
    # The command, with its settings from a file, finds all of it done.
    (tmp_path / "pilot.yaml").write_text(json.dumps({**given, "seeds": 2, "params": "410M"}))
    capsys.readouterr()
    command = ["pilot", "--out", str(tmp_path / "whole"), "--config", str(tmp_path / "pilot.yaml"), "--quiet"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == json.loads(json.dumps(more.data["verdict"]))
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {more.page}"


@pytest.mark.slow
def test_a_tiny_pilot_ends_in_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mates-hf pilot --tiny` on the built-in text, of fewer tokens, one seed and the filter that needs no package."""
    out = tmp_path / "pilot"
    smaller = ["--pilot-tokens", "40k", "--pilot-params", "20k", "--row-tokens", "64", "--batch-rows", "8"]
    smaller += ["--vocab-size", "512", "--reference-limit", "48", "--held-out-limit", "32", "--pool-documents", "2000"]
    smaller += ["--update-steps", "20", "--num-probes", "60", "--seeds", "1", "--longer", "1.0"]
    assert main(["pilot", "--out", str(out), "--tiny", "--static-filter", "linear", "--quiet", *smaller]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"page: {out / 'pilot.html'}"
    page = (out / "pilot.html").read_text()
    assert page.startswith("<!doctype html>")
    assert json.loads((out / "result.json").read_text())["verdict"]["decision"] in ("no-go", "measure more")
