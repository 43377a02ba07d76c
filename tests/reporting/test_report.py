"""The report of a run: it says what was recorded, each check has two sides, texts are harmless, and it is readable."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import html.parser
import json
import re
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.errors import MatesError
from mates_hf.reporting.page.checks import find_checks
from mates_hf.reporting.page.examples import checked_texts, level_of
from mates_hf.reporting.page.plain import plain
from mates_hf.reporting.page.render import _environment
from mates_hf.reporting.page.texts import predicted_tokens, shown_rows
from mates_hf.reporting.report import report_data, report_html
from mates_hf.training.run_report import read_report, write_report
from tests.reporting.made_run import byte_tokenizer, fill_round, pool_of, round_info, write_rounds, write_state

STYLE = (Path(__file__).parents[2] / "mates_hf/reporting/page/templates/style.css.jinja").read_text("utf-8")
WORD = "unmistakable"
MAX_SECONDS, MAX_BYTES = 5.0, 5_000_000  # of a page of a thousand rounds


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Any, Any, Any]:
    """A run of three rounds; its pool, its tokenizer and the newest round's influence model."""
    run = tmp_path_factory.mktemp("made") / "run"
    write_state(run, 80, {20: 6.0, 40: 5.0, 60: 4.5, 80: 4.0})
    folders = write_rounds(run, [round_info(i) for i in (1, 2, 3)])
    tokenizer = byte_tokenizer()
    pool = pool_of([f"{WORD} row {i} {'e' * (i % 7)} and so on" for i in range(90)], tokenizer)
    model = fill_round(folders[-1], pool, tokenizer, range(90), 40)
    return run, pool, tokenizer, model


def changed(tmp_path: Path, *infos: dict[str, Any]) -> dict[str, Any]:
    """The data of a run with these rounds."""
    write_rounds(tmp_path / "run", infos)
    write_state(tmp_path / "run", 80, {80: 4.0})
    return report_data(tmp_path / "run")


def test_a_page_says_what_the_rounds_recorded(made, tmp_path: Path) -> None:
    run, pool, _, _ = made
    path = write_report(run, tmp_path / "page.html", price=2.0, dataset=pool, verify=False)
    page = path.read_text(encoding="utf-8")
    assert "The run selects. Nothing stands out in the checks." in page
    assert "Round 3 has held-out Spearman 0.60 [0.40, 0.75], above the guard of 0.1" in page
    assert page.count('<th scope="row">') > 20
    assert "0.40 to 0.75" in page  # an interval in the table
    assert "4.700" in page  # reference loss of round 3
    assert "texts may belong to other rows" in page  # the pool's hash is another
    data = read_report(run, price=2.0, num_devices=4, dataset=pool, verify=False)
    assert [row["number"] for row in data["rounds"]] == [1, 2, 3]
    assert data["groups"]["named"][0]["boost"] == pytest.approx((20 / 40) / (60 / 90))
    assert data["groups"]["named"][1]["loss_change"] == pytest.approx(-0.4)
    # 6.3 s of stages in each of three rounds, at 2 an hour and four devices.
    assert data["cost"]["money"]["mates"] == pytest.approx(3 * 6.3 / 3600 * 2.0 * 4)
    assert json.loads(json.dumps(data, allow_nan=False)) == data


@pytest.mark.parametrize(
    ("guard", "level", "says"),
    [
        ({"decision": "select"}, "fine", "The run selects."),
        ({"decision": "own_order", "failed": "interval"}, "refused", "has an interval that includes 0"),
        ({"decision": "own_order", "failed": "loss_rose"}, "refused", "the reference loss rose by 0.300"),
        ({"decision": "own_order", "failed": "used_up"}, "refused", "used up (gap +0.10 sd)"),
        ({"decision": "keep_previous", "failed": "reversed"}, "look", "by an earlier influence model"),
        ({"decision": "select", "failed": "min_spearman"}, "look", "selected although its signal is too weak"),
    ],
)
def test_the_verdict_gives_its_reason(tmp_path: Path, guard: dict[str, Any], level: str, says: str) -> None:
    info = round_info(1)
    last = round_info(
        2,
        guard={**info["guard"], **guard},
        rise={"rise": 0.3, "interval": [0.2, 0.4]},
        gap={"gap": 0.1, "interval": [0, 1]},
    )
    verdict = changed(tmp_path, info, last)["verdict"]
    assert says in f"{verdict['text']} {verdict['reason']}"
    assert verdict["level"] == level
    told = "1 of 2" if level == "refused" else "2 of 2"
    assert f"{told} rounds selected" in verdict["reason"]


REFUSED = {"decision": "own_order", "spearman": 0.0, "interval": [-0.2, 0.2], "failed": "min_spearman"}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("Refused rounds", {"guard": REFUSED}),
        ("Signal of selections", {"guard": {**round_info(1)["guard"], "interval": [-0.01, 0.9]}}),
        ("Reversals", {"guard": {**round_info(1)["guard"], "reversed": True}}),
        ("Choice used up", {"gap": {"gap": -0.01, "interval": [-0.2, 0.2]}}),
        ("Reference loss", {"guard": {**REFUSED, "failed": "loss_rose"}}),
        ("Machinery check", {"fidelity": {"spearman": 0.45, "interval": [0.2, 0.6], "num_candidates": 16}}),
        ("Held-out labels", {"fit": {**round_info(1)["fit"], "num_held_out": 29}}),
        ("Best fifth found", {"fit": {**round_info(1)["fit"], "top_fifth_overlap": 0.2}}),
        ("Reference overlap", {"reference_overlap": {"rows": 2, "share": 0.011, "ngram": 13}}),
        ("Copies", {"repeated_share": 0.21}),
        ("Largest group", {"groups": {"a": {"candidates": 3, "chosen": 8}, "b": {"candidates": 3, "chosen": 2}}}),
        ("Largest boost", {"groups": {"a": {"candidates": 1, "chosen": 5}, "b": {"candidates": 9, "chosen": 5}}}),
    ],
)
def test_each_check_has_two_sides(tmp_path: Path, name: str, bad: dict[str, Any]) -> None:
    def look(folder: str, **changes: Any) -> dict[str, str]:
        data = changed(tmp_path / folder, round_info(1), round_info(2, **changes), round_info(3, **changes))
        return {check["name"]: check["status"] for check in data["checks"]}

    assert look("good")[name] == "fine"
    assert look("bad", **bad)[name] == "look"


def test_cost_and_groups_and_files_are_checked(made) -> None:
    data = report_data(made[0])
    assert {check["name"]: check["status"] for check in data["checks"]}["Loss of groups"] == "fine"
    data["groups"]["named"][0]["loss_change"] = 0.051
    data["cost"] |= {"idle_share": 0.051, "mates": {"share_of_training_flops": 0.26}}
    data["verify"] = {"ok": False, "problem_text": "round-0001/scores.npy: changed"}
    found = {check["name"]: check for check in find_checks(data)}
    for name in ("Loss of groups", "Idle devices", "FLOPs of selecting", "Files of the run"):
        assert found[name]["status"] == "look"
    assert "scores.npy" in found["Files of the run"]["text"]


def test_texts_are_the_best_the_worst_and_those_at_the_threshold(made) -> None:
    run, pool, _, _ = made
    shown, average = shown_rows(run / "_mates/round-0003", num_random=0)
    ids = {one.kind: one.ids.tolist() for one in shown}
    assert ids == {"top": list(range(10)), "border": list(range(35, 45)), "bottom": list(range(80, 90))}
    assert shown[1].selected.tolist() == [True] * 5 + [False] * 5
    assert average == pytest.approx(0.0, abs=1e-6)
    examples = read_report(run, dataset=pool, verify=False)["texts"]["kinds"]
    assert [kind["kind"] for kind in examples] == ["top", "border", "bottom", "measured_top", "measured_bottom"]
    entry = examples[0]["entries"][0]
    assert "".join(piece["text"] for piece in entry["pieces"]) == f"{WORD} row 0  and so on"
    # Measured rows: the letter that helps is coloured so, and the others are below the average.
    pieces = examples[3]["entries"][0]["pieces"]
    assert {level_of(p["influence"], examples[3]["scale"])[:1] for p in pieces[1:] if p["text"] == "e"} == {"p"}
    assert all(p["influence"] < 0 for p in pieces[1:] if p["text"] not in "e")


def test_values_of_tokens_add_up_to_the_prediction_of_the_row(made) -> None:
    _, pool, _, model = made
    from mates_hf.data.pool import CandidatePool

    rows = CandidatePool(pool).token_rows(np.arange(8))
    values = predicted_tokens(model, rows)
    assert values is not None
    means = [np.nanmean(values[rows.offsets[i] : rows.offsets[i + 1]]) for i in range(8)]
    np.testing.assert_allclose(means, model.predict(rows), rtol=1e-4, atol=1e-8)
    assert np.isnan(values[rows.offsets[:-1]]).all()  # the first token of a row is not predicted
    assert predicted_tokens(object(), rows) is None


def test_without_a_dataset_a_page_says_what_is_missing(made) -> None:
    data = read_report(made[0], verify=False)
    assert data["texts"] is None
    assert "--dataset" in data["missing"][-1]
    raises = {entry["text"] for entry in data["ngrams"]["raises"] if entry["kind"] == "token"}
    assert "e" in raises


def test_redacted_pages_hold_no_text(made, tmp_path: Path) -> None:
    run, pool, _, _ = made
    whole = write_report(run, tmp_path / "whole.html", dataset=pool, verify=False).read_text(encoding="utf-8")
    path = write_report(run, tmp_path / "page.html", dataset=pool, verify=False, redact=True)
    page, data = path.read_text(encoding="utf-8"), read_report(run, dataset=pool, verify=False, redact=True)
    letters = re.sub("<[^>]+>", "", whole)
    assert WORD in letters
    assert WORD not in re.sub("<[^>]+>", "", page)
    assert ">word<" in whole
    assert ">word<" not in page
    assert (data["texts"], data["ngrams"], data["words"], data["missing"]) == (None, None, [], [])


def test_another_dataset_is_refused(made) -> None:
    run, pool, _, _ = made
    with pytest.raises(ValueError, match="with 90 rows, got 89"):
        read_report(run, dataset=pool.select(range(89)), verify=False)


@pytest.mark.parametrize("given", [{"price": 0.0}, {"price": -1.0}, {"num_devices": 0}])
def test_prices_and_devices_are_above_0(made, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        report_data(made[0], **given)


def test_kept_texts_are_read_with_distrust() -> None:
    entry = {
        "row": 1, "influence": 0.5, "selected": True, "num_tokens": 1, "cut": False,
        "pieces": [{"text": "a", "influence": float("nan")}],
    }  # fmt: skip
    kept = {"round": 1, "order_sha256": "0", "examples": {"top": [entry], "other": [1]}, "ngrams": None}
    found = checked_texts(kept)
    assert found["examples"] == {"top": [{**entry, "pieces": [{"text": "a", "influence": None}]}]}
    for wrong in (
        {**kept, "examples": {"top": [{}]}},
        {**kept, "ngrams": {"raises": [{"kind": "<b>"}], "lowers": []}},
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            checked_texts(wrong)


@pytest.mark.slow
def test_a_thousand_rounds_are_a_page_within_seconds(made, tmp_path: Path) -> None:
    run, _, _, _ = made
    write_rounds(tmp_path / "run", [round_info(i) for i in range(1, 1001)])
    newest = tmp_path / "run/_mates/round-1000"
    for file in (run / "_mates/round-0003").glob("*.npy"):
        (newest / file.name).write_bytes(file.read_bytes())
    write_state(tmp_path / "run", 20_020, {20_000: 3.0})
    began = time.process_time()
    page = report_html(report_data(tmp_path / "run"))
    assert time.process_time() - began < MAX_SECONDS
    assert 100_000 < len(page.encode()) < MAX_BYTES
    assert page.count("<tr>") > 1_000
    assert "160 of 1000 rounds are drawn" in page


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where entries of a JSON value are."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place] * bool(place) + [found for key in keys for found in places(value[key], (*place, key))]


WRONG = (None, True, -1, 10**30, float("inf"), float("nan"), "x", "\ud800<b>", [], [1], [None, None], {}, {"a": 1})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(round_info(1))), st.sampled_from(WRONG)), min_size=1, max_size=3))
def test_a_tampered_round_gives_a_page_or_one_sentence(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    info = round_info(1)
    for place, value in changes:
        inner: Any = info
        try:
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = copy.deepcopy(value)  # a change of it would be one of every later value
        except (KeyError, IndexError, TypeError):  # a change before took its place away
            continue
    with tempfile.TemporaryDirectory() as folder:
        write_rounds(Path(folder), [{**info, "number": 1}, round_info(2)])
        write_state(Path(folder), 60, {20: 5.0, 40: 4.0, 60: 3.0})
        with contextlib.suppress(MatesError):
            page = report_html(report_data(folder))
            assert page.encode()
            assert "<b>" not in page


# --- the page as a document ---


class Document(html.parser.HTMLParser):
    """Tags of a page, with their attributes, and whether they are closed in order."""

    VOID = {"meta", "link", "line", "rect", "circle", "polygon", "br", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


@pytest.fixture(scope="module")
def page(made) -> str:
    run, pool, _, _ = made
    return report_html(read_report(run, dataset=pool, verify=False, price=2.0))


def test_a_page_asks_for_nothing_and_runs_nothing(page: str) -> None:
    document = Document(page)
    names = {tag for tag, _ in document.tags}
    assert not names & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "video",
        "audio",
        "base",
        "foreignobject",
    }
    attributes = [(tag, key, value) for tag, found in document.tags for key, value in found.items()]
    assert [
        one for one in attributes if one[1].startswith("on") or one[1] in ("style", "src", "srcset", "xlink:href")
    ] == []
    links = [value for _, key, value in attributes if key == "href" and not str(value).startswith("#")]
    assert links == ["data:,"]
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in STYLE
    assert set(re.findall(r"url\(([^)]*)\)", STYLE)) == {"#hatch"}


def test_the_policy_allows_the_style_and_nothing_else(page: str) -> None:
    style = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(found["content"] for tag, found in Document(page).tags if found.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digest}'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip


def test_a_screen_reader_finds_its_way(page: str) -> None:
    document = Document(page)
    levels = [int(tag[1]) for tag, _ in document.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(found.get("scope") in ("col", "row") for tag, found in document.tags if tag == "th")
    ids = [found["id"] for _, found in document.tags if "id" in found]
    assert len(ids) == len(set(ids))
    pictures = [found for tag, found in document.tags if tag == "svg" and found.get("aria-hidden") != "true"]
    assert len(pictures) == 5
    for found in pictures:
        assert found["role"] == "img"
        assert set(str(found["aria-labelledby"]).split()) <= set(ids)
    regions = [found["aria-label"] for _, found in document.tags if found.get("role") == "region"]
    assert len(regions) == len(set(regions)) > 5
    assert [found["lang"] for tag, found in document.tags if tag == "html"] == ["en"]


def palette(dark: bool) -> dict[str, tuple[float, float, float]]:
    """Colours by name."""
    light, _, rest = STYLE.partition("prefers-color-scheme: dark")
    found = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", rest if dark else light))
    return {name: tuple(int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, colour in found.items()}


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Contrast of two colours by WCAG 2."""

    def luminance(colour: tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_read_in_light_and_in_dark(dark: bool) -> None:
    colours = palette(dark)
    assert len(colours) == 26
    text = [("ink", "back"), ("soft", "back"), ("link", "back"), ("ink", "raised"), ("soft", "raised")]
    text += [(name, f"{name}-back") for name in ("fine", "look", "refused")]
    text += [("ink", f"{name}-back") for name in ("fine", "look", "refused")]
    text += [("ink", f"{side}{i}") for side in "pn" for i in (1, 2, 3)]
    for ink, back in text:
        assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)
    for name in (*(f"c{i}" for i in range(7)), "refused", "soft"):
        assert contrast(colours[name], colours["back"]) >= 3.0, name


# --- texts of others ---


@given(st.text(st.characters(codec=None, exclude_categories=[]), max_size=300))
def test_plain_text_shows_and_does_nothing(text: str) -> None:
    shown = plain(text, 200)
    assert shown.encode() is not None  # no half of a surrogate pair
    kinds = {unicodedata.category(char) for char in shown if char not in "\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown) <= 200 * 8 + 1
    assert not re.search(r"[\u0300-\u036f]{5}", shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a⟨NUL⟩b"), ("x\u202ey", "x⟨RLO⟩y"), ("a\nb", "a⏎b"), ("\ud800", "⟨U+D800⟩"),
        ("e" + "\u0301" * 9, "e" + "\u0301" * 4 + "⟨5 more marks⟩"),
        ("نیم\u200cفاصله", "نیم\u200cفاصله"), ("ab" * 5, "ababa…"), ("<b>&", "<b>&"), ("\u2028", "⟨LSEP⟩"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_named(text: str, shown: str) -> None:
    assert plain(text, 5 if text.startswith("ab") else 100) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`run` has no `trainer_state.json`.", "{}run{} has no {}trainer_state.json{}."),
        ("no names", "no names"),
        ("`", "`"),
        ("`<b>` & one ` more", "`&lt;b&gt;` &amp; one ` more"),
        ("`<script>alert(1)</script>`", "{}&lt;script&gt;alert(1)&lt;/script&gt;{}"),
        ("`a\u202eb`\x00", "{}a⟨RLO⟩b{}⟨NUL⟩"),
    ],
)
def test_names_in_a_sentence_look_like_names(text: str, shown: str) -> None:
    template = _environment().from_string('{% from "parts.html.jinja" import worded %}{{ worded(text) }}')
    pieces = ['<bdi class="gram">', "</bdi>"] * 2
    assert template.render(text=text) == shown.format(*pieces[: shown.count("{}")])


@pytest.mark.parametrize(
    ("influence", "level"), [(1.0, "p3"), (0.5, "p2"), (0.2, "p1"), (0.1, ""), (-0.2, "n1"), (-2.0, "n3"), (None, "")]
)
def test_colours_follow_the_sign(influence: float | None, level: str) -> None:
    assert level_of(influence, 1.0) == level
