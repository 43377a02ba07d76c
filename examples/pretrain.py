# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval,report]"]
# ///
"""Pretrain a causal language model with MATES and with the Trainer's own order, on equal tokens, and compare.

With no arguments it is the demo: a small Llama-type model, the corpus every Python installation carries, the language
manual as reference. With arguments it is the real thing:

    python examples/pretrain.py
    python examples/pretrain.py --seeds 5
    python examples/pretrain.py --dataset json --data_files corpus.jsonl.gz --text_column text --group_column domain \
        --reference passages.jsonl --held_out other_passages.jsonl --max_steps 800 --update_steps 100
    accelerate launch examples/pretrain.py --model_config EleutherAI/pythia-410m --dataset allenai/c4 \
        --dataset_config en --reference lambada_openai --arms mates --block_size 1024 --max_steps 50000 \
        --update_steps 10000 --output_dir runs/pythia-410m --eval_tasks mates_zero_shot --eval_every 5000

Every `TrainingArguments` and `MatesConfig` field is an argument too. Pool documents that share a 13-gram with a
reference passage, a held-out one or an item of `--eval_tasks` are counted and dropped. In several processes the main
one reads, filters, tokenises, prints and writes; the others take what it made (`--ddp_timeout` must cover that).
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from mates_hf import MatesCallback, MatesConfig, ReferenceTask, load_round
from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.scored_column import tokenizer_digest
from mates_hf.evaluation import LmEvalCallback, check_contamination
from mates_hf.influence.passes import mean_loss
from mates_hf.reporting.cost import run_cost

DEMO = """--output_dir runs/demo --max_steps 330 --update_steps 40 --random_rounds 4 --num_probes 400
 --candidate_scope slice --per_device_train_batch_size 16 --learning_rate 2e-3 --adam_beta2 0.95 --weight_decay 0.1
 --warmup_steps 20 --lr_scheduler_type constant_with_warmup --logging_strategy no --save_strategy no --report_to none
 --block_size 128 --vocab_size 2048 --hidden_size 128 --num_layers 3 --evaluate_steps 15 --extend_random 2.0
 --disable_tqdm true --log_level error --dataloader_pin_memory false""".split()


def option(default: Any, text: str) -> Any:
    """A field of a command line."""
    return field(default=default, metadata={"help": text})


@dataclass
class ExampleArguments:
    """What this script adds to the arguments of the Trainer and of MATES."""

    dataset: str | None = option(None, "Hub dataset, or `json`, `parquet`, `arrow`, `text`.")
    dataset_config: str | None = option(None, "Configuration of the Hub dataset.")
    data_files: list[str] | None = option(None, "Local files of the pool.")
    split: str = option("train", "Split that is the pool.")
    text_column: str = option("text", "Column of the text.")
    group_column: str | None = option(None, "Column shown in the report; never used to select.")
    reference: str | None = option(None, "What the model should get better at: an lm-eval task, or a JSONL file.")
    held_out: str | None = option(None, "JSONL file to evaluate on. None: half of the reference is held out.")
    reference_limit: int | None = option(None, "Passages read from the reference.")
    loss_on: str = option("all", "`all` tokens of a passage or its `completion`.")
    model_config: str | None = option(None, "Config of the model to pretrain (Hub id, path).")
    tokenizer: str | None = option(None, "None: the model's, or one trained on the pool.")
    vocab_size: int = option(4096, "Of a tokenizer trained on the pool.")
    hidden_size: int = option(128, "Of the small model that stands in for --model_config.")
    num_layers: int = option(4, "Of the small model that stands in for --model_config.")
    block_size: int = option(128, "Tokens in a row.")
    num_proc: int | None = option(None, "Processes that tokenise.")
    arms: str = option("mates,random", "Which runs to make, in order: mates, random.")
    seeds: int = option(1, "Paired runs, each of its own model and selection seed; 2 and more: an interval.")
    evaluate_steps: int = option(50, "Optimizer steps between two held-out evaluations.")
    extend_random: float = option(1.0, "Train the random arm this many times longer, to see when it catches up.")
    eval_tasks: list[str] | None = option(None, "lm-eval tasks to evaluate while training: `mates_zero_shot`, others.")
    eval_every: int | None = option(None, "Optimizer steps between two of these. None: at each round and at the end.")
    eval_data_dir: str | None = option(None, "Folder of the files of `mates_zero_shot_local`.")
    eval_limit: int | None = option(None, "First documents of each task only.")
    eval_truncate: bool = option(False, "Cut items longer than the model's context from the left, as lm-eval does.")


# --- data ---


def from_main(make: Callable[[], Any]) -> Any:
    """What the main process makes, in every process."""
    return broadcast_object_list([make() if PartialState().is_main_process else None])[0]


def read_documents(
    arguments: ExampleArguments, training: TrainingArguments
) -> tuple[Dataset, list[dict[str, str]], list[dict[str, str]]]:
    """The pool's documents (text, group), reference passages and held-out passages."""
    if arguments.dataset is None:
        corpus = builtin_corpus()
        show(f"Built-in corpus: {len(corpus.pool)} passages")
        pool = Dataset.from_list([{"text": row["text"], "group": row["kind"]} for row in corpus.pool])
        pool = drop_shared(pool, corpus.reference, corpus.development)
        return pool, [{"text": text} for text in corpus.reference], [{"text": text} for text in corpus.development]
    with training.main_process_first(desc="reading the pool"):
        pool = load_dataset(
            arguments.dataset, arguments.dataset_config, data_files=arguments.data_files, split=arguments.split
        )
    columns = {arguments.text_column: "text"}
    if arguments.group_column:
        columns[arguments.group_column] = "group"
    pool = pool.select_columns(list(columns)).rename_columns({a: b for a, b in columns.items() if a != b})
    if arguments.reference is None or not Path(arguments.reference).exists():
        return pool, [], []
    passages = read_jsonl(arguments.reference)[: arguments.reference_limit]
    if arguments.held_out:
        held_out = read_jsonl(arguments.held_out)
    else:
        passages, held_out = passages[::2], passages[1::2]
    pool = drop_shared(pool, [text_of(row) for row in passages], [text_of(row) for row in held_out])
    return pool, passages, held_out


def read_jsonl(path: str) -> list[dict[str, str]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def drop_shared(
    pool: Dataset, reference: Any, held_out: Any, evaluated: dict[str, Any] | None = None, tokenizer: Any = None
) -> Dataset:
    """The pool without documents that share a 13-gram with reference, held-out passages or evaluated items."""

    def look() -> np.ndarray:
        sides = {"held-out": held_out, **(evaluated or {})}
        found = check_contamination(pool=pool, reference=reference, evaluation=sides, tokenizer=tokenizer)
        show("\n".join(found.lines()))
        return found.kept("pool")

    kept = from_main(look)
    show(f"{len(pool) - len(kept):,} of {len(pool):,} pool documents dropped")
    return pool if len(kept) == len(pool) else pool.select(kept)


def text_of(passage: dict[str, str]) -> str:
    """A passage's text, also where it is given as context and target."""
    return passage["text"] if "text" in passage else f"{passage['context']} {passage['target']}"


def get_tokenizer(arguments: ExampleArguments, texts: Iterable[str]) -> Any:
    """The tokenizer asked for, or a byte-level BPE trained on the pool."""
    name = arguments.tokenizer or arguments.model_config
    if name:
        return AutoTokenizer.from_pretrained(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def make_rows(pool: Dataset, tokenizer: Any, block_size: int, num_proc: int | None = None) -> Dataset:
    """Rows of exactly `block_size` tokens: each document cut on its own, what is left over packed within its group."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[list[int]] = []
        row_groups: list[str] = []
        left_over: dict[str, list[int]] = {}
        groups = batch.get("group", [""] * len(batch["text"]))
        for ids, group in zip(tokenizer(batch["text"])["input_ids"], groups, strict=True):
            ids = [*ids, tokenizer.eos_token_id]
            whole = len(ids) - len(ids) % block_size
            rest = left_over.setdefault(group, [])
            rest.extend(ids[whole:])
            pieces = [ids[i : i + block_size] for i in range(0, whole, block_size)]
            if len(rest) >= block_size:
                pieces.append(rest[:block_size])
                del rest[:block_size]
            rows.extend(pieces)
            row_groups.extend([group] * len(pieces))
        return {"input_ids": rows, "labels": rows, "group": row_groups}

    # All processes find what the first one made: how a tokenizer is pickled differs between them.
    key = Hasher.hash([pool._fingerprint, tokenizer_digest(tokenizer), block_size, num_proc])
    options = {"batch_size": 2_000, "num_proc": num_proc, "new_fingerprint": key, "desc": "Tokenizing"}
    return pool.map(cut, batched=True, remove_columns=pool.column_names, **options)


def make_reference(
    arguments: ExampleArguments, tokenizer: Any, passages: list[dict[str, str]], held_out: list[dict[str, str]]
) -> tuple[ReferenceTask, ReferenceTask]:
    """Reference task and, disjoint from it, the held-out task that both arms are judged by."""
    if not passages:
        task = ReferenceTask.from_lm_eval(
            arguments.reference, tokenizer, limit=arguments.reference_limit, loss_on=arguments.loss_on
        )
        return task.split(0.5, seed=0)
    columns: dict[str, Any] = {"text_column": "text"}
    if "context" in passages[0] and "target" in passages[0]:
        columns = {"prompt_column": "context", "completion_column": "target", "loss_on": arguments.loss_on}
    names = [name for name in columns.values() if name in passages[0]]

    def build(rows: list[dict[str, str]], name: str) -> ReferenceTask:
        data = Dataset.from_list([{column: row[column] for column in names} for row in rows])
        return ReferenceTask.from_dataset(data, tokenizer, max_length=arguments.block_size, name=name, **columns)

    return build(passages, "reference"), build(held_out, "held-out")


def make_evaluation(arguments: ExampleArguments, tokenizer: Any, batch_size: int) -> LmEvalCallback | None:
    """What evaluates the model while it trains, the same for every run; None where it was not asked for."""
    if arguments.eval_tasks is None:
        return None
    return LmEvalCallback(
        arguments.eval_tasks,
        tokenizer,
        every_steps=arguments.eval_every,
        limit=arguments.eval_limit,
        batch_size=batch_size,
        metadata={"data_dir": arguments.eval_data_dir} if arguments.eval_data_dir else None,
        truncate=arguments.eval_truncate,
    )


# --- model and runs ---


def make_model(arguments: ExampleArguments, vocab_size: int, seed: int) -> torch.nn.Module:
    """A fresh model, the same for every arm of a seed."""
    set_seed(seed)
    if arguments.model_config:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model_config))
    width = arguments.hidden_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=arguments.block_size,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


class HeldOutLoss(TrainerCallback):
    """Held-out and reference loss, nats/token, over the tokens trained so far."""

    def __init__(self, name: str, tasks: dict[str, ReferenceTask], every: int, tokens_per_step: int) -> None:
        self.name, self.tasks, self.every, self.tokens_per_step = name, tasks, every, tokens_per_step
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Each `every` steps and at the end."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state, kwargs["model"])
            row = self.curve[-1]
            show(f"  {self.name:7s} step {state.global_step:5d}  reference {row['reference']:.4f}  "
                 f"held-out {row['held_out']:.4f}", end="\r" if sys.stdout.isatty() else "\n")  # fmt: skip

    def _measure(self, state: Any, model: torch.nn.Module) -> None:
        was_training = model.training
        model.eval()
        losses = {name: mean_loss(model, task.rows) for name, task in self.tasks.items()}
        model.train(was_training)
        self.curve.append({"step": state.global_step, "tokens": state.global_step * self.tokens_per_step, **losses})


def train_arm(
    arm: str,
    seed: int,
    arguments: ExampleArguments,
    training: TrainingArguments,
    config: MatesConfig,
    rows: Dataset,
    tasks: dict[str, ReferenceTask],
    tokenizer: Any,
    zero_shot: LmEvalCallback | None,
) -> dict[str, Any]:
    """Train one arm from the seed's weights; its learning curve, seconds and evaluations."""
    args = copy.copy(training)
    args.output_dir = str(Path(training.output_dir) / f"{arm}-{seed}")
    args.seed = args.data_seed = seed
    if arm == "random":
        args.max_steps = int(training.max_steps * arguments.extend_random)
    tokens_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * (
        arguments.block_size - 1
    )  # fmt: skip
    evaluation = HeldOutLoss(arm, tasks, arguments.evaluate_steps, tokens_per_step)
    callbacks: list[TrainerCallback] = [evaluation]
    if arm == "mates":
        own = replace(config, selection_seed=config.selection_seed + seed)  # so that the interval has the draws in it
        callbacks.append(MatesCallback(tasks["reference"], own))
    if zero_shot is not None:
        callbacks.append(zero_shot)
    trainer = Trainer(
        model=make_model(arguments, len(tokenizer), seed),
        args=args,
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,  # saved with each checkpoint, for `evaluate.py`
        callbacks=callbacks,
    )
    if zero_shot is not None and args.report_to:
        zero_shot.attach(trainer)  # its metrics reach the reporters
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_state()  # with the run's seconds, for `mates-hf cost`
    zero_shot_curve = [entry for entry in trainer.state.log_history if "lm_eval/seconds" in entry]
    return {"arm": arm, "seed": seed, "output_dir": args.output_dir, "curve": evaluation.curve,
            "seconds": time.perf_counter() - begin, "evaluations": zero_shot_curve}  # fmt: skip


# --- report ---


def tokens_to_reach(curve: list[dict[str, float]], loss: float) -> float | None:
    """Tokens at which a curve first gets to a held-out loss, interpolated; None where it does not."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after["held_out"] <= loss:
            share = (before["held_out"] - loss) / max(before["held_out"] - after["held_out"], 1e-12)
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def catch_up(ours: dict[str, Any], theirs: dict[str, Any], steps: int, since_selection: bool) -> str:
    """How many times our tokens random needs for our held-out loss, counted from the start or the first selection."""
    end, last = at_step(ours, steps), theirs["curve"][-1]
    start = 0.0
    if since_selection:
        folders = sorted((Path(ours["output_dir"]) / "_mates").glob("round-????"))
        start = load_round(folders[0]).info["from_step"] * last["tokens"] / last["step"] if folders else 0.0
    reached = tokens_to_reach(theirs["curve"], end["held_out"])
    if reached is None:
        return f"not reached in {(last['tokens'] - start) / (end['tokens'] - start):.1f} x"
    return f"{(reached - start) / (end['tokens'] - start):.2f} x"


def at_step(result: dict[str, Any], step: int) -> dict[str, float]:
    """The last evaluation of a run up to a step."""
    return [row for row in result["curve"] if row["step"] <= step][-1]


def report(results: list[dict[str, Any]], rows: Dataset, training: TrainingArguments) -> dict[str, Any]:
    """Print the comparison and return it."""
    summary: dict[str, Any] = {}
    steps = training.max_steps
    show(f"\n{'arm':8s}{'seed':>5s}{'reference loss':>16s}{'held-out loss':>15s}{'seconds':>9s}")
    for result in results:
        row = at_step(result, steps)
        show(
            f"{result['arm']:8s}{result['seed']:5d}{row['reference']:16.4f}{row['held_out']:15.4f}{result['seconds']:9.1f}"
        )
    report_evaluations(results, steps)
    by_arm = {arm: [result for result in results if result["arm"] == arm] for arm in ("mates", "random")}
    pairs = list(zip(by_arm["mates"], by_arm["random"], strict=False))
    for name, since in (("the whole run", False), ("from the first selection on", True)):
        ratios = [catch_up(ours, theirs, steps, since) for ours, theirs in pairs]
        if ratios:
            summary.setdefault("tokens_random_needs", {})[name] = ratios
            show(f"\nTokens that random needs for MATES's held-out loss, {name}: {', '.join(ratios)}")
    if len(by_arm["mates"]) > 1 and len(by_arm["mates"]) == len(by_arm["random"]):
        summary["paired"] = paired_interval(by_arm["mates"], by_arm["random"], steps)
        mean, low, high = summary["paired"]
        show(
            f"Held-out loss, MATES minus random, {len(by_arm['mates'])} pairs: {mean:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f})"
        )
    if by_arm["mates"]:
        summary["rounds"] = report_rounds(by_arm["mates"][0], rows)
    return summary


def report_evaluations(results: list[dict[str, Any]], steps: int) -> None:
    """Accuracy of each task that has one, at the last evaluation of each run up to a step."""
    entries = [[entry for entry in result["evaluations"] if entry["step"] <= steps] for result in results]
    last = [(result, found[-1]) for result, found in zip(results, entries, strict=True) if found]
    keys = list(dict.fromkeys(key for _, entry in last for key in entry if key.endswith(("/accuracy", "/acc"))))
    names = {}  # our tasks have both, lm-eval's own the second
    for key in sorted(keys, key=lambda key: key.endswith("/acc")):
        names.setdefault(key.split("/")[1], key)
    if not names:
        return
    heads = [name.removeprefix("mates_").removesuffix("_local") for name in names]
    show(f"\n{'accuracy':8s}{'seed':>5s}{'step':>7s}" + "".join(f"  {head}" for head in heads))
    for result, entry in last:
        cells = [
            f"{entry.get(key, float('nan')):{len(head) + 2}.3f}"
            for head, key in zip(heads, names.values(), strict=True)
        ]
        show(f"{result['arm']:8s}{result['seed']:5d}{entry['step']:7d}" + "".join(cells))


def paired_interval(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int
) -> tuple[float, float, float]:
    """Mean difference of held-out loss and its 95 % t interval."""
    from scipy import stats

    gaps = [at_step(a, steps)["held_out"] - at_step(b, steps)["held_out"] for a, b in zip(ours, theirs, strict=True)]
    half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    return float(np.mean(gaps)), float(np.mean(gaps) - half), float(np.mean(gaps) + half)


def report_rounds(result: dict[str, Any], rows: Dataset) -> list[dict[str, Any]]:
    """What each round of a run chose, how good its signal was, and what it cost."""
    groups = np.array(rows["group"])
    names = sorted(set(groups))
    folders = sorted((Path(result["output_dir"]) / "_mates").glob("round-????"))
    records = [load_round(path) for path in folders]
    show(
        f"\nShare of each group, seed {result['seed']}:\n{'':18s}{'pool':>8s}"
        + "".join(f"{'round ' + str(r.info['number']):>10s}" for r in records)
    )
    table = []
    for record in records:
        chosen = groups if record.selection is None else groups[np.asarray(record.selection)]
        table.append({name: float(np.mean(chosen == name)) for name in names})
    for name in names:
        show(f"{name[:17]:18s}{np.mean(groups == name):8.1%}" + "".join(f"{shares[name]:10.1%}" for shares in table))
    show(f"{'held-out Spearman':26s}" + "".join(f"{r.info['guard']['spearman']:10.3f}" for r in records))
    show(f"{'fidelity':26s}" + "".join(f"{r.info['fidelity'].get('spearman', float('nan')):10.3f}" for r in records))
    show("")
    for line in run_cost(result["output_dir"]).lines():
        show(line)
    return [
        {"shares": shares, "spearman": r.info["guard"]["spearman"]} for shares, r in zip(table, records, strict=True)
    ]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over tokens, one line a run."""
    try:
        import matplotlib
    except ImportError:
        show("No plot: pip install 'mates-hf[report]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    colours = {"mates": "tab:blue", "random": "tab:grey"}
    for result in results:
        axes.plot(
            [row["tokens"] / 1e6 for row in result["curve"]],
            [row["held_out"] for row in result["curve"]],
            color=colours[result["arm"]],
            label=result["arm"] if result["seed"] == results[0]["seed"] else None,
        )
    axes.set_xlabel("trained tokens (millions)")
    axes.set_ylabel("held-out loss (nats/token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def show(text: str, end: str = "\n") -> None:
    """One line to the person at the terminal, once however many processes there are."""
    if PartialState().is_main_process:
        sys.stdout.write(text + end)
        sys.stdout.flush()


def main() -> None:
    """Parse, prepare the data once, train every arm of every seed, report."""
    given = sys.argv[1:]
    parser = HfArgumentParser((ExampleArguments, TrainingArguments, MatesConfig))
    arguments, training, config = parser.parse_args_into_dataclasses([*([] if "--dataset" in given else DEMO), *given])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    pool, passages, held_out = read_documents(arguments, training)
    # Batch by batch: a column as a whole is a list in datasets 3.
    tokenizer = from_main(lambda: get_tokenizer(arguments, (batch["text"] for batch in pool.iter(1_000))))
    reference, development = make_reference(arguments, tokenizer, passages, held_out)
    zero_shot = make_evaluation(arguments, tokenizer, training.per_device_eval_batch_size)
    if zero_shot is not None or not passages:
        evaluated = zero_shot.evaluator.loaded["tasks"] if zero_shot is not None else {}
        pool = drop_shared(pool, reference, development, evaluated, tokenizer)
    with training.main_process_first(desc="tokenising"):
        rows = make_rows(pool, tokenizer, arguments.block_size, arguments.num_proc).shuffle(seed=0)
    show(
        f"{len(rows)} rows of {arguments.block_size} tokens; reference {reference.num_targets} tokens, "
        f"held-out {development.num_targets}"
    )
    tasks = {"reference": reference, "held_out": development}
    results = [
        train_arm(arm, seed, arguments, training, config, rows, tasks, tokenizer, zero_shot)
        for seed in range(arguments.seeds)
        for arm in arguments.arms.split(",")
    ]
    if not PartialState().is_main_process:
        return
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    summary = report(results, rows, training)
    (output_dir / "results.json").write_text(json.dumps({"results": results, "summary": summary}, indent=1))
    plot(results, output_dir / "held_out_loss.png")
    show(f"\nRounds, results.json and held_out_loss.png are in {output_dir}")


if __name__ == "__main__":
    main()
