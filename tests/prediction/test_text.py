"""The text influence model: how a text is cut and hashed, what it learns, and that no form of a text changes a bit."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mates_hf import MatesError, MatesSelector, TextInfluenceModel
from mates_hf.data.rows import TokenRows
from mates_hf.data.text_spans import TextSpans
from mates_hf.prediction import text_model
from mates_hf.prediction.artifacts import load_influence_model, model_digest
from mates_hf.prediction.text import ridge_path, units
from mates_hf.prediction.threads import at_most_threads
from tests.selection.selector_kit import fit_model

BUCKETS = 2**16
MASK = 2**64 - 1
LETTERS = (
    (0x0E00, 0x0EFF), (0x1000, 0x10BF), (0x1780, 0x17FF), (0x2E80, 0x10FFFF),
)  # fmt: skip
MIXED = [
    "The cat sat on the mat, and the internationalisation of unbelievablylongwordswithoutend was 1234567890123456789!",
    "  two spaces\n\nand\tlines ", "Straße und Österreich", "Привет мир", "東京は日本の首都です。", "ภาษาไทย ลาว",
    "مرحبا بالعالم",
    "हिन्दी भाषा", "emoji 🎉🎉 here", "", " ", "x", "don't stop", "a" * 40, "é" * 20, "naïve café “quoted” — dash",
]  # fmt: skip


def fold(value: int) -> int:
    return value ^ (value >> 32)


def key_of(unit: bytes) -> int:
    low, high = (int.from_bytes(unit[i : i + 8], "little") for i in (0, 8))
    a, b = int(units._A), int(units._B)
    key = fold(((low ^ len(unit) * a & MASK) * b) & MASK)
    return key if len(unit) <= 8 else fold(((key ^ high ^ len(unit) * a & MASK) * b) & MASK)


def kind_of(letter: str) -> str:
    code = ord(letter)
    if code < 0x80:
        return "word" if letter.isalnum() else "white" if letter in " \t\n\r\v\f" else "sign"
    if code < 0xC0 or 0x2000 <= code < 0x2E80:
        return "sign"
    return "letter" if any(first <= code <= last for first, last in LETTERS) else "word"


def units_of(text: str) -> list[tuple[bytes, str]]:
    """The units of a text as the format says, character by character: what the kernels are compared with."""
    found: list[tuple[bytes, str]] = []
    i = 0
    while i < len(text):
        kind, unit = kind_of(text[i]), text[i].encode()
        i += 1
        if kind in ("word", "white"):
            while i < len(text) and kind_of(text[i]) == kind and len(unit + text[i].encode()) <= 16:
                unit += text[i].encode()
                i += 1
        if unit != b" ":
            found.append((unit, kind))
    return found


def buckets_of(text: str, pairs: bool, pieces: bool = False) -> tuple[list[int], list[int]]:
    found = units_of(text)
    keys = [key_of(unit) for unit, _ in found]
    a, b, shift = int(units._A), int(units._B), 64 - 16
    twos = [
        fold(((fold(first * a & MASK) ^ second) * b) & MASK)
        for (first, second), (one, other) in zip(pairwise(keys), pairwise(found), strict=True)
        if pairs or one[1] == other[1] == "letter"
    ]
    ends = [(unit[:3], unit[-3:]) for unit, _ in found if len(unit) >= 6 and pieces]
    for end, kind in [(end, kind) for two in ends for end, kind in zip(two, (32, 33), strict=True)]:
        twos.append(fold(((int.from_bytes(end, "little") ^ kind * a & MASK) * b) & MASK))
    return [(key * b & MASK) >> shift for key in keys], [(key * b & MASK) >> shift for key in twos]


def effects() -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(-9999, 9999, BUCKETS).astype(np.int16)


def expected(texts: Iterable[str | None], pairs: bool, pieces: bool = False) -> list[float]:
    values = []
    for text in texts:
        ones, twos = buckets_of(text or "", pairs, pieces)
        values.append(int(effects()[ones + twos].astype(int).sum()) / len(ones) if ones else 0.0)
    return values


@pytest.mark.parametrize(("pairs", "pieces"), [(False, False), (True, False), (True, True)])
def test_units_are_those_of_the_format(pairs: bool, pieces: bool) -> None:
    counted = pairs, pieces
    assert units.score_texts(TextSpans.of(MIXED), effects(), *counted).tolist() == expected(MIXED, *counted)
    buckets, sizes, num_units = units.buckets_of(TextSpans.of(MIXED), BUCKETS, *counted)
    parts = np.split(buckets, np.cumsum(sizes)[:-1])
    for text, part, num in zip(MIXED, parts, num_units, strict=True):
        ones, others = buckets_of(text, *counted)
        assert (part[:num].tolist(), sorted(part[num:].tolist())) == (ones, sorted(others)), text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=4), st.booleans(), st.booleans())
def test_any_text_is_cut_as_the_format_says(texts: list[str], pairs: bool, pieces: bool) -> None:
    found = units.score_texts(TextSpans.of(texts), effects(), pairs, pieces)
    assert found.tolist() == expected(texts, pairs, pieces)


def test_the_hash_is_written_down() -> None:
    # Saved models depend on these numbers: a change of them must raise `UNITS_VERSION`.
    assert [key_of(unit) for unit in (b"the", b"internationalisa")] == [0xFEF0E97C9509C5AD, 0x2C7B6DE3B5323444]


def test_every_form_of_the_same_texts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*MIXED, None] * 40
    plain = units.score_texts(TextSpans.of(texts), effects(), True)
    array = pa.array(texts)
    forms = [
        array, array.cast(pa.large_string()), array.dictionary_encode(), pa.chunked_array([array[:7], array[7:]]),
        pa.array(["before", *texts])[1:], Dataset.from_dict({"text": texts})["text"], tuple(texts),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(units.score_texts(TextSpans.of(form), effects(), True), plain)
    one_by_one = [units.score_texts(TextSpans.of([text]), effects(), True)[0] for text in texts]
    assert np.array_equal(one_by_one, plain)
    monkeypatch.setattr(units, "_SMALL", 0)
    monkeypatch.setattr(units, "_PART", 64)
    with at_most_threads(3):
        assert np.array_equal(units.score_texts(TextSpans.of(array), effects(), True), plain)
    monkeypatch.setattr(units, "_NATIVE", False)  # as on a machine of the other byte order
    assert np.array_equal(units.score_texts(TextSpans.of(array), effects(), True), plain)


def test_spans_take_and_count() -> None:
    spans = TextSpans.of(["ab", None, "äöü", "", "abcde"])
    assert spans.num_bytes.tolist() == [2, 0, 6, 0, 5]
    assert spans.num_targets.tolist() == [1, 0, 2, 0, 2]
    assert spans.take(np.array([4, 0])).num_bytes.tolist() == [5, 2]
    assert spans.take(np.array([True, False, True, False, False])).num_bytes.tolist() == [2, 6]
    with pytest.raises(ValueError, match="once at most"):
        spans.take(np.array([1, 1]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "into a list"),
        ([b"bytes"], "got bytes as text 0"),
        (["a", 3], "got int as text 1"),
        (pa.array([1, 2]), "array of strings, got int64"),
        (5, "sequence of texts"),
        (TokenRows.from_lists([[1, 2]]), "rows of tokens"),
        (Dataset.from_dict({"body": ["a"]}), r"predict_texts\(dataset\[name\]\)"),
    ],
)
def test_what_is_no_text_is_refused(texts: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fitted().predict(texts)


# --- learning ---

WORDS = np.array([f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"])


def planted(num: int, seed: int = 0) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Texts of made-up words, and their values: the mean effect of their words, and of one pair of them."""
    rng = np.random.default_rng(seed)
    worth = np.random.default_rng(7).normal(size=len(WORDS))
    texts, values = [], []
    for length in rng.integers(5, 40, num):
        ids = rng.integers(0, len(WORDS), length)
        texts.append(" ".join(WORDS[ids]))
        values.append(worth[ids].mean())
    return texts, np.array(values)


def fitted(num: int = 400, sign: float = 1.0) -> TextInfluenceModel:
    texts, values = planted(num)
    return TextInfluenceModel.distil(sign * values, texts, num_buckets=BUCKETS)


def test_it_learns_what_words_are_worth_with_their_sign() -> None:
    texts, values = planted(300, seed=1)
    model = fitted(2_500)
    predicted = model.predict_texts(texts)
    assert predicted.dtype == np.float32
    assert spearmanr(predicted, values)[0] > 0.95
    assert model.units == "words"
    assert model.report.spearman == pytest.approx(spearmanr(predicted, values)[0], abs=0.05)
    assert model.report.slope == pytest.approx(1, abs=0.1)
    assert spearmanr(fitted(2_500, sign=-1.0).predict_texts(texts), values)[0] < -0.95
    shuffled = np.random.default_rng(0).permutation(planted(2_500)[1])
    assert abs(TextInfluenceModel.distil(shuffled, planted(2_500)[0], num_buckets=BUCKETS).report.spearman) < 0.15


def test_it_counts_pairs_where_order_matters() -> None:
    rng = np.random.default_rng(0)
    texts, values = [], []
    for _ in range(2_500):
        ids = rng.integers(0, 6, 30)
        texts.append(" ".join(WORDS[ids]))
        values.append(np.mean((ids[:-1] == 1) & (ids[1:] == 4)))
    model = TextInfluenceModel.distil(values, texts, num_buckets=BUCKETS)
    assert model.units == "pairs"
    assert model.report.spearman > 0.8


def test_it_counts_pieces_where_words_are_made_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = ["".join(rng.choice(list("abcdefghijklm"), 5)) for _ in range(60)]
    worth = rng.normal(size=60)
    made = rng.integers(0, 60, (1_500, 8, 2))  # of 3,600 compounds most are rare
    texts = [" ".join(parts[a] + parts[b] for a, b in words) for words in made]
    values = (worth[made[..., 0]] + worth[made[..., 1]]).mean(axis=1)
    model = TextInfluenceModel.distil(values, texts, num_buckets=2**14)
    assert model.units == "pieces"
    assert model.report.spearman > 0.95
    best = parts[int(np.argmax(worth))] + parts[int(np.argsort(-worth)[1])]
    worst = parts[int(np.argmin(worth))] + parts[int(np.argsort(worth)[1])]
    high, low = model.predict_texts([best, worst])
    assert high > low
    model.save_pretrained(tmp_path)
    again = TextInfluenceModel.from_pretrained(tmp_path)
    assert again.units == "pieces"
    assert again.predict_texts(texts).tolist() == model.predict_texts(texts).tolist()


def test_a_weak_penalty_is_fitted_as_well_as_a_choice_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a word and of a hundred make the equations so uneven that a start from nothing does not get there."""
    rng = np.random.default_rng(0)
    chance = 1 / np.arange(1, 5_001)
    effects = rng.normal(size=5_000)
    lengths = np.exp(rng.uniform(0, np.log(100), 1_000)).astype(int)
    rows = [rng.choice(5_000, length, p=chance / chance.sum()) for length in lengths]
    values = np.array([effects[row].mean() for row in rows]) + 0.02 * rng.normal(size=1_000)
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    monkeypatch.setattr(text_model, "choose", lambda *_: ridge_path.Choice(True, ridge_path.PENALTIES[-1], 0.0))
    found = TextInfluenceModel.distil(values, texts, num_buckets=2**14).report.spearman
    monkeypatch.setattr(ridge_path.Design, "solve_by_way", ridge_path.Design.solve)
    assert found > TextInfluenceModel.distil(values, texts, num_buckets=2**14).report.spearman + 0.02


def test_the_same_fit_twice_and_saved_is_the_same(tmp_path: Path) -> None:
    model, again = fitted(), fitted()
    assert model_digest(model) == model_digest(again)
    model.save_pretrained(tmp_path)
    loaded = load_influence_model(tmp_path)
    assert isinstance(loaded, TextInfluenceModel)
    assert np.array_equal(loaded.predict_texts(MIXED), model.predict_texts(MIXED))
    assert (loaded.report, loaded.units, repr(loaded)) == (model.report, model.units, repr(model))
    assert not any(
        word in (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors") for word in (b"bal",)
    )
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "units_version": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="Upgrade mates-hf, or distil"):
        load_influence_model(tmp_path)
    for damage in ({"units": "bytes"}, {"smallest_effect": "x"}, {"num_buckets": 2**10}, {"intercept": float("nan")}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **damage}), encoding="utf-8")
        with pytest.raises(MatesError, match="as it was fitted"):
            load_influence_model(tmp_path)


def test_a_null_has_the_intercept() -> None:
    predicted = fitted().predict_texts([None, "", " ", "bal"])
    assert predicted[0] == predicted[1] == predicted[2] != predicted[3]


@pytest.mark.parametrize(
    ("values", "texts", "error", "message"),
    [
        ([1.0, 2.0], ["a"], ValueError, r"one number a text \(1\), got 2"),
        ([[1.0], [2.0]], ["a", "b"], ValueError, "one number a text"),
        ([1.0, float("nan")], ["a", "b"], ValueError, "1 are not, the first at 1"),
        ([1.0] * 30, ["a"] * 30, MatesError, "all are equal"),
        (range(30), ["a"] * 10 + [""] * 20, ValueError, "at least 20 texts that are not empty, got 10"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    values: list[float], texts: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TextInfluenceModel.distil(values, texts)


@pytest.mark.parametrize("arguments", [{"num_buckets": 3}, {"num_buckets": 2**31}, {"num_buckets": 1.0}, {"seed": -1}])
def test_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TextInfluenceModel(**arguments)


def test_an_unfitted_model_says_how() -> None:
    with pytest.raises(MatesError, match="distil"):
        TextInfluenceModel().predict_texts(["a"])


def test_few_texts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    fitted(60)
    assert "too few to know rare words" in caplog.text


def test_a_large_corpus_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from mates_hf.prediction import text_model

    monkeypatch.setattr(text_model, "MOST_ENTRIES", 5_000)
    assert fitted(400).report.num_labels + fitted(400).report.num_held_out < 200


def test_a_forked_process_scores_after_this_one() -> None:
    model = fitted()
    wanted = model.predict_texts(MIXED)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(model.predict_texts, (MIXED,)), wanted)


# --- in a selector ---


def test_a_selector_scores_texts_without_a_tokenizer(tmp_path: Path) -> None:
    texts, _ = planted(300, seed=2)
    selector = MatesSelector(fitted())
    dataset = Dataset.from_dict({"meta": [{"text": text} for text in texts], "text": texts, "n": range(300)})
    wanted = selector.influence_model.predict_texts(texts)
    scored = selector.score(dataset)
    assert np.array_equal(scored.influence, wanted)
    assert scored.num_targets.tolist() == [-(-len(text) // 4) for text in texts]
    assert np.array_equal(selector.score(dataset, column="meta.text").influence, wanted)
    assert np.array_equal(selector.score(dataset.select([5, 5, 2])).influence, wanted[[5, 5, 2]])
    assert np.array_equal(selector.score(dataset, num_proc=2).influence, wanted)
    mapped = selector.map(dataset)
    assert np.array_equal(np.array(mapped["influence"], np.float32), wanted)
    kept = selector.filter(dataset, ratio=0.2)
    assert len(kept) == 60
    selector.save_pretrained(tmp_path)
    again = MatesSelector.from_pretrained(tmp_path)
    assert again.filter(dataset, ratio=0.2)["n"][:] == kept["n"][:]
    assert again.filter(mapped, ratio=0.2)["n"][:] == kept["n"][:]
    stream: IterableDataset = dataset.to_iterable_dataset()
    assert [row["influence"] for row in again.map(stream)] == pytest.approx(wanted.tolist())
    explained = again.select(dataset, ratio=0.2).explain(0)
    assert "".join(span["text"] for span in explained["spans"]) == texts[0]


def test_a_selector_of_texts_refuses_tokens() -> None:
    selector = MatesSelector(fitted())
    with pytest.raises(ValueError, match="must have a column `text` to score"):
        selector.score(Dataset.from_dict({"input_ids": [[1, 2]]}))
    with pytest.raises(TypeError, match="must hold texts"):
        selector.score(Dataset.from_dict({"input_ids": [[1, 2]]}), column="input_ids")


def test_a_selector_is_distilled(tiny_tokenizer: Any) -> None:
    words = sorted(tiny_tokenizer.get_vocab(), key=tiny_tokenizer.get_vocab().get)[3:]
    texts = [" ".join(row) for row in np.random.default_rng(0).choice(words, (400, 12))]
    selector = MatesSelector(fit_model(), tiny_tokenizer, origin={"step": 7})
    dataset = Dataset.from_dict({"body": texts})
    wanted = selector.score(dataset, column="body").influence
    distilled = selector.distil(texts, num_buckets=BUCKETS)
    assert distilled.influence_model.report.spearman > 0.5
    assert spearmanr(distilled.score(dataset, column="body").influence, wanted)[0] > 0.7
    assert distilled.origin == {"step": 7, "distilled_from": "NgramInfluenceModel"}
    by_column = selector.distil(dataset, column="body", num_buckets=BUCKETS)
    assert model_digest(by_column.influence_model) == model_digest(distilled.influence_model)
    with pytest.raises(ValueError, match="must have a column `text`"):
        selector.distil(dataset)
