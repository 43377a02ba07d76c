"""Which n-grams raise and lower the influence that tables predict.

Where it is used: behind `NgramInfluenceModel.explain`. Trade-off: tables hash bigrams and statistics keep them, so of
the bigrams that share a bucket only the most frequent one is named.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mates_hf.prediction.ngram.additive import MIN_BIGRAM_COUNT
from mates_hf.prediction.ngram.kernels import hash_bigrams
from mates_hf.prediction.ngram.tables import Statistics, Tables


def strongest_ngrams(
    tables: Tables, statistics: Statistics, k: int, tokenizer: Any
) -> dict[str, list[dict[str, Any]]]:
    """The n-grams of largest effect, and of lowest.

    Args:
        tables: in units of `influence_per_token`, > 0 helps.
        statistics: that they were fitted on.
        k: entries in each list.
        tokenizer: decodes ids to text; None leaves `text` out.

    Returns:
        As `NgramInfluenceModel.explain` says.
    """
    vocab_size = len(tables.token)
    token, previous = statistics.token, statistics.previous
    often = np.flatnonzero(statistics.counts >= MIN_BIGRAM_COUNT)
    often = often[np.argsort(-statistics.counts[often], kind="stable")]
    buckets = hash_bigrams(previous[often], token[often], len(tables.bigram))
    first = np.unique(buckets, return_index=True)[1]
    often, buckets = often[first], buckets[first]
    token_counts = np.bincount(token, weights=statistics.counts, minlength=vocab_size)
    previous_counts = np.bincount(previous, weights=statistics.counts, minlength=vocab_size)
    effect = np.concatenate([tables.token, tables.previous, tables.bigram[buckets]])
    count = np.concatenate([token_counts, previous_counts, statistics.counts[often]])

    def entry(i: int) -> dict[str, Any]:
        kind, ids = "token", [i % vocab_size]
        if i >= 2 * vocab_size:
            cell = often[i - 2 * vocab_size]
            kind, ids = "bigram", [int(previous[cell]), int(token[cell])]
        elif i >= vocab_size:
            kind = "previous"
        text = None if tokenizer is None else tokenizer.decode(ids)
        return {"kind": kind, "ids": ids, "text": text, "effect": float(effect[i]), "count": float(count[i])}

    order = np.argsort(-effect, kind="stable")
    return {
        "raises": [entry(int(i)) for i in order[:k] if effect[i] > 0],
        "lowers": [entry(int(i)) for i in order[::-1][:k] if effect[i] < 0],
    }
