from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.corpus import BuiltinCorpus, builtin_corpus, find_overlap

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"manual", "source", "docstring", "licence", "metadata"}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams(texts: list[str], n: int) -> set[tuple[str, ...]]:
    """All word n-grams, by brute force."""
    found = set()
    for text in texts:
        words = words_of(text)
        found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return found


@pytest.fixture(scope="module")
def corpus() -> BuiltinCorpus:
    return builtin_corpus(seed=0)


@given(
    st.lists(st.text("ab c.\n", max_size=25), max_size=6),
    st.lists(st.text("ab c.\n", max_size=25), max_size=6),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_overlap_equals_brute_force(texts_a: list[str], texts_b: list[str], n: int) -> None:
    theirs = ngrams(texts_b, n)
    expected = [i for i, text in enumerate(texts_a) if ngrams([text], n) & theirs]
    found = find_overlap(texts_a, texts_b, n)
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_overlap_ignores_case_and_punctuation_but_not_order() -> None:
    text = "The quick brown fox jumps over the lazy dog while seven wizards watch"
    shouted = text.upper().replace(" ", ",\n  ")
    backwards = " ".join(reversed(text.split()))
    assert find_overlap([backwards, f"Well: {shouted}!"], [text]).tolist() == [1]


def test_overlap_is_never_of_two_texts_glued_together() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    whole, halves = " ".join(words), [" ".join(words[:7]), " ".join(words[7:])]
    assert find_overlap(halves, [whole]).size == 0
    assert find_overlap([whole], halves).size == 0


def test_overlap_needs_a_length() -> None:
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        find_overlap(["a"], ["a"], n=0)


@pytest.mark.slow
def test_parts_share_no_13_gram(corpus: BuiltinCorpus) -> None:
    reference, development = ngrams(corpus.reference, 13), ngrams(corpus.development, 13)
    pool = ngrams([row["text"] for row in corpus.pool], 13)
    assert reference
    assert development
    assert not reference & development
    assert not pool & (reference | development)
    assert [corpus.overlap[k] for k in ("pool/reference", "pool/development", "development/reference")] == [0, 0, 0]


@pytest.mark.slow
def test_reference_is_a_scarce_kind_of_a_mixed_pool(corpus: BuiltinCorpus) -> None:
    characters: Counter[str] = Counter()
    for row in corpus.pool:
        assert set(row) == {"text", "kind"}
        characters[row["kind"]] += len(row["text"])
    total = sum(characters.values())
    assert set(characters) == KINDS
    assert 1_000_000 < total < 6_000_000
    assert 0.03 < characters["manual"] / total < 0.15
    assert characters["source"] + characters["metadata"] > total / 2
    assert len(corpus.reference) >= 50
    assert len(corpus.development) >= 50
    assert "pydoc_data" not in sys.modules


def test_held_out_passages_are_like_the_manual_and_unlike_the_rest(corpus: BuiltinCorpus) -> None:
    """Word frequencies alone must tell it, or the demo has nothing to find: the control is the other way round."""

    def frequencies(texts: list[str]) -> Counter[str]:
        return Counter(word for text in texts for word in words_of(text))

    def cosine(a: Counter[str], b: Counter[str]) -> float:
        dot = sum(a[word] * b[word] for word in a)
        norms = [np.sqrt(sum(count**2 for count in c.values())) for c in (a, b)]
        return float(dot / (norms[0] * norms[1]))

    reference = frequencies(corpus.reference)
    similarity = {
        kind: cosine(reference, frequencies([row["text"] for row in corpus.pool if row["kind"] == kind]))
        for kind in KINDS
    }
    assert max(similarity, key=similarity.__getitem__) == "manual"


def test_passages_have_a_length_to_train_on(corpus: BuiltinCorpus) -> None:
    texts = corpus.reference + corpus.development + [row["text"] for row in corpus.pool]
    lengths = [len(text) for text in texts]
    assert min(lengths) >= 90
    assert max(lengths) <= 1_200
    assert min(len(words_of(text)) for text in texts) >= 13  # or a copy could hide in another part
    assert len(set(texts)) == len(texts)


def test_corpus_is_a_function_of_seed_and_installation(corpus: BuiltinCorpus) -> None:
    code = (
        "import hashlib; from mates_hf.data.corpus import builtin_corpus; "
        "print(hashlib.sha256(repr(builtin_corpus(seed=0)).encode()).hexdigest())"
    )
    # Another process has another string hash seed, so an order that came from a set would differ.
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(repr(corpus).encode()).hexdigest()


@pytest.mark.slow
def test_cap_keeps_held_out_parts(corpus: BuiltinCorpus) -> None:
    capped = builtin_corpus(seed=0, max_rows_per_kind=7)
    assert Counter(row["kind"] for row in capped.pool) == dict.fromkeys(KINDS, 7)
    assert capped.reference == corpus.reference
    assert capped.development == corpus.development
    assert builtin_corpus(seed=1, max_rows_per_kind=7).reference != corpus.reference
    with pytest.raises(ValueError, match="`max_rows_per_kind` must be"):
        builtin_corpus(max_rows_per_kind=0)
