# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf[eval]"]
# [tool.uv.sources]
# mates-hf = { path = ".." }
# ///
"""Pretrain, or train on, a causal language model with the data that helps it most. Copy this one.

    python examples/pretrain.py                               # a small model on built-in text
    python examples/pretrain.py run.yaml --arm random         # settings from a file; flags override them
    python examples/pretrain.py --pool 'corpus/*.parquet' --reference passages.jsonl --model runs/earlier
    accelerate launch examples/pretrain.py --pool allenai/c4 --pool_config en --reference lambada_openai --bf16 \
        --model_config EleutherAI/pythia-410m --block_size 1024 --max_steps 50000 --update_steps 10000

Settings are the fields of `DataArguments`, `TrainingArguments` and `MatesConfig`. `--resume_from_checkpoint last`
takes the last whole checkpoint, or none. With `--max_steps 60 --update_steps 20 --num_probes 80` the first
command took 51 CPU seconds (a minute or less on two idle cores) and 1.0 GB of memory. Last lines:

    ***** held_out metrics *****
      held_out_loss               =      6.589
"""

import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg

from mates_hf import MatesCallback, MatesConfig, ReferenceTask
from mates_hf.data.corpus import builtin_corpus
from mates_hf.evaluation import check_contamination
from mates_hf.training.checkpoints import last_complete_checkpoint

DEFAULTS = {  # for the small model; a large one wants another learning rate and longer rounds
    "output_dir": "runs/pretrain", "max_steps": 200, "update_steps": 40, "num_probes": 300, "learning_rate": 2e-3,
    "per_device_train_batch_size": 16, "warmup_steps": 20, "lr_scheduler_type": "constant_with_warmup",
    "eval_strategy": "steps", "eval_steps": 100, "logging_steps": 50, "save_steps": 100, "report_to": "none",
}  # fmt: skip
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass
class DataArguments:
    """What this script adds to `TrainingArguments` and `MatesConfig`."""

    arm: Literal["mates", "random"] = HfArg(default="mates", help="Select, or keep the Trainer's own order.")
    pool: str | None = HfArg(default=None, help="JSONL or Parquet files (a glob), or a Hub id. None: built-in text.")
    pool_config: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    text_column: str = HfArg(default="text", help="Column of the pool's texts.")
    reference: str | None = HfArg(default=None, help="What to get better at: JSONL of `text`, or an lm-eval task.")
    held_out: str | None = HfArg(default=None, help="JSONL to evaluate on. None: half of the reference.")
    reference_limit: int | None = HfArg(default=None, help="First passages of the reference only.")
    model: str | None = HfArg(default=None, help="Checkpoint to start from (path or Hub id).")
    model_config: str | None = HfArg(default=None, help="Config of a fresh model. None: a small Llama.")
    tokenizer: str | None = HfArg(default=None, help="None: the model's, or one trained on the pool.")
    block_size: int = HfArg(default=128, help="Tokens in a row.")
    num_proc: int | None = HfArg(default=None, help="Processes that tokenise.")


def parse(argv: list[str]) -> tuple[DataArguments, TrainingArguments, MatesConfig]:
    """Flags, over a YAML file where the first argument is one, over `DEFAULTS`."""
    parser = HfArgumentParser((DataArguments, TrainingArguments, MatesConfig))
    parser.set_defaults(**DEFAULTS)
    if argv and argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**yaml.safe_load(Path(argv.pop(0)).read_text(encoding="utf-8")))
    data, training, config, *unknown = parser.parse_args_into_dataclasses(argv)
    if unknown:
        parser.error(f"no such settings: {', '.join(vars(unknown[0]))}")
    return data, training, config


def read_pool(data: DataArguments) -> Dataset:
    """The candidate pool, with the one column `text`."""
    if data.pool is None:
        return Dataset.from_list(builtin_corpus().pool).select_columns("text")
    files = glob.glob(data.pool)
    kind = ("parquet" if ".parquet" in data.pool else "json") if files else data.pool
    pool = load_dataset(kind, data.pool_config, data_files=files or None, split="train")
    return pool.select_columns(data.text_column).rename_columns({data.text_column: "text"})


def make_tokenizer(data: DataArguments, pool: Dataset) -> Any:
    """The tokenizer asked for, or a byte-level BPE trained on the pool."""
    name = data.tokenizer or data.model or data.model_config
    if name:
        return AutoTokenizer.from_pretrained(name)
    bpe = ByteLevelBPETokenizer()
    texts = (batch["text"] for batch in pool.iter(1_000))
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def make_model(data: DataArguments, tokenizer: Any) -> Any:
    """A checkpoint, fresh weights by a config, or a small Llama."""
    if data.model:
        return AutoModelForCausalLM.from_pretrained(data.model)
    if data.model_config:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model_config))
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SMALL, **ends))


def make_reference(data: DataArguments, tokenizer: Any) -> tuple[ReferenceTask, ReferenceTask]:
    """What the model should get better at and, disjoint from it, what it is judged by."""

    def read(path: str) -> list[str]:
        return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines() if line]

    def task(texts: list[str]) -> ReferenceTask:
        rows = [{"text": text} for text in texts]
        return ReferenceTask.from_dataset(rows, tokenizer, text_column="text", max_length=data.block_size)

    if data.reference is None:
        corpus = builtin_corpus()
        return task(corpus.reference), task(corpus.development)
    if Path(data.reference).is_file():
        found = task(read(data.reference)[: data.reference_limit])
    else:
        sizes = {"limit": data.reference_limit, "max_length": data.block_size}
        found = ReferenceTask.from_lm_eval(data.reference, tokenizer, **sizes)
    return (found, task(read(data.held_out))) if data.held_out else found.split(0.5, seed=0)


def clean_rows(pool: Dataset, tokenizer: Any, *tasks: ReferenceTask) -> list[int]:
    """Rows of the pool that share no 13 words with a passage; the others would be chosen for that alone."""
    found = check_contamination(pool=pool, reference=tasks[0], evaluation={"held-out": tasks[1]}, tokenizer=tokenizer)
    clean = found.kept("pool").tolist()
    print(f"{len(pool) - len(clean):,} of {len(pool):,} texts of the pool share text with a passage: dropped")
    return clean


def cut(texts: list[list[int]], block_size: int, end: int | None) -> dict[str, list[list[int]]]:
    """Rows of exactly `block_size` tokens: each text is cut by itself, and what is left over is joined."""
    rows, rest = [], []
    for text in texts:
        ids = text if end is None else [*text, end]
        whole = len(ids) - len(ids) % block_size
        rows += [ids[i : i + block_size] for i in range(0, whole, block_size)]
        rest += ids[whole:]
    rows += [rest[i : i + block_size] for i in range(0, len(rest) - block_size + 1, block_size)]
    return {"input_ids": rows, "labels": rows}


def main() -> None:
    """Read, cut, train."""
    data, training, config = parse(sys.argv[1:])
    is_main = training.process_index == 0  # it prints, and makes what must not differ between processes
    pool = read_pool(data)
    tokenizer = broadcast_object_list([make_tokenizer(data, pool) if is_main else None])[0]
    reference, held_out = make_reference(data, tokenizer)
    clean = broadcast_object_list([clean_rows(pool, tokenizer, reference, held_out) if is_main else None])[0]
    pool = pool.select(clean)
    shape = data.block_size, tokenizer.eos_token_id
    key = Hasher.hash([pool._fingerprint, sorted(tokenizer.get_vocab().items()), shape])
    options = {"remove_columns": "text", "num_proc": data.num_proc, "new_fingerprint": key}  # found by all processes
    with training.main_process_first(desc="tokenising"):
        rows = pool.map(lambda batch: cut(tokenizer(batch["text"])["input_ids"], *shape), batched=True, **options)
    passages = [held_out.rows.row(i)[0].tolist() for i in range(len(held_out))]
    set_seed(training.seed)
    trainer = Trainer(
        model=make_model(data, tokenizer),
        args=training,
        train_dataset=rows.shuffle(seed=0),
        eval_dataset=Dataset.from_dict(cut(passages, *shape)),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    if data.arm == "mates":
        MatesCallback(reference, config).attach(trainer)
    given = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(training.output_dir) if given == "last" else given)
    trainer.save_state()  # with the run's seconds, for `mates-hf cost`
    trainer.log_metrics("held_out", trainer.evaluate(metric_key_prefix="held_out"))


if __name__ == "__main__":
    main()
