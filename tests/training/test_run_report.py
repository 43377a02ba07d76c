"""The page that a run writes itself: it is there after each round, has texts, and never harms the run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, default_data_collator

from mates_hf.answering.forget import forget_rows
from mates_hf.reporting.report import PAGE_FILE, TEXTS_FILE
from mates_hf.round_files import load_round
from mates_hf.training import run_report
from mates_hf.training.callback import MatesCallback
from mates_hf.training.run_report import RunPage, read_report, write_report
from tests.training.kit import make_arguments, make_model, make_pool, make_reference, small_config


def train(folder: Path, tokenizer: Any = None, **settings: Any) -> Trainer:
    """A run with three rounds."""
    trainer = Trainer(
        make_model(), args=make_arguments(folder), train_dataset=make_pool(),
        data_collator=default_data_collator, processing_class=tokenizer,
    )  # fmt: skip
    MatesCallback(make_reference(), small_config(**settings)).attach(trainer)
    trainer.train()
    trainer.save_state()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    train(folder, tiny_tokenizer)
    return folder


def test_a_run_writes_its_page_after_each_round(run: Path) -> None:
    page = (run / "_mates" / PAGE_FILE).read_text(encoding="utf-8")
    newest = max((run / "_mates").glob("round-????"))
    assert f"Round {load_round(newest).info['number']} " in page
    assert "The files were not verified for this page" in page
    assert page.count('<ol class="texts">') == 5
    assert ">w40<" in page.replace("> ", ">")  # a token of the pool, by the run's tokenizer
    assert not list((run / "_mates").glob("*.tmp"))
    assert str(run.parent) not in page  # it may be sent to others
    assert "has no trainer_state.json" in page


def test_a_later_page_has_the_texts_that_the_run_kept_and_verifies_them(run: Path, tmp_path: Path) -> None:
    data = read_report(run)
    assert data["verify"]["ok"]
    assert data["missing"] == []
    kept = json.loads((run / "_mates" / TEXTS_FILE).read_text())
    top = data["texts"]["kinds"][0]
    assert [entry["row"] for entry in top["entries"]] == [entry["row"] for entry in kept["examples"]["top"]]
    # The pool itself gives the same texts, and values to the last digit.
    again = read_report(run, dataset=make_pool(), verify=False)
    assert again["missing"] == []
    assert again["texts"] == data["texts"]
    assert again["ngrams"] == data["ngrams"]
    path = write_report(run, tmp_path / "page.html")
    assert "was recomputed from what they left on disk" in path.read_text(encoding="utf-8")


def test_a_damaged_run_is_named_and_damaged_texts_are_left_out(tmp_path: Path) -> None:
    train(tmp_path)
    assert read_report(tmp_path, verify=False)["texts"] is not None
    (tmp_path / "_mates" / TEXTS_FILE).write_text('{"round": 1}')
    assert read_report(tmp_path, verify=False)["texts"] is None
    scores = max((tmp_path / "_mates").glob("round-????")) / "scores.npy"
    scores.write_bytes(scores.read_bytes()[:-4] + b"\0\0\0\0")
    data = read_report(tmp_path)
    assert not data["verify"]["ok"]
    assert data["checks"][0]["name"] == "Files of the run"
    assert "scores.npy" in data["checks"][0]["text"]


def test_forgotten_rows_are_in_no_text_that_is_kept_or_shown_later(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "_mates"
    before = json.loads((folder / TEXTS_FILE).read_text())
    rows = {entry["row"] for entries in before["examples"].values() for entry in entries}
    gone = sorted(rows)[::2]
    assert forget_rows(tmp_path / "run", gone).page
    assert not (folder / PAGE_FILE).exists()
    after = json.loads((folder / TEXTS_FILE).read_text())
    assert {entry["row"] for entries in after["examples"].values() for entry in entries} == rows - set(gone)
    assert after["ngrams"] is None  # of a model that was made of probed rows
    for dataset in (None, make_pool()):  # what was kept, and the pool itself
        data = read_report(tmp_path / "run", dataset=dataset)
        assert data["verify"]["ok"]
        kinds = data["texts"]["kinds"]
        assert [kind["kind"] for kind in kinds][:3] == ["top", "border", "bottom"]
        assert not {entry["row"] for kind in kinds for entry in kind["entries"]} & set(gone)


@pytest.mark.parametrize("error", [OSError("no space left on device"), ImportError("no jinja2"), ValueError("odd")])
def test_a_page_that_fails_is_told_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(run_report, "report_html", fails)
    with caplog.at_level(logging.WARNING, logger=run_report.__name__):
        trainer = train(tmp_path)
    told = [record.getMessage() for record in caplog.records if record.name == run_report.__name__]
    assert len(told) == 1
    assert str(error) in told[0]
    assert trainer.state.global_step == 20
    assert len(list((tmp_path / "_mates").glob("round-????"))) == 3
    assert not (tmp_path / "_mates" / PAGE_FILE).exists()


@pytest.mark.parametrize("page", ["redacted", "none"])
def test_a_run_shows_what_its_config_allows(tmp_path: Path, tiny_tokenizer, run: Path, page: str) -> None:
    train(tmp_path, tiny_tokenizer, round_page=page)
    path = tmp_path / "_mates" / PAGE_FILE
    assert path.exists() is (page == "redacted")
    assert not (tmp_path / "_mates" / TEXTS_FILE).exists()
    if page == "redacted":
        assert "left out on request" in path.read_text(encoding="utf-8")
    orders = [
        [load_round(one).info["order_sha256"] for one in sorted((folder / "_mates").glob("round-????"))]
        for folder in (run, tmp_path)
    ]
    assert orders[0] == orders[1]


def test_pages_take_a_small_part_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        is_main = True

    class FakeRun:
        processes = Alone()
        config = small_config()
        rounds_dir = Path("no-such-folder")

    now, written = [0.0], []
    monkeypatch.setattr(run_report.time, "perf_counter", lambda: now[0])
    page = RunPage(FakeRun())  # type: ignore[arg-type]

    def write() -> None:
        written.append(now[0])
        now[0] += 2.0  # seconds that a page takes

    monkeypatch.setattr(page, "_write", write)
    for _ in range(1_000):
        now[0] += 1.0  # a round each second
        page.update()
    assert written[0] == 1.0  # the first round has its page
    assert 2.0 * len(written) <= 0.01 * now[0] + 2.0
    behind = len(written)
    page.update(last=True)  # and the last one too
    assert len(written) == behind + 1
