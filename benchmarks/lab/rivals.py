"""Static filters that people use instead: one ranking of a corpus, made once, from reference passages and no model.

Place in the flow: `influence_models_contenders.py` and `selection_training.py` rank candidates by them. Trade-off: the
real packages at common settings, not tuned on this corpus; neither is anything else here.

Sign: higher is more like the reference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.data.texts import decode_rows
from mates_hf.prediction.encoder.folding import FoldingEncoder

Values = npt.NDArray[np.float64]
TextScorer = Callable[[Sequence[str]], Values]

FASTTEXT = {"lr": 0.5, "epoch": 25, "dim": 100, "wordNgrams": 2, "minCount": 1, "bucket": 2**18, "thread": 1}


def texts_of(rows: TokenRows, tokenizer: Any) -> list[str]:
    """Rows as texts of one line."""
    return [" ".join(text.split()) for text in decode_rows(rows, tokenizer)]


def pieces_of(rows: TokenRows, length: int) -> TokenRows:
    """Rows, such as reference passages, cut into pieces as long as a candidate."""
    spans = [rows.values[a:b] for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
    return TokenRows.from_lists([span[i : i + length] for span in spans for i in range(0, len(span), length)])


def states_of(encoder: FoldingEncoder, texts: Sequence[str]) -> npt.NDArray[Any]:
    """(N, D) float32 pooled states of texts; nan where there is nothing to read."""
    documents = encoder.read(texts)
    found = np.array([len(ids) > 0 for ids in documents])
    states = np.full((len(texts), encoder.width), np.nan, np.float32)
    states[found] = encoder.states([documents[i] for i in np.flatnonzero(found)], 2_048)
    return states


def dsir(raw: Sequence[str], target: Sequence[str]) -> TextScorer:
    """Log importance weights of hashed word n-grams (`data-selection`), target texts against raw ones."""
    from data_selection import HashedNgramDSIR

    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, texts in (("raw", raw), ("target", target)):
            path = Path(folder) / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            paths[name] = str(path)
        model = HashedNgramDSIR([paths["raw"]], [paths["target"]], cache_dir=folder, num_proc=1)
        model.fit_importance_estimator(num_tokens_to_fit="all")
    return lambda texts: np.array([float(model.importance_estimator(model.featurizer(text))) for text in texts])


def fasttext(positive: Sequence[str], negative: Sequence[str], seed: int) -> TextScorer:
    """Log-odds of a fastText classifier of texts without line breaks."""
    import fasttext

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        lines = [f"__label__yes {text}\n" for text in positive] + [f"__label__no {text}\n" for text in negative]
        order = np.random.default_rng([seed, 10]).permutation(len(lines))
        path.write_text("".join(lines[i] for i in order), encoding="utf-8")
        model: Any = fasttext.train_supervised(str(path), verbose=0, seed=seed, **FASTTEXT)

    def score(texts: Sequence[str]) -> Values:
        found, chances = model.predict(list(texts))  # the likelier label: of both, it gives one chance twice
        likelier = np.clip(np.array([chance[0] for chance in chances], np.float64), 0.5, 1 - 1e-9)
        sign = np.array([1.0 if names[0] == "__label__yes" else -1.0 for names in found])
        return sign * np.log(likelier / (1 - likelier))

    return score


def mean_direction(states: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(D,) mean of (N, D) states of unit length; nan rows are left out."""
    return np.asarray(np.nanmean(states / np.linalg.norm(states, axis=1, keepdims=True), axis=0))


def cosines(states: npt.NDArray[Any], direction: npt.NDArray[Any]) -> Values:
    """(N,) cosines of (N, D) states with a direction; 0 where there is no state."""
    return np.nan_to_num(states @ direction / np.linalg.norm(states, axis=1) / np.linalg.norm(direction))
