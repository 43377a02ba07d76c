"""A selector on disk: an influence model's directory with the tokenizer of its tokens and where it comes from.

Where it is used: by `MatesSelector.save_pretrained` and `from_pretrained`; a round keeps its influence model in the
same form. Trade-off: the influence model's own files stay where they would be alone, so that its class reads them
without us; the tokenizer lies in a folder next to them, with a checksum for each of its files.

```
config.json  model.safetensors  fit.json   the influence model
tokenizer/                                 where it is known
selector.json                              checksums of the tokenizer, max_length, origin
```
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mates_hf.data.scored_column import tokenizer_digest
from mates_hf.disk import COPY_AGAIN, read_json, sha256_of, write_json
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.prediction.artifacts import CONFIG_FILE, FIT_FILE, WEIGHTS_FILE, library_version, load_influence_model
from mates_hf.round_files import ROUND_FILE, find_rounds

SELECTOR_FILE = "selector.json"
TOKENIZER_DIR = "tokenizer"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, FIT_FILE, SELECTOR_FILE, CARD_FILE, f"{TOKENIZER_DIR}/*"]

logger = logging.getLogger(__name__)

_NUM_LISTED = 8  # names in an error
_ROUND_MODEL_DIR = "influence_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Saved(NamedTuple):
    """What a directory holds.

    Attributes:
        model: The fitted influence model.
        tokenizer: Tokenizer of its tokens, or None where none was saved.
        max_length: Number of tokens that a text is cut to, or None.
        origin: Plain JSON values that say where the fit comes from.
    """

    model: Any
    tokenizer: Any
    max_length: int | None
    origin: Mapping[str, Any]


def is_hub_id(name: str) -> bool:
    """True where a name could be a repository on the Hub, and is nothing on this disk."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def download(name: str, **options: Any) -> Path:
    """Folder of a repository's files in the Hub's cache.

    Args:
        name: Name of the repository.
        **options: Options of `huggingface_hub.snapshot_download`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no such repository, or it cannot be read.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, **options))
    except (OSError, ValueError) as error:  # not there, not allowed, not online
        raise FileNotFoundError(
            f"`{name}` must be a directory or a repository on the Hub that can be read, and is not ({error})."
        ) from error


def open_selector(name: str | Path, tokenizer: Any, **options: Any) -> Saved:
    """Read what `MatesSelector.from_pretrained` is given.

    Args:
        name: A directory, `~` included, or a repository on the Hub.
        tokenizer: Tokenizer of the model's tokens, or None for the saved one.
        **options: Options of the download.

    Returns:
        What it holds, with the tokenizer to use.

    Raises:
        FileNotFoundError: there is no such directory or repository, or it holds no influence model.
        ValueError: it was written in a newer format, or with another tokenizer than the one given.
        MatesError: a file is damaged or was changed after it was written.
    """
    path = expand_path(name)
    if not path.is_dir():
        if not is_hub_id(str(name)):
            raise FileNotFoundError(f"`{name}` must be a directory or the name of a repository on the Hub.")
        path = download(str(name), **options)
    saved = read_selector(path)
    known = saved.tokenizer if saved.tokenizer is not None else getattr(saved.model, "tokenizer", None)
    if tokenizer is not None and known is not None and tokenizer_digest(tokenizer) != tokenizer_digest(known):
        raise ValueError(
            f"`tokenizer` must be the one that `{name}` was fitted with, and makes other tokens. Leave it out: the "
            "right one is saved with the model."
        )
    return saved._replace(tokenizer=known if tokenizer is None else tokenizer)


def write_selector(
    directory: Path, model: Any, tokenizer: Any, max_length: int | None, origin: Mapping[str, Any]
) -> None:
    """Write a selector; a directory without the model's config, which is written last, is refused when read.

    Args:
        directory: Directory to write into; it is created where it is missing.
        model: The fitted influence model.
        tokenizer: Tokenizer of its tokens, or None.
        max_length: Number of tokens that a text is cut to, or None.
        origin: Plain JSON values that say where the fit comes from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    _write_about(directory, tokenizer, max_length, origin)
    model.save_pretrained(directory)


def write_round_model(directory: Path, model: Any, tokenizer: Any) -> None:
    """Write the influence model of a round as a selector, so that the round filters texts without its run.

    Args:
        directory: Directory to write, which must not be there yet. The caller sets aside what a killed run left.
        model: The fitted influence model.
        tokenizer: The Trainer's `processing_class`, or None. One that is no tokenizer of text, lacks an id that the
            model has seen, or cannot be saved is left out: a round must not fail for it.
    """
    model.save_pretrained(directory)
    if not callable(getattr(tokenizer, "get_vocab", None)) or not callable(tokenizer):
        tokenizer = None
    elif getattr(model, "vocab_size", 0) > len(tokenizer):
        logger.warning(
            "The round is kept without the Trainer's `processing_class`: the pool has ids up to %d, and it has %d.",
            model.vocab_size - 1, len(tokenizer),
        )  # fmt: skip
        tokenizer = None
    try:
        _write_about(directory, tokenizer, None, {})
    except Exception as error:  # a tokenizer may fail in any way of its own
        logger.warning("The round is kept without the Trainer's `processing_class`, which cannot be saved: %s", error)
        _write_about(directory, None, None, {})


def _write_about(directory: Path, tokenizer: Any, max_length: int | None, origin: Mapping[str, Any]) -> None:
    """Write the tokenizer and `selector.json`."""
    folder = directory / TOKENIZER_DIR
    shutil.rmtree(folder, ignore_errors=True)
    recorded: dict[str, Any] | None = None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        recorded = {"digest": tokenizer_digest(tokenizer), "sha256": _checksums(folder)}
    write_json(
        directory / SELECTOR_FILE,
        {
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "max_length": max_length,
            "tokenizer": recorded,
            "origin": dict(origin),
        },
    )


def read_selector(path: Path) -> Saved:
    """Read a saved selector, a saved influence model, or the influence model of a finished round.

    Args:
        path: The directory, or that of a run or of its rounds, whose newest finished round is then read.

    Returns:
        What it holds. A round knows the tokenizer of its training run if the Trainer had one as `processing_class`.

    Raises:
        FileNotFoundError: it is none of these, or no round finished; says what is there.
        ValueError: a file was written in a newer format.
        MatesError: a file is damaged or was changed after it was written.
    """
    if (path / _ROUND_MODEL_DIR).is_dir() and not (path / CONFIG_FILE).exists():
        if not (path / ROUND_FILE).exists():
            raise FileNotFoundError(f"`{path}` is not a finished round: it has no {ROUND_FILE}.")
        return read_selector(path / _ROUND_MODEL_DIR)._replace(origin=round_origin(read_json(path / ROUND_FILE)))
    if not _holds_model(path):
        return read_selector(_newest_model(path))
    if not (path / SELECTOR_FILE).exists():
        return Saved(load_influence_model(path), None, None, {})
    about = read_json(path / SELECTOR_FILE)
    version, max_length, origin = about.get("format_version"), about.get("max_length"), about.get("origin")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"`{path}` must have a selector format of at most {FORMAT_VERSION}, got {version}, written by mates-hf "
            f"{about.get('library_version')}. Upgrade mates-hf."
        )
    whole = isinstance(version, int) and "tokenizer" in about
    if (
        not whole
        or not isinstance(origin, dict)
        or not (max_length is None or (isinstance(max_length, int) and max_length > 0))
    ):
        raise MatesError(
            f"`{path / SELECTOR_FILE}` must say `format_version`, `max_length`, `tokenizer` and `origin` as they were "
            f"written. {COPY_AGAIN}"
        )
    tokenizer = _read_tokenizer(path / TOKENIZER_DIR, about["tokenizer"])
    return Saved(load_influence_model(path), tokenizer, max_length, origin)


def _removed(rounds: Mapping[int, Path]) -> str:
    """What to do where `mates-hf forget` deleted the models of rounds."""
    if not any((path / "redacted.json").exists() for path in rounds.values()):
        return ""
    return " Rows were removed from it (`mates-hf forget`); its models are fitted again when the run resumes."


def _holds_model(path: Path) -> bool:
    """True where a directory's config is an influence model's, damaged or not; `Trainer.save_model` writes others."""
    if not (path / CONFIG_FILE).exists():
        return False
    try:
        found = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return True
    return not isinstance(found, dict) or "kind" in found or not ({"model_type", "architectures"} & set(found))


def _newest_model(path: Path) -> Path:
    """The newest finished round of a run that kept its influence model.

    Args:
        path: Path of the run, or of its rounds.

    Returns:
        The round's directory.

    Raises:
        FileNotFoundError: there is none; says what is there.
    """
    _, finished = find_rounds(path)
    with_model = [number for number, one in finished.items() if (one / _ROUND_MODEL_DIR).is_dir()]
    if with_model:
        newest = finished[max(with_model)]
        logger.info("The influence model of the newest of %d finished rounds is read: `%s`.", len(finished), newest)
        return newest
    if (path / ROUND_FILE).exists():
        why = f"It is a finished round that kept no influence model. Its run is `{path.parent}`.{_removed({0: path})}"
    elif finished:
        why = (
            f"The finished rounds there, {', '.join(map(str, finished))}, kept no influence model.{_removed(finished)}"
        )
    elif (path / CONFIG_FILE).exists():
        why = "It holds a model of transformers. Influence models are in the run's rounds, `<output_dir>/_mates`."
        _, beside = find_rounds(path.parent)
        if beside:
            why += f" Pass the run, `{path.parent}`."
    else:
        names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in path.iterdir())
        listed = ", ".join([*names[:_NUM_LISTED], *(["..."] if len(names) > _NUM_LISTED else [])])
        why = f"It has no {CONFIG_FILE} and no finished round, but {listed or 'nothing at all'}."
        begun = [name for name in (*names, *_names(path / "_mates")) if name.startswith("round-")]
        if begun:
            why += f" No round is finished: {', '.join(begun[:_NUM_LISTED])}."
    raise FileNotFoundError(
        f"`{path}` must be a saved selector, a saved influence model, a finished round, or a run that has one. {why}"
    )


def _names(path: Path) -> list[str]:
    return sorted(f"{one.name}/" for one in path.iterdir()) if path.is_dir() else []


def round_origin(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of a round, from its `round.json`; facts that it does not record are left out."""
    names = ("number", "step", "model", "reference", "num_probed", "num_candidates", "fidelity", "guard", "step_size")
    found = {("round" if name == "number" else name): info[name] for name in names if info.get(name) not in (None, {})}
    unit = _label_unit(info)
    return found | ({} if unit is None else {"label_unit": unit})


def _label_unit(info: Mapping[str, Any]) -> str | None:
    """`"step"` where a round's labels price one step, `"order"` where they look further; None for another's probe."""
    probe = info.get("probe")
    if isinstance(probe, Mapping):
        losses = probe.get("path_losses")  # of rounds before `path_points` was recorded
        points = probe.get("path_points", len(losses) if isinstance(losses, list) else None)
        if isinstance(points, int):
            return "order" if points > 1 else "step"
    measured = info.get("measured_with")
    probe = measured.get("probe") if isinstance(measured, Mapping) else None
    name = str(probe.get("class", "")) if isinstance(probe, Mapping) else ""
    units = {"OneStepProbe": "step", "LossReductionProbe": "order"}
    return units.get(name.rpartition(".")[2]) if name.startswith("mates_hf.") else None


def _read_tokenizer(folder: Path, recorded: Any) -> Any:
    """The saved tokenizer, after every file of its folder was compared with its checksum."""
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not folder.is_dir() or _checksums(folder) != recorded.get("sha256"):
        raise MatesError(
            f"`{folder}` must hold the files whose SHA-256 are in {SELECTOR_FILE}, and no others; one is missing, cut "
            f"short, changed or was added. {COPY_AGAIN}"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer_digest(tokenizer) != recorded.get("digest"):
        raise MatesError(
            f"`{folder}` must load as the tokenizer that was saved, and makes other tokens. It may need the version "
            "of transformers it was saved with."
        )
    return tokenizer


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, as a mapping from its name."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
