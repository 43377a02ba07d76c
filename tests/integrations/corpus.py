"""What the tests of engines share: a corpus in files, a selector on disk, and the rows that it keeps of the corpus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from mates_hf import MatesSelector
from tests.selection.selector_kit import fit_model, make_lists

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
NUM_FILES = 7


def cluster_scripts(language: str) -> list[str]:
    """Fenced blocks of the page on clusters."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


class Corpus(NamedTuple):
    """Files of texts, and what scores them."""

    files: Path
    selector: Path
    dataset: Dataset

    def kept(self, **budget: Any) -> list[str]:
        """Ids of the rows that `MatesSelector.filter` keeps, sorted."""
        return sorted(MatesSelector.from_pretrained(self.selector).filter(self.dataset, **budget)["id"])


def make_corpus(folder: Path, tokenizer: Any, num_rows: int = 700) -> Corpus:
    """Texts of 2 to 40 words in files of different sizes, of which a quarter are in the corpus twice."""
    MatesSelector(fit_model(), tokenizer).save_pretrained(folder / "selector")
    lists = make_lists(num_rows, seed=3)
    lists[num_rows // 2 : num_rows // 2 + num_rows // 4] = lists[: num_rows // 4]
    texts = [" ".join(f"w{token}" for token in ids) for ids in lists]
    order = np.random.default_rng(0).permutation(num_rows)
    table = pa.table({"id": [f"row-{i}" for i in order], "text": [texts[i] for i in order]})
    (folder / "corpus").mkdir()
    borders = np.linspace(0, 1, NUM_FILES + 1) ** 1.5 * num_rows
    for number, (begin, end) in enumerate(zip(borders[:-1].astype(int), borders[1:].astype(int), strict=True)):
        pq.write_table(table.slice(begin, end - begin), folder / "corpus" / f"{number:03d}.parquet")
    return Corpus(folder / "corpus", folder / "selector", Dataset(table))
