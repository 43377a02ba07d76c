"""A run directory made without training: rounds, labels and a fitted influence model on texts of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mates_hf.config import MatesConfig
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import write_labels
from mates_hf.selection.saved import write_round_model

STEPS = 20  # of a round


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def round_info(which: int, **changes: Any) -> dict[str, Any]:
    """A `round.json` as a run writes it; `changes` replace entries."""
    seconds = {"digest": 0.1, "probe": 4.0, "audit": 1.0, "fit": 0.5, "guard": 0.1, "score": 0.5, "select": 0.1}
    info: dict[str, Any] = {
        "number": which, "step": STEPS * which, "from_step": STEPS * which + 5, "to_step": STEPS * (which + 1) + 5,
        "from_position": 0, "num_rows": 40, "order_sha256": "0" * 64, "num_candidates": 90, "num_probed": 300,
        "num_random": 4, "step_size": 1e-3, "probe": {"reference_loss": 5.0 - 0.1 * which},
        "fit": {
            "num_labels": 240, "num_held_out": 60, "spearman": 0.6, "interval": [0.4, 0.75], "label_std": 1e-3,
            "top_fifth_overlap": 0.5,
            "calibration": [[(i - 4.5) * 3e-4, (i - 4.5) * 2.5e-4] for i in range(10)],
        },
        "fidelity": {"spearman": 0.8, "interval": [0.5, 0.95], "num_candidates": 16},
        "guard": {"decision": "select", "spearman": 0.6, "interval": [0.4, 0.75], "reversed": False, "failed": None},
        "gap": {"gap": 1.2, "interval": [0.9, 1.5]}, "rise": {"rise": -0.1, "interval": [-0.2, 0.0]},
        "repeated_share": 0.01, "num_passed_over": 2,
        "reference_overlap": {"rows": 0, "share": 0.0, "ngram": 13},
        "bought_most": [{"token_id": 3, "text": "word", "share": 0.6, "candidate_share": 0.4}],
        "groups": {
            "code": {"candidates": 60, "chosen": 20, "probes": 200, "loss": 4.0 - 0.1 * which, "influence": 0.0},
            "manual": {"candidates": 30, "chosen": 20, "probes": 100, "loss": 5.0 - 0.2 * which, "influence": 0.1},
        },
        "stages": {name: {"seconds": value, "flops": 1e8} for name, value in seconds.items()},
        "beside_training": [],
        "flop_parameters": {"stages": 1_000, "trainer": 1_000},
        "config": MatesConfig(update_steps=STEPS, group_column="kind").to_dict(), "seed": 0,
        "reference": {"name": "manual", "num_passages": 20, "digest": "d" * 64},
        "pool": {"num_rows": 90, "features": "input_ids: list", "rows_sha256": "a" * 64},
        "model": {"name": "tiny", "num_parameters": 1_000}, "versions": {"torch": "2"}, "weights": "sum128-0",
    }  # fmt: skip
    return {**info, **changes}


def write_state(run: Path, steps: int, losses: dict[int, float], **changes: Any) -> None:
    """A `trainer_state.json` with an evaluation at some steps."""
    history: list[dict[str, Any]] = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    history.append({"step": steps, "train_runtime": 100.0, "train_steps_per_second": steps / 100})
    state = {"global_step": steps, "total_flos": 1e9 * steps, "log_history": history, **changes}
    run.mkdir(parents=True, exist_ok=True)
    (run / "trainer_state.json").write_text(json.dumps(state))


def write_rounds(run: Path, infos: Sequence[dict[str, Any]]) -> list[Path]:
    """Round directories that hold their `round.json` alone."""
    folders = []
    for info in infos:
        folder = run / "_mates" / f"round-{info['number']:04d}"
        folder.mkdir(parents=True)
        (folder / "round.json").write_text(json.dumps(info))
        folders.append(folder)
    return folders


def pool_of(texts: Sequence[str], tokenizer: Any) -> Dataset:
    """A pool with one row a text."""
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})


def fill_round(folder: Path, pool: Dataset, tokenizer: Any, order: Sequence[int], num_selected: int) -> Any:
    """What a round that chose leaves: labels, scores and its influence model.

    The rows of `order` are the candidates, the best first, and so many of them are chosen. The letter e raises.
    """
    lengths = np.array([len(row) - 1 for row in pool["input_ids"]])
    helps = np.concatenate([np.array(row[1:]) == tokenizer("e")["input_ids"][0] for row in pool["input_ids"]])
    derivatives = helps.astype(np.float32) + np.random.default_rng(0).normal(0, 0.01, len(helps)).astype(np.float32)
    ends = np.cumsum(lengths)
    per_token = np.array(
        [derivatives[end - length : end].mean() for end, length in zip(ends, lengths, strict=True)], np.float32
    )
    labels = InfluenceLabels(
        candidate_id=np.arange(len(pool)), influence=per_token * np.float32(1e-3), influence_per_token=per_token,
        loss=np.ones(len(pool), np.float32), num_tokens=lengths.astype(np.int32),
        probe=np.array(["one_step"] * len(pool)), step_size=1e-3, token_derivatives=derivatives,
    )  # fmt: skip
    write_labels(folder / "probes.parquet", labels)
    model = NgramInfluenceModel().fit(pool, labels, held_out_fraction=0.2, seed=0)
    write_round_model(folder / "influence_model", model, tokenizer)
    candidates = np.asarray(order, np.int64)
    np.save(folder / "candidates.npy", candidates)
    np.save(folder / "scores.npy", np.linspace(1, -1, len(candidates)).astype(np.float32))
    np.save(folder / "num_targets.npy", np.full(len(candidates), 10, np.int32))
    np.save(folder / "selection.npy", candidates[:num_selected][::-1].copy())
    return model
