"""The rival: a static filter that ranks the pool once by how like the reference a row is, tuned as we would be.

Where it is used: the filter arm of a pilot. A filter costs next to nothing, so selecting while a model trains must
beat it, and not random rows. Three kinds: log-odds of words, which were as strong as any in the lab of long runs;
fastText, as people use it; and a logistic regression on hashed words and pairs (scikit-learn), named for what it is.
Each has three settings, chosen on passages and a seed that are not reported.

Trade-off: three settings are few; a filter that somebody has tuned for months may be better.

Sign: higher is more like the reference.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.prediction.moore_lewis import MooreLewisModel

Scores = npt.NDArray[np.float64]
Scorer = Callable[[Sequence[str]], Scores]

NAMES = {
    "moore-lewis": "log-odds of words (Moore and Lewis)",
    "fasttext": "fastText",
    "linear": "logistic regression on hashed words and pairs",
}
_NEGATIVES = 6_000  # rows of the pool, where a setting names none
SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "moore-lewis": {
        "words and pairs": {"bigrams": True, "lower": False},
        "words and pairs in lower case": {"bigrams": True, "lower": True},
        "words alone": {"bigrams": False, "lower": False},
    },
    "fasttext": {
        "as many negatives as passages, 25 epochs": {"negatives": 0, "lr": 0.5, "epoch": 25, "wordNgrams": 2},
        "6,000 negatives, 5 epochs": {"lr": 0.1, "epoch": 5, "wordNgrams": 2},
        "6,000 negatives, 5 epochs, words alone": {"lr": 0.1, "epoch": 5, "wordNgrams": 1},
    },
    "linear": {
        "words and pairs": {"pairs": True, "C": 10.0},
        "words and pairs, strong penalty": {"pairs": True, "C": 0.3},
        "words alone": {"pairs": False, "C": 10.0},
    },
}
_FASTTEXT = {"dim": 100, "minCount": 1, "bucket": 2**18, "thread": 1}
_WORD, _WORD_IDS = re.compile(r"\w+|[^\w\s]"), 2**18  # of which each word is hashed to one
_PACKAGES = {"fasttext": "fasttext", "linear": "sklearn"}


def require_filter(kind: str) -> None:
    """Refuse a filter whose package is not installed, before anything is read.

    Args:
        kind: A name in `SETTINGS`.

    Raises:
        ImportError: says what to install, and what does without.
    """
    if kind not in _PACKAGES or importlib.util.find_spec(_PACKAGES[kind]) is not None:
        return
    if kind == "fasttext":
        raise ImportError(
            'A pilot against fastText must have it, and it is not installed: `pip install "mates-hf[pilot]"`. Where '
            "it cannot be built, `static_filter=moore-lewis` needs no package."
        )
    raise ImportError(
        'The filter `linear` must have scikit-learn, which is not installed: `pip install "mates-hf[pilot]"`.'
    )


def fit_filter(kind: str, setting: str, positive: Sequence[str], background: Sequence[str], seed: int) -> Scorer:
    """Fit a filter.

    Args:
        kind: A name in `SETTINGS`.
        setting: A name in `SETTINGS[kind]`.
        positive: Texts of the reference.
        background: Texts of the pool in a random order, of which as many are taken as the setting wants.
        seed: Random seed of the fit.

    Returns:
        A function from M texts to (M,) float64 scores, higher is more like the reference.
    """
    given = dict(SETTINGS[kind][setting])
    num = given.pop("negatives", _NEGATIVES) or len(positive)
    fits: Mapping[str, Callable[..., Scorer]] = {
        "moore-lewis": _fit_moore_lewis, "fasttext": _fit_fasttext, "linear": _fit_linear,
    }  # fmt: skip
    return fits[kind]([_line(text) for text in positive], [_line(text) for text in background[:num]], seed, **given)


def _line(text: str) -> str:
    return " ".join(text.split())


def _fit_moore_lewis(positive: list[str], negative: list[str], seed: int, *, bigrams: bool, lower: bool) -> Scorer:
    """Log-odds of words, and of the words after them."""

    def rows(texts: Sequence[str]) -> TokenRows:
        words = [_WORD.findall(text.lower() if lower else text) for text in texts]
        # A first word has nothing before it: every text begins with a word of its own.
        return TokenRows.from_lists([[0, *(1 + zlib.crc32(w.encode()) % _WORD_IDS for w in text)] for text in words])

    model = MooreLewisModel(bigrams=bigrams, seed=seed).fit(rows(positive), rows(negative))
    return lambda texts: np.asarray(model.predict(rows(texts)), np.float64)


def _fit_fasttext(positive: list[str], negative: list[str], seed: int, **given: Any) -> Scorer:
    """Log-odds of a fastText classifier; the positives are repeated until they are as many."""
    repeated = positive * max(1, round(len(negative) / len(positive)))
    lines = [f"__label__yes {text}\n" for text in repeated] + [f"__label__no {text}\n" for text in negative]
    order = np.random.default_rng([seed, 10]).permutation(len(lines))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_text("".join(lines[i] for i in order), encoding="utf-8")
        model = _trained(str(path), seed, {**_FASTTEXT, **given})

    def score(texts: Sequence[str]) -> Scores:
        names, chances = model.predict([_line(text) for text in texts])  # of both labels, the likelier one
        likelier = np.clip(np.array([chance[0] for chance in chances], np.float64), 0.5, 1 - 1e-9)
        sign = np.array([1.0 if name[0] == "__label__yes" else -1.0 for name in names])
        return np.asarray(sign * np.log(likelier / (1 - likelier)))

    return score


def _trained(path: str, seed: int, given: dict[str, Any]) -> Any:
    """A fastText model; where its rate lets it diverge, which it says, half of that is tried, as its manual asks."""
    import fasttext

    rate = given["lr"]
    while True:
        try:
            return fasttext.train_supervised(path, verbose=0, seed=seed, **{**given, "lr": rate})
        except RuntimeError as error:
            if "NaN" not in str(error) or rate < 1e-3:
                raise
            rate /= 2


def _fit_linear(positive: list[str], negative: list[str], seed: int, *, pairs: bool, C: float) -> Scorer:  # noqa: N803
    """Log-odds of a logistic regression; both classes weigh the same."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    hashed = HashingVectorizer(n_features=2**18, ngram_range=(1, 2 if pairs else 1), alternate_sign=False)
    features = hashed.transform([*positive, *negative])
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=300, random_state=seed).fit(features, labels)
    return lambda texts: np.asarray(model.decision_function(hashed.transform([_line(text) for text in texts])))
