"""The benchmarks: all are listed, pages follow from their JSON, rooms are closed, and quick runs end and go on."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import os
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.lab import harness
from benchmarks.lab.tables import table
from benchmarks.lab.units import side_by_side

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODULES = sorted(path for path in BENCHMARKS.rglob("*.py") if path.parent != BENCHMARKS)
NOT_MEASURED = {"gpu"}  # needs a card
RESULT = re.compile(r"(?P<name>[a-z_]+)_(cpu\d+|[a-z0-9]+)_20\d\d-(0[1-9]|1[0-2])")


@pytest.fixture(autouse=True)
def benchmarks_silence_loggers_in_their_own_test_alone() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("mates_hf", "lm_eval")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, env=environment, timeout=1_200, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done.stdout


def room_of(module: str) -> str:
    """`benchmarks.lab`, or the question that a module belongs to: `benchmarks.quality.selection`."""
    return ".".join(module.split(".")[: 2 if module.startswith("benchmarks.lab") else 3])


def strays(source: str, module: str) -> Iterator[str]:
    """Imports that leave a module's room for another than `lab`."""
    for node in ast.walk(ast.parse(source)):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            found = ["relative"] * node.level or [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            inside = name.startswith("benchmarks.") and room_of(name) in (room_of(module), "benchmarks.lab")
            if name.split(".")[0] in ("benchmarks", "tests", "examples", "relative") and not inside:
                yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_a_question_imports_from_the_lab_alone(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert list(strays(path.read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from benchmarks.cost.probe_speed import run", "benchmarks.quality.selection.page"),
        ("def f():\n    from tests.launch import free_port", "benchmarks.reliability.kills"),
        ("from ..cost import probe_speed", "benchmarks.quality.fidelity"),
        ("import benchmarks.cost.overhead", "benchmarks.lab.units"),
        ("from benchmarks.quality import fidelity", "benchmarks.quality.selection"),
    ],
)
def test_the_rule_sees_a_wrong_import(source: str, module: str) -> None:
    assert list(strays(source, module))


def test_help_lists_every_question_and_the_readme_answers_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main(["--help"])
    listed, readme = capsys.readouterr().out, (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    rooms = [*BENCHMARKS.glob("*/*.py"), *BENCHMARKS.glob("*/*/__init__.py")]
    names = {
        path.parent.name if path.name == "__init__.py" else path.stem for path in rooms if "lab" not in path.parts
    }
    assert names - {"quality", "cost", "reliability"} == set(harness.questions())
    for name, question in harness.questions().items():
        assert f"  {name} " in listed
        assert question.asks in listed
        assert len(question.asks) > 30
        answered = f"`python -m benchmarks {name} " if name in NOT_MEASURED else f"[`{name}`](results/{name}_"
        assert answered in readme, name


def test_every_result_is_named_by_question_hardware_and_month() -> None:
    known, results = harness.questions(), sorted((BENCHMARKS / "results").iterdir())
    for path in results:
        found = RESULT.fullmatch(path.stem)
        assert found, path.name
        assert harness.question_of(path, known), path.name
    assert {path.stem for path in results if path.suffix == ".md"} == {p.stem for p in results if p.suffix == ".json"}


def test_an_unknown_question_and_a_result_of_none_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no question `nothing`"):
        harness.main(["nothing"])
    assert harness.check_all(tmp_path, None) == 1  # nothing to check is no good news
    (tmp_path / "nothing_cpu2_2026-11.json").write_text("{}")
    assert harness.check_all(tmp_path, None) == 1
    assert "no such question" in capsys.readouterr().out


def test_a_page_that_does_not_follow_is_told(tmp_path: Path) -> None:
    for path in (BENCHMARKS / "results").glob("large_pool_*.[jm]*"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8").replace("Not in these", "Also in these"))
    assert harness.check_all(tmp_path, "large_pool") == 1
    assert harness.check_all(tmp_path, "rows_cost") == 1  # there is none
    (path,) = tmp_path.glob("*.json")
    harness.write_page(harness.questions()["large_pool"].module(), path)
    assert harness.check_all(tmp_path, "large_pool") == 0


def test_tables_and_pictures_of_other_pages_are_written_and_compared(tmp_path: Path) -> None:
    module: Any = SimpleNamespace(page=lambda document: "whole\n")
    page, picture = tmp_path / "page.md", tmp_path / "picture.svg"
    module.tables = lambda document: {page: [table(["arm", "loss"], document["rows"])]}
    module.pictures = lambda document: {picture: f"<svg>{document['rows'][0][1]}</svg>"}
    result = tmp_path / "asked_cpu2_2026-11.json"
    result.write_text('{"rows": [["ours", 1.5], ["random", 2.0]]}', encoding="utf-8")
    harness.write_page(module, result)
    other, stale = "| other | loss |\n|---|---|\n| ours | 9 |", "| arm | loss |\n|:--|--:|\n| ours | 1.4 |\n| old |1|"
    before = f"# Page\n\n{other}\n\n{stale}\n\nEnd\n"
    page.write_text(before, encoding="utf-8")
    assert any("arm | loss" in wrong for wrong in harness.check(result, module))
    assert any("picture.svg is not drawn" in wrong for wrong in harness.check(result, module))
    harness.write_docs(module, harness.read(result))
    assert list(harness.check(result, module)) == []
    assert picture.read_text(encoding="utf-8") == "<svg>1.5</svg>"
    picture.write_text("<svg>1.4</svg>", encoding="utf-8")
    assert list(harness.check(result, module)) == ["picture.svg is not drawn from asked_cpu2_2026-11.json"]
    picture.write_text("<svg>1.5</svg>", encoding="utf-8")
    after = before.replace("| ours | 1.4 |\n| old |1|", "| ours | 1.5 |\n| random | 2.0 |")
    assert page.read_text(encoding="utf-8") == after
    page.write_text(after.replace("End", "| arm | loss |\n|---|---|\n"), encoding="utf-8")  # which one is meant?
    assert len(list(harness.check(result, module))) == 1
    with pytest.raises(ValueError, match="2 tables in place of one"):
        harness.write_docs(module, harness.read(result))


def test_no_unit_begins_after_the_deadline() -> None:
    assert list(side_by_side(len, [("one",), ("two",)], 1, time.monotonic() - 1)) == []


def test_json_is_what_was_given_with_a_line_for_each_entry() -> None:
    document = {"quick": True, "units": {"a": {"x": 1 / 3}, "b": {"x": None}}, "n": [1, 2.0]}
    text = harness.as_json(document, 4)
    assert json.loads(text) == {"quick": True, "units": {"a": {"x": 0.3333}, "b": {"x": None}}, "n": [1, 2.0]}
    assert '\n"b":' in text
    assert json.loads(harness.as_json({"points": [], "n": 1}, 4)) == {"points": [], "n": 1}


@pytest.mark.slow
def test_every_page_follows_from_the_committed_json() -> None:
    assert "follow from their JSON" in run("--check")


@pytest.mark.slow
def test_the_kit_for_a_card_runs_on_a_processor_and_goes_on(tmp_path: Path) -> None:
    arguments = ("gpu", "--quick", "--threads", "1", "--out", str(tmp_path / "out"))
    arguments = (*arguments, "--work", str(tmp_path / "work"))
    said = run(*arguments)
    (path,) = (tmp_path / "out").glob("gpu-quick_*.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert set(parts) == {"tests", "fidelity tiny", "speed tiny", "overhead", "training"}
    assert all(part["done"] and "error" not in part for part in parts.values()), said
    assert {found["outcome"] for found in parts["tests"]["outcomes"].values()} <= {"passed", "skipped"}
    points = {arm: found["points"] for arm, found in parts["training"]["arms"].items()}
    assert {len(found) for found in points.values()} == {3}  # turns of four steps
    assert {found[0]["reference"] for found in points.values()} == {points["random"][0]["reference"]}  # one start

    # What is done is kept; an arm whose steps are raised goes on from its own.
    unit = tmp_path / "work" / "gpu-quick" / "units" / "training.json"
    unit.unlink()
    times = {other: other.stat().st_mtime_ns for other in unit.parent.glob("*.json")}
    run(*arguments)
    assert {other: other.stat().st_mtime_ns for other in times} == times
    again = json.loads(path.read_text(encoding="utf-8"))["parts"]["training"]["arms"]
    assert {arm: found["points"] for arm, found in again.items()} == points
    run("gpu", "--check", "--out", str(tmp_path / "out"))


def test_parts_share_the_time_and_begin_nothing_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.reliability import gpu

    begun: list[tuple[str, float]] = []

    def measured(call: str, task: gpu.Task) -> dict[str, object]:
        begun.append((task.part, task.seconds))
        return {"done": task.part != "training"}

    monkeypatch.setattr(gpu, "_measured", measured)
    monkeypatch.setattr(gpu, "card", lambda: "a card")

    def call(minutes: str) -> harness.Bench:
        parser = harness.common_parser("gpu", "")
        gpu.add_options(parser)
        options = parser.parse_args(
            ["--minutes", minutes, "--out", str(tmp_path), "--work", str(tmp_path), "--data", str(tmp_path)]
        )
        options.begun = time.monotonic()
        bench = harness.Bench("gpu", gpu, options)
        gpu.run(bench)
        return bench

    assert call("0.1").left == 7
    assert begun == []  # six seconds are not enough for any
    bench = call("10")
    assert bench.left == 1
    assert [part for part, _ in begun] == list(gpu.parts_of(False))
    # What a part leaves goes to those behind it: all of what is left, in the end.
    assert 150 < begun[0][1] < 185
    assert 550 < begun[-1][1] <= 600
    begun.clear()
    assert call("10").left == 1
    assert [part for part, _ in begun] == ["training"]
    assert 590 < begun[0][1] <= 600
    assert "a card" in next(tmp_path.glob("gpu_*.md")).read_text(encoding="utf-8")


def test_a_part_of_the_kit_that_fails_says_so_and_ends_no_other(tmp_path: Path) -> None:
    from benchmarks.reliability.gpu.device import Task
    from benchmarks.reliability.gpu.isolated import in_child

    task = Task(part="none", size="tiny", seconds=300.0, quick=True, data="", work=str(tmp_path), steps=1, threads=1)
    found = in_child("benchmarks.reliability.gpu.device:no_such_part", task)
    assert not found["done"]
    assert "no_such_part" in found["error"]


def test_a_folder_without_wheels_is_told(tmp_path: Path) -> None:
    from benchmarks.lab.wheels import install_from

    install_from(["gpu", "--minutes", "8"])
    for arguments in (["gpu", "--wheels", str(tmp_path)], ["gpu", f"--wheels={tmp_path}"]):
        with pytest.raises(SystemExit, match="pip wheel -w wheels"):
            install_from(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit_file"),
    [("selection", "lambada--ours--0.json"), ("faults", "labels:_last_error.json")],
)
def test_a_quick_run_ends_and_goes_on_where_it_was_stopped(name: str, unit_file: str, tmp_path: Path) -> None:
    arguments = (name, "--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    run(*arguments)
    (page,) = (tmp_path / "out").glob(f"{name}-quick_*.md")
    units = sorted((tmp_path / "work").rglob(unit_file))
    assert len(units) == 1
    before = page.read_text(encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in units[0].parent.glob("*.json")}
    assert len(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["units"]) == len(times) > 1
    # Nothing is done twice, and the page is made of what is there.
    run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert page.read_text(encoding="utf-8") == before
    run(name, "--check", "--out", str(tmp_path / "out"))


def test_a_penalty_spreads_a_set_and_a_mask_leaves_the_better_tokens() -> None:
    from benchmarks.lab.corpus import as_rows, together
    from benchmarks.quality.horizon.choosing import best_tokens, distilled, spread_top_k

    rng = np.random.default_rng(0)
    liked = np.arange(400) % 4 == 0  # a quarter of the rows; its tokens are 1 to 3, those of the rest 4 to 7
    ids = np.where(liked[:, None], rng.integers(1, 4, (400, 9)), rng.integers(4, 8, (400, 9)))
    rows, values = as_rows(ids, 9), liked + rng.normal(0, 0.1, 400)
    assert set(spread_top_k(values, rows, 100, 0.0)) == set(np.argsort(-values)[:100]) == set(np.flatnonzero(liked))
    spread = [liked[spread_top_k(values, rows, 100, penalty)].mean() for penalty in (1.0, 3.0, 30.0)]
    assert 1 > spread[0] > spread[1] > spread[2] > 0.25

    ids = rng.integers(1, 8, (400, 9))
    tables = distilled(as_rows(ids, 9), (ids[:, 1:] >= 5).mean(1), 0)
    masked = best_tokens(as_rows(ids, 9), tables)
    assert (masked.num_targets >= 4).all()
    kept = masked.labels.reshape(400, 9)[:, 1:] >= 0
    assert (ids[:, 1:] >= 5)[kept].mean() > 0.75 > 0.35 > (ids[:, 1:] >= 5)[~kept].mean()
    batch = together(masked, as_rows(ids[:2], 9))
    assert batch.num_targets.tolist() == [*masked.num_targets, 8, 8]


def test_steps_are_read_off_between_decays_alone() -> None:
    from benchmarks.quality.horizon.page import reaches

    def unit(*losses: float) -> dict[str, Any]:
        ends = [{"step": 100 * i, "lambada": loss} for i, loss in enumerate(losses)]
        return {"curve": ends[:1], "decayed": ends[1:]}

    assert reaches(unit(6.0, 5.0, 4.5), unit(6.0, 5.5, 5.0), "style") == pytest.approx(0.5)
    assert reaches(unit(6.0, 5.6, 5.1), unit(6.0, 5.5, 5.0), "style") is None
    assert reaches(unit(6.0, 4.5), unit(6.0, 5.0), "style") is None  # a line from the start would be far off the curve


def test_units_are_found_in_the_json_and_in_the_folder_if_their_arm_is_as_it_was(tmp_path: Path) -> None:
    from benchmarks.lab.units import keep, recover, unit_path

    @dataclasses.dataclass(frozen=True)
    class Cell:
        arm: str
        seed: int

        @property
        def name(self) -> str:
            return f"{self.arm}/{self.seed}"

    @dataclasses.dataclass(frozen=True)
    class How:
        rounds: int = 1
        new_option: bool = False

    def made(arm: str, seed: int, **settings: Any) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "settings": settings}

    arms = {"a": How(), "b": How(rounds=2), "c": How(rounds=3)}
    document = {"settings": {"sizes": {"steps": 4}}, "units": [made("a", 0, rounds=1), made("b", 0, rounds=1)]}
    bench: Any = SimpleNamespace(work=tmp_path, earlier=lambda: document)
    for result in (made("b", 1, rounds=2), made("c", 1, rounds=2), made("gone", 1, rounds=1)):
        keep(unit_path(tmp_path, f"{result['arm']}/1"), result)
    found = recover(bench, How(rounds=4), Cell, arms, How())  # of other sizes
    assert set(found) == {"b/1"}

    @dataclasses.dataclass(frozen=True)
    class Sizes:
        steps: int = 4

    found = recover(bench, Sizes(), Cell, arms, How())
    assert set(found) == {"a/0", "b/1"}, "an arm that changed since is none of its units"
    assert found["b/1"]["settings"] == {"rounds": 2, "new_option": False}
    assert unit_path(tmp_path, "a/0").exists()
    assert not unit_path(tmp_path, "b/0").exists()


def test_kinds_are_found_and_none_is_chosen_more_often_than_it_may_be() -> None:
    from benchmarks.lab.corpus import as_rows
    from benchmarks.quality.horizon.choosing import KINDS, capped_top_k, find_kinds, near_border

    rng = np.random.default_rng(0)
    topic = rng.integers(0, 8, 2_000)  # which tokens a row is of
    rows = as_rows(8 * topic[:, None] + rng.integers(0, 8, (2_000, 32)), 32)
    kind = find_kinds(rows, 64, 0)(rows)
    assert kind.max() < KINDS
    assert all(len(set(topic[kind == i])) <= 1 for i in range(KINDS)), "a kind is of one topic"

    values = (topic == 3) + rng.normal(0, 0.1, 2_000)
    chosen = capped_top_k(values, topic, 400, 2.0)
    counts = np.bincount(topic[chosen], minlength=8) / (400 * np.bincount(topic) / 2_000)
    assert len(set(chosen)) == 400
    assert counts.max() == pytest.approx(2.0, abs=0.02) == counts[3]
    assert set(np.flatnonzero(topic[chosen] == 3)) == set(range((topic[chosen] == 3).sum())), "its best come first"
    assert len(capped_top_k(values, topic, 400, 0.5)) == 400  # filled up with the best of the others
    near = near_border(values, 100, 0.2)
    assert np.abs(values[near] - np.quantile(values, 0.8)).max() < 0.1


@pytest.mark.slow
def test_arms_of_the_long_lab_choose_each_in_their_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.lab.corpus import write_built_in
    from benchmarks.quality.horizon import training
    from benchmarks.quality.horizon.arms import ARMS, Unit
    from benchmarks.quality.horizon.settings import SETTINGS, Sizes, open_lab

    names = (
        "ours", "CoLoR", "ours, virtual labels", "ours, keep 1", "ours, late", "ours, tokens masked",
        "ours, passages apart", "ours, twice of a kind", "ours, probes near the border",
        "ours, loss reduction", "mixer", "domain means", "random, watched",
    )  # fmt: skip
    sizes = Sizes(warm=4, steps=12, branches=(), marks=(), judged=8, reserved=200, watched=60, held=1)
    lab, runs = open_lab(write_built_in(tmp_path / "data"), tmp_path, "style", None, 8), {}
    for name in names:
        small = {"random_first": 2, "first_steps": None, "round_steps": 4, "probes": 24, "passages": 16}
        monkeypatch.setitem(ARMS, name, dataclasses.replace(ARMS[name], **small))
        run = training.Run(lab, SETTINGS["style"], sizes, tmp_path, Unit(setting="style", arm=name, seed=10))
        runs[name] = (run, run.train())
    ends = [result["decayed"][-1]["pool"] for _, result in runs.values()]
    assert np.isfinite(ends).all()
    assert len(set(ends)) == len(names)
    probed = {
        name: [found["step"] for found in result["rounds"] if "spearman" in found]
        for name, (_, result) in runs.items()
    }
    assert (probed["ours"], probed["ours, late"]) == ([2, 6, 10], [6, 10])
    assert runs["ours, virtual labels"][0].probed == 2 * runs["ours"][0].probed
    assert runs["ours, loss reduction"][0].flops["probe"] < 0.8 * runs["ours"][0].flops["probe"]
    color, passages = runs["CoLoR"][0], lab.reference["all"].rows
    assert color._filter.rank(passages).mean() > color._filter.rank(lab.rows.take(color.reserved)).mean() + 0.05
    assert color.flops["score"] > color.flops["train"] > 0.1 * color.flops["fit"] > 0
    apart = runs["ours, passages apart"][0]
    assert set(apart.passages % 2) == {0}
    read = apart._read(len(passages)).rows
    assert len(read) == len(passages) // 2
    assert not {bytes(read.row(i)[0]) for i in range(len(read))} & {bytes(passages.row(i)[0]) for i in apart.passages}
    kept = runs["ours, keep 1"][0]._read(8).rows.lengths
    assert kept[8:].sum() == pytest.approx(kept[:8].sum(), abs=64)
    watched = runs["random, watched"][1]["watched"]
    assert len(watched) == 1
    assert len(watched[0]["label"]) == len(watched[0]["log_odds"]) == sizes.watched
    assert [num for num, *_ in watched[0]["few"]] == [25]
    own = training.Run(
        lab, SETTINGS["style"], sizes, tmp_path, Unit(setting="style", arm="own domains, known", seed=10)
    )
    own.parts = lab.domain_names[:1]
    assert (own._values(own.open) == (lab.domain[own.open] == 0)).all()


def test_a_file_that_lists_a_row_group_again_is_read_at_full_length(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from benchmarks.cost.score_files import list_again, write_files

    write_files(tmp_path / "one", [f"text {i}" for i in range(5_000)], 1, row_group_size=5_000)
    (one,) = (tmp_path / "one").iterdir()
    list_again(one, tmp_path / "more" / "0.parquet", 40)
    file, whole = pq.ParquetFile(tmp_path / "more" / "0.parquet"), pq.read_table(one)
    assert file.metadata.num_row_groups == 40
    assert file.metadata.num_rows == 200_000
    assert all(file.read_row_group(number).equals(whole) for number in (0, 1, 39))
    assert (tmp_path / "more" / "0.parquet").stat().st_size < 2 * one.stat().st_size


def test_every_place_of_a_fault_is_there() -> None:
    from benchmarks.reliability.faults.places import all_faults

    for fault in all_faults():
        assert callable(pkgutil.resolve_name(fault.target)), fault.target


def test_every_place_that_kills_and_profiles_look_at_is_there() -> None:
    from benchmarks.lab.boundary import STAGES
    from benchmarks.reliability.kills.dying import PHASES

    for target in STAGES:
        assert callable(pkgutil.resolve_name(target)), target
    for file, name in PHASES:
        if file.startswith("mates_hf/"):
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in (None, *(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))), file


def test_what_an_earlier_model_found_of_the_evidence_counts_for_arms_that_keep_it() -> None:
    from benchmarks.quality.horizon.arms import ARMS
    from benchmarks.quality.horizon.choosing import earlier
    from mates_hf.prediction.ngram.evidence import log_odds
    from tests.prediction.test_ngram import BUCKETS, make_labels, make_rows, model

    rows = make_rows(60, seed=1)
    labels = make_labels(rows, lambda previous, token: (token % 2) * 1.0)
    evidence = log_odds(make_rows(20, seed=2), rows, BUCKETS)
    tables = model().fit(rows, labels, evidence=evidence)
    assert tables.report.evidence_weight is not None
    kept = ARMS["ours, evidence kept, rounds of up to 800"]
    assert earlier(kept, tables) is tables
    assert earlier(ARMS["ours"], tables).report == dataclasses.replace(tables.report, evidence_weight=None)
    assert earlier(ARMS["ours, labels of one round"], tables) is None
    assert earlier(kept, None) is None
