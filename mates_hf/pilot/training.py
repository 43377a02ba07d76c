"""One arm of a pilot at one seed: a plain `transformers.Trainer` run, judged on its way.

Where it is used: `run_pilot`, once a unit. All arms of a seed have the same fresh weights, the same first rows and the
same batches; only the choice of later rows differs. Random rows are in a shuffled order. The filter ranks the same
candidates that ours chooses from, once. Ours has `MatesCallback` and nothing else.

A unit that was killed continues at the last checkpoint of the Trainer; what was judged before it is kept. On a CPU it
ends with the same numbers, bit for bit.

Trade-off: each arm trains the common start again, which is short, instead of copying a checkpoint between runs.

Signs: losses in nats/token, lower is better.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from mates_hf.config import MatesConfig
from mates_hf.data.rows import TokenRows
from mates_hf.data.texts import decode_rows
from mates_hf.disk import make_directory, read_json, write_json
from mates_hf.engine.model_traits import unwrap
from mates_hf.flops import gradient_flops
from mates_hf.influence.passes import token_losses
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.pilot.filters import fit_filter
from mates_hf.pilot.inputs import PilotInputs
from mates_hf.pilot.schedule import Schedule, intermediate_size, shape_for
from mates_hf.pilot.settings import PilotSettings
from mates_hf.reporting.cost import run_cost
from mates_hf.round_files import load_round
from mates_hf.training.callback import MatesCallback
from mates_hf.training.checkpoints import last_complete_checkpoint

ArmName = Literal["random", "filter", "ours"]
IntArray = npt.NDArray[np.int64]
_SAVES = 4  # checkpoints on the way
_MOST_NEGATIVES = 20_000
_MARK = "mark-{:08d}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One training.

    Attributes:
        arm: What it trains on.
        seed: Its seed.
        setting: Setting of the filter; None for other arms.
        part: Passages that it is judged by.
    """

    arm: ArmName
    seed: int
    setting: str | None = None
    part: Literal["held_out", "tuning"] = "held_out"


def make_model(settings: PilotSettings, tokenizer: Any, seed: int) -> torch.nn.Module:
    """The model that all arms of a seed start from.

    Args:
        settings: How the pilot is run.
        tokenizer: The tokenizer.
        seed: Seed of fresh weights.

    Returns:
        The checkpoint that was named, in float32, or a Llama with fresh weights.

    Raises:
        ValueError: there is no such checkpoint.
    """
    set_seed(seed)
    if settings.model is not None:
        try:
            found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                settings.model, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # of another kind, damaged, or code of its own that is not run
            raise ValueError(
                f"`model` must be a folder or a repository on the Hub with a causal language model, and "
                f"{settings.model!r} cannot be read ({str(error).strip().splitlines()[:1]})."
            ) from error
        return found
    width, layers, heads = shape_for(settings.pilot_params, len(tokenizer))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=intermediate_size(width),
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=settings.row_tokens,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    made: torch.nn.Module = LlamaForCausalLM(config)
    return made


def train_unit(
    unit: Unit, run_dir: Path, inputs: PilotInputs, settings: PilotSettings, schedule: Schedule
) -> dict[str, Any]:
    """Train one arm at one seed, from its last checkpoint where there is one.

    Args:
        unit: What to train.
        run_dir: The Trainer's output folder.
        inputs: What is read.
        settings: How the pilot is run.
        schedule: When it ends and is judged.

    Returns:
        Losses at each mark, of each group at the end, rounds, FLOPs and seconds, as JSON values.
    """
    checkpoint = last_complete_checkpoint(run_dir)
    if checkpoint is None and run_dir.exists():
        shutil.rmtree(run_dir)  # killed before its first checkpoint: nothing of it is needed
    make_directory(run_dir)
    marks = schedule.marks + (schedule.later_marks if unit.arm == "random" else ())
    order, filter_seconds = _order(unit, inputs, settings, schedule)
    model = make_model(settings, inputs.tokenizer, unit.seed)
    num_multiplied = count_multiplied_parameters(model)
    judge = _Judge(run_dir, inputs, unit.part, marks, schedule.end, num_saves=_SAVES)
    trainer = _InOrder(
        model, args=_arguments(settings, run_dir, marks[-1], unit.seed), train_dataset=inputs.pool.select(order),
        data_collator=_without_groups, callbacks=[judge],
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if unit.arm == "ours":
        config = MatesConfig(**schedule.config, group_column="group", selection_seed=unit.seed)
        MatesCallback(inputs.reference, config).attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    found = judge.result(marks)
    step_flops = gradient_flops(num_multiplied, settings.batch_rows * settings.row_tokens)
    return {
        "arm": unit.arm, "seed": unit.seed, "setting": unit.setting, "part": unit.part, **found,
        "step_flops": step_flops, "num_parameters": sum(p.numel() for p in unwrap(model).parameters()),
        "filter_seconds": filter_seconds, **(_rounds(run_dir) if unit.arm == "ours" else {}),
    }  # fmt: skip


def _order(unit: Unit, inputs: PilotInputs, settings: PilotSettings, schedule: Schedule) -> tuple[IntArray, float]:
    """Rows of the pool in the order of training, and seconds that choosing them took."""
    order = np.random.default_rng([unit.seed, 1]).permutation(len(inputs.pool))
    if unit.arm != "filter":
        return order, 0.0
    assert unit.setting is not None
    started = time.perf_counter()
    start, num = schedule.start * schedule.batch_rows, schedule.steps * schedule.batch_rows
    candidates, rest = order[start : start + schedule.num_candidates], order[start + schedule.num_candidates :]
    background = np.concatenate([rest, candidates])[:_MOST_NEGATIVES]
    positive = decode_rows(inputs.passages["reference"].rows, inputs.tokenizer)
    score = fit_filter(
        settings.static_filter, unit.setting, positive, _texts(inputs, background), unit.seed
    )  # fmt: skip
    scores = np.concatenate(
        [score(_texts(inputs, part)) for part in np.array_split(candidates, 1 + len(candidates) // 5_000)]
    )
    num_best = num - round(settings.random_share * num)
    ranked = candidates[np.argsort(-scores, kind="stable")]
    rng = np.random.default_rng([unit.seed, 2])
    chosen = np.concatenate([ranked[:num_best], rng.permutation(ranked[num_best:])[: num - num_best]])
    return np.concatenate([order[:start], rng.permutation(chosen)]), time.perf_counter() - started


def _texts(inputs: PilotInputs, rows: IntArray) -> list[str]:
    return list(decode_rows(TokenRows.from_lists(inputs.pool.select(rows)["input_ids"][:]), inputs.tokenizer))


def _arguments(settings: PilotSettings, run_dir: Path, max_steps: int, seed: int) -> TrainingArguments:
    """The Trainer's arguments: AdamW with a constant rate, so that the loss at each step is that of a shorter run."""
    rows = settings.batch_rows
    at_once = max(num for num in range(1, min(rows, settings.micro_batch_rows) + 1) if rows % num == 0)
    on_device = settings.device == "auto" and torch.cuda.is_available()
    in_bfloat16 = on_device and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(run_dir), max_steps=max_steps, seed=seed, data_seed=seed, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once, learning_rate=settings.learning_rate, adam_beta2=0.95,
        weight_decay=0.1, lr_scheduler_type="constant_with_warmup", warmup_steps=20, save_strategy="no",
        save_total_limit=2, logging_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False, use_cpu=not on_device, bf16=in_bfloat16,
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one process would wrap the model in DataParallel
        arguments._n_gpu = 1
    return arguments


def _without_groups(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator: a batch of what the model takes."""
    batch: dict[str, Any] = default_data_collator(
        [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    )
    return batch


class _InOrder(Trainer):
    """A Trainer whose own order is that of its dataset, so that all arms of a seed share their first rows."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return torch.utils.data.SequentialSampler(dataset)


class _Judge(TrainerCallback):
    """Losses of passages at marks, and of what was kept out of the pool at the end; asks for checkpoints.

    Args:
        run_dir: The Trainer's output folder, where each mark is a file.
        inputs: What is read.
        part: Passages to judge by.
        marks: Steps.
        end: The step at which groups are judged too.
        num_saves: Checkpoints up to the end.
    """

    def __init__(
        self, run_dir: Path, inputs: PilotInputs, part: str, marks: tuple[int, ...], end: int, *, num_saves: int
    ) -> None:
        self._dir, self._passages, self._kept = run_dir, inputs.passages[part], inputs.kept_out
        self._marks, self._end = set(marks), end
        self._saves = set(marks[:: max(1, len(marks) // num_saves)])
        self._started, self._spent = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, behind what an earlier call had trained when its checkpoint was written."""
        path = self._dir / _MARK.format(state.global_step)
        self._spent = float(read_json(path)["seconds"]) if path.exists() else 0.0
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge at a mark."""
        step = state.global_step
        if step not in self._marks:
            return
        self._spent += time.perf_counter() - self._started  # judging is no training
        model, sums = kwargs["model"], _by_owner(kwargs["model"], self._passages.rows, self._passages.owner)[0]
        found: dict[str, Any] = {"step": step, "seconds": self._spent, "sums": sums}
        if step == self._end:
            rows, groups = self._kept
            sums, tokens = _by_owner(model, rows, np.arange(len(rows)))
            found["kept_out"] = {"sums": sums, "tokens": tokens, "groups": groups}
        write_json(self._dir / _MARK.format(step), found)
        self._started = time.perf_counter()
        control.should_save = control.should_save or step in self._saves

    def result(self, marks: tuple[int, ...]) -> dict[str, Any]:
        """What was judged, of this call and of those before it.

        Args:
            marks: Steps.

        Returns:
            JSON values.
        """
        found = [read_json(self._dir / _MARK.format(step)) for step in marks]
        tokens = np.zeros(len(self._passages), np.int64)
        np.add.at(tokens, self._passages.owner, self._passages.rows.num_targets)
        kept = next(one["kept_out"] for one in found if "kept_out" in one)
        return {
            "steps": list(marks), "sums": [one["sums"] for one in found], "tokens": tokens.tolist(), "kept_out": kept,
            "seconds": found[-1]["seconds"],
        }  # fmt: skip


def _by_owner(model: torch.nn.Module, rows: TokenRows, owner: IntArray) -> tuple[list[float], list[int]]:
    """Sums of the losses of each owner's rows, in nats, and their target tokens."""
    was_training = model.training
    model.eval()
    try:
        losses = token_losses(model, rows)
    finally:
        model.train(was_training)
    counts = np.asarray(rows.num_targets, np.int64)
    row = np.repeat(np.arange(len(rows)), counts)
    each = np.bincount(row, losses.astype(np.float64), len(rows))
    num = int(owner.max()) + 1
    sums, tokens = np.bincount(owner, each, num), np.bincount(owner, counts, num)
    return [float(f"{one:.7g}") for one in sums], [int(one) for one in tokens]


def _rounds(run_dir: Path) -> dict[str, Any]:
    """What the rounds of a run recorded."""
    cost = run_cost(run_dir)
    rounds = []
    for path in sorted(run_dir.glob("_mates/round-????")):
        info: Mapping[str, Any] = load_round(path).info
        checks = [read_json(file) for file in sorted(path.glob("check-*.json"))]
        parts = [*info["stages"].values(), *checks]
        rounds.append({
            "step": info["step"], "decision": info["guard"]["decision"], "spearman": info["guard"]["spearman"],
            "interval": list(info["guard"]["interval"]), "flops": sum(part.get("flops") or 0.0 for part in parts),
            "seconds": sum(part.get("seconds") or 0.0 for part in parts),
        })  # fmt: skip
    return {"rounds": rounds, "idle_seconds": cost.idle_seconds, "selecting_seconds": cost.mates.seconds}
