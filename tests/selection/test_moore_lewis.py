"""A filter by words, without a model: what it ranks by, what it is told of the pool, and all that a selector does."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from datasets import Dataset

from mates_hf import (
    MatesCallback,
    MatesConfig,
    MatesSelector,
    MooreLewisModel,
    ReferenceTask,
    TextInfluenceModel,
    score_files,
)
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.errors import MatesError, UnsupportedSettingError
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction import moore_lewis
from mates_hf.prediction.artifacts import load_influence_model
from mates_hf.prediction.ngram.evidence import log_odds
from mates_hf.prediction.ngram_model import NgramInfluenceModel

BUCKETS = 2**12


def make_texts(num: int, share: float, seed: int = 0) -> list[str]:
    """Texts of two kinds, a share of them of the wanted one; a kind has words of its own and words of both."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(num):
        low, high = (3, 24) if i < share * num else (18, 60)
        found.append(" ".join(f"w{word}" for word in rng.integers(low, high, rng.integers(6, 30))))
    return [found[i] for i in rng.permutation(num)]


def is_wanted(text: str) -> bool:
    return sum(int(word[1:]) < 18 for word in text.split()) > len(text.split()) / 3


@pytest.fixture
def reference(tiny_tokenizer) -> ReferenceTask:
    passages = Dataset.from_dict({"text": make_texts(40, 1.0, seed=7)})
    return ReferenceTask.from_dataset(passages, tiny_tokenizer, text_column="text", name="wanted")


@pytest.fixture
def pool() -> Dataset:
    return Dataset.from_dict({"text": make_texts(600, 0.2)})


@pytest.fixture
def fitted(reference, pool, tiny_tokenizer) -> MooreLewisModel:
    return MooreLewisModel(num_buckets=BUCKETS).fit(reference, pool, tokenizer=tiny_tokenizer)


def test_it_finds_what_the_reference_is_like(fitted, pool, tiny_tokenizer) -> None:
    selector = MatesSelector(fitted, tiny_tokenizer)
    wanted = np.array([is_wanted(text) for text in pool["text"]])
    kept = selector.filter(pool, ratio=0.2)
    assert np.mean([is_wanted(text) for text in kept["text"]]) > 0.95 > 3 * wanted.mean()
    influence = np.array(selector.map(pool)["influence"])
    assert influence[wanted].mean() > 0.15 > 0 > influence[~wanted].mean()
    assert fitted.separation > 0.9
    mixed = selector.filter(pool, ratio=0.2, random_share=0.5)
    assert len(mixed) == len(kept)
    assert 0.5 < np.mean([is_wanted(text) for text in mixed["text"]]) < 0.8
    spans = selector.select(pool, k=10).explain(0)["spans"]
    assert sum(span["num_targets"] for span in spans) == len(pool[0]["text"].split()) - 1
    assert selector.filter(pool, threshold=0.0).num_rows < 0.4 * len(pool)  # above 0 is likelier in the reference


def test_it_is_what_a_run_counts_next_to_its_labels_but_for_a_discount(reference, pool, tiny_tokenizer) -> None:
    ids = tiny_tokenizer(list(pool["text"]))["input_ids"]
    rows = TokenRows.from_lists(ids)
    fitted = MooreLewisModel(num_buckets=BUCKETS).fit(reference, rows)
    parts = log_odds(reference.weighted_rows, rows, BUCKETS, discount=1.0)
    whole = NgramInfluenceModel(num_buckets=BUCKETS).count_evidence(reference.weighted_rows, rows)
    of_run = whole[0].plus(whole[1]).score(rows)
    assert rank_correlation(of_run, parts[0].plus(parts[1]).score(rows)) > 0.95
    assert np.allclose(fitted.predict(rows), parts[0].plus(parts[1]).score(rows), atol=1e-6)
    # However the same pool is given, and whichever of its threads reads it.
    others = (Dataset.from_dict({"input_ids": ids}), [{"input_ids": row} for row in ids], pool)
    for given in (*others, CandidatePool(others[0])):
        again = MooreLewisModel(num_buckets=BUCKETS).fit(reference, given, tokenizer=tiny_tokenizer)
        assert np.array_equal(again.predict(rows), fitted.predict(rows))
        assert again.separation == fitted.separation


def test_weights_of_the_reference_count(reference, pool, tiny_tokenizer) -> None:
    other = ReferenceTask.from_dataset(
        Dataset.from_dict({"text": make_texts(400, 0.0, seed=3)}), tiny_tokenizer, text_column="text"
    )
    both = ReferenceTask.mixture([reference, other], [1, 1])
    rows = TokenRows.from_lists(tiny_tokenizer(list(pool["text"]))["input_ids"])
    fitted = MooreLewisModel(num_buckets=BUCKETS).fit(both, rows)
    tokens, bigrams = log_odds(both.weighted_rows, rows, BUCKETS, discount=1.0)
    assert np.allclose(fitted.predict(rows), tokens.plus(bigrams).score(rows), atol=1e-6)
    # Half of the weight is on the wanted texts, which are a fifth of the pool and an eleventh of the passages.
    wanted = np.array([is_wanted(text) for text in pool["text"]])
    alike = MooreLewisModel(num_buckets=BUCKETS).fit(both.rows, rows)
    gaps = [model.predict(rows)[wanted].mean() - model.predict(rows)[~wanted].mean() for model in (fitted, alike)]
    assert gaps[0] > 0 > gaps[1]


def test_saved_and_read_it_says_the_same_bit_for_bit(fitted, pool, tiny_tokenizer, tmp_path) -> None:
    selector = MatesSelector(fitted, tiny_tokenizer)
    selector.save_pretrained(tmp_path / "saved")
    again = MatesSelector.from_pretrained(tmp_path / "saved")
    assert np.array_equal(again.score(pool).influence, selector.score(pool).influence)
    assert again.influence_model.separation == fitted.separation
    assert repr(again.influence_model) == repr(fitted)
    assert "fitted to wanted: separation 0.9" in repr(fitted)
    assert "nats/token by which the reference's words are likelier" in repr(again)
    assert load_influence_model(tmp_path / "saved").vocab_size == fitted.vocab_size
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "# Filter by words" in card
    assert "name: wanted" in card
    for of_a_probe in ("Spearman", "probed", "optimizer step", "MATES is", "Labels"):
        assert of_a_probe not in card
    texts = tmp_path / "saved" / "model.safetensors"
    texts.write_bytes(texts.read_bytes()[:-8])
    with pytest.raises(MatesError, match="is missing, cut short or changed"):
        MatesSelector.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "value"), [("num_buckets", 3), ("seed", -1), ("separation", "high"), ("reference", 4), ("seed", True)]
)
def test_a_config_that_was_changed_is_refused(fitted, tmp_path, name, value) -> None:
    fitted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}), encoding="utf-8")
    with pytest.raises(MatesError, match="as it was fitted"):
        MooreLewisModel.from_pretrained(tmp_path)


def test_files_and_texts_without_a_tokenizer(fitted, pool, tiny_tokenizer, tmp_path) -> None:
    selector = MatesSelector(fitted, tiny_tokenizer)
    pool.to_parquet(tmp_path / "pool.parquet")
    report = score_files(selector, tmp_path / "pool.parquet", tmp_path / "kept", ratio=0.2, random_share=0.3)
    assert report.rows_kept == 120
    fast = selector.distil(pool)
    assert isinstance(fast.influence_model, TextInfluenceModel)
    assert fast.influence_model.report.spearman > 0.8
    assert fast.origin["label_unit"] == "log_odds"
    assert np.mean([is_wanted(text) for text in fast.filter(pool, ratio=0.2)["text"]]) > 0.9


def test_a_reference_like_the_pool_is_warned_of(pool, tiny_tokenizer, caplog) -> None:
    same = ReferenceTask.from_dataset(
        Dataset.from_dict({"text": make_texts(60, 0.2, seed=5)}), tiny_tokenizer, text_column="text"
    )
    with caplog.at_level(logging.WARNING, logger="mates_hf"):
        found = MooreLewisModel(num_buckets=BUCKETS).fit(same, pool, tokenizer=tiny_tokenizer)
    assert 0.3 < found.separation < 0.6
    assert "Words hardly separate the reference" in caplog.text


def test_few_passages_are_counted_and_not_judged(reference, pool, tiny_tokenizer) -> None:
    found = MooreLewisModel(num_buckets=BUCKETS).fit(reference.subset(3), pool, tokenizer=tiny_tokenizer)
    assert np.isnan(found.separation)
    assert "too few passages to judge it" in repr(found)
    assert np.mean([is_wanted(text) for text in MatesSelector(found, tiny_tokenizer).filter(pool, k=60)["text"]]) > 0.8


def test_what_it_cannot_count_is_refused(reference, pool, tiny_tokenizer, tmp_path) -> None:
    model = MooreLewisModel(num_buckets=BUCKETS)
    with pytest.raises(MatesError, match="must be fitted first"):
        model.predict(TokenRows.from_lists([[1, 2]]))
    with pytest.raises(ValueError, match="no tokenizer"):
        model.fit(reference, pool)
    with pytest.raises(TypeError, match="`reference` must be a ReferenceTask"):
        model.fit(pool, reference)
    with pytest.raises(TypeError, match="`background` must be the pool"):
        model.fit(reference, reference)
    with pytest.raises(ValueError, match="rows of two tokens or more"):
        model.fit(reference, TokenRows.from_lists([[5], [6]]))
    with pytest.raises(UnsupportedSettingError, match="stream"):
        model.fit(reference, pool.to_iterable_dataset(), tokenizer=tiny_tokenizer)
    images = ReferenceTask.from_examples(
        [{"pixel_values": np.zeros((3, 4, 4), np.float32), "labels": 1}], name="images"
    )
    with pytest.raises(UnsupportedSettingError, match="must be of text for a filter by words"):
        model.fit(images, pool, tokenizer=tiny_tokenizer)
    for wrong in ({"num_buckets": 3}, {"num_buckets": 2.0}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MooreLewisModel(**wrong)
    with pytest.raises(TypeError, match="is a filter that knows none.*`score_column`"):
        MatesCallback(reference, MatesConfig(update_steps=8), influence_model=model)
    with pytest.raises(ValueError, match="temperature"):
        MatesSelector(
            MooreLewisModel(num_buckets=BUCKETS).fit(reference, pool, tokenizer=tiny_tokenizer), tiny_tokenizer
        ).filter(pool, ratio=0.2, temperature=0.5)


def test_of_a_large_pool_enough_is_read_and_no_more(reference, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(moore_lewis, "SAMPLE_TOKENS", 1_350)
    monkeypatch.setattr(moore_lewis, "_AT_ONCE", 50)
    read = []

    texts = make_texts(500, 0.2, seed=4)
    tokenise = type(tiny_tokenizer).__call__
    monkeypatch.setattr(
        type(tiny_tokenizer),
        "__call__",
        lambda self, given, **more: read.append(len(given)) or tokenise(self, given, **more),
    )
    fitted = MooreLewisModel(num_buckets=BUCKETS).fit(
        reference, Dataset.from_dict({"text": texts}), tokenizer=tiny_tokenizer
    )
    assert read == [50, 30]  # of rows of 17 tokens
    assert fitted.separation > 0.85


def test_documents_of_a_packed_row_begin_anew(reference) -> None:
    lists = [list(range(3, 23)), list(range(30, 50)), list(range(20, 40))]
    packed = TokenRows.from_lists([lists[0] + lists[1] + lists[2]], seq_lengths=[[20, 20, 20]])
    apart = TokenRows.from_lists(lists)
    models = [MooreLewisModel(num_buckets=BUCKETS).fit(reference, rows) for rows in (packed, apart)]
    probe = TokenRows.from_lists([[22, 30, 49, 20, 5, 6]])
    assert models[0].predict(probe) == models[1].predict(probe)


def test_a_row_that_was_counted_ranks_less_below_others_by_the_discount(reference) -> None:
    """Each row has pairs of tokens that no other has, and counting those puts it last."""
    rng = np.random.default_rng(0)
    rows = TokenRows.from_lists([rng.permutation(400)[:60].tolist() for _ in range(400)])
    passages = TokenRows.from_lists([rng.permutation(400)[:60].tolist() for _ in range(40)])
    counted, gaps = np.arange(400) < 200, {}
    for discount in (0.0, 1.0):
        tokens, bigrams = log_odds(passages, rows.take(counted), 2**20, discount)
        scores = tokens.plus(bigrams).score(rows)
        gaps[discount] = (scores[~counted].mean() - scores[counted].mean()) / scores[~counted].std()
    assert gaps[0.0] > 5
    assert gaps[1.0] < 0.4 * gaps[0.0]


@pytest.mark.parametrize("tokens_per_row", [0.0, 1.0, 127.0, 4_000.0])
def test_a_sample_is_less_than_a_quarter_of_its_pool(tokens_per_row: float) -> None:
    for num in (0, 1, 500, 2**14, 2**16, 2**16 + 1, 10**9):
        counted = moore_lewis.num_counted(num, tokens_per_row)
        assert counted == num or (4 * counted < num and counted * tokens_per_row >= min(2**21, 2**14 * tokens_per_row))


@pytest.mark.parametrize("sample", [500 * 6, 1_100 * 6, 10**6], ids=["fewer than are read at first", "more", "whole"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_to_count_are_drawn_at_random_and_read_once(monkeypatch, sample: int, packed: bool) -> None:
    monkeypatch.setattr(moore_lewis, "SAMPLE_TOKENS", sample)
    lengths, reads = [[2, 4]] * 6_000 if packed else None, list[int]()
    rows = TokenRows.from_lists([[i] * 6 for i in range(6_000)], seq_lengths=lengths)

    def read(places: np.ndarray) -> TokenRows:
        reads.extend(places.tolist())
        return rows.take(places)

    found = moore_lewis.background_rows(6_000, read, np.random.default_rng(0))
    wanted = min(sample // 6, 6_000)
    assert len(reads) == len(set(reads)) == max(wanted, 1_024)
    firsts = np.unique(found.values)  # a row's tokens are its number
    assert len(firsts) == wanted
    assert found.segments is None
    assert len(found) == (1 + packed) * len(firsts)
    assert abs(firsts.mean() - 3_000) < 300


def test_an_empty_pool_is_refused(reference, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="two tokens or more"):
        MooreLewisModel().fit(reference, Dataset.from_dict({"text": []}), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="two tokens or more"):
        MooreLewisModel().fit(reference, TokenRows.from_lists([]))
