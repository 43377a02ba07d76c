# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[report]"]
# [tool.uv.sources]
# mates-hf = { path = ".." }
# ///
"""Does selecting pay? The same model with and without it, on equal tokens, for one seed or several.

    python examples/compare.py            # `make demo`
    python examples/compare.py --seeds 5  # and the interval of the difference
    python examples/compare.py --data my  # my/pool.jsonl, my/reference.jsonl, my/held_out.jsonl

The pool is text that every Python installation carries, and the reference is the language manual. Lines of your own
files have a `text`, pool lines perhaps a `kind`, which is shown and never used to select. The pool must share no text
with the passages (`mates_hf.evaluation.check_contamination`). It took 140 seconds on two cores; a shortened run took
1.3 GB of memory. Of its last lines:

    seed  loss: mates   random  tokens random needs  FLOPs of selecting
       0        4.734    5.173                1.56x                 50%
    Difference in held-out loss, nats/token, below 0 where selecting helps: -0.439 (one seed: no interval)
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from matplotlib.figure import Figure
from scipy import stats
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from mates_hf import MatesCallback, MatesConfig, ReferenceTask, load_round
from mates_hf.data.corpus import builtin_corpus
from mates_hf.reporting.cost import run_cost

BLOCK, VOCAB_SIZE = 128, 2048  # tokens in a row; tokens that there are
MODEL = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
MAX_STEPS, LONGER = 240, 1.75  # steps of the arm that selects; how many times longer the random arm trains
ROUNDS = {"update_steps": 40, "random_rounds": 3, "num_probes": 300}
TRAINING = {
    "per_device_train_batch_size": 16, "learning_rate": 2e-3, "adam_beta2": 0.95, "weight_decay": 0.1,
    "warmup_steps": 20, "lr_scheduler_type": "constant_with_warmup", "per_device_eval_batch_size": 64,
    "eval_strategy": "steps", "eval_steps": 20, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip


def make_tokenizer(pool: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the pool."""
    bpe, texts = ByteLevelBPETokenizer(), (row["text"] for row in pool)
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def cut(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Rows of `BLOCK` tokens: each text is cut by itself, and what is left over is joined."""
    rows, rest = [], []
    for ids in tokenizer(texts)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        whole = len(ids) - len(ids) % BLOCK
        rows += [ids[i : i + BLOCK] for i in range(0, whole, BLOCK)]
        rest += ids[whole:]
    return rows + [rest[i : i + BLOCK] for i in range(0, len(rest) - BLOCK + 1, BLOCK)]


def train(arm: str, seed: int, given: argparse.Namespace, tokenizer: Any, data: dict[str, Any]) -> dict[str, Any]:
    """One arm from the seed's weights: its curve of held-out loss, and what selecting took."""
    output_dir = given.output_dir / f"{arm}-{seed}"
    steps = given.max_steps if arm == "mates" else round(given.longer * given.max_steps)
    set_seed(seed)
    trainer = Trainer(
        LlamaForCausalLM(LlamaConfig(**MODEL)),
        args=TrainingArguments(output_dir=str(output_dir), max_steps=steps, seed=seed, data_seed=seed, **TRAINING),
        train_dataset=data["rows"],
        eval_dataset=data["held_out"],  # rows of one length, so that its loss is a mean over tokens
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if arm == "mates":
        settings = {name: getattr(given, name) for name in ROUNDS}
        MatesCallback(data["reference"], MatesConfig(**settings, selection_seed=seed)).attach(trainer)
    trainer.train()
    trainer.save_state()  # with the run's seconds, which `run_cost` and `mates-hf cost` read
    result = {"arm": arm, "seed": seed, "chosen": {}}
    result["curve"] = [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    if arm == "mates" and trainer.is_world_process_zero():
        rounds = [load_round(path) for path in sorted(output_dir.glob("_mates/round-????"))]
        kinds = np.array(data["rows"]["kind"])
        parts = {"pool": kinds, **{f"round {r.info['number']}": kinds[r.selection] for r in rounds}}
        for kind in np.unique(kinds):
            result["chosen"][str(kind)] = {name: float(np.mean(part == kind)) for name, part in parts.items()}
        result["flops_share"] = run_cost(output_dir).mates.share_of_training_flops
    return result


def steps_to(curve: list[tuple[int, float]], loss: float) -> float:
    """Steps at which a curve first reaches a loss, interpolated; infinite where it does not."""
    for (step, high), (next_step, low) in zip(curve, curve[1:], strict=False):
        if low <= loss:
            return step + (next_step - step) * min(1.0, (high - loss) / max(high - low, 1e-12))
    return float("inf")


def interval(values: list[float]) -> str:
    """Mean over seeds, and its 95 % t interval."""
    mean, num = float(np.mean(values)), len(values)
    if num == 1:
        return f"{mean:+.3f} (one seed: no interval)"
    half = stats.t.ppf(0.975, num - 1) * np.std(values, ddof=1) / num**0.5
    return f"{mean:+.3f} (95% interval {mean - half:+.3f} to {mean + half:+.3f}, {num} seeds)"


def report(results: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print what came out, and write it as JSON and as a picture."""
    ours, theirs, differences = results[::2], results[1::2], []
    print(f"\n{'seed':>4} {'loss: mates':>12} {'random':>8} {'tokens random needs':>20} {'FLOPs of selecting':>19}")
    for a, b in zip(ours, theirs, strict=True):
        loss, other = dict(a["curve"])[given.max_steps], dict(b["curve"])[given.max_steps]
        times = steps_to(b["curve"], loss) / given.max_steps
        a["tokens_random_needs"] = times if np.isfinite(times) else None
        differences.append(loss - other)
        told = f"{times:.2f}x" if np.isfinite(times) else f"over {given.longer:.2f}x"
        print(f"{a['seed']:>4} {loss:>12.3f} {other:>8.3f} {told:>20} {a['flops_share']:>19.0%}")
    print(f"Difference in held-out loss, nats/token, below 0 where selecting helps: {interval(differences)}")
    print(f"\n{'share of':<12}" + "".join(f"{name:>9}" for name in next(iter(ours[0]["chosen"].values()))))
    for kind, parts in ours[0]["chosen"].items():
        print(f"{kind:<12}" + "".join(f"{share:>9.1%}" for share in parts.values()))

    axes = Figure(figsize=(7, 4.5)).subplots()
    for result in results:
        steps, losses = zip(*result["curve"], strict=True)
        label = result["arm"] if result["seed"] == 0 else None
        axes.plot(steps, losses, "C0" if result["arm"] == "mates" else "0.5", label=label)
    axes.set(xlabel="optimizer steps", ylabel="held-out loss (nats/token)")
    axes.legend()
    axes.figure.savefig(given.output_dir / "held_out_loss.png", dpi=150)
    found = {"settings": vars(given), "differences": differences, "results": results}
    (given.output_dir / "results.json").write_text(json.dumps(found, indent=1, default=str))
    print(f"\nresults.json, held_out_loss.png and the rounds (mates-hf round, cost, verify) are in {given.output_dir}")


def main() -> None:
    """Prepare the data once, train both arms of every seed, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="pairs of runs; two and more give an interval")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="of the arm that selects")
    parser.add_argument("--longer", type=float, default=LONGER, help="the random arm trains so many times longer")
    parser.add_argument("--data", type=Path, help="folder of your own files, see above; None: built-in text")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    for name, value in ROUNDS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="as in MatesConfig")
    given = parser.parse_args()
    given.max_steps -= given.max_steps % TRAINING["eval_steps"]  # both arms are compared where both are evaluated
    is_main = TrainingArguments(str(given.output_dir), **TRAINING).process_index == 0  # it sets the processes up

    if given.data:
        files = (given.data / f"{name}.jsonl" for name in ("pool", "reference", "held_out"))
        pool, *passages = ([json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files)
        reference, held_out = ([row["text"] for row in rows] for rows in passages)
    else:
        corpus = builtin_corpus()
        pool, reference, held_out = corpus.pool, corpus.reference, corpus.development
    tokenizer = broadcast_object_list([make_tokenizer(pool) if is_main else None])[0]
    rows, kinds = [], []
    for kind in sorted({row.get("kind", "text") for row in pool}):
        rows += cut([row["text"] for row in pool if row.get("kind", "text") == kind], tokenizer)
        kinds += [kind] * (len(rows) - len(kinds))
    judged, passages = cut(held_out, tokenizer), [{"input_ids": ids} for ids in cut(reference, tokenizer)]
    data = {
        "rows": Dataset.from_dict({"input_ids": rows, "labels": rows, "kind": kinds}).shuffle(seed=0),
        "held_out": Dataset.from_dict({"input_ids": judged, "labels": judged}),
        "reference": ReferenceTask.from_dataset(passages, input_ids_column="input_ids"),
    }
    results = [train(arm, seed, given, tokenizer, data) for seed in range(given.seeds) for arm in ("mates", "random")]
    if is_main:
        report(results, given)


if __name__ == "__main__":
    main()
