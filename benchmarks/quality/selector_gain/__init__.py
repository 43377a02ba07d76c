"""Does a selector carry over: to a corpus the run never saw, and to a model that starts from nothing?

About 40 minutes on two cores; needs no data.

1. A demo run: a small Llama and `MatesCallback`, a round each 40 steps, one seed. Its last round that selected is the
   selector.
2. Another corpus, free of every text that shares a 13-gram with the demo's pool, reference or held-out passages:
   installed packages and a second draw of the built-in corpus. A fresh process reads the selector, filters it to a
   fifth of its rows, and saves that.
3. Fresh weights, one seed each, trained on what was kept, packed to rows of one length, in three epochs; against a
   random draw of as many tokens, from the same weights. A third arm draws at random with the kept tokens' shares of
   the kinds of text: what is gained over it, the kinds do not explain. All arms share optimizer, steps, rate (constant
   after a warm-up), epochs and points of evaluation, where the mean of the last weights is judged.

Trade-off: models of a million parameters and minutes of training. The learning rate and the corpora stand in the
table.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.corpus import END, as_dataset, byte_bpe
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import in_its_own_process, versions
from benchmarks.lab.models import llama, trainer_of
from benchmarks.lab.units import run_units
from benchmarks.quality.selector_gain import training
from benchmarks.quality.selector_gain.page import RANDOM, SAME_KINDS, SELECTED, page
from benchmarks.quality.selector_gain.texts import builtin_texts, pack
from benchmarks.quality.selector_gain.training import BATCH_ROWS, BLOCK, EPOCHS, LR, WARM_UP, Tokens, steps_of

__all__ = ["page", "run"]
RATIO, VOCAB = 0.2, 2048
DIGITS = 7

DEMO = {"update_steps": 40, "random_rounds": 4, "num_probes": 400, "candidate_scope": "slice"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run."""

    seeds: int = 5  # fresh models of each arm
    share: float = 1.0  # of the other corpus to read
    demo_steps: int = 330  # of the demo run
    demo: dict[str, Any] = dataclasses.field(default_factory=dict)  # other settings of its rounds


QUICK = Sizes(
    seeds=2, share=0.1, demo_steps=60,
    demo={"update_steps": 20, "random_rounds": 1, "num_probes": 100, "on_weak_signal": "select"},
)  # fmt: skip


# --- stages 1 and 2 ---


def run_demo(work: Path, sizes: Sizes) -> Path:
    """The run that leaves a selector; its folder, where `shape` has tokenizer and config. A finished one is kept."""
    from transformers import PreTrainedTokenizerFast

    from mates_hf import MatesCallback, MatesConfig, ReferenceTask

    folder, texts = work / "demo", json.loads((work / "texts.json").read_text(encoding="utf-8"))
    if (folder / "shape").exists():
        return folder
    pool = [row["text"] for row in texts["demo_pool"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(pool, VOCAB), eos_token=END)
    ids = [np.array(row, np.int64) for row in tokenizer(pool)["input_ids"]]
    rows = as_dataset(pack(ids, np.random.default_rng(0).permutation(len(ids)), tokenizer.eos_token_id, BLOCK))
    passages = [{"text": text} for text in texts["reference"]]
    reference = ReferenceTask.from_dataset(passages, tokenizer, text_column="text", max_length=BLOCK)
    model = llama(len(tokenizer), layers=3, length=BLOCK)
    callback = MatesCallback(reference, MatesConfig(**{**DEMO, **sizes.demo}))
    trainer_of(
        model, rows, folder, sizes.demo_steps, BATCH_ROWS, [callback], tokenizer=tokenizer, learning_rate=LR,
        adam_beta2=0.95, weight_decay=0.1, warmup_steps=WARM_UP, lr_scheduler_type="constant_with_warmup",
    ).train()  # fmt: skip
    tokenizer.save_pretrained(folder / "shape")
    model.config.save_pretrained(folder / "shape")
    return folder


def last_selector(demo: Path) -> Path:
    """The round folder of the last round that selected by a model of its own."""
    from mates_hf import load_round

    for folder in sorted((demo / "_mates").glob("round-????"), reverse=True):
        if load_round(folder).info["guard"]["decision"] == "select":
            return folder
    raise SystemExit("No round of the demo run selected, so there is no selector to try.")


def write_texts(work: Path, share: float) -> None:
    """Read all texts and keep them under `work`: the other corpus as a dataset."""
    from datasets import Dataset

    if (work / "texts.json").exists():
        return
    texts = builtin_texts(share)
    other = [{**row, "row": i} for i, row in enumerate(texts.other)]
    Dataset.from_list(other).save_to_disk(str(work / "corpus"))
    about = {name: value for name, value in vars(texts).items() if name != "other"}
    (work / "texts.json").write_text(json.dumps(about), encoding="utf-8")


def filter_to(selector: str, corpus: str, kept: str) -> None:
    """Filter, in a process that knows the round's folder and the corpus alone."""
    from datasets import load_from_disk

    from mates_hf import MatesSelector

    MatesSelector.from_pretrained(selector).filter(load_from_disk(corpus), ratio=RATIO).save_to_disk(kept)


def collected(
    bench: Bench, sizes: Sizes, selector: Path, tokens: Tokens, units: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON document of what is done so far."""
    from mates_hf import load_round

    lengths = tokens.lengths
    info = load_round(selector).info
    every = np.bincount(tokens.kind, lengths)
    kept = np.bincount(tokens.kind, lengths * tokens.kept)
    shares = zip(tokens.kinds, every / every.sum(), kept / kept.sum(), strict=True)
    kinds = {name: {"corpus": float(a), "kept": float(b)} for name, a, b in shares}
    about = json.loads((bench.work / "texts.json").read_text(encoding="utf-8"))
    return {
        "settings": {
            "quick": bench.quick, "corpus": "built-in", "demo_pool": "built-in", "reference": "language manual",
            "ratio": RATIO, "learning_rate": LR, "batch_rows": BATCH_ROWS, "block": BLOCK, "warm_up": WARM_UP,
            "window": training.WINDOW,
            "steps": EPOCHS * steps_of(tokens), "epochs": EPOCHS, "demo_steps": sizes.demo_steps, "seeds": sizes.seeds,
            "held_out_passages": len(about["held_out"]), "own_passages": len(about["own"]),
            "dropped": about["dropped"], "corpus_rows": len(tokens.ids), "corpus_tokens": int(lengths.sum()),
            "kept_rows": int(tokens.kept.sum()), "kept_tokens": int(lengths[tokens.kept].sum()),
            **versions("torch", "transformers"),
        },
        "selector": {"number": info["number"], "step": info["step"], **info["guard"]},
        "kinds": kinds,
        "units": units,
    }  # fmt: skip


def run(bench: Bench) -> dict[str, Any]:
    """Run what is missing; the JSON document of what is done so far."""
    from transformers import AutoTokenizer

    sizes, work = QUICK if bench.quick else Sizes(), bench.work
    work.mkdir(parents=True, exist_ok=True)
    write_texts(work, sizes.share)
    demo = run_demo(work, sizes)
    selector, checkpoint = last_selector(demo), demo / "shape"
    kept = work / "kept"
    if not (kept / "state.json").exists():
        in_its_own_process(filter_to, *map(str, (selector, work / "corpus", kept)))
    tokens = training.read_tokens(work, kept, AutoTokenizer.from_pretrained(checkpoint))
    counts = Counter(np.array(tokens.kinds)[tokens.kind[tokens.kept]].tolist())
    say(f"Kept {tokens.kept.sum()} of {len(tokens.ids)} rows ({counts}); {EPOCHS} x {steps_of(tokens)} steps")
    arms = [(arm, seed) for seed in range(sizes.seeds) for arm in (SELECTED, RANDOM)]
    arms += [(SAME_KINDS, seed) for seed in range(sizes.seeds)]
    units = {f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}": (arm, seed) for arm, seed in arms}
    found = run_units(bench, training.train, {name: (work, kept, checkpoint, *unit) for name, unit in units.items()})
    return collected(bench, sizes, selector, tokens, [found[name] for name in sorted(found)])
