"""Saved influence models: a directory of `config.json`, `model.safetensors` and `fit.json`, checked when read.

Where it is used: under the influence models' `save_pretrained` and `from_pretrained`. Trade-off: checksums in the
config make reading a large file twice as long, and a cut or edited file an error by name instead of a wrong selection.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import COPY_AGAIN, read_json, sha256_of, write_json, written_whole
from mates_hf.errors import MatesError
from mates_hf.records import FitReport

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FIT_FILE = "fit.json"
FORMAT_VERSION = 1

# A saved model names its kind; what is not in this table is never imported.
_HOMES = {
    "NgramInfluenceModel": "mates_hf.prediction.ngram_model",
    "EncoderInfluenceModel": "mates_hf.prediction.encoder_model",
    "FeatureInfluenceModel": "mates_hf.prediction.feature_model",
    "HiddenStateInfluenceModel": "mates_hf.prediction.hidden_states",
    "MooreLewisModel": "mates_hf.prediction.moore_lewis",
    "TextInfluenceModel": "mates_hf.prediction.text_model",
}


def write_artifact(
    path: str | os.PathLike[str],
    kind: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    report: FitReport | None,
) -> None:
    """Write an influence model; each file appears whole or not at all, and the config, which vouches for all, last.

    Args:
        path: directory, created where missing.
        kind: class name of the model.
        settings: plain JSON values.
        tensors: arrays by name.
        report: The report of the last fit; None of a model that is fitted to no labels.
    """
    from safetensors.numpy import save

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    with written_whole(directory / WEIGHTS_FILE) as file:
        file.write(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))
    write_json(directory / FIT_FILE, {} if report is None else report.to_dict())
    config = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        **settings,
        "sha256": {name: sha256_of(directory / name) for name in (WEIGHTS_FILE, FIT_FILE)},
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
    config, tensors = read_without_report(path, kind, settings)
    try:
        report = FitReport.from_dict(read_json(Path(path) / FIT_FILE))
    except MatesError:
        raise
    except Exception as error:  # a checksum can be forged along with its file
        raise _not_as_written(path, kind, error) from error
    return config, tensors, report


def read_without_report(
    path: str | os.PathLike[str], kind: str, settings: Iterable[str]
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The config and the arrays by name; arguments and errors are those of `read_artifact`."""
    from safetensors.numpy import load

    directory = Path(path)
    config = _read_config(directory, kind)
    missing = sorted({*settings, "sha256"} - set(config))
    digests = config.get("sha256")
    # Names in a file never become paths: only these two are read.
    if missing or not isinstance(digests, dict) or set(digests) != {WEIGHTS_FILE, FIT_FILE}:
        raise MatesError(
            f"`{directory / CONFIG_FILE}` must hold every setting and checksum, and lacks {missing or 'checksums'}. "
            f"{COPY_AGAIN}"
        )
    for name in (WEIGHTS_FILE, FIT_FILE):
        if not (directory / name).exists() or sha256_of(directory / name) != digests[name]:
            raise MatesError(
                f"`{directory / name}` must be as it was written (its SHA-256 is in {CONFIG_FILE}), and is missing, "
                f"cut short or changed. {COPY_AGAIN}"
            )
    try:
        return config, load((directory / WEIGHTS_FILE).read_bytes())
    except Exception as error:  # checksums can be forged along with a file, and safetensors has errors of its own
        raise _not_as_written(path, kind, error) from error


def _not_as_written(path: Any, kind: str, error: Exception) -> MatesError:
    return MatesError(
        f"`{path}` must hold a {kind} as it was written, and a file is damaged ({error!r}). {COPY_AGAIN}"
    )


def told_text_only(model: Any) -> dict[str, bool]:
    """What a config says of a model that reads the text of rows with other inputs; nothing of others."""
    return {"text_only": True} if model.text_only else {}


def damaged(path: Any, error: Exception) -> MatesError:
    """The error for a saved model whose content was damaged along with its checksum."""
    return MatesError(f"`{path}` must hold a model as it was fitted: {error}. {COPY_AGAIN}")


def load_influence_model(path: Path) -> Any:
    """A saved influence model of any kind that ships here.

    Args:
        path: its directory.

    Returns:
        The fitted model. Nothing is unpickled, and no name in a file becomes an import.

    Raises:
        FileNotFoundError: the directory holds no influence model.
        ValueError: it is of a kind unknown here, or was written in a newer format.
        MatesError: a file is damaged or was changed after it was written.
    """
    if not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(f"`{path}` holds no influence model: it has no {CONFIG_FILE}.")
    kind = read_json(path / CONFIG_FILE).get("kind")
    if not isinstance(kind, str):
        raise MatesError(f"`{path / CONFIG_FILE}` must say a `kind`, got {kind!r}. {COPY_AGAIN}")
    if kind not in _HOMES:
        raise ValueError(
            f"`{path}` must hold one of {', '.join(_HOMES)}, got {kind!r}. Load a model of your own with its class, "
            "and pass it: `MatesSelector(influence_model)`. A newer kind needs a newer mates-hf."
        )
    return getattr(importlib.import_module(_HOMES[kind]), kind).from_pretrained(path)


def model_digest(model: Any) -> str:
    """SHA-256 of what a model predicts by: of what it saves, or its own `digest()` where it depends on more.

    Args:
        model: fitted. A torch module that it reads candidates with, as its attribute `model`, counts too.

    Returns:
        The digest, the same in every process.
    """
    if callable(own := getattr(model, "digest", None)):
        return str(own())
    digest = hashlib.sha256()
    if callable(weights := getattr(getattr(model, "model", None), "state_dict", None)):
        import torch

        for name, tensor in weights().items():
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name == FIT_FILE:  # says how well and how fast it was fitted: nothing depends on it
                continue
            if path.name == CONFIG_FILE:
                config = {k: v for k, v in json.loads(content).items() if k not in ("sha256", "library_version")}
                content = json.dumps(config, sort_keys=True).encode()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _read_config(directory: Path, kind: str) -> dict[str, Any]:
    """The config of a saved model of this kind and of a format that can be read."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"`{directory}` holds no influence model: it has no {CONFIG_FILE}.")
    config = read_json(path)
    found, version = config.get("kind"), config.get("format_version")
    if not isinstance(found, str) or not isinstance(version, int):
        raise MatesError(
            f"`{path}` must say a `kind` and a `format_version`, got {found!r} and {version!r}. {COPY_AGAIN}"
        )
    if found != kind:
        raise ValueError(f"`{directory}` must hold a {kind}, got a {found}. Load it with the class of that name.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{directory}` must have a format version of at most {FORMAT_VERSION}, got {version}, written by "
            f"mates-hf {config.get('library_version')}. Upgrade mates-hf."
        )
    return config


def library_version() -> str:
    """Version of this library as installed."""
    try:
        return importlib.metadata.version("mates-hf")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
