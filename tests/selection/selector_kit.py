"""What the tests of `MatesSelector` share: a fitted model, rows it knows, and models that misbehave."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.rows import TokenRows
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels

VOCAB = 64
GOOD, BAD = 7, 9  # the token that helps and the one that hurts


def make_lists(num: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Rows of 2 to `longest` ids from 3 to 63, some rich in `GOOD`, some in `BAD`."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        ids = rng.integers(3, VOCAB, rng.integers(2, longest + 1))
        ids[rng.random(len(ids)) < rng.random() * 0.5] = GOOD if rng.random() < 0.5 else BAD
        rows.append(ids.tolist())
    return rows


def truth(ids: list[int]) -> float:
    """Planted influence per token: the share of helpful targets minus that of harmful ones."""
    targets = np.array(ids[1:])
    return float((targets == GOOD).mean() - (targets == BAD).mean()) if len(targets) else 0.0


def fit_model(step_size: float = 0.01, seed: int = 0) -> NgramInfluenceModel:
    lists = make_lists(200, seed=seed)
    rows = TokenRows.from_lists(lists)
    derivatives = [np.array([(t == GOOD) - (t == BAD) for t in ids[1:]], np.float32) for ids in lists]
    noisy = np.concatenate(derivatives) + 0.1 * np.random.default_rng(seed).normal(size=sum(map(len, derivatives)))
    owner = np.repeat(np.arange(len(lists)), rows.num_targets)
    per_token = (np.bincount(owner, noisy, minlength=len(lists)) / rows.num_targets).astype(np.float32)
    labels = InfluenceLabels(
        candidate_id=np.arange(len(lists)),
        influence=per_token * np.float32(step_size),
        influence_per_token=per_token,
        loss=np.ones(len(lists), np.float32),
        num_tokens=rows.num_targets,
        probe=np.full(len(lists), "made"),
        step_size=step_size,
        token_derivatives=noisy.astype(np.float32),
    )
    return NgramInfluenceModel(num_buckets=2**10).fit(rows, labels)


class MeanId:
    """An influence model of a user: the mean id of a row. Counts how often it is asked, and can die of it."""

    report = None

    def __init__(self, die_at: int | None = None) -> None:
        self.num_calls = 0
        self.die_at = die_at

    def predict(self, rows: TokenRows) -> np.ndarray:
        self.num_calls += 1
        if self.num_calls == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert isinstance(rows, TokenRows)
        return np.array([rows.row(i)[0].mean() if len(rows.row(i)[0]) else 0.0 for i in range(len(rows))], np.float32)

    def save_pretrained(self, path: Any) -> None:
        (Path(path) / "config.json").write_text('{"kind": "MeanId"}')


class DigestedMeanId(MeanId):
    """A mean of nothing is not finite, as `numpy` has it: no row of the tests is empty."""

    def predict(self, rows: Any) -> np.ndarray:
        self.num_calls += 1
        with np.errstate(all="ignore"):
            means = [np.divide(rows.row(i)[0].sum(), len(rows.row(i)[0])) for i in range(len(rows))]
        return np.array(means, np.float32)

    def digest(self) -> str:
        return "mean"


class CountedMean(MeanId):
    """Reads trained tokens alone, so that a label which is taken away counts; the same in every selector."""

    def predict(self, rows: Any) -> np.ndarray:
        self.num_calls += 1
        counted = np.where(rows.target_mask, rows.values, 0)
        return np.array([part.mean() for part in np.split(counted, rows.offsets[1:-1])], np.float32)

    def digest(self) -> str:
        return "mean"


class NoDigest:
    """A model that cannot say what it depends on."""

    report = None

    def predict(self, rows: Any) -> np.ndarray:
        raise NotImplementedError


class Counted:
    """A tokenizer, and a model, that count what they are asked."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        counted = self
        self.num_texts = self.num_rows = 0

        class Tokenizer(type(tokenizer)):  # type: ignore[misc]
            def __call__(self, texts: list[str], **options: Any) -> Any:
                counted.num_texts += len(texts)
                return super().__call__(texts, **options)

        class Model:
            report = model.report

            def predict(self, rows: Any) -> Any:
                counted.num_rows += len(rows.num_targets)
                return model.predict(rows)

            def digest(self) -> str:
                return "counted"

        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.__class__ = Tokenizer
        self.model = Model()

    def forget(self) -> None:
        self.num_texts = self.num_rows = 0


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of a tokenizer that renders conversations."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
