"""The page in a real browser: hostile texts do nothing, nothing is asked for, and it can be used by everybody."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mates_hf.reporting.comparison import compare_html, compare_runs
from mates_hf.reporting.report import report_html
from mates_hf.training.run_report import read_report, write_report
from tests.reporting import browser
from tests.reporting.made_run import byte_tokenizer, fill_round, pool_of, round_info, write_rounds, write_state

RUN = "window.ran = true; document.title = 'ran'"
# Texts that a pool may hold: what runs, what asks, what breaks out of its place, what turns or hides its neighbours.
HOSTILE = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror=\"{RUN}\">",
    f"<svg onload=\"{RUN}\"></svg>",
    f"<svg><script>{RUN}</script></svg>",
    f"\"><script>{RUN}</script>",
    f"'><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</bdi></span></li></ol><script>{RUN}</script>",
    f"<iframe srcdoc=\"<script>parent.{RUN}</script>\"></iframe>",
    f"<a href=\"javascript:{RUN}\">x</a>",
    "<img src=\"https://example.invalid/pixel.png\">",
    "<link rel=stylesheet href=\"https://example.invalid/style.css\">",
    "<meta http-equiv=refresh content=\"0;url=https://example.invalid/\">",
    "<base href=\"https://example.invalid/\">",
    "<form action=\"https://example.invalid/\"><input autofocus onfocus=\"" + RUN + "\">",
    "<style>* { display: none !important } @import 'https://example.invalid/a.css';</style>",
    "<style>body { background: url(https://example.invalid/b.png) }</style>",
    "{{ 7 * 7 }} {% raw %} {# no #} {{ data.__class__ }}",
    "<!-- -->--><![CDATA[ ]]> <!DOCTYPE html>",
    "&lt;script&gt;" + RUN + "&lt;/script&gt; &#60;img src=x&#62;",
    "\u202e\u2066gnihtyreve snrut sihT\u202d\u2067\u200f",
    "\u2069\u2069\u2069\u202c\u202c end of all isolations",
    "NUL \x00, bell \x07, escape \x1b[31m, delete \x7f, next line \x85",
    "z\u0300" + "\u0336\u0489\u0301" * 2_000,
    "\ufffe\uffff\U000e0041\U000e007f\ufeff\u200b\u2060\u00ad",
    "a line of a megabyte " + "x" * 1_000_000,
    "\u2028\u2029\n\r\n\t" * 50,
    "\u05d0\u05d1\u05d2 \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600\u200d\U0001f680",
    "\\u003cscript\\u003e" + RUN + "//\\x3c/script>",
]  # fmt: skip

CHECK = """axe.run(document, {resultTypes: ['violations']})
    .then(found => found.violations.map(one => [one.impact, one.id, one.nodes[0].html.slice(0, 200)]))"""

pytestmark = pytest.mark.skipif(browser.find() is None, reason="needs a Chromium on this system: none was found")


@pytest.fixture(scope="module")
def shown() -> Iterator[browser.Page]:
    with browser.opened() as page:
        yield page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, Any]:
    """A run whose pool, groups, words and names are hostile; the pool."""
    assert len(HOSTILE) == 30
    run = tmp_path_factory.mktemp("hostile") / "run <script>"
    names = [f"{i} {text[:200]}" for i, text in enumerate(HOSTILE)]
    groups = {
        name: {"candidates": 3, "chosen": 1, "probes": 30, "loss": 4.0} for name in [*names, "lone \ud800\udfff"]
    }
    words = [{"text": text, "share": 0.5, "candidate_share": 0.1} for text in ("\ud800<b>", HOSTILE[0], HOSTILE[21])]
    infos = [
        round_info(
            i, groups=groups, bought_most=words, model={"name": HOSTILE[1], "num_parameters": 1},
            reference={"name": HOSTILE[2], "num_passages": 1, "digest": HOSTILE[3]},
            versions={HOSTILE[4]: HOSTILE[5]}, order_sha256=HOSTILE[6],
            pool={"num_rows": 90, "features": HOSTILE[7], "rows_sha256": HOSTILE[8]},
            guard={"decision": HOSTILE[9] if i == 1 else "select", "spearman": 0.6, "interval": [0.4, 0.75]},
        )
        for i in (1, 2, 3)
    ]  # fmt: skip
    folders = write_rounds(run, infos)
    write_state(run, 80, {20: 6.0, 40: 5.0, 60: 4.5, 80: 4.0})
    tokenizer = byte_tokenizer()
    pool = pool_of([*HOSTILE, *(f"plain row {i} {'e' * (i % 7)}" for i in range(60))], tokenizer)
    # The first ten are the best, ten are at the threshold and ten are the worst, so that all 30 are shown.
    rows = list(range(30, 90))
    order = [*range(10), *rows[:25], *range(10, 20), *rows[25:], *range(20, 30)]
    fill_round(folders[-1], pool, tokenizer, order, 40)
    return run, pool


def inert(shown: browser.Page) -> None:
    """Nothing ran, nothing was asked for, nothing was complained of, and the page is the page."""
    assert shown.run("window.ran") is None
    assert shown.run("document.title") != "ran"
    assert shown.requests() == []
    assert shown.complaints() == []
    assert (
        shown.run("document.querySelectorAll('script, iframe, img, form, base, object, [onerror], [onload]').length")
        == 0
    )
    assert shown.run("document.querySelectorAll('style').length") == 1
    assert shown.run("document.querySelectorAll('main').length") == 1


def test_thirty_hostile_texts_are_inert(shown: browser.Page, hostile, tmp_path: Path) -> None:
    run, pool = hostile
    path = write_report(run, tmp_path / "page.html", dataset=pool, verify=False)
    assert path.stat().st_size < 5_000_000  # a line of a megabyte is cut
    shown.open(path)
    inert(shown)
    shown.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    texts = shown.run("[...document.querySelectorAll('.text')].map(one => one.textContent)")
    assert len([text for text in texts if text.startswith("<script>window.ran")]) >= 1  # shown as it is written
    assert any("⟨NUL⟩" in text and "⟨ESC⟩" in text for text in texts)
    assert any("⟨RLO⟩" in text for text in texts)
    assert any("{{ 7 * 7 }}" in text for text in texts)
    text = shown.run("document.body.textContent")
    assert not set(text) & {"\u202e", "\u2066", "\x00", "\u2028", "\ufeff"}
    assert "⟨U+D800⟩" in text
    # What stands after the texts is where it belongs, and reads from left to right.
    assert shown.run("getComputedStyle(document.querySelector('footer')).direction") == "ltr"
    assert shown.run("document.querySelector('footer').parentElement.tagName") == "BODY"
    assert shown.run("document.querySelectorAll('.text > :not(bdi)').length") == 0


@pytest.mark.parametrize("width", [1200, 400])
def test_a_page_fits_its_screen(shown: browser.Page, hostile, tmp_path: Path, width: int) -> None:
    run, pool = hostile
    path = write_report(run, tmp_path / "page.html", dataset=pool, verify=False)
    for media in ("screen", "print"):
        for dark in (False, True):
            shown.open(path, width=width, dark=dark, media=media)
            inert(shown)
            if media == "screen":
                assert shown.run("document.documentElement.scrollWidth") <= width
    back = shown.run("getComputedStyle(document.body).backgroundColor")
    shown.open(path, width=width)
    assert shown.run("getComputedStyle(document.body).backgroundColor") != back  # light and dark are two


def test_a_page_of_two_runs_is_inert(shown: browser.Page, hostile, tmp_path: Path) -> None:
    run, _ = hostile
    path = tmp_path / "page.html"
    path.write_text(compare_html(compare_runs(run, run), "1"), encoding="utf-8")
    shown.open(path)
    inert(shown)


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The accessibility checks of axe-core, from npm where it can be had."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    command = [npm, "pack", "axe-core@4", "--silent"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=120, env=os.environ
    )
    archives = list(folder.glob("axe-core-*.tgz"))
    if done.returncode or not archives:
        pytest.skip("axe-core could not be had from npm")
    subprocess.run(["tar", "xzf", archives[0].name, "package/axe.min.js"], cwd=folder, check=True)
    return (folder / "package/axe.min.js").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_fault(shown: browser.Page, hostile, tmp_path: Path, axe: str, dark: bool) -> None:
    run, pool = hostile
    report, comparison = tmp_path / "report.html", tmp_path / "comparison.html"
    report.write_text(report_html(read_report(run, dataset=pool, verify=False, price=2.0)), encoding="utf-8")
    comparison.write_text(compare_html(compare_runs(run, run), "1"), encoding="utf-8")
    for path in (report, comparison):
        shown.open(path, dark=dark)
        shown.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
        shown.run(f"(() => {{ {axe}\n}})()")
        found = shown.run(CHECK)
        assert found == []


def test_a_fault_would_be_seen(shown: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        f"<title>x</title><body><script>{RUN}; console.error('no')</script><img src='https://example.invalid/'>"
    )
    shown.open(path)
    assert shown.run("window.ran") is True
    assert any("example.invalid" in url for url in shown.requests())
    assert any("no" in text for text in shown.complaints())
    with pytest.raises(AssertionError):
        inert(shown)
