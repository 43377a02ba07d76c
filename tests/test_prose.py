"""Ratchets of plain English: what a user reads is short, has few numbers a sentence, and none of our own idioms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN_BY_TESTS = {"settings.md"}
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in WRITTEN_BY_TESTS)]
MODULES = sorted((ROOT / "mates_hf").rglob("*.py"))
MAX_WORDS = 30
MAX_NUMBERS = 2
ANY_NUMBERS = {"LOG.md"}  # its entries are figures
# Ours -> what everybody says.
BANNED = {
    r"to the bit": "bit for bit",
    r"goes? on\b": "continues, resumes",
    r"refused by name": "raises an error that names the setting",
    r"labels of one step": "one-step labels",
    r"labels along a path": "path labels",
    r"is level with|are level with": "matches",
    r"by count of flops": "in FLOPs",
    r"\bbeside\b": "next to, in addition to",
    r"\balike\b|\blikewise\b|\bas there\b": "repeat the noun",
    r"\btells?\b|\btold\b": "shows, says",
    r"the (?:run|constructor|model|trainer)'s(?=[.,;:)])": "name the noun",
    r"\d [×%]": "no space before × and %",
    r"\bas published": "no arm is MATES as it was published",
}
ALLOWED = {
    ("LOG.md", r"\bas published"): 1,  # the mistake itself
    ("ablations.md", r"\bas published"): 1,  # "No arm is MATES as published."
}


def prose(page: Path) -> str:
    """A page without code, links' targets, pictures and headings; inline code is the word `code`."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n|^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^:{3,}.*$|^:[a-z]+:.*$|^<!--.*$", "", text, flags=re.MULTILINE)  # marks of the site
    text = re.sub(r"^    \S.*$|^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(page: Path) -> Iterator[str]:
    """Sentences of paragraphs and lists; tables are left out."""
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
        words = re.sub(r"\s+", " ", re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block.strip())).replace("*", "")
        yield from (part for part in re.split(r"(?<=[.!?])\)? (?=[\"'(A-Z0-9]|code|fastText)", words) if part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    assert [s for s in sentences(page) if len(re.findall(r"[\w'/-]*\w[\w'/-]*", s)) > MAX_WORDS] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ANY_NUMBERS], ids=lambda page: page.name)
def test_sentences_have_few_numbers(page: Path) -> None:
    number = r"(?<![\w.,-])\d[\d,.]*(?:e-?\d+)?(?![\d-])"  # not that of a name: FSDP2, 1e-3 once, Pythia-410M
    assert [s for s in sentences(page) if len(re.findall(number, s)) > MAX_NUMBERS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_are_those_of_everybody(page: Path) -> None:
    text = re.sub(r"\s+", " ", prose(page)).lower()
    found = {phrase: len(re.findall(phrase, text)) for phrase in BANNED}
    assert {p: BANNED[p] for p, n in found.items() if n > ALLOWED.get((page.name, p), 0)} == {}


def test_the_checks_see_what_they_are_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# 1 2 3\n\nIt has 1, 2 and 3 of `4`. It goes on.\n\n- " + "word " * 31 + ".\n\n| 1 | 2 | 3 |\n")
    with pytest.raises(AssertionError, match="word word"):
        test_sentences_are_short(page)
    with pytest.raises(AssertionError, match="It has 1, 2 and 3 of code"):
        test_sentences_have_few_numbers(page)
    with pytest.raises(AssertionError, match="continues"):
        test_words_are_those_of_everybody(page)
    page.write_text("It has 1 and 2 of FSDP2 with bf16. It continues. " + "Word " * 30 + ".\n")
    test_sentences_are_short(page)
    test_sentences_have_few_numbers(page)
    test_words_are_those_of_everybody(page)


FRAGMENT = re.compile(r"^\s+(\*{0,2}\w+): ((?:of|as in|as for|as there|likewise)\b.*)$")


def fragments(source: str) -> list[str]:
    """Arguments that a docstring documents by a fragment: in a tooltip it stands alone and says nothing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            _, _, sections = (ast.get_docstring(node) or "").partition("\n\n")
            found += [line.strip() for line in sections.splitlines() if FRAGMENT.match(line)]
    return found


def test_arguments_are_documented_by_sentences() -> None:
    found = {str(path.relative_to(ROOT)): fragments(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_fragment_is_seen() -> None:
    lines = ("Draw.", "", "Args:", "    seed: of the folds.", "    k: as in `f`.", "    n: Number of rows.")
    source = 'def f(seed, k, n):\n    """' + "\n    ".join(lines) + '\n    """\n'
    assert fragments(source) == ["seed: of the folds.", "k: as in `f`."]
