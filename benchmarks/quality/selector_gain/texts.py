"""The corpora of `selector_gain`: what the demo run saw, another corpus without it, and rows of equal length.

Trade-off: the other corpus is whatever this Python installation holds besides the demo's text, mostly the installed
packages: no download, and other figures on another installation. Files are read, never imported.
"""

from __future__ import annotations

import ast
import dataclasses
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.overlap import NGRAM_WORDS, find_overlap
from mates_hf.data.words import words_of

Row = dict[str, str]
IntArray = npt.NDArray[np.int64]

OTHER_SEED = 1  # of `builtin_corpus`: the demo has 0
OWN_SHARE = 0.02  # of the other corpus is held out, to see what selecting unlearns

# Characters taken of the installed packages, of one kind and of one file: many authors, none of them most of it.
PACKAGE_BUDGETS = {"package source": 4_200_000, "package docstring": 1_800_000, "package document": 800_000}
FILE_CHARACTERS = 12_000
PASSAGE_CHARACTERS = (600, 1_200)
SKIPPED_FOLDERS = {"__pycache__", "_vendor", "mates_hf", "test", "tests", "testing"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """All that is read."""

    demo_pool: list[Row]  # what the demo run chose from; only to keep the other corpus free of it
    reference: list[str]  # passages that the demo measured influence on
    held_out: list[str]  # passages like them that the fresh models are judged by
    # the other corpus, rows of `text` and `kind`, shuffled. None shares a 13-gram with the three above.
    other: list[Row]
    own: list[str]  # passages of the other corpus that are not in it and share no 13-gram with it
    dropped: int  # candidates of the other corpus left out for a shared 13-gram


def builtin_texts(share: float) -> Texts:
    """The demo's corpus; the other one is a second draw of it and a `share` of the text of the installed packages.

    What is in the demo's texts is dropped, and a part of the other corpus kept aside.
    """
    demo, second = builtin_corpus(), builtin_corpus(seed=OTHER_SEED)
    candidates = [*second.pool, *package_texts(np.random.default_rng(OTHER_SEED), share)]
    seen = [*(row["text"] for row in demo.pool), *demo.reference, *demo.development]
    shared = set(find_overlap([row["text"] for row in candidates], seen).tolist())
    free = [row for i, row in enumerate(candidates) if i not in shared and len(words_of(row["text"])) >= NGRAM_WORDS]
    free = [free[i] for i in np.random.default_rng(OTHER_SEED).permutation(len(free))]
    num = int(OWN_SHARE * len(free))
    own, other = [row["text"] for row in free[:num]], free[num:]
    known = set(find_overlap(own, [row["text"] for row in other]).tolist())
    return Texts(
        demo_pool=list(demo.pool),
        reference=demo.reference,
        held_out=demo.development,
        other=other,
        own=[text for i, text in enumerate(own) if i not in known],
        dropped=len(shared),
    )


def package_texts(rng: np.random.Generator, share: float) -> Iterator[Row]:
    """Passages of source, docstrings and documents of the installed packages, each kind from files of its own."""
    folder = Path(sysconfig.get_paths()["purelib"])
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".md", ".rst")
        and not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)
        and not any(part.endswith(".dist-info") for part in path.parts)
    ]
    files = [files[i] for i in rng.permutation(len(files))]
    modules = [path for path in files if path.suffix == ".py"]
    documents = [path for path in files if path.suffix != ".py"]
    texts = {
        "package source": map(_read, modules[::2]),
        "package docstring": (_docstrings(_read(path)) for path in modules[1::2]),
        "package document": map(_read, documents),
    }
    seen: set[str] = set()
    for kind, kind_texts in texts.items():
        budget = share * PACKAGE_BUDGETS[kind]
        for text in kind_texts:
            for passage in cut_passages(text[:FILE_CHARACTERS]):
                key = " ".join(words_of(passage))
                if key not in seen:
                    seen.add(key)
                    budget -= len(passage)
                    yield {"text": passage, "kind": kind}
            if budget < 0:
                break


def cut_passages(text: str) -> list[str]:
    """Consecutive lines in pieces of `PASSAGE_CHARACTERS`, cut at an empty line where there is one."""
    shortest, longest = PASSAGE_CHARACTERS
    found, current = [], ""
    for line in [*text.splitlines(), ""]:
        if len(current) + len(line) > longest or (len(current) >= shortest and not line.strip()):
            found.append(current.strip("\n"))
            current = ""
        current += line[:longest] + "\n"
    # Fewer words have no n-gram, so that a copy of them in the demo's corpus could not be seen.
    return [passage for passage in found if len(words_of(passage)) >= NGRAM_WORDS]


def pack(rows_ids: Sequence[npt.NDArray[Any]], order: IntArray, end: int, block: int) -> npt.NDArray[Any]:
    """(B, `block`) token ids: the rows in `order`, each followed by `end`, one after the other; a rest is dropped."""
    flat = np.concatenate([part for i in order for part in (rows_ids[i], [end])])
    return flat[: len(flat) - len(flat) % block].reshape(-1, block)


def _read(path: Path) -> str:
    """A file's text; empty where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and its functions; empty where it does not parse."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes: Iterable[ast.AST] = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return ""
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))))
