"""Stage 3 of `selector_gain`: the rows of each arm, and one fresh model trained on them.

Trade-off: a unit reads and tokenises the corpus
again, so that it needs nothing but folders, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab.corpus import as_rows
from benchmarks.lab.models import build_optimizer, train_steps
from benchmarks.quality.selector_gain.page import SAME_KINDS, SELECTED
from benchmarks.quality.selector_gain.texts import pack

LR, BATCH_ROWS, WARM_UP, BLOCK = 2e-3, 16, 20, 128
EVERY, WINDOW = 30, 10  # steps between two evaluations, and of weights that one averages
EPOCHS = 3  # over one fifth of the corpus: in one, a model of this size is still on its way out of the first plateau
MOST_OWN_ROWS = 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The other corpus as tokens."""

    ids: list[npt.NDArray[np.int64]]  # token ids of each of the N rows
    kind: npt.NDArray[np.int64]  # (N,) number of its kind, into `kinds`
    kinds: list[str]  # names
    kept: npt.NDArray[np.bool_]  # (N,) bool, True where the selector kept the row
    end: int  # the token that ends a row

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each row with the one that ends it."""
        return np.array([len(row) + 1 for row in self.ids])

    def blocks(self, arm: str, seed: int, num_epochs: int) -> npt.NDArray[np.int64]:
        """(B, BLOCK) the rows of one training, in order: as many in every arm, each epoch shuffled."""
        order = np.random.default_rng(seed).permutation(len(self.ids))
        if arm == SELECTED:
            order = order[self.kept[order]]
        elif arm == SAME_KINDS:
            # Of each kind as many tokens as were kept of it, from all its rows; then all in a common order.
            place = np.empty(len(order), np.int64)
            place[order] = np.arange(len(order))
            drawn = []
            for k in range(len(self.kinds)):
                rows = order[self.kind[order] == k]
                total = np.cumsum(self.lengths[rows])
                drawn.append(rows[: np.searchsorted(total, self.lengths[self.kept & (self.kind == k)].sum()) + 1])
            order = np.concatenate(drawn)
            order = order[np.argsort(np.random.default_rng(seed).permutation(len(place))[order])]
        blocks = pack(self.ids, order, self.end, BLOCK)[: steps_of(self) * BATCH_ROWS]
        rng = np.random.default_rng([seed, 1])
        return np.concatenate([blocks, *(rng.permutation(blocks) for _ in range(num_epochs - 1))])


def read_tokens(work: Path, kept: Path, tokenizer: Any) -> Tokens:
    """Tokenise the other corpus and mark what was kept."""
    from datasets import load_from_disk

    corpus = load_from_disk(str(work / "corpus"))
    is_kept = np.zeros(len(corpus), bool)
    is_kept[load_from_disk(str(kept))["row"]] = True
    kinds = sorted(set(corpus["kind"]))
    ids = [np.array(row, np.int64) for row in tokenizer(list(corpus["text"]), add_special_tokens=False)["input_ids"]]
    kind = np.array([kinds.index(name) for name in corpus["kind"]])
    return Tokens(ids=ids, kind=kind, kinds=kinds, kept=is_kept, end=tokenizer.eos_token_id)


def steps_of(tokens: Tokens) -> int:
    """Steps of one epoch: the selected arm sees each of its tokens once."""
    return int(tokens.lengths[tokens.kept].sum()) // BLOCK // BATCH_ROWS


def own_rows(work: Path, tokenizer: Any) -> Any:
    """Held-out rows of the other corpus itself."""
    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))["own"]
    ids = [np.array(row, np.int64) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    blocks = pack(ids, np.arange(len(ids)), tokenizer.eos_token_id, BLOCK)
    return as_rows(blocks[np.random.default_rng(0).permutation(len(blocks))[:MOST_OWN_ROWS]], BLOCK)


def train(work: Path, kept: Path, checkpoint: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one fresh model on what an arm has; the seed decides weights, draw and order. Its curve."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mates_hf import ReferenceTask
    from mates_hf.engine.averaging import WeightAverage
    from mates_hf.influence.passes import mean_loss

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = read_tokens(work, kept, tokenizer)
    blocks = tokens.blocks(arm, seed, EPOCHS)
    num_steps = len(blocks) // BATCH_ROWS
    passages = json.loads((work / "texts.json").read_text(encoding="utf-8"))["held_out"]
    columns = {"text_column": "text", "max_length": BLOCK, "name": "held-out"}
    held_out = ReferenceTask.from_dataset([{"text": text} for text in passages], tokenizer, **columns)
    own = own_rows(work, tokenizer)

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)).train()
    points = [*range(EVERY, num_steps - WINDOW + 1, EVERY), num_steps]
    curve: list[dict[str, float]] = []
    average = WeightAverage(model)

    def on_step(step: int) -> None:
        nonlocal average
        following = next(point for point in points if point >= step)
        if step > following - WINDOW:
            average.update()
        if step != following:
            return
        with average.swapped_in():
            model.eval()
            entry = {"step": step, "held_out": mean_loss(model, held_out.rows)}
            if step == num_steps:
                entry["own"] = mean_loss(model, own)
            model.train()
        curve.append(entry)
        average = WeightAverage(model)

    optimizer = build_optimizer(model, lr=LR)
    rows, order = as_rows(blocks, BLOCK), np.arange(num_steps * BATCH_ROWS)
    train_steps(model, optimizer, rows, order, batch_rows=BATCH_ROWS, warm_up=WARM_UP, on_step=on_step)
    return {"arm": arm, "seed": seed, "num_steps": num_steps, "curve": curve}
