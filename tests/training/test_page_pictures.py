"""`round_page="images"`: small pictures of the rows that a page shows, and none where nobody asked."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from transformers import default_data_collator

from mates_hf import load_round
from mates_hf.answering.forget import forget_rows
from mates_hf.data.pool import CandidatePool
from mates_hf.reporting.page import media
from mates_hf.reporting.page.thumbnails import MAX_BYTES
from mates_hf.reporting.report import IMAGES_FILE, PAGE_FILE, TEXTS_FILE, report_data, report_html
from mates_hf.training.run_report import read_report, write_report
from mates_hf.training.verify import verify_run
from tests.reporting.made_run import round_info, write_rounds, write_state
from tests.reporting.test_report import Document
from tests.training.modalities import images
from tests.training.test_modalities import train

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT that showed pictures."""
    path = tmp_path_factory.mktemp("pictures") / "run"
    train(path, round_page="images")
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def pictures_of(page: str) -> list[dict[str, Any]]:
    """Attributes of each picture of a page; the page asks for nothing else."""
    tags = Document(page).tags
    assert not [found for tag, found in tags if tag != "img" and "src" in found]
    assert not {"script", "audio", "video", "iframe"} & {tag for tag, _ in tags}
    return [found for tag, found in tags if tag == "img"]


def kept(path: Path) -> dict[str, Any]:
    return json.loads((path / "_mates" / IMAGES_FILE).read_text())


def shown(examples: dict[str, Any]) -> set[int]:
    return {entry["row"] for entries in examples.values() for entry in entries}


def test_a_run_shows_small_pictures_of_its_rows(run: Path) -> None:
    page = (run / "_mates" / PAGE_FILE).read_text(encoding="utf-8")
    examples = kept(run)["examples"]
    entries = [entry for kind in examples.values() for entry in kind]
    found = pictures_of(page)
    assert len(found) == len(entries) == 40
    for tag in found:
        start, _, data = tag["src"].partition(",")
        assert start == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert len(png) <= MAX_BYTES
        picture = Image.open(io.BytesIO(png))
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (96, 96))  # 8 x 8, enlarged
    alts = [tag["alt"] for tag in found]
    best = examples["top"][0]
    assert alts[0].startswith(f"Row {best['row']}, label {best['label']}, predicted influence ")
    assert sum("measured influence" in alt for alt in alts) == 10
    record = load_round(run / "_mates" / "round-0001")
    assert shown(examples) <= set(record.candidates.tolist()) | set(record.labels.candidate_id.tolist())
    assert "does not show" not in page
    assert '<h2 id="texts">Examples</h2>' in page
    assert not list((run / "_mates").glob("*.tmp"))
    assert not (run / "_mates" / TEXTS_FILE).exists()
    assert verify_run(run).problem is None


def test_pictures_are_those_of_the_rows(run: Path) -> None:
    """A row's lit quadrant is its class, in the pool and on the page."""
    rows = images(120)
    for entry in kept(run)["examples"]["top"]:
        row = rows[entry["row"]]
        assert entry["label"] == str(row["labels"])
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"]))))[::12, ::12].transpose(2, 0, 1)
        values = row["pixel_values"].numpy()
        wanted = (values - values.min()) / (values.max() - values.min()) * 255
        assert np.abs(pixels - wanted).max() < 16  # 32 colours at worst


def test_a_later_page_has_them_too_and_a_redacted_one_none(run: Path, tmp_path: Path) -> None:
    data = read_report(run)
    assert data["verify"]["ok"]
    assert data["missing"] == []
    assert [kind["kind"] for kind in data["media"]["kinds"]] == [
        "top", "border", "bottom", "measured_top", "measured_bottom",
    ]  # fmt: skip
    path = write_report(run, tmp_path / "page.html")
    assert len(pictures_of(path.read_text(encoding="utf-8"))) == 40
    page = write_report(run, tmp_path / "redacted.html", redact=True).read_text(encoding="utf-8")
    assert pictures_of(page) == []
    assert "base64" not in page
    assert ", label " not in page
    assert read_report(run, redact=True, verify=False)["media"] is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("png", base64.b64encode(b"<svg onload=alert(1)>").decode()),
        ("png", '"><script>alert(1)</script>'),
        ("png", base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(9_000)).decode()),
        ("png", 3),
        ("row", "x"),
        ("label", {"a": 1}),
    ],
)
def test_kept_pictures_are_read_with_distrust(copied: Path, place: str, value: Any) -> None:
    content = kept(copied)
    content["examples"]["top"][0][place] = value
    (copied / "_mates" / IMAGES_FILE).write_text(json.dumps(content))
    data = read_report(copied, verify=False)
    page = report_html(data)
    assert "<script" not in page
    assert "svg onload" not in page
    if place == "label":
        assert len(pictures_of(page)) == 40
    else:
        assert data["media"] is None
        assert any("does not show" in line for line in data["missing"])


@pytest.mark.parametrize("page", ["texts", "redacted", "none"])
def test_a_run_that_is_not_to_show_them_deletes_them(copied: Path, page: str) -> None:
    (copied / "_mates" / TEXTS_FILE).write_text("{}")
    train(copied, round_page=page, resume=True)  # no round is left to run
    assert not (copied / "_mates" / IMAGES_FILE).exists()
    assert not (copied / "_mates" / PAGE_FILE).exists()
    assert (copied / "_mates" / TEXTS_FILE).exists() is (page == "texts")


def test_forgotten_rows_are_shown_nowhere(copied: Path) -> None:
    before = kept(copied)["examples"]
    gone = np.array(sorted(shown(before))[::2])
    found = forget_rows(copied, gone, drop_models=True)
    assert found.page
    assert any("page was deleted" in line for line in found.lines())
    assert not (copied / "_mates" / PAGE_FILE).exists()
    after = kept(copied)["examples"]
    assert shown(after) == shown(before) - set(gone.tolist())
    data = read_report(copied)
    assert data["verify"]["ok"], data["verify"]
    assert {entry["row"] for kind in data["media"]["kinds"] for entry in kind["entries"]} == shown(after)
    # A page that is made anew shows others in their place.
    folder, pool = copied / "_mates" / "round-0001", CandidatePool(images(120), default_data_collator)
    again = media.example_media(folder, dict(load_round(folder).info), pool, None)
    assert not shown(again["examples"]) & set(gone.tolist())
    assert shown(again["examples"]) > shown(after)
    train(copied, round_page="images", resume=True)
    assert kept(copied)["examples"] == after
    nothing = forget_rows(copied, gone)
    assert not nothing.page


def test_without_pillow_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "can_draw", lambda: False)
    train(tmp_path, round_page="images")
    page = (tmp_path / "_mates" / PAGE_FILE).read_text(encoding="utf-8")
    assert pictures_of(page) == []
    assert page.count("pillow is not installed") == 1
    assert {entry["png"] for entry in kept(tmp_path)["examples"]["top"]} == {None}
    assert " · label <bdi>3</bdi>" in page


@pytest.mark.parametrize("kind", ["Llava", "Whisper"])
def test_pictures_stand_beside_texts_and_sounds_have_none(kind: str, tmp_path: Path) -> None:
    train(tmp_path, kind, round_page="images")
    page = (tmp_path / "_mates" / PAGE_FILE).read_text(encoding="utf-8")
    entries = kept(tmp_path)["examples"]["top"]
    assert len(pictures_of(page)) == (40 if kind == "Llava" else 0)
    assert page.count('<ol class="texts">') == (5 if kind == "Llava" else 0)
    assert all(len(entry["label"].split()) > 1 for entry in entries)  # tokens
    assert "No picture" not in page
    assert "does not show" not in page


# --- rows of datasets ---


def tensors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixel_values": torch.zeros(len(rows), 3, 8, 8), "labels": torch.tensor([row["label"] for row in rows])}


def read(pool: Any, collator: Any, rows: int, tokenizer: Any = None, names: Any = None) -> tuple[list[Any], list[str]]:
    reader = media._Reader(CandidatePool(pool, collator), tokenizer, names)
    return [reader.read(row) for row in range(rows)], reader.missing()


def size_of(entry: dict[str, Any]) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(entry["png"]))).size


def test_a_picture_column_is_read_as_it_is_stored(tmp_path: Path) -> None:
    """The dataset's own picture, not what the collator makes; one hostile file costs nothing but its own place."""
    Image.new("RGB", (200, 100), (250, 0, 0)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    cells = [
        {"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": whole, "path": None},
        {"bytes": whole[:60], "path": None}, {"bytes": b"<svg/>", "path": "a.svg"}, None,
    ]  # fmt: skip
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "<b>dog"])})
    pool = Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1, 0]}, features=kinds)
    pool = pool.with_transform(lambda rows: {"label": rows["label"]})  # never decodes
    found, missing = read(pool, tensors, 5)
    assert [entry["label"] for entry in found] == ["cat", "<b>dog", "cat", "<b>dog", "cat"]
    assert [size_of(entry) for entry in found[:2]] == [(96, 48), (96, 48)]
    assert [entry["png"] for entry in found[2:4]] == [None, None]
    assert size_of(found[4]) == (96, 96)  # no picture of its own: the collator's
    assert len(missing) in (1, 2)
    assert all(line.startswith("No picture of ") for line in missing)
    several = Features({"images": Sequence(ImageFeature()), "label": Value("int64")})
    pool = Dataset.from_dict({"images": [[cells[1], cells[1]]], "label": [0]}, features=several)
    assert size_of(read(pool, tensors, 1)[0][0]) == (96, 48)


def test_pictures_of_a_list_and_names_of_a_model() -> None:
    pool = [{"image": Image.new("L", (10, 20), i), "label": i} for i in range(3)]
    found, missing = read(pool, tensors, 3, names={0: "LABEL_0", 1: "one"})
    assert [entry["label"] for entry in found] == ["0", "one", "2"]
    assert [size_of(entry) for entry in found] == [(40, 80)] * 3
    assert missing == []


def sound(seconds: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8_000)
        out.writeframes(bytes(int(seconds * 8_000) * 2))
    return file.getvalue()


def test_a_sound_is_its_length_and_its_text(tiny_tokenizer: Any) -> None:
    cells = [{"bytes": sound(1.5), "path": None}, {"bytes": sound(1.5)[:30], "path": None}]
    ids = tiny_tokenizer("w40 w41")["input_ids"]
    pool = Dataset.from_dict({"audio": cells, "labels": [[*ids, -100]] * 2})
    pool = pool.cast_column("audio", Audio())

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_features": torch.zeros(len(rows), 80, 30), "labels": torch.tensor([[*ids, -100]] * len(rows))}

    found, missing = read(pool.with_transform(lambda rows: {"labels": rows["labels"]}), collator, 2, tiny_tokenizer)
    assert [entry["seconds"] for entry in found] == [1.5, None]
    assert [entry["png"] for entry in found] == [None, None]
    assert "w40" in found[0]["label"]
    assert missing == []
    decoded = [{"audio": {"array": np.zeros(4_000), "sampling_rate": 8_000, "path": None}, "label": 1}]
    assert read(decoded, collator, 1)[0][0]["seconds"] == 0.5


def test_pictures_take_so_much_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(value: Any) -> bytes:
        time.sleep(0.05)
        return b"png"

    monkeypatch.setattr(media, "thumbnail", slow)
    monkeypatch.setattr(media, "MAX_SECONDS", 0.12)
    pool = [{"image": Image.new("L", (4, 4)), "label": 0} for _ in range(40)]
    found, missing = read(pool, tensors, 40)
    assert 1 <= sum(entry["png"] is not None for entry in found) <= 3
    assert len(missing) == 1
    assert "pictures took" in missing[0]


def test_a_page_of_a_thousand_rounds_with_the_largest_pictures(tmp_path: Path) -> None:
    write_rounds(tmp_path, [round_info(which) for which in range(1, 1_001)])
    write_state(tmp_path, 20_000, {20_000: 3.0})
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(MAX_BYTES - 8)).decode()
    entry = {"influence": 1e-3, "selected": True, "label": "é\u202e<b>" * 20, "seconds": 1.0, "png": png}
    kinds = ("top", "border", "bottom", "measured_top", "measured_bottom")
    examples = {kind: [{"row": row, **entry} for row in range(10)] for kind in kinds}
    data = report_data(tmp_path, media={"round": 1_000, "examples": examples, "missing": []})
    page = report_html(data)
    assert len(page.encode()) < 5_000_000
    assert "<b>" not in page
    assert "\u202e" not in page
    assert len(pictures_of(page)) == 50
    assert max(len(line) for line in page.splitlines()) < 2 * MAX_BYTES
