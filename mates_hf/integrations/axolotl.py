"""Axolotl: `plugins: [mates_hf.integrations.axolotl.MatesPlugin]`, with the settings under `mates:` in its YAML.

Where it is used: Axolotl's plugin manager imports this module and calls the hooks. Settings are checked when the file
is read, before a model is loaded; the callback is made once there is a Trainer, whose tokenizer reads the passages.

Trade-off: the class inherits from Axolotl's where that is installed, so that hooks of newer versions have their
defaults. Without it the hooks that are here work alike, which is enough for other managers of the same contract.
"""

from __future__ import annotations

import difflib
import glob
import inspect
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask
from mates_hf.paths import expand_path
from mates_hf.training.callback import MatesCallback

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError:  # only its own manager needs these
    BasePlugin = BaseModel = object  # type: ignore[assignment, misc, unused-ignore]

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

# Keys of Axolotl that no schedule of rows can serve, and what to write instead. The callback would find them too, but
# after the model was loaded, and by other names.
_REFUSED = {
    "sample_packing": "Axolotl then cuts its batches itself. Set it to false. `batch_flattening: true` trains without "
    "padding as well, with `attn_implementation: flash_attention_2`",
    "streaming": "a stream cannot be reordered. Set it to false, and list the pool under `datasets`",
    "pretraining_dataset": "Axolotl reads it as a stream. List the pool under `datasets` with `type: completion`",
    "rl": "a loss of preferences is no loss of rows. Leave the plugin out, or train without `rl`",
    "reward_model": "a loss of preferences is no loss of rows. Leave the plugin out",
    "process_reward_model": "a loss of rewards is no loss of rows. Leave the plugin out",
}


class MatesArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """What Axolotl adds to the keys of its config file.

    Attributes:
        mates: The fields of `MatesConfig`, and `reference`.
    """

    mates: dict[str, Any] | None = None


class MatesPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Selects data while Axolotl trains, by the key `mates` of its config file.

    `mates` has the fields of `MatesConfig`, and `reference`: a mapping with `path` and arguments of
    `ReferenceTask.from_dataset`, or with `lm_eval` and arguments of `ReferenceTask.from_lm_eval`.
    """

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Check the settings when the config file is read, before a model is loaded.

        Args:
            cfg: The whole config.

        Raises:
            ValueError: a setting is missing, unknown or wrong, or stands in the way of a selection.
        """
        read_settings(cfg)

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys that are added."""
        return f"{__name__}.{MatesArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Any) -> list[MatesCallback]:
        """The callback, for Axolotl to add to its Trainer.

        Args:
            cfg: The whole config.
            trainer: The Trainer, whose tokenizer reads the reference task.

        Returns:
            One callback.

        Raises:
            ValueError: as `register`; or the passages cannot be read.
        """
        config, asked = read_settings(cfg)
        return [MatesCallback(make_reference(asked, getattr(trainer, "processing_class", None)), config)]


def read_settings(cfg: Mapping[str, Any]) -> tuple[MatesConfig, dict[str, Any]]:
    """How data is chosen, and what the reference task is made of.

    Args:
        cfg: Axolotl's config.

    Returns:
        The `MatesConfig`, and the keys of `mates.reference`.

    Raises:
        ValueError: a key is missing or unknown, a value is wrong, or another key stands in the way of a selection.
    """
    given = _mapping("mates", cfg.get("mates"), "It has `reference` and the fields of `MatesConfig`.")
    for key, way_out in _REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"`{key}` must not be set together with `mates`, got {cfg[key]!r}: {way_out}.")
    known = MatesConfig.__dataclass_fields__.keys()
    _refuse_unknown("mates", given, ("reference", *known))
    asked = _mapping("mates.reference", given.pop("reference", None), "It has `path`, or `lm_eval`.")
    _check_reference(asked)
    return MatesConfig(**given), asked


def make_reference(asked: Mapping[str, Any], tokenizer: Any) -> ReferenceTask:
    """What the model should get better at.

    Args:
        asked: The keys of `mates.reference`.
        tokenizer: The run's tokenizer.

    Returns:
        The reference task.

    Raises:
        ValueError: there are no passages, or they have no such column.
    """
    given = dict(asked)
    if "lm_eval" in given:
        return ReferenceTask.from_lm_eval(given.pop("lm_eval"), tokenizer, **given)
    from datasets import load_dataset

    path, config_name = str(given.pop("path")), given.pop("config_name", None)
    split, kind = given.pop("split", "train"), _file_format(path)
    files = None if kind is None else _written_out(path)
    passages = load_dataset(kind or path, config_name, data_files=files, split=split)
    if not any(key.endswith("_column") for key in given):
        given["text_column"] = "text"
    return ReferenceTask.from_dataset(passages, tokenizer, **given)


def _check_reference(asked: Mapping[str, Any]) -> None:
    """Raise where it is not one of the two forms, a key is unknown, or its file is not there."""
    if ("path" in asked) == ("lm_eval" in asked):
        raise ValueError(
            "`mates.reference` must have either `path` (a file, a folder or a dataset of the Hub) or `lm_eval` (a "
            f"task), got {sorted(asked) or 'none'}."
        )
    if "path" in asked:
        known = ("path", "config_name", "split", *_keywords(ReferenceTask.from_dataset))
    else:
        known = ("lm_eval", *_keywords(ReferenceTask.from_lm_eval))
    _refuse_unknown("mates.reference", asked, known)
    path = str(asked.get("path", ""))
    if _file_format(path) and "://" not in path and not glob.glob(_written_out(path)):
        raise ValueError(
            f"`mates.reference.path` must name a file that is there, got {path!r}. A path that does not begin with "
            "`/` begins at the folder that Axolotl was started in."
        )


def _written_out(path: str) -> str:
    """A local path with its home folder; a remote one as it is."""
    return path if "://" in path else str(expand_path(path))


def _file_format(path: str) -> str | None:
    """What `load_dataset` calls this kind of file; None where the path is no file of a known kind."""
    suffixes = [suffix for suffix in PurePath(path).suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _keywords(function: Any) -> list[str]:
    """Names of the arguments that can only be given by name."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _mapping(name: str, value: Any, what: str) -> dict[str, Any]:
    """The value as a dict; an error that says what belongs there where it is none."""
    if not isinstance(value, Mapping):
        got = "nothing" if value is None else repr(value)
        raise ValueError(f"`{name}` must be a mapping of settings, got {got}. {what}")
    return dict(value)


def _refuse_unknown(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise where a key is none of the known ones, with the one that was meant."""
    for key in given:
        if key not in (names := list(known)):
            close = difflib.get_close_matches(str(key), names, n=1)
            meant = f"`{close[0]}` is the nearest." if close else f"There are {', '.join(names)}."
            raise ValueError(f"`{name}` must have known settings only, got `{key}`. {meant}")
