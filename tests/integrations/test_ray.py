"""Ray Data itself: scores in actors, and exactly the rows of `MatesSelector`, whatever blocks and batches there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mates_hf import MatesSelector
from mates_hf.integrations.ray import COLUMNS, score_batch, top_ratio
from tests.integrations.corpus import Corpus, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("ray"), tiny_tokenizer)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray with two processors; all is skipped where it is not installed."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}},
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def scored(cluster: Any, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with its scores, in files."""
    folder = tmp_path_factory.mktemp("scored")
    texts = cluster.data.read_parquet(str(corpus.files))
    scores = texts.map_batches(score_batch(corpus.selector), batch_format="pyarrow", batch_size=64, concurrency=1)
    scores.write_parquet(str(folder))
    return folder


def ids(dataset: Any) -> list[str]:
    return sorted(row["id"] for row in dataset.take_all())


def test_a_batch_is_scored_without_ray(corpus: Corpus) -> None:
    table = pq.read_table(corpus.files)
    found = score_batch(str(corpus.selector), column="text")()(table)
    assert found.column_names == ["id", "text", *COLUMNS]
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset).influence
    assert np.array_equal(found["influence"].to_numpy(), want)
    with pytest.raises(TypeError, match='got dict. Pass `batch_format="pyarrow"`'):
        score_batch(str(corpus.selector))()({"text": ["w1"]})
    with pytest.raises(TypeError, match=r"got MatesSelector.*save_pretrained"):
        score_batch(MatesSelector.from_pretrained(corpus.selector))


@pytest.mark.slow
def test_scores_of_actors_are_those_of_the_selector(scored: Path, corpus: Corpus) -> None:
    found = pq.read_table(scored)
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset)
    by_id = dict(zip(corpus.dataset["id"], zip(*want, strict=True), strict=True))
    pairs = zip(found["influence"].to_numpy(), found["num_targets"].to_numpy(), strict=True)
    assert dict(zip(found["id"].to_pylist(), pairs, strict=True)) == by_id


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"ratio": 0.2}, {"k": 0}, {"k": 700}, {"threshold": 0.001}], ids=str)
@pytest.mark.parametrize("num_blocks", [1, 5])
def test_the_kept_rows_are_those_of_the_selector(
    cluster: Any, scored: Path, corpus: Corpus, budget: dict[str, Any], num_blocks: int
) -> None:
    kept = top_ratio(cluster.data.read_parquet(str(scored)).repartition(num_blocks), **budget)
    assert ids(kept) == corpus.kept(**budget)
    if budget != {"k": 0}:
        assert kept.columns() == ["id", "text", *COLUMNS]


@pytest.mark.slow
def test_copies_at_the_edge_are_kept_as_often_as_fits(cluster: Any, scored: Path, corpus: Corpus) -> None:
    texts = dict(zip(corpus.dataset["id"], corpus.dataset["text"], strict=True))
    table = pq.read_table(scored)
    counts = table.group_by("content_hash").aggregate([("id", "count")])
    assert max(counts["id_count"].to_pylist()) == 2
    dataset = cluster.data.read_parquet(str(scored)).materialize()
    for budget in ({"k": 139}, {"k": 140}, {"num_tokens": 3_000}):  # one of them parts a pair of copies
        kept = ids(top_ratio(dataset, **budget))
        assert sorted(texts[one] for one in kept) == sorted(texts[one] for one in corpus.kept(**budget))
    for seed in (0, 1):
        budget = {"k": 140, "random_share": 0.5, "seed": seed}
        kept = ids(top_ratio(dataset, **budget))
        assert len(kept) == 140
        assert kept == ids(top_ratio(dataset.repartition(3), **budget)) or len(set(kept)) == 140


@pytest.mark.slow
def test_bad_input_and_no_rows(cluster: Any, scored: Path, corpus: Corpus) -> None:
    texts = cluster.data.read_parquet(str(corpus.files))
    with pytest.raises(ValueError, match="has no influence, num_targets, content_hash. Score it"):
        top_ratio(texts, 0.2)
    with pytest.raises(ValueError, match=r"`k` must be at most the number of rows \(700\), got 701"):
        top_ratio(cluster.data.read_parquet(str(scored)), k=701)
    none = cluster.data.from_arrow(pq.read_table(scored).slice(0, 0))
    assert top_ratio(none, 0.2).count() == 0
    with pytest.raises(Exception, match="a column `txt` to score"):
        texts.map_batches(
            score_batch(str(corpus.selector), column="txt"), batch_format="pyarrow", concurrency=1
        ).materialize()
    bad = pa.table({"influence": pa.array([float("nan")], pa.float32()), "num_targets": pa.array([1], pa.int32()),
                    "content_hash": pa.array([1], pa.uint64())})  # fmt: skip
    with pytest.raises(Exception, match="must be finite"):
        top_ratio(cluster.data.from_arrow(bad), 0.5)
