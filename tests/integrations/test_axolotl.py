"""The plugin by the contract of Axolotl's plugin manager: reduced to its structure, and the real one where it is."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from tests.integrations.kit import PAGE, REDUCED, SELECTS, TRAINER_FLAGS, blocks, selected_rounds, write_inputs
from tests.training.settings import proves

NAME = "mates_hf.integrations.axolotl"


class BasePlugin:
    """A plugin's hooks, as far as a run of a causal model calls them."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def get_adapter_capabilities(self) -> list[Any]:
        return []

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None: ...

    def get_trainer_cls(self, cfg: Any) -> type | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


class PluginManager:
    """Imports plugins by name, makes them without arguments, and swallows what cannot be imported."""

    def __init__(self) -> None:
        self.plugins: dict[str, Any] = {}

    def register(self, plugin_name: str) -> None:
        module_name, class_name = plugin_name.rsplit(".", 1)
        try:
            self.plugins[plugin_name] = getattr(importlib.import_module(module_name), class_name)()
        except ImportError:
            return

    def get_input_args(self) -> list[str]:
        return [args for plugin in self.plugins.values() if (args := plugin.get_input_args()) is not None]

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [c for plugin in self.plugins.values() for c in plugin.add_callbacks_pre_trainer(cfg, model) or []]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [c for plugin in self.plugins.values() for c in plugin.add_callbacks_post_trainer(cfg, trainer) or []]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginManager]:
    """The reduced one, in the place of the package."""
    pytest.importorskip("pydantic")
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield PluginManager()
    sys.modules.pop(NAME, None)  # its class inherits from what goes


@pytest.fixture
def real_manager() -> Iterator[Any]:
    """That of the installed Axolotl, which is a singleton."""
    made = pytest.importorskip("axolotl.integrations.base").PluginManager.get_instance()
    made.plugins.clear()
    yield made
    made.plugins.clear()


def load(manager: Any, text: str) -> dict[str, Any]:
    """A config as Axolotl reads it: plugins first, then the keys that they add."""
    import pydantic

    cfg = yaml.safe_load(text)
    for plugin_name in cfg["plugins"]:
        manager.register(plugin_name)
    for plugin in manager.plugins.values():
        plugin.register(cfg)

    class InputConfig(pydantic.BaseModel):
        plugins: list[str] | None = None
        sample_packing: bool | None = None
        batch_flattening: bool | None = None

    bases = []
    for path in manager.get_input_args():
        module_name, class_name = path.rsplit(".", 1)
        bases.append(getattr(importlib.import_module(module_name), class_name))
    merged = types.new_class("Merged", (InputConfig, *bases))
    dumped: dict[str, Any] = merged(**cfg).model_dump(exclude_none=True)
    return dumped


def build(manager: Any, cfg: dict[str, Any], folder: Path) -> Any:
    """A Trainer as Axolotl builds it."""
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    model = AutoModelForCausalLM.from_pretrained(folder / "MODEL")
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    flat = cfg.get("batch_flattening")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder / "out"), **TRAINER_FLAGS),
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
        callbacks=manager.add_callbacks_pre_trainer(cfg=cfg, model=model),
        processing_class=tokenizer,
    )
    for callback in manager.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    return trainer


SMALL = "  update_steps: 8\n  num_probes: 60\n  first_round_steps: null\n  on_weak_signal: select\n"


def page_config() -> str:
    """The config of the page, with rounds of a test's size."""
    text, _ = blocks("yaml", "Axolotl")
    line = "  update_steps: 1000        # every field of MatesConfig\n"
    assert line in text
    return text.replace(line, SMALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    write_inputs(tmp_path, tiny_model, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_selects(manager: Any, text: str, folder: Path) -> None:
    """A run of the config selects, by the settings that are in it."""
    trainer = build(manager, load(manager, text), folder)
    trainer.train()
    (first, *_) = selected_rounds(folder / "out")
    assert first.info["config"]["update_steps"] == 8
    assert first.info["config"]["first_round_steps"] is None  # `null` in the file is no missing key
    assert any("mates/spearman" in entry for entry in trainer.state.log_history)


@proves("Axolotl (`plugins: [mates_hf.integrations.axolotl.MatesPlugin]`)", SELECTS, note=REDUCED)
@pytest.mark.parametrize("flat", [True, False])
def test_the_config_of_the_page_selects(folder: Path, manager: PluginManager, flat: bool) -> None:
    if flat and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("models of older versions see across the rows that are flattened on a processor")
    text = page_config()
    assert_selects(
        manager, text if flat else text.replace("batch_flattening: true", "batch_flattening: false"), folder
    )


def test_the_installed_axolotl_takes_the_plugin(folder: Path, real_manager: Any) -> None:
    assert_selects(real_manager, page_config(), folder)


@proves(
    "keys of Axolotl: `sample_packing`, `streaming`, `pretraining_dataset`, `rl`, `reward_model`, "
    "`process_reward_model`",
    "refused when the config file is read, before a model is loaded",
    outcome="refused",
    note="each with the way out",
)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mates": None}, "`mates` must be a mapping.*got nothing.*`reference`"),
        ({"mates": [1]}, r"`mates` must be a mapping.*got \[1\]"),
        ({"update_step": 5}, "got `update_step`. `update_steps` is the nearest"),
        ({"colour": "red"}, "got `colour`. There are reference, update_steps"),
        ({"update_steps": 0}, "`update_steps` must be a whole number of at least 1, got 0"),
        ({"selection_ratio": "1e-1"}, r"`selection_ratio` must be in \(0, 1\], got '1e-1'"),
        ({"reference": None}, "`mates.reference` must be a mapping.*got nothing.*`path`, or `lm_eval`"),
        ({"reference": {}}, "either `path`.*got none"),
        ({"reference": {"path": "passages.jsonl", "lm_eval": "lambada"}}, r"either `path`.*\['lm_eval', 'path'\]"),
        ({"reference": {"path": "passages.jsonl", "text_colum": "text"}}, "`text_column` is the nearest"),
        ({"reference": {"lm_eval": "lambada", "text_column": "text"}}, "got `text_column`"),
        ({"reference": {"path": "nowhere.jsonl"}}, "must name a file that is there, got 'nowhere.jsonl'"),
        ({"sample_packing": True}, "`sample_packing` must not be set.*`batch_flattening: true`"),
        ({"streaming": True}, "`streaming` must not be set.*`datasets`"),
        ({"pretraining_dataset": [{"path": "pool"}]}, "`pretraining_dataset` must not be set.*`type: completion`"),
        ({"rl": "dpo"}, "`rl` must not be set"),
        ({"reward_model": True}, "`reward_model` must not be set"),
        ({"process_reward_model": True}, "`process_reward_model` must not be set"),
    ],
)
def test_what_is_wrong_is_an_error_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: PluginManager, changes: dict[str, Any], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passages.jsonl").write_text('{"text": "w1 w2"}\n')
    cfg = yaml.safe_load(page_config())
    for key, value in changes.items():
        is_own = key == "mates" or key in importlib.import_module(NAME)._REFUSED
        (cfg if is_own else cfg["mates"])[key] = value
    with pytest.raises(ValueError, match=match):
        load(manager, yaml.safe_dump(cfg))


@pytest.mark.parametrize(
    ("reference", "num"),
    [
        ({"path": "passages.jsonl"}, 3),
        ({"path": "*.jsonl", "text_column": "text", "limit": 2}, 2),
        ({"path": "passages.jsonl", "split": "train[:1]"}, 1),
        ({"path": "folder", "prompt_column": "ask", "completion_column": "answer", "loss_on": "completion"}, 1),
    ],
)
def test_passages_are_read_from_files_and_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    manager: PluginManager,
    tiny_tokenizer: Any,
    reference: dict[str, Any],
    num: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passages.jsonl").write_text('{"text": "w3 w4"}\n' * 3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"ask": "w3 w4", "answer": "w5 w6"}\n')
    cfg = yaml.safe_load(page_config())
    cfg["mates"]["reference"] = reference
    cfg = load(manager, yaml.safe_dump(cfg))
    (callback,) = manager.add_callbacks_post_trainer(cfg, types.SimpleNamespace(processing_class=tiny_tokenizer))
    assert len(callback.reference) == num
    assert callback.reference.num_targets == (2 if "ask" in reference.values() else num)


def test_an_lm_eval_task_is_asked_for_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch, manager: PluginManager
) -> None:
    _, text = blocks("yaml", "Axolotl")
    cfg = yaml.safe_load(page_config())
    cfg["mates"] |= yaml.safe_load(text)
    cfg = load(manager, yaml.safe_dump(cfg))
    asked: list[Any] = []

    def from_lm_eval(*args: Any, **kwargs: Any) -> None:
        asked.append((args, kwargs))

    module = importlib.import_module(NAME)
    monkeypatch.setattr(module, "ReferenceTask", types.SimpleNamespace(from_lm_eval=from_lm_eval))
    module.make_reference(cfg["mates"]["reference"], "tokenizer")
    assert asked == [(("lambada_openai", "tokenizer"), {"limit": 1024})]


def test_every_refused_key_is_on_the_page(manager: PluginManager) -> None:
    refused = importlib.import_module(NAME)._REFUSED
    page = PAGE.read_text(encoding="utf-8")
    assert [key for key in refused if f"`{key}`" not in page] == []


def test_without_axolotl_the_hooks_that_are_here_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    for name in ("axolotl", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    plugin = importlib.import_module(NAME).MatesPlugin()
    assert plugin.get_input_args() == f"{NAME}.MatesArgs"
    with pytest.raises(ValueError, match="`mates` must be a mapping of settings"):
        plugin.register({})
    sys.modules.pop(NAME)
