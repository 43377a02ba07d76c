"""The built-in corpus: real text that every Python installation carries, so that a demo needs no download.

Where it is used: where a demo, a test or a benchmark needs a mixed candidate pool and a reference task that is like a
small part of it. The reference is prose of the language manual (`pydoc_data.topics`); the pool is mostly other text:
source and docstrings of the standard library, licences and metadata of the installed packages. Files are read, never
imported.

Trade-off: no download and no licence question, for a corpus that depends on the installation: equal for one
installation and seed, similar but not equal on another. Figures made with it compare arms of one run, not machines.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mates_hf.data.overlap import NGRAM_WORDS, find_overlap, hash_ngrams
from mates_hf.data.words import words_of

_T = TypeVar("_T")

PASSAGE_MIN_CHARACTERS = 600
PASSAGE_MAX_CHARACTERS = 1_200
PASSAGE_DROP_CHARACTERS = 100  # a row this short has too few tokens to carry a label

# Characters taken of each kind. The manual is what is left of it (about 0.2 M, 4 % of the pool): scarce, as the text
# that a reference task needs is in a real pool, so that a uniform draw does badly and there is something to select.
_BUDGETS = {"source": 3_000_000, "docstring": 900_000, "licence": 500_000, "metadata": 1_200_000}

_REFERENCE_SHARE = 0.2
_DEVELOPMENT_SHARE = 0.2
_LARGEST_HELD_OUT_COMPONENT = 0.05  # of the manual's characters; larger ones would be most of a held-out part

# Tests, tables of code points and the manual itself; files of the build, which hold paths of the machine.
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars")
_LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice|authors", re.IGNORECASE)
_OWN_NAME = "mates-hf"  # its metadata is this project's README, and a corpus must not change with it


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltinCorpus:
    """A candidate pool and held-out passages that share no word 13-gram with it.

    Attributes:
        pool: candidates, shuffled; each a dict of `text` and `kind` ("manual", "source", "docstring", "licence" or
            "metadata").
        reference: passages of the manual for the reference task.
        development: other passages of the manual, to evaluate on.
        overlap: How many texts of the first part share a 13-gram with the second, counted after the split:
            `pool/reference`, `pool/development` and `development/reference` (all 0), and `dropped`, how many
            candidates were left out because they did.
    """

    pool: list[dict[str, str]]
    reference: list[str]
    development: list[str]
    overlap: Mapping[str, int]


def builtin_corpus(*, seed: int = 0, max_rows_per_kind: int | None = None) -> BuiltinCorpus:
    """Build the corpus from this Python installation; takes a few seconds.

    The manual repeats itself (about 40 % of its 13-grams recur in another topic), so it is split by connected
    components of passages that share a 13-gram, never by topic or passage.

    Args:
        seed: Random seed that decides which files are read, how the manual is split, and the order of the pool.
        max_rows_per_kind: Largest number of candidates of each kind that are kept; None keeps all. The reference and
            the development passages do not depend on it.

    Returns:
        The pool, the two held-out parts and what overlap remains between them.

    Raises:
        FileNotFoundError: this installation has no `pydoc_data/topics.py`.
        ValueError: `max_rows_per_kind` is below 1.
    """
    if max_rows_per_kind is not None and max_rows_per_kind < 1:
        raise ValueError(f"`max_rows_per_kind` must be None or at least 1, got {max_rows_per_kind}.")
    rng = np.random.default_rng(seed)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    manual = _manual_passages(stdlib)
    parts = _split_by_components(manual, rng)
    reference, development = ([manual[i] for i in part] for part in (parts[0], parts[1]))

    source_files, docstring_files = _stdlib_files(stdlib, rng)
    distributions = _distributions(rng)
    texts: dict[str, Iterable[str]] = {
        "source": filter(None, map(_read_utf8, source_files)),
        "docstring": (_docstrings(text) for text in filter(None, map(_read_utf8, docstring_files))),
        "licence": _licences(stdlib, distributions),
        "metadata": filter(None, map(_metadata_text, distributions)),
    }
    candidates = [("manual", manual[i]) for i in parts[2]]
    seen: set[str] = set()
    for kind, kind_texts in texts.items():
        candidates += [(kind, passage) for passage in _distinct_passages(kind_texts, _BUDGETS[kind], seen)]

    held_out = reference + development
    dropped = set(find_overlap([text for _, text in candidates], held_out).tolist())
    kept = [row for i, row in enumerate(candidates) if i not in dropped]
    pool: list[dict[str, str]] = []
    counts: dict[str, int] = {}
    for kind, text in _shuffled(kept, rng):
        counts[kind] = counts.get(kind, 0) + 1
        if max_rows_per_kind is None or counts[kind] <= max_rows_per_kind:
            pool.append({"text": text, "kind": kind})
    pool_texts = [row["text"] for row in pool]
    overlap = {
        "pool/reference": len(find_overlap(pool_texts, reference)),
        "pool/development": len(find_overlap(pool_texts, development)),
        "development/reference": len(find_overlap(development, reference)),
        "dropped": len(dropped),
    }
    return BuiltinCorpus(pool=pool, reference=reference, development=development, overlap=overlap)


def _split_by_components(passages: Sequence[str], rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
    """Positions of the reference, development and pool passages; passages that share a 13-gram stay together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    hashes, owners = hash_ngrams(passages, NGRAM_WORDS)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    left, right = owners[order][:-1][same], owners[order][1:][same]
    num = len(passages)
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(num, num))
    num_components, component = connected_components(graph, directed=False)

    sizes = np.bincount(component, weights=[len(text) for text in passages], minlength=num_components)
    total = sizes.sum()
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    filled = [0.0, 0.0]
    for c in rng.permutation(num_components):
        part = 2
        if sizes[c] <= _LARGEST_HELD_OUT_COMPONENT * total:
            if filled[0] < _REFERENCE_SHARE * total:
                part = 0
            elif filled[1] < _DEVELOPMENT_SHARE * total:
                part = 1
        if part < 2:
            filled[part] += sizes[c]
        parts[part].extend(np.flatnonzero(component == c).tolist())
    return parts


def _manual_passages(stdlib: Path) -> list[str]:
    """The language manual in passages, without paragraphs that an earlier topic already has."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.exists():
        raise FileNotFoundError(
            f"`pydoc_data/topics.py` must be in the standard library, and {stdlib} has none. Some distributions ship "
            "it in a package of its own (documentation or the full standard library): install that."
        )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    topics: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
    seen: set[str] = set()
    passages: list[str] = []
    for name in sorted(topics):
        fresh: list[str] = []
        for paragraph in _paragraphs(topics[name]):
            words = words_of(paragraph)
            key = " ".join(words)
            if len(words) >= NGRAM_WORDS and key in seen:
                continue
            seen.add(key)
            fresh.append(paragraph)
        passages += _passages(fresh)
    return list({" ".join(words_of(passage)): passage for passage in passages}.values())


def _stdlib_files(stdlib: Path, rng: np.random.Generator) -> tuple[list[Path], list[Path]]:
    """Modules to take source from, and other modules to take docstrings from (of one, they would come twice)."""
    files = [
        path
        for path in sorted(stdlib.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts)
        and not path.name.startswith(_SKIPPED_FILES)
    ]
    files = _shuffled(files, rng)
    return files[::2], files[1::2]


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and its functions, as paragraphs."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _distributions(rng: np.random.Generator) -> list[importlib.metadata.Distribution]:
    """The installed packages, one a name (the first on the path, which is the one imported), shuffled."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        text = _metadata_text(distribution)
        match = re.search(r"^Name:\s*(\S+)", text, re.MULTILINE) if text else None
        if match:
            found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), distribution)
    found.pop(_OWN_NAME, None)
    return _shuffled([found[name] for name in sorted(found)], rng)


def _metadata_text(distribution: importlib.metadata.Distribution) -> str | None:
    """A package's metadata and description, or None where there is none in UTF-8."""
    try:
        return distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    except UnicodeDecodeError:
        return None


def _licences(stdlib: Path, distributions: Iterable[importlib.metadata.Distribution]) -> Iterator[str]:
    """Licence, notice and author files of Python and of the packages."""
    paths = [stdlib / "LICENSE.txt"]
    for distribution in distributions:
        files = sorted(distribution.files or [], key=str)
        paths += [
            Path(str(distribution.locate_file(file)))
            for file in files
            if _LICENCE_NAME.search(file.name) and file.suffix in ("", ".txt", ".md", ".rst")
        ]
    for path in paths:
        text = _read_utf8(path) if path.is_file() else None
        if text:
            yield text


def _read_utf8(path: Path) -> str | None:
    """A file's text, or None where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _distinct_passages(texts: Iterable[str], budget: int, seen: set[str]) -> Iterator[str]:
    """Passages of the texts up to `budget` characters that are not in `seen` (one licence is in many packages)."""
    for text in texts:
        for passage in _passages(_paragraphs(text)):
            key = " ".join(words_of(passage))
            if key in seen:
                continue
            if budget < len(passage):
                return
            seen.add(key)
            budget -= len(passage)
            yield passage


def _paragraphs(text: str) -> list[str]:
    """Blocks between blank lines, each of at most `PASSAGE_MAX_CHARACTERS`; indentation is kept."""
    blocks: list[str] = []
    for block in re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n").replace("\f", "")):
        while len(block) > PASSAGE_MAX_CHARACTERS:
            span = (PASSAGE_MIN_CHARACTERS, PASSAGE_MAX_CHARACTERS)
            cuts = (block.rfind("\n", *span), block.rfind(" ", *span), PASSAGE_MAX_CHARACTERS)
            cut = next(cut for cut in cuts if cut > 0)
            blocks.append(block[:cut].rstrip())
            block = block[cut:].lstrip("\n")
        blocks.append(block.rstrip())
    return [block for block in blocks if block.strip()]


def _passages(paragraphs: Iterable[str]) -> list[str]:
    """Consecutive paragraphs joined to passages of about `PASSAGE_MIN_CHARACTERS` to `PASSAGE_MAX_CHARACTERS`."""
    passages: list[str] = []
    current = ""
    for paragraph in paragraphs:
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if current and (len(current) >= PASSAGE_MIN_CHARACTERS or len(joined) > PASSAGE_MAX_CHARACTERS):
            passages.append(current)
            joined = paragraph
        current = joined
    passages.append(current)
    # Fewer words have no n-gram, so that a copy of them in another part could not be seen.
    return [
        passage.strip("\n")
        for passage in passages
        if len(passage) >= PASSAGE_DROP_CHARACTERS and len(words_of(passage)) >= NGRAM_WORDS
    ]


def _shuffled(values: Sequence[_T], rng: np.random.Generator) -> list[_T]:
    """The values in a seeded order (`Generator.shuffle` would turn paths and tuples into arrays)."""
    return [values[i] for i in rng.permutation(len(values))]
