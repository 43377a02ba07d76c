"""Packed and flattened rows in the Trainer and in TRL's `SFTTrainer`: each strategy selects, and leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, default_data_collator

from mates_hf import MatesCallback, MatesRounds, load_round
from mates_hf.errors import UnsupportedSettingError
from mates_hf.training.verify import verify_run
from tests.training.kit import VOCAB, make_arguments, make_model, make_pool, make_reference, small_config
from tests.training.settings import proves

FLATTENED = "rows flattened by the collator (`DataCollatorWithFlattening`, TRL's `padding_free`)"
PACKED = "packed rows (TRL's `packing` in each strategy, packers of one's own)"
APART = "what is probed is what is trained: documents apart where the run keeps them apart, else the block"
STEPS = 14


def texts(num: int = 240, seed: int = 0) -> list[list[int]]:
    """Rows of several lengths, every third one counting up as the reference does."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 14, num).tolist()
    return [
        (32 + (int(rng.integers(8)) + np.arange(size)) % 8 if i % 3 == 0 else rng.integers(32, VOCAB, size)).tolist()
        for i, size in enumerate(sizes)
    ]


def callback(**changes: Any) -> MatesCallback:
    return MatesCallback(make_reference(8), small_config(update_steps=5, switch_lead_steps=2, **changes))


def train(folder: Any, dataset: Any, collator: Any, mates: MatesCallback | None, **args: Any) -> Trainer:
    arguments = make_arguments(folder, **{"max_steps": STEPS, "per_device_train_batch_size": 4, **args})
    callbacks = [] if mates is None else [mates]
    model = make_model()
    model.config.use_cache = False  # as newer Trainers set it
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=callbacks)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def only_round(folder: Any) -> Any:
    return load_round(folder / "_mates" / "round-0001")


@proves(FLATTENED, "no trace")
@proves(FLATTENED, APART, note="rows that a model lets see each other are refused by name, with the way out")
@pytest.mark.slow
@pytest.mark.parametrize("returns", [{}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}])
def test_flattened_rows_select(tmp_path, returns):
    dataset, collator = Dataset.from_dict({"input_ids": texts()}), DataCollatorWithFlattening(**returns)
    run = train(tmp_path / "run", dataset, collator, callback())
    record = only_round(tmp_path / "run")
    assert record.info["loss"]["documents"] == "apart"
    assert record.info["loss"]["fed"] == "padded"
    assert len(np.unique(record.selection)) == len(record.selection) >= 4 * 5
    lengths = np.array([len(row) for row in dataset["input_ids"]])
    assert record.labels.num_tokens.tolist() == (lengths[record.labels.candidate_id] - 1).tolist()
    control = train(tmp_path / "control", dataset, collator, None)
    assert losses(run)[:7] == losses(control)[:7]  # up to the switch nothing shows
    assert losses(run) != losses(control)


@pytest.mark.slow
@proves(FLATTENED, "resumes exactly; verifies")
def test_a_flattened_run_resumes_and_verifies(tmp_path):
    dataset, collator = Dataset.from_dict({"input_ids": texts()}), DataCollatorWithFlattening()
    whole = train(tmp_path / "run", dataset, collator, callback(), save_strategy="steps", save_steps=6)
    assert verify_run(tmp_path / "run").problem is None
    arguments = make_arguments(tmp_path / "run", max_steps=STEPS, save_strategy="steps", save_steps=6)
    again = Trainer(model=make_model(), args=arguments, train_dataset=dataset, data_collator=collator,
                    callbacks=[callback()])  # fmt: skip
    again.model.config.use_cache = False
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert losses(again)[-6:] == losses(whole)[-6:]


STRATEGIES = {
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "bfd-requeue": {"packing": True, "packing_strategy": "bfd-requeue"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True, "max_length": None},
}


@proves(PACKED, APART)
@proves(FLATTENED, APART)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sft_trainer(tmp_path, tiny_tokenizer, strategy):
    trl = pytest.importorskip("trl")
    wanted = {"max_length": 24, **STRATEGIES[strategy]}
    unknown = wanted.keys() - trl.SFTConfig.__dataclass_fields__.keys()
    if unknown:
        pytest.skip(f"this TRL has no {unknown}")
    args = make_arguments(tmp_path, max_steps=STEPS).to_dict()
    kept = ("max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "save_strategy",
            "report_to", "disable_tqdm", "use_cpu")  # fmt: skip
    try:
        config = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **{key: args[key] for key in kept}, **wanted)
        trainer = trl.SFTTrainer(
            model=make_model(), args=config, train_dataset=Dataset.from_dict({"input_ids": texts(600)}),
            processing_class=tiny_tokenizer, callbacks=[callback()],
        )  # fmt: skip
    except ValueError as error:
        pytest.skip(f"not in this TRL: {error}")
    trainer.train()
    record = only_round(tmp_path)
    assert verify_run(tmp_path).problem is None
    assert record.info["loss"]["candidates"] == "shifted"
    assert record.info["loss"]["fed"] == "padded"
    assert record.info["loss"].get("documents") == (None if strategy == "wrapped" else "apart")
    assert len(record.selection) >= 4 * 5
    assert record.labels.influence.std() > 0


def counting_wrong(rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = default_data_collator(rows)
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"]) * 2}


def without_positions(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in counting_wrong(rows).items() if key != "position_ids"}


def disagreeing(rows: list[Any], borders: tuple[int, ...] = (0, 4, 12)) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    positions = torch.tensor([*range(6), *range(6)]).expand_as(ids)
    flat = {"input_ids": ids.reshape(1, -1), "labels": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
    flat["labels"] = torch.where(flat["position_ids"] == 0, -100, flat["labels"])
    all_borders = [0] + [12 * i + border for i in range(len(rows)) for border in borders[1:]]
    return {**flat, "cu_seq_lens_q": torch.tensor(all_borders, dtype=torch.int32)}


def agreeing(rows: list[Any]) -> dict[str, torch.Tensor]:
    return disagreeing(rows, (0, 6, 12))


def left_out(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in disagreeing(rows).items() if key != "cu_seq_lens_q"}


def unmarked(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in agreeing(rows).items() if key in ("input_ids", "labels")}


ADVICE = [
    (counting_wrong, "`position_ids` must count up by 1.*leave `position_ids` out", [without_positions]),
    (disagreeing, "must mark the same documents.*leave the wrong one out", [agreeing, left_out]),
    (unmarked, "nothing that says so.*DataCollatorWithFlattening.*that pads",
     [DataCollatorWithFlattening()]),
    (DataCollatorWithFlattening(separator_id=2), "leave `separator_id` at -100", [DataCollatorWithFlattening()]),
    (DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True), "a collator that pads",
     [default_data_collator]),
]  # fmt: skip


@proves("packed rows whose documents nobody can tell", "no step, no file", outcome="refused",
        note="positions that do not count up, borders that disagree; the message names the way out")  # fmt: skip
@pytest.mark.slow
@pytest.mark.parametrize(("collator", "match", "ways"), ADVICE)
def test_each_advice_works(tmp_path, collator, match, ways):
    pool = make_pool(200)
    with pytest.raises(UnsupportedSettingError, match=match):
        train(tmp_path / "refused", pool, collator, callback())
    assert not (tmp_path / "refused" / "_mates").exists()
    for number, way in enumerate(ways):
        folder = tmp_path / str(number)
        trainer = train(folder, pool, way, callback(), max_steps=9)
        assert trainer.state.global_step == 9
        assert len(only_round(folder).selection)


def test_a_loop_of_ones_own_over_flattened_rows(tmp_path):
    dataset, collator = Dataset.from_dict({"input_ids": texts(120)}), DataCollatorWithFlattening()
    model = make_model()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = small_config(update_steps=4, switch_lead_steps=1)
    rounds = MatesRounds(make_reference(8), dataset, config, output_dir=tmp_path, collate_fn=collator)
    for _, rows in rounds.order(model, optimizer, batch_size=4, max_steps=8):
        model(**collator([dataset[int(i)] for i in rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    record = load_round(sorted(tmp_path.rglob("round-0001"))[0])
    assert record.info["loss"]["documents"] == "apart"
    assert len(record.selection)
