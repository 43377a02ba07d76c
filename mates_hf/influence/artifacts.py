"""Saved influence models: a directory of `config.json`, `model.safetensors` and `fit.json`, checked when read.

Place in the flow: under the influence models' `save_pretrained` and `from_pretrained`. Trade-off: checksums in the
config make reading a large file twice as long, and a cut or edited file an error by name instead of a wrong selection.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.records import FitReport, MatesError, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FIT_FILE = "fit.json"
FORMAT_VERSION = 1


def write_artifact(
    path: str | os.PathLike[str],
    kind: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    report: FitReport,
) -> None:
    """Write an influence model; each file appears whole or not at all, and the config, which vouches for all, last.

    Args:
        path: directory, created where missing.
        kind: class name of the model.
        settings: plain JSON values.
        tensors: arrays by name.
        report: of the last fit.
    """
    from safetensors.numpy import save

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (WEIGHTS_FILE + ".tmp")
    with open(temporary, "wb") as file:
        file.write(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / WEIGHTS_FILE)
    write_json(directory / FIT_FILE, report.to_dict())
    config = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        **settings,
        "sha256": {name: _digest(directory / name) for name in (WEIGHTS_FILE, FIT_FILE)},
    }
    write_json(directory / CONFIG_FILE, config)


def read_artifact(
    path: str | os.PathLike[str], kind: str, settings: Iterable[str]
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]], FitReport]:
    """Read what `write_artifact` wrote.

    Args:
        path: the directory.
        kind: class name that must have written it.
        settings: names that the config must hold.

    Returns:
        The config, the arrays by name, the report.

    Raises:
        FileNotFoundError: the directory holds no influence model.
        ValueError: it holds another kind of model, or was written in a newer format.
        MatesError: a file is missing, damaged, or was changed after it was written.
    """
    from safetensors.numpy import load

    directory = Path(path)
    config = _read_config(directory, kind)
    missing = sorted({*settings, "sha256"} - set(config))
    if missing or set(config["sha256"]) != {WEIGHTS_FILE, FIT_FILE}:
        raise MatesError(
            f"`{directory / CONFIG_FILE}` must hold every setting and checksum, and lacks {missing or 'checksums'}. "
            "Copy the directory again, or fit again."
        )
    for name, digest in config["sha256"].items():
        if not (directory / name).exists() or _digest(directory / name) != digest:
            raise MatesError(
                f"`{directory / name}` must be as it was written (its SHA-256 is in {CONFIG_FILE}), and is missing, "
                "cut short or changed. Copy the directory again, or fit again."
            )
    tensors = load((directory / WEIGHTS_FILE).read_bytes())
    report = FitReport.from_dict(json.loads((directory / FIT_FILE).read_text(encoding="utf-8")))
    return config, tensors, report


def _read_config(directory: Path, kind: str) -> dict[str, Any]:
    """The config of a saved model of this kind and of a format that can be read."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"`{directory}` holds no influence model: it has no {CONFIG_FILE}.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, version = config["kind"], int(config["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise MatesError(
            f"`{path}` must be a whole JSON object with `kind` and `format_version`, and is not ({error!r}). Copy the "
            "directory again, or fit again."
        ) from error
    if found != kind:
        raise ValueError(f"`{directory}` must hold a {kind}, got a {found}. Load it with the class of that name.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{directory}` must have a format version of at most {FORMAT_VERSION}, got {version}, written by "
            f"mates-hf {config.get('library_version')}. Upgrade mates-hf."
        )
    return config


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _library_version() -> str:
    try:
        return importlib.metadata.version("mates-hf")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
