"""The lines of docs/launchers.md in the scripts that they are for: each runs, and selects."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integrations.kit import (
    REDUCED,
    SELECTS,
    TRAINER_FLAGS,
    blocks,
    flags,
    patched,
    run_script,
    selected_rounds,
    smaller,
    write_inputs,
)
from tests.training.settings import proves

RUN_CLM = (Path(__file__).parent / "reduced_run_clm.py").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    write_inputs(tmp_path, tiny_model, tiny_tokenizer)
    return tmp_path


def clm_flags(**settings: Any) -> list[str]:
    data = {"model_name_or_path": "MODEL", "train_file": "train.jsonl", "do_train": True, "output_dir": "out"}
    return flags(**data, **settings)


@proves("transformers' `run_clm.py`", SELECTS, note=REDUCED)
def test_run_clm_selects_with_four_lines_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff, _ = blocks("diff", "`run_clm.py` of transformers")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 4  # as the page says
    run_script(smaller(patched(RUN_CLM, diff)), clm_flags(), folder, monkeypatch)
    (first, *_) = selected_rounds(folder / "out")
    assert first.info["config"]["update_steps"] == 8
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert any("mates/spearman" in entry for entry in state["log_history"])


def test_run_clm_with_flags_for_every_field(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RUN_CLM
    for diff in blocks("diff", "`run_clm.py` of transformers"):
        source = patched(source, diff)
    given = {"update_steps": 8, "num_probes": 60, "first_round_steps": 8, "on_weak_signal": "select"}
    run_script(source, clm_flags(**given), folder, monkeypatch)
    (first, *_) = selected_rounds(folder / "out")
    assert given.items() <= first.info["config"].items()


def test_the_lines_of_the_page_fit_one_place_only() -> None:
    """What the test of a diff stands on: no change of the script passes unseen."""
    diff, _ = blocks("diff", "`run_clm.py` of transformers")
    for changed in (RUN_CLM.replace("checkpoint = training_args", "point = training_args"), RUN_CLM + RUN_CLM, ""):
        with pytest.raises(AssertionError, match="places for"):
            patched(changed, diff)


@proves("TRL's `sft.py`", SELECTS, note="[lines to add](launchers.md)")
@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{}, {"packing": True, "max_length": 16}, {"use_peft": True, "lora_r": 2}],
    ids=["plain", "packing", "lora"],
)
def test_sft_of_the_installed_trl_selects(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """TRL's own script, read from where it is installed."""
    script = pytest.importorskip("trl.scripts.sft")
    (diff,) = blocks("diff", "`sft.py` of TRL")
    source = smaller(patched(Path(script.__file__).read_text(encoding="utf-8"), diff))
    (folder / "data").mkdir()
    (folder / "train.jsonl").rename(folder / "data" / "train.jsonl")
    data = {"model_name_or_path": "MODEL", "dataset_name": "data", "output_dir": "out", "dtype": "float32"}
    run_script(source, flags(**data, **given), folder, monkeypatch)
    (first, *_) = selected_rounds(folder / "out")
    assert first.info["num_candidates"] > first.info["num_rows"]


class ReducedFactory(types.ModuleType):
    """The structure of LLaMA-Factory's `train.tuner`: a YAML on the command line, callbacks of the caller's."""

    def __init__(self) -> None:
        super().__init__("llamafactory.train.tuner")
        self.trainer: Any = None

    def run_exp(self, args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        args = yaml.safe_load(Path(sys.argv[1]).read_text()) if args is None else args
        callbacks = callbacks or []
        self._training_function(args, callbacks)

    def _training_function(self, args: dict[str, Any], callbacks: list[Any]) -> None:
        from datasets import load_dataset
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            DataCollatorForLanguageModeling,
            Seq2SeqTrainingArguments,
            Trainer,
            TrainerCallback,
        )

        class Log(TrainerCallback):
            """Stands for the callbacks that the launcher adds to the caller's."""

        class CustomTrainer(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                return super().compute_loss(model, inputs, *args, **kwargs)

        callbacks.append(Log())
        model_path, dataset = args.pop("model_name_or_path"), args.pop("dataset")
        assert args.pop("stage") == "pt"
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        rows = load_dataset("json", data_files=dataset, split="train")
        rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
        self.trainer = CustomTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_path),
            args=Seq2SeqTrainingArguments(**args),
            data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
            callbacks=callbacks,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        self.trainer.train(resume_from_checkpoint=self.trainer.args.resume_from_checkpoint)


@proves("LLaMA-Factory (`run_exp` with callbacks)", SELECTS, note=REDUCED)
def test_a_launcher_of_llama_factory_selects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks("python", "LLaMA-Factory")
    assert len([line for line in source.splitlines() if line]) == 7  # as the page says
    factory = ReducedFactory()
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", factory)
    files = {"stage": "pt", "model_name_or_path": "MODEL", "dataset": "train.jsonl", "output_dir": "out"}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**TRAINER_FLAGS, **files}))
    run_script(smaller(source), ["pretrain.yaml"], folder, monkeypatch)
    selected_rounds(folder / "out")
    assert any("mates/spearman" in entry for entry in factory.trainer.state.log_history)
