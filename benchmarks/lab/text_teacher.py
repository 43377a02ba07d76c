"""What text models are distilled from: an n-gram selector for texts, fitted to labels of a small model.

A model of a million parameters takes some random steps on the texts, a probe labels rows of them by passages of
LAMBADA, and an n-gram model is fitted to the labels. Trade-off: one small model's labels, of a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lab.corpus import as_rows, as_tasks, byte_bpe, cut_rows, lambada
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.selection.selector import MatesSelector

CHARACTERS = 1_500  # read of a document
ROW_TOKENS, BATCH_ROWS = 128, 16
NUM_REFERENCE = 256  # passages of the first half of LAMBADA's


def text_teacher(texts: Sequence[str], data: Path, quick: bool) -> MatesSelector:
    """The selector that is distilled.

    `texts` are those of a corpus, cut to `CHARACTERS`; `data` has the passages.
    """
    from transformers import PreTrainedTokenizerFast

    from benchmarks.lab.models import build_model, build_optimizer, train_steps

    vocab, steps, labelled = (2_048, 20, 200) if quick else (8_192, 300, 1_000)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(texts[:10_000], vocab))
    rows = as_rows(cut_rows(texts[:30_000], tokenizer, ROW_TOKENS, 2)[0], ROW_TOKENS)
    passages = lambada(data / "eval" / "lambada")[0][:NUM_REFERENCE]
    model = build_model(len(tokenizer), seed=0)
    optimizer = build_optimizer(model)
    order = np.random.default_rng(0).permutation(len(rows))
    train_steps(model, optimizer, rows, order[: steps * BATCH_ROWS], batch_rows=BATCH_ROWS, warm_up=min(20, steps))
    candidates = rows.take(np.sort(order[steps * BATCH_ROWS :][:labelled]))
    probe = DirectionalProbe(tokens_per_batch=1_024)
    labels = probe.measure(model, optimizer, as_tasks(passages, tokenizer, "reference")["all"], candidates)
    return MatesSelector(NgramInfluenceModel().fit(candidates, labels), tokenizer)
