"""What the site has beyond Sphinx: links out of `docs/`, a `.md` of every page, `llms.txt`.

Pages are read on GitHub as well, so they link to files by paths such as `../examples`. On the site those become
addresses of the repository. Trade-off: text is replaced before it is parsed, in code blocks too, so a code block must
not hold a Markdown link.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

BLOB = "https://github.com/mates-hf/mates_hf/blob/main/"
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
DOCS = Path(__file__).parent


def absolute(text: str, folder: str) -> str:
    """A page with the links that leave `docs/` made addresses.

    Args:
        text: Markdown.
        folder: Where the file lies in the repository, `docs` or `.`.
    """

    def replaced(link: re.Match[str]) -> str:
        opening, path, anchor, closing = link.groups()
        target = posixpath.normpath(posixpath.join(folder, path))
        inside = target.startswith("docs/")
        new = posixpath.relpath(target, "docs") if inside else BLOB + target
        return f"{opening}{new}{anchor or ''}{closing}"

    return LINK.sub(replaced, text)


def commands() -> str:
    """What each command prints for `--help`, with a heading each."""
    from mates_hf import cli

    (action,) = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    return "\n\n".join(f"## {name}\n\n```text\n{each.format_help()}```" for name, each in action.choices.items())


def existing(name: str) -> str:
    """An entry of a table of contents for a page that a version may not have."""
    return f"{name}\n" if (DOCS / f"{name}.md").exists() else ""


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Links of a page, before it is parsed."""
    source[0] = absolute(source[0], "docs")
    source[0] = re.sub(r"^(\w+)\*\n", lambda entry: existing(entry[1]), source[0], flags=re.MULTILINE)
    source[0] = source[0].replace("<!-- commands -->", commands() if name == "cli" else "")
    app.env.mates_sources = {**getattr(app.env, "mates_sources", {}), name: source[0]}


def read_included(app: Any, path: Path, parent: str, source: list[str]) -> None:
    """Links of a file of the repository that a page includes, and its text for the page's `.md`."""
    source[0] = absolute(source[0], ".")
    app.env.mates_sources[parent] = source[0]


def with_help(kind: type) -> list[str]:
    """The first line of a dataclass's docstring, and its arguments where fields have a help text."""
    fields = [field for field in dataclasses.fields(kind) if "help" in field.metadata]
    told = [f"    {each.name}: {each.metadata['help']} Defaults to `{each.default!r}`." for each in fields]
    return [(inspect.getdoc(kind) or "").splitlines()[0], "", *(["Args:", *told, ""] if told else [])]


def docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are read as plain text too: code between single backticks, indented blocks of code after a colon."""
    if what == "class" and dataclasses.is_dataclass(value):
        lines[:] = [*with_help(value), *lines[1:]] if lines else lines
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    lines[:] = re.sub(r"(?<=\w):\n\n(?= {4}\w+ = )", "::\n\n", text).split("\n")


def documented(name: str) -> str:
    """A public object as Markdown: its signature and its docstring."""
    import mates_hf

    value = getattr(mates_hf, name)
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        signature = ""
    text = inspect.getdoc(value) or ""
    if dataclasses.is_dataclass(value):
        text = "\n".join([*with_help(value), *text.splitlines()[1:]])
    return f"## {name}\n\n```python\n{name}{signature}\n```\n\n{text}\n"


def markdown_of(name: str, source: str) -> str:
    """A page as its readers see it: without directives of Sphinx, the API written out."""
    if name == "api":
        import mates_hf

        about = source.partition("\n## ")[0]
        return f"{about}\n" + "\n".join(documented(each) for each in mates_hf.__all__)
    text = re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.DOTALL)
    text = re.sub(r"^```\{(?:toctree|eval-rst)\}.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```\{code-cell\}.*\n(?::.*\n)*", "```python\n", text, flags=re.MULTILINE)
    return re.sub(r"^:{3,}.*\n(?::\w[\w-]*:.*\n)*", "", text, flags=re.MULTILINE).strip() + "\n"


def first_words(text: str) -> str:
    """Who a page is for: its first paragraph."""
    paragraphs = [part for part in text.split("\n\n")[1:] if re.match(r"[A-Z`*]", part)]
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraphs[0]).split()) if paragraphs else ""


def write_texts(app: Any, exception: Exception | None) -> None:
    """`page.md` next to `page.html`, and `llms.txt`."""
    if exception is not None or app.builder.format != "html":
        return
    out, lines = Path(app.outdir), ["# mates_hf", ""]
    pages = {name: markdown_of(name, text) for name, text in app.env.mates_sources.items()}
    order = [name for name in app.env.toctree_includes.get("index", []) if name in pages]
    for name in ["index", *order, *sorted(set(pages) - {"index", *order})]:
        path = out / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[name], encoding="utf-8")
        if name == "index":
            lines += [f"> {first_words(pages[name])}", "", "## Pages", ""]
        else:
            lines.append(f"- [{app.env.titles[name].astext()}]({name}.md): {first_words(pages[name])}".rstrip(": "))
    (out / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def begin(app: Any) -> None:
    """Notebooks share a folder of this build, empty at its start, so that no figure is of an earlier one."""
    runs = Path(app.outdir) / ".." / f"{Path(app.outdir).name}-notebooks"
    shutil.rmtree(runs, ignore_errors=True)
    os.environ["MATES_DOCS_RUNS"] = str(runs.resolve())


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", begin)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon
    app.connect("build-finished", write_texts)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
