"""Ray Data itself: scores in actors, and exactly the rows of `MatesSelector`, whatever the blocks and batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mates_hf import MatesSelector
from mates_hf.integrations.ray import score_batch, top_ratio
from mates_hf.selection.table_scorer import SCORE_COLUMNS
from tests.integrations.corpus import Corpus, cluster_scripts, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("ray"), tiny_tokenizer)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray with two processors; all is skipped where it is not installed."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    # A cluster that cannot start, or a worker that cannot, is waited for without an end.
    before = signal.signal(signal.SIGALRM, waited_too_long)
    signal.setitimer(signal.ITIMER_REAL, 900, 60)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_worker_niceness", "0")  # else other tests on the same cores are all served first
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    ray.shutdown()


def waited_too_long(*_: Any) -> None:
    raise TimeoutError("Ray took more than a quarter of an hour for these tests.")


@pytest.fixture(scope="module")
def scored(cluster: Any, corpus: Corpus) -> Any:
    """The corpus with its scores, as the script of the page leaves it."""
    (script,) = (block for block in cluster_scripts("python") if "import ray" in block)
    assert script.count('"/shared"') == 1
    exec(compile(script.replace("/shared", str(corpus.files.parent)), "docs/clusters.md", "exec"), {})
    return cluster.data.read_parquet(str(corpus.files.parent / "scored")).materialize()


def ids(dataset: Any) -> list[str]:
    return sorted(row["id"] for row in dataset.take_all())


def test_a_batch_is_scored_without_ray(corpus: Corpus) -> None:
    table = pq.read_table(corpus.files)
    found = score_batch(str(corpus.selector), column="text")()(table)
    assert found.column_names == ["id", "text", *SCORE_COLUMNS]
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset).influence
    assert np.array_equal(found["influence"].to_numpy(), want)
    with pytest.raises(TypeError, match='got dict. Pass `batch_format="pyarrow"`'):
        score_batch(str(corpus.selector))()({"text": ["w1"]})
    with pytest.raises(TypeError, match=r"got MatesSelector.*save_pretrained"):
        score_batch(MatesSelector.from_pretrained(corpus.selector))


@pytest.mark.slow
def test_scores_of_actors_are_those_of_the_selector(cluster: Any, scored: Any, corpus: Corpus) -> None:
    found = pa.concat_tables(cluster.get(scored.to_arrow_refs()))
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset)
    by_id = dict(zip(corpus.dataset["id"], zip(*want, strict=True), strict=True))
    pairs = zip(found["influence"].to_numpy(), found["num_targets"].to_numpy(), strict=True)
    assert dict(zip(found["id"].to_pylist(), pairs, strict=True)) == by_id


@pytest.mark.slow
def test_the_script_of_the_page_keeps_what_the_selector_keeps(scored: Any, corpus: Corpus) -> None:
    texts = dict(zip(corpus.dataset["id"], corpus.dataset["text"], strict=True))
    kept = pq.read_table(corpus.files.parent / "kept")
    assert sorted(kept["text"].to_pylist()) == sorted(texts[one] for one in corpus.kept(ratio=0.2))


@pytest.mark.slow
def test_the_kept_rows_are_those_of_the_selector_and_exactly_as_many(
    cluster: Any, scored: Any, corpus: Corpus
) -> None:
    texts = dict(zip(corpus.dataset["id"], corpus.dataset["text"], strict=True))
    assert len(set(texts.values())) < len(texts)
    for budget in ({"ratio": 0.2}, {"k": 141}, {"k": 700}, {"num_tokens": 3_000}, {"threshold": 0.001}):
        kept = top_ratio(scored, **budget)
        found, want = ids(kept), corpus.kept(**budget)
        assert len(set(found)) == len(want), budget
        assert sorted(texts[one] for one in found) == sorted(texts[one] for one in want)  # a pair may be parted
        assert kept.columns() == ["id", "text", *SCORE_COLUMNS]
    assert top_ratio(scored, k=0).count() == 0


@pytest.mark.slow
def test_neither_blocks_nor_batches_matter(cluster: Any, scored: Any, corpus: Corpus) -> None:
    texts = dict(zip(corpus.dataset["id"], corpus.dataset["text"], strict=True))
    found = []
    for dataset in (scored, scored.repartition(1), scored.random_shuffle(seed=1).repartition(40)):
        kept = ids(top_ratio(dataset, k=140, random_share=0.5, seed=2))
        assert len(set(kept)) == 140
        found.append(sorted(texts[one] for one in kept))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_bad_input_and_no_rows(cluster: Any, scored: Any, corpus: Corpus) -> None:
    texts = cluster.data.read_parquet(str(corpus.files))
    with pytest.raises(ValueError, match="has no influence, num_targets, content_hash. Score it first"):
        top_ratio(texts, 0.2)
    with pytest.raises(ValueError, match=r"`k` must be at most the number of rows \(700\), got 701"):
        top_ratio(scored, k=701)
    assert top_ratio(scored.limit(0), 0.2).count() == 0
    bad = pa.table({"influence": pa.array([float("nan")], pa.float32()), "num_targets": pa.array([1], pa.int32()),
                    "content_hash": pa.array([1], pa.uint64())})  # fmt: skip
    with pytest.raises(Exception, match="must be finite"):
        top_ratio(cluster.data.from_arrow(bad), 0.5)
