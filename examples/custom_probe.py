# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# [tool.uv.sources]
# mates-hf = { path = ".." }
# ///
"""A probe of one's own in the Trainer: what a copy of the model, taught the reference for a moment, finds easier.

A probe is any object with the two methods of `mates_hf.influence.probe.Probe`. This one copies the live model, takes a
few steps on reference passages with the copy, and calls a candidate's influence how much its loss fell: text like the
reference gets easier. It needs one more copy of the model in memory, and it knows nothing of the optimizer.

    python examples/custom_probe.py

Half a minute of one CPU core and 1.1 GB of memory. Its last lines:

    round-0001: select, held-out Spearman 0.98, 640 rows
    round-0002: select, held-out Spearman 0.79, 640 rows
    round-0003: keep_previous, held-out Spearman 0.84, 480 rows
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from mates_hf import MatesCallback, MatesConfig, ReferenceTask, load_round
from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.pool import read_candidates
from mates_hf.influence.passes import token_losses
from mates_hf.influence.probe import RunSettings
from mates_hf.records import InfluenceLabels

BLOCK, VOCAB = 64, 2048


@dataclass(frozen=True)
class TaughtCopy:
    """Influence of a candidate: its loss under the live model minus that under a copy taught the reference."""

    num_steps: int = 4
    learning_rate: float = 0.05
    seed: int = 0

    def measure(self, model: Any, optimizer: Any, reference: Any, candidates: Any) -> InfluenceLabels:
        """Labels in nats/token, > 0 helps. The live model, its gradients and random streams stay as they are."""
        ids, rows = read_candidates(candidates)
        taught = copy.deepcopy(model).eval()
        steps = torch.optim.SGD(taught.parameters(), lr=self.learning_rate)
        for part in np.array_split(np.random.default_rng(self.seed).permutation(len(reference)), self.num_steps):
            passages = torch.tensor(np.stack([reference.rows.row(i)[0] for i in part]), device=model.device).long()
            steps.zero_grad()
            taught(input_ids=passages, labels=passages).loss.backward()
            steps.step()
        was_training = model.training
        model.eval()
        before, after = (token_losses(each, rows) for each in (model, taught))
        model.train(was_training)
        starts = np.cumsum(rows.num_targets) - rows.num_targets  # every row has targets here
        loss, easier = (np.add.reduceat(each, starts) / rows.num_targets for each in (before, before - after))
        return InfluenceLabels(
            candidate_id=ids,
            influence=easier.astype(np.float32),
            influence_per_token=easier.astype(np.float32),
            loss=loss.astype(np.float32),
            num_tokens=rows.num_targets.astype(np.int32),
            probe=np.full(len(ids), "taught_copy"),
        )

    def for_run(self, settings: RunSettings) -> TaughtCopy:
        """The probe with the round's seed."""
        return replace(self, seed=settings.seed)


def cut(texts: list[str], tokenizer: ByteLevelBPETokenizer) -> Dataset:
    """Rows of `BLOCK` tokens; what is left over at the end of a text is left out."""
    ids = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    rows = [each[i : i + BLOCK] for each in ids for i in range(0, len(each) - BLOCK + 1, BLOCK)]
    return Dataset.from_dict({"input_ids": rows})


def main(output_dir: str = "runs/custom_probe", max_steps: int = 160, update_steps: int = 40) -> None:
    """Train a small model with rounds by this probe, and say how well each round's labels were predicted."""
    corpus = builtin_corpus()
    texts = [row["text"] for row in corpus.pool]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    pool = cut(texts, tokenizer).map(lambda row: {"labels": row["input_ids"]})
    reference = ReferenceTask.from_dataset(cut(corpus.reference, tokenizer), input_ids_column="input_ids", limit=128)
    config = MatesConfig(update_steps=update_steps, num_probes=10 * update_steps)
    settings = {"per_device_train_batch_size": 16, "learning_rate": 2e-3, "save_strategy": "no"}
    args = TrainingArguments(output_dir, max_steps=max_steps, report_to="none", disable_tqdm=True, **settings)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))
    trainer = Trainer(model=model, args=args, train_dataset=pool, data_collator=default_data_collator)
    MatesCallback(reference, config, probe=TaughtCopy()).attach(trainer)
    trainer.train()
    if not trainer.is_world_process_zero():
        return  # under `accelerate launch` one process speaks
    for path in sorted(Path(output_dir, "_mates").glob("round-????")):
        info = load_round(path).info
        spearman = info["guard"]["spearman"]
        print(f"{path.name}: {info['guard']['decision']}, held-out Spearman {spearman:.2f}, {info['num_rows']} rows")


if __name__ == "__main__":
    main()
