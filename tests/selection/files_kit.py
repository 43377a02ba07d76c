"""What the tests of scoring files share: files of every format with texts whose worth is known, and how they read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mates_hf.prediction.text_model import TextInfluenceModel
from mates_hf.selection.selector import MatesSelector

WORDS = 60
WORTH = np.random.default_rng(5).normal(size=WORDS)
METADATA = {b"origin": b"made", b"huggingface": b'{"info": {}}'}


def make_texts(num: int, seed: int, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words `w3` to `w59`, all different."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, WORDS, rng.integers(1, longest + 1))) for _ in range(num)]
    return [f"{text} w{3 + i % 50} w{3 + i // 50 % 50} w{3 + seed % 50}" for i, text in enumerate(texts)]


def worth(text: str) -> float:
    """Mean worth of a text's words, > 0 helps."""
    return float(np.mean([WORTH[int(word[1:])] for word in text.split()]))


def text_selector() -> MatesSelector:
    texts = make_texts(600, 99)
    return MatesSelector(TextInfluenceModel.distil([worth(text) for text in texts], texts, num_buckets=2**10))


def rows_of(texts: Sequence[str | None], first: int = 0) -> list[dict[str, Any]]:
    return [{"id": first + i, "text": text, "meta": {"n": i % 3, "tags": ["a"]}} for i, text in enumerate(texts)]


def write_parquet(path: Path, texts: Sequence[str | None], first: int = 0, **options: Any) -> None:
    schema = pa.schema(
        [
            ("id", pa.int64()),
            pa.field("text", pa.large_string(), metadata={"of": "the field"}),
            ("meta", pa.struct([("n", pa.int32()), ("tags", pa.list_(pa.string()))])),
        ],
        METADATA,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows_of(texts, first), schema)
    pq.write_table(table, path, **{"compression": "zstd", "row_group_size": 70, **options})


def lines_of_texts(texts: Sequence[str | None], first: int = 0) -> list[bytes]:
    """JSON lines that no writer would write in the same way again."""
    return [json.dumps(row, separators=(" ,", ":  ")).encode() for row in rows_of(texts, first)]


def write_lines(path: Path, lines: Iterable[bytes], end: bytes = b"\n") -> None:
    content = b"".join(line + end for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix in (".zst", ".bz2"):
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".bz2": "bz2"}[path.suffix]) as file:
            file.write(content)
    else:
        path.write_bytes(content)


def read_lines_of(path: Path | str) -> list[bytes]:
    with pa.input_stream(str(path)) as file:
        return file.read().splitlines(keepends=True)


def write_corpus(folder: Path, num: int = 200) -> list[str]:
    """Files of each format; all texts, by the files' names."""
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet", "deep/d.ndjson.zst", "deep/e.parquet", "deep/f.jsonl.bz2"]
    texts: list[str] = []
    for seed, name in enumerate(names):
        some = make_texts(num + seed, seed)
        if name.endswith("parquet"):
            write_parquet(folder / name, some, len(texts))
        else:
            write_lines(folder / name, lines_of_texts(some, len(texts)))
        texts += some
    return texts


def outputs(folder: Path | str) -> list[str]:
    """Names of the files that were written, ours left out."""
    fs, root = fsspec.url_to_fs(str(folder))
    names = [name[len(root.rstrip("/")) + 1 :] for name in fs.find(root)]
    return sorted(name for name in names if not name.startswith("_mates/"))


def kept_ids(folder: Path) -> list[int]:
    """The ids of all rows that were written, in their order."""
    found: list[int] = []
    for name in outputs(folder):
        if name.endswith("parquet"):
            found += pq.read_table(folder / name).column("id").to_pylist()
        else:
            found += [json.loads(line)["id"] for line in read_lines_of(folder / name)]
    return found


def content_of(folder: Path) -> dict[str, bytes]:
    """All that was written, byte for byte."""
    return {name: (folder / name).read_bytes() for name in outputs(folder)}
