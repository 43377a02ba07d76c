"""datatrove itself: tasks that score, die and resume, a cut through them, and exactly the rows of `MatesSelector`."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mates_hf import MatesSelector
from mates_hf.errors import MatesError
from mates_hf.selection.score_file import read_facts
from tests.integrations.corpus import Corpus, make_corpus

pytestmark = pytest.mark.slow
RATIO = 0.2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("datatrove"), tiny_tokenizer)


@pytest.fixture(scope="module", autouse=True)
def engine() -> Any:
    """The module under test; all is skipped where datatrove is not installed."""
    pytest.importorskip("datatrove")
    from mates_hf.integrations import datatrove

    return datatrove


def reader(corpus: Corpus) -> Any:
    from datatrove.pipeline.readers import ParquetReader

    return ParquetReader(str(corpus.files))


def execute(folder: Path, name: str, *steps: Any, tasks: int = 3, workers: int = 1) -> Any:
    """Run a pipeline with a log of this name."""
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(folder / name)).run()


def writer(folder: Path) -> Any:
    from datatrove.pipeline.writers import ParquetWriter

    return ParquetWriter(str(folder), output_filename="${rank}.parquet")


class DiesOnce:
    """A step that raises in one task until a file is there, amid its documents."""

    def __init__(self, rank: int, unless: Path) -> None:
        self.rank, self.unless = rank, unless

    def __call__(self, data: Iterator[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for number, document in enumerate(data):
            if rank == self.rank and number == 5 and not self.unless.exists():
                raise RuntimeError("the node is gone")
            yield document


def test_a_corpus_that_was_scored_by_tasks_of_which_one_died_keeps_what_the_selector_keeps(
    corpus: Corpus, engine: Any, tmp_path: Path
) -> None:
    scores = str(tmp_path / "scores")
    mended = tmp_path / "mended"

    def steps() -> list[Any]:
        scorer = engine.MatesScorer(str(corpus.selector), scores, batch_size=64)
        return [reader(corpus), scorer, DiesOnce(1, mended), writer(tmp_path / "scored")]

    with pytest.raises(RuntimeError, match="the node is gone"):
        execute(tmp_path, "log", *steps())
    with pytest.raises(MatesError, match=r"\(tasks 1, 2\).*`tasks=3`: finished tasks are skipped"):
        engine.top_ratio(scores, RATIO)
    mended.touch()
    (first,) = (tmp_path / "scores").iterdir()
    written = first.stat().st_mtime_ns
    execute(tmp_path, "log", *steps(), workers=2)
    assert sorted(path.name for path in (tmp_path / "log" / "completions").iterdir()) == ["00000", "00001", "00002"]
    assert (first.name, first.stat().st_mtime_ns) == ("00000.parquet", written)

    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset).influence
    by_id = dict(zip(corpus.dataset["id"], want.tolist(), strict=True))
    scored = pq.read_table(tmp_path / "scored")
    assert {one["id"]: np.float32(one["metadata"]["influence"]) for one in scored.to_pylist()} == by_id

    cut = engine.top_ratio(scores, RATIO)
    assert cut.num_kept == round(RATIO * len(by_id))
    keep = engine.MatesFilter(cut, exclusion_writer=writer(tmp_path / "dropped"))
    execute(tmp_path, "log2", reader(corpus), keep, writer(tmp_path / "kept"))
    kept = pq.read_table(tmp_path / "kept")["id"].to_pylist()
    assert sorted(kept) == corpus.kept(ratio=RATIO)
    rest = pq.read_table(tmp_path / "dropped").to_pylist()
    assert sorted(kept + [one["id"] for one in rest]) == sorted(by_id)
    assert {one["metadata"]["filter_reason"] for one in rest} == {"low_influence"}


def test_a_chain_that_is_submitted_before_anything_is_scored(corpus: Corpus, engine: Any, tmp_path: Path) -> None:
    scores = str(tmp_path / "scores")
    budget = {"num_tokens": 3_000, "random_share": 0.3, "seed": 4}
    texts = [reader(corpus), engine.MatesScorer(str(corpus.selector), scores)]
    find = [engine.MatesCut(scores, **budget)]
    keep = [reader(corpus), engine.MatesFilter(scores, **budget, batch_size=7), writer(tmp_path / "kept")]
    sent = [pickle.loads(pickle.dumps(steps)) for steps in (texts, find, keep)]  # as Slurm has it: all are sent first
    for steps, name, tasks in zip(sent, ("score", "find", "keep"), (3, 1, 3), strict=True):
        execute(tmp_path, name, *steps, tasks=tasks)
    kept = pq.read_table(tmp_path / "kept")["id"].to_pylist()
    cut = engine.top_ratio(scores, **budget)
    assert len(kept) == cut.num_kept
    assert cut.cut.num_tokens_kept <= 3_000
    stats = json.loads((tmp_path / "find" / "stats.json").read_text())
    assert stats[0]["stats"]["kept"]["total"] == cut.num_kept


def test_another_division_or_other_files_are_an_error(corpus: Corpus, engine: Any, tmp_path: Path) -> None:
    from datatrove.data import Document

    scores = str(tmp_path / "scores")
    scorer = engine.MatesScorer(str(corpus.selector), scores)
    texts = corpus.dataset["text"][:30]

    def documents(rank: int) -> list[Document]:
        return [Document(text=text, id=str(i)) for i, text in enumerate(texts) if i % 2 == rank]

    for rank in (0, 1):
        assert len(list(scorer.run(iter(documents(rank)), rank, 2))) == 15
    with pytest.raises(MatesError, match="of the same selector and of 4 tasks, and .* holds scores of 2 tasks"):
        list(scorer.run(iter(documents(0)), 0, 4))
    with pytest.raises(MatesError, match="holds scores of 2 tasks"):
        list(scorer.run(iter([]), 3, 4))  # of a task without files
    cut = engine.top_ratio(scores, k=10)
    keep = engine.MatesFilter(cut)
    with pytest.raises(MatesError, match="are of 2 where this pipeline has 4.*set `tasks=2`"):
        list(keep.run(iter(documents(0)), 0, 4))
    with pytest.raises(MatesError, match="task 1 has as document 0 another one"):
        list(keep.run(iter(documents(0)), 1, 2))
    with pytest.raises(MatesError, match="task 0 has 14 documents where 15 were scored"):
        list(keep.run(iter(documents(0)[:-1]), 0, 2))
    kept = [list(keep.run(iter(documents(rank)), rank, 2)) for rank in (0, 1)]
    assert sum(map(len, kept)) == 10
    stopped = scorer.run(iter(documents(0)), 0, 2)
    before = read_facts(f"{scores}/00000.parquet")
    next(stopped)
    stopped.close()  # a step behind it that wants no more
    assert read_facts(f"{scores}/00000.parquet") == before


def test_columns_of_the_metadata(corpus: Corpus, engine: Any, tmp_path: Path) -> None:
    from datatrove.data import Document

    selector = MatesSelector.from_pretrained(corpus.selector)
    rows = [[], [4], *([7] * length for length in range(2, 12)), [9, 9]]
    documents = [Document(text="-", id=str(i), metadata={"input_ids": ids}) for i, ids in enumerate(rows)]
    for name, size in (("one", 1), ("many", 1000)):  # a batch of empty rows alone has no type of its own
        scorer = engine.MatesScorer(str(corpus.selector), str(tmp_path / name), column="input_ids", batch_size=size)
        found = [one.metadata["influence"] for one in scorer.run(iter(documents), 0, 1)]
        want = selector.score(corpus.dataset.from_dict({"input_ids": rows})).influence
        assert np.array_equal(np.array(found, np.float32), want)
        kept = list(engine.MatesFilter(str(tmp_path / name), k=3, batch_size=size).run(iter(documents), 0, 1))
        assert [one.id for one in kept] == ["9", "10", "11"]
    with pytest.raises(ValueError, match=r"metadata must have `ids`, and document '0' has \['influence', "):
        list(engine.MatesScorer(str(corpus.selector), str(tmp_path / "x"), column="ids").run(iter(documents), 0, 1))


def test_arguments_are_checked_where_the_pipeline_is_written(corpus: Corpus, engine: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got MatesSelector.*save_pretrained"):
        engine.MatesScorer(MatesSelector.from_pretrained(corpus.selector), str(tmp_path))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        engine.MatesScorer(str(corpus.selector), str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match="Exactly one of `ratio`"):
        engine.MatesFilter(str(tmp_path))
    with pytest.raises(ValueError, match="Exactly one of `ratio`"):
        engine.MatesCut(str(tmp_path), 0.2, k=3)
    scorer = engine.MatesScorer(str(corpus.selector), str(tmp_path / "scores"))
    list(scorer.run(iter(reader(corpus).run(None, 0, 1)), 0, 1))
    assert scorer._scorer is not None
    assert len(pickle.dumps(scorer)) < 10_000  # the path, not the model
    with pytest.raises(ValueError, match="must not be given with a cut"):
        engine.MatesFilter(engine.top_ratio(str(tmp_path / "scores"), 0.2), 0.3)
