"""The command line of all benchmarks: lists the questions, runs one, writes its JSON and page, checks pages.

A question is a module of `quality/`, `cost/` or `reliability/`, or a folder of its own there. The first line of its
docstring is the question. It has `run(bench)`, which measures and returns the JSON document (None where nothing is to
be written), and `page(document)`, which makes the Markdown page of it and of nothing else, unless the document is a
list of figures. It may have

- `add_options(parser)`: options of its own; `variant(options)`: what is added to the name of its results;
- `differences(document)`: what is wrong with a document that its page does not show;
- `tables(document)`: tables of other pages that follow from it, by the page's path: a run writes them there, where a
  table has the same heads, and `--check` compares them;
- `pictures(document)`: pictures of other pages that follow from it, SVG text by path: written and compared as well;
- `plot(document, path)`: a picture beside the page;
- `DATA = True`: it reads the folder that `--data` names;
- `DIGITS`: significant digits of figures in the JSON (9).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lab import machine
from benchmarks.lab.statistics import rounded
from benchmarks.lab.tables import figures_page, stale_tables, with_tables
from mates_hf.disk import written_whole

Document = dict[str, Any]
FOLDER = Path(__file__).resolve().parents[1]
RESULTS = FOLDER / "results"
ROOMS = ("quality", "cost", "reliability")
UNITS_LEFT = 3  # exit code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A benchmark, before it is imported."""

    name: str  # on the command line and of its results
    room: str  # `quality`, `cost` or `reliability`
    asks: str  # the first line of its docstring

    def module(self) -> Any:
        """Its code."""
        return importlib.import_module(f"benchmarks.{self.room}.{self.name}")


def questions() -> dict[str, Question]:
    """All questions by name, without importing them."""
    found = {}
    for room in ROOMS:
        for path in sorted([*(FOLDER / room).glob("*.py"), *(FOLDER / room).glob("*/__init__.py")]):
            name = path.parent.name if path.name == "__init__.py" else path.stem
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if name != room:
                found[name] = Question(name=name, room=room, asks=" ".join(doc.partition("\n\n")[0].split()))
    return found


class Bench:
    """A benchmark that has begun: the options it was given, units that are `left`, whether something is `wrong`."""

    def __init__(self, name: str, module: Any, options: argparse.Namespace) -> None:
        self.module, self.options = module, options
        variant = module.variant(options) if hasattr(module, "variant") else ""
        self.name = name + (f"_{variant}" if variant else "") + ("-quick" if options.quick else "")
        self.left, self.wrong = 0, False

    @property
    def quick(self) -> bool:
        """Whether numbers are small, to see that everything runs."""
        return bool(self.options.quick)

    @property
    def deadline(self) -> float:
        """When nothing more is to be begun, on the clock of `time.monotonic`."""
        return float(self.options.begun + 60 * self.options.minutes)

    @property
    def work(self) -> Path:
        """Folder of what is done so far."""
        return Path(self.options.work, self.name).resolve()

    @property
    def data(self) -> Path:
        """Folder of the data, or of text of the Python installation in its place."""
        from benchmarks.lab.corpus import write_built_in

        return Path(self.options.data or write_built_in(self.work / "built-in")).resolve()

    @property
    def paths(self) -> Any:
        """Both, as units take them."""
        from benchmarks.lab.checkpoint import Paths

        self.work.mkdir(parents=True, exist_ok=True)
        return Paths(data=self.data, work=self.work)

    def earlier(self) -> Document | None:
        """The newest document of this benchmark and hardware."""
        found = sorted((self.options.out or RESULTS).glob(f"{self.name}_{machine.tag()}_????-??.json"))
        return read(found[-1]) if found else None

    def figures(self, settings: Document, figures: list[Document], raw: Any) -> Document:
        """The document of a benchmark whose result is a list of figures."""
        hardware = machine.hardware(self.options.threads)
        return {"quick": self.quick, "hardware": hardware, "settings": settings, "figures": figures, "raw": raw}

    def write(self, document: Document, *, aloud: bool = True) -> None:
        """Write the JSON and, from what was written, the page and the plot; a quick run without `--out` prints."""
        text = as_json(document, getattr(self.module, "DIGITS", 9))
        found = json.loads(text)
        if aloud:
            say(page_of(self.module, found))
        out = self.options.out or (None if self.quick else RESULTS)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{self.name}_{machine.tag()}_{time.strftime('%Y-%m')}.json"
            with written_whole(path) as file:
                file.write(text.encode("utf-8"))
            write_page(self.module, path)
            if out == RESULTS:
                write_docs(self.module, found)


def say(text: str) -> None:
    """One line to standard output, at once."""
    print(text, flush=True)


def read(path: Path) -> Document:
    """A JSON document."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def newest(name: str) -> Document:
    """The newest committed document of a question, of whatever hardware."""
    return read(max(RESULTS.glob(f"{name}_*_????-??.json"), key=lambda path: path.stem[-7:]))


def as_json(document: Document, digits: int) -> str:
    """Plain JSON; the longest list or mapping has a line for each entry, so that changes of one show as such."""
    values = rounded(document, digits)

    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    parts = {name: dumped(value) for name, value in values.items()}
    longest = max(parts, key=lambda name: len(parts[name]), default="")
    entries = values.get(longest)
    if isinstance(entries, dict):
        parts[longest] = "{\n" + ",\n".join(f"{dumped(name)}:{dumped(entry)}" for name, entry in entries.items()) + "}"
    elif isinstance(entries, list):
        parts[longest] = "[\n" + ",\n".join(map(dumped, entries)) + "]"
    return "{" + ",\n".join(f"{dumped(name)}:{part}" for name, part in parts.items()) + "}\n"


def page_of(module: Any, document: Document) -> str:
    """The page that a question makes; without one of its own, that of a list of figures."""
    if hasattr(module, "page"):
        return str(module.page(document))
    return figures_page(module.__name__.rpartition(".")[2], document)


def write_page(module: Any, path: Path) -> None:
    """The page of a JSON file, and its plot."""
    document = read(path)
    path.with_suffix(".md").write_text(page_of(module, document), encoding="utf-8")
    if hasattr(module, "plot"):
        module.plot(document, path.with_suffix(".svg"))


def tables_of(module: Any, document: Document) -> dict[Path, list[str]]:
    """Tables of other pages that follow from a document, by page."""
    return dict(module.tables(document)) if hasattr(module, "tables") else {}


def pictures_of(module: Any, document: Document) -> dict[Path, str]:
    """Pictures of other pages that follow from a document, by path."""
    return dict(module.pictures(document)) if hasattr(module, "pictures") else {}


def write_docs(module: Any, document: Document) -> None:
    """Put tables that follow from a document in the place of the pages' own, and write its pictures for them."""
    for page, tables in tables_of(module, document).items():
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    for path, picture in pictures_of(module, document).items():
        path.write_text(picture, encoding="utf-8")


def question_of(path: Path, known: dict[str, Question]) -> Question | None:
    """The question that a result answers: the longest name that its own begins with."""
    names = [name for name in known if path.stem.startswith(name)]
    return known[max(names, key=len)] if names else None


def check(path: Path, module: Any) -> Iterator[str]:
    """What is wrong with a result."""
    document = read(path)
    page = path.with_suffix(".md")
    if hasattr(module, "differences"):
        yield from module.differences(document)
    for other, tables in tables_of(module, document).items():
        for heads in stale_tables(other.read_text(encoding="utf-8"), tables):
            yield f"{other.name} has another table than follows from {path.name}: {heads}"
    for other, picture in pictures_of(module, document).items():
        if not other.exists() or other.read_text(encoding="utf-8") != picture:
            yield f"{other.name} is not drawn from {path.name}"
    if not page.exists() or page_of(module, document) != page.read_text(encoding="utf-8"):
        yield f"{page.name} does not follow from {path.name}"


def check_all(out: Path, name: str | None) -> int:
    """Check every page of a folder, or those of one question; the exit code."""
    known, wrong, num = questions(), 0, 0
    for path in sorted(out.glob("*.json")):
        question = question_of(path, known)
        if question is None:
            wrong += 1
            say(f"{path.name}: there is no such question")
        elif name in (None, question.name):
            num += 1
            for line in check(path, question.module()):
                wrong += 1
                say(f"{path.name}: {line}")
    say(f"{num} pages follow from their JSON" if not wrong else f"{wrong} faults in {num} pages")
    return int(bool(wrong or not num))


def listed() -> str:
    """All questions, room by room."""
    return "\n".join(["questions:", *(f"  {found.name:18} {found.asks}" for found in questions().values())])


def common_parser(prog: str, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=about, epilog=epilog, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="only compare pages with their JSON")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after this many")
    parser.add_argument("--out", type=Path, help="for JSON and page; a quick run prints where it is not given")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for what is done so far; a rerun goes on")
    parser.add_argument("--data", type=Path, help="folder with corpus.jsonl.gz and eval/, for those that read it")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each, where units run apart")
    parser.add_argument("--threads", type=int, default=machine.num_cores(), help="of torch, where times are taken")
    return parser


def main(arguments: list[str]) -> int:
    """Run, check or list; the exit code."""
    known = questions()
    if not arguments or arguments[0].startswith("-"):
        parser = common_parser("python -m benchmarks [NAME]", "What this library does, measured.", listed())
        options = parser.parse_args(arguments)
        if options.check:
            return check_all(options.out or RESULTS, None)
        parser.print_help()
        return 0
    name, *rest = arguments
    if name not in known:
        raise SystemExit(f"There is no question `{name}`. The names are: {', '.join(known)}.")
    if "--check" not in rest and not {"-h", "--help"} & set(rest):
        machine.with_steady_memory()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module = known[name].module()
    parser = common_parser(f"python -m benchmarks {name}", (module.__doc__ or "").strip())
    if hasattr(module, "add_options"):
        module.add_options(parser)
    options = parser.parse_args(rest)
    if options.check:
        return check_all(options.out or RESULTS, name)
    if getattr(module, "DATA", False) and options.data is None and not options.quick:
        parser.error("`--data` must name the folder of the data")
    logging.basicConfig(level=logging.ERROR)
    options.begun = time.monotonic()
    bench = Bench(name, module, options)
    document = module.run(bench)
    if document is not None:
        bench.write(document)
    if bench.left:
        say(f"{bench.left} units are left; the same command goes on")
    sys.stdout.flush()
    return UNITS_LEFT if bench.left else int(bench.wrong)
