"""Shared n-grams on both sides, against brute force, whatever the batches and however many indexes."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data import overlap
from mates_hf.data.overlap import NGRAM_WORDS, NgramIndex, find_overlap, find_overlaps, hash_ngrams
from mates_hf.data.words import WORD, weight_of, words_of

TEXTS = st.lists(st.text("ab c.\n", max_size=25), max_size=8)
MIXED_TEXTS = st.lists(st.text("ab 中かก้.", max_size=25), max_size=8)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All word n-grams of a text, by brute force."""
    words = words_of(text)
    if text.isascii():
        assert words == re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    found = set()
    for i in range(len(words)):  # as many words and letters as weigh enough
        ends = [j for j in range(i, len(words)) if sum(map(weight_of, words[i : j + 1])) >= n * WORD]
        found |= {tuple(words[i : ends[0] + 1])} if ends else set()
    return found


def sharing(texts: list[str], others: list[str], n: int) -> list[int]:
    """Positions in `texts` of those that share an n-gram with one of the others, by brute force."""
    theirs = set().union(*(ngrams(other, n) for other in others))
    return [i for i, text in enumerate(texts) if ngrams(text, n) & theirs]


def random_texts(num: int, num_words: int, seed: int) -> list[str]:
    """Texts of a vocabulary so large that they share no 13-gram."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in row) for row in rng.integers(5_000, size=(num, num_words))]


@given(*[TEXTS | MIXED_TEXTS] * 3, st.integers(1, 4), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_both_sides_equal_brute_force_whatever_the_batch(texts, first, second, n, batch_characters) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_BATCH_CHARACTERS", batch_characters)
        found = find_overlaps(iter(texts), [NgramIndex(iter(first), n), NgramIndex(iter(second), n)])
    for side, indexed in zip(found, (first, second), strict=True):
        assert side.positions.dtype == side.indexed_positions.dtype == np.int64
        assert side.positions.tolist() == sharing(texts, indexed, n)
        assert side.indexed_positions.tolist() == sharing(indexed, texts, n)
        assert side.num_texts == len(texts)
        assert side.short_positions.tolist() == [i for i, text in enumerate(texts) if not ngrams(text, n)]
        assert side.num_short == len(side.short_positions)
    assert find_overlap(texts, first, n).tolist() == found[0].positions.tolist()


def test_an_index_is_of_one_side_and_can_be_asked_again() -> None:
    indexed, texts = random_texts(20, 40, seed=0), random_texts(30, 40, seed=1)
    planted = indexed[7].split()[5 : 5 + NGRAM_WORDS]
    texts[11] += " " + " ".join(planted)
    texts[12] += " " + " ".join(planted[:-1])  # one word too few
    texts[13] += " " + " ".join(reversed(planted))
    index = NgramIndex([*indexed, "too short"])
    assert (index.num_texts, index.num_short) == (21, 1)
    for _ in range(2):
        assert index.shared(texts).tolist() == [11]
    assert find_overlaps(texts, [index])[0].indexed_positions.tolist() == [7]
    assert index.shared(texts[:11]).size == 0


def test_a_find_gives_the_numbers_that_owners_takes() -> None:
    index = NgramIndex(["a b c", "b c d", "x y"], n=2)
    hashes, owners = hash_ngrams(["c d", "b c", "q r", "y x"], 2)
    where, which = index.find(hashes)
    assert owners[where].tolist() == [0, 1]
    assert index.owners_of(which[:1]).tolist() == [1]
    assert index.owners_of(which[1:]).tolist() == [0, 1]
    assert index.owners_of(which[:0]).size == 0
    largest = hash_ngrams(["a b c", "b c d", "x y"], 2)[0].max()
    where, _ = index.find(np.array([largest + np.uint64(1), largest]))  # the first would stand behind the last
    assert where.tolist() == [1]


def test_the_texts_looked_up_are_never_all_in_memory() -> None:
    """A stream ten times as long takes about the memory of a batch: held whole, it would take ten times as much."""

    def stream(num: int) -> Iterator[str]:
        for i in range(100, 100 + num):
            yield " ".join(f"word{j}of{i}" for j in range(2_000))

    index = NgramIndex(random_texts(10, 40, seed=0))
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_BATCH_CHARACTERS", 50_000)
        for num in (6, 60):
            tracemalloc.start()
            assert index.shared(stream(num)).size == 0
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="`n` must be at least 1 word, got 0"):
        NgramIndex(["a"], n=0)
    with pytest.raises(ValueError, match=r"of one length, got the lengths \[2, 3\]"):
        find_overlaps(["a"], [NgramIndex(["a"], 2), NgramIndex(["a"], 3)])
    with pytest.raises(ValueError, match="one at least"):
        find_overlaps(["a"], [])
