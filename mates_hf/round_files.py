"""A round on disk: in the making, finished, read back. Everything a round did, readable without this library.

Where it is used: left of every folder, on top of `records`. `round_writer` makes the directories; `load_round`
needs numpy and pyarrow only, so a finished round can be read on a machine without torch.

Trade-off: a round is a directory of plain files (Parquet, npy, JSON), not one archive. It costs a few more file
handles and can be opened by anything, `sha256sum -c SHA256SUMS` included.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mates_hf.disk import (
    COPY_AGAIN,
    json_bytes,
    read_array,
    read_json,
    require_file,
    sha256_of,
    write_array,
    written_whole,
)
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.records import InfluenceLabels
from mates_hf.round_record import RoundRecord

ROUND_FILE = "round.json"
KEY_FILE = "key.json"
CHECKSUMS_FILE = "SHA256SUMS"
PROBES_FILE = "probes.parquet"
GROUPS_FILE = "groups.npy"  # (M,) int32 group of each candidate
STRATA_FILE = "probe_groups.npy"  # int32 group of each row that the probes were drawn from
REFERENCE_FILE = "reference_losses.npy"  # (R, 2) float32, mean loss and trained tokens of each reference passage
SELECTION_KEYS = ("number", "from_step", "to_step", "from_position", "num_rows", "order_sha256", "cursor")

_COLUMNS = {
    "candidate_id": "int64",
    "influence": "float32",
    "influence_per_token": "float32",
    "loss": "float32",
    "num_tokens": "int32",
    "probe": "string",
}


def write_labels(path: Path, labels: InfluenceLabels) -> None:
    """Write `probes.parquet`, and beside it derivatives of tokens and losses of passages where they are known."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if labels.token_derivatives is not None:
        write_array(path.with_name("token_derivatives.npy"), labels.token_derivatives)
    if labels.reference_losses is not None:
        write_array(path.with_name(REFERENCE_FILE), labels.reference_losses)
    values = {name: getattr(labels, name) for name in _COLUMNS}
    values["probe"] = labels.probe.tolist()
    table = pa.table({name: pa.array(values[name], getattr(pa, kind)()) for name, kind in _COLUMNS.items()})
    meta = {"step_size": labels.step_size, "info": dict(labels.info)}
    table = table.replace_schema_metadata({"mates_hf": json.dumps(meta)})
    with written_whole(path) as file:
        pq.write_table(table, file)


def read_labels(path: str | os.PathLike[str]) -> InfluenceLabels:
    """Read what `write_labels` wrote.

    Args:
        path: the `probes.parquet` of a round; `~` is the home folder.

    Returns:
        The labels; derivatives are memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        MatesError: the file is damaged, or holds other columns.
    """
    import pyarrow.parquet as pq

    path = expand_path(path)
    require_file(path)
    try:
        with open(path, "rb") as file:  # a file, not a path: folder names such as `lr=1` would become columns
            table = pq.ParquetFile(file).read(list(_COLUMNS))
        meta = json.loads((table.schema.metadata or {}).get(b"mates_hf", b'{"step_size": 1.0, "info": {}}'))
        columns = {name: table.column(name) for name in _COLUMNS}
        for name, kind in _COLUMNS.items():
            found = {"float": "float32"}.get(str(columns[name].type), str(columns[name].type))
            if found != kind or columns[name].null_count:
                raise ValueError(f"`{name}` must be {kind} without nulls, got {found}")
        values = {name: column.to_numpy() for name, column in columns.items() if name != "probe"}
        if len(values["num_tokens"]) and values["num_tokens"].min() < 0:
            raise ValueError(f"`num_tokens` must not be negative, got {values['num_tokens'].min()}")
        step_size, info = float(meta["step_size"]), dict(meta["info"])
        if not math.isfinite(step_size) or step_size == 0:
            raise ValueError(f"`step_size` must be a finite number other than 0, got {step_size}")
        return InfluenceLabels(
            **values,
            probe=np.array(columns["probe"].to_pylist(), dtype=np.str_),
            step_size=step_size,
            token_derivatives=read_array(path.with_name("token_derivatives.npy"), np.float32),
            reference_losses=read_array(path.with_name(REFERENCE_FILE), np.float32, num_dims=2),
            info=info,
        )
    except MatesError:
        raise
    except Exception as error:  # damaged Parquet ends in errors of Arrow, of the system, of memory, of text
        raise MatesError(
            f"`{path}` must hold the labels of a round, and is damaged ({error}). {COPY_AGAIN}"
        ) from error


def load_round(path: str | os.PathLike[str]) -> RoundRecord:
    """Read a finished round directory with numpy and pyarrow alone.

    Args:
        path: a round directory, `<output_dir>/_mates/round-0003`; `~` is the home folder.

    Returns:
        The record; arrays are memory-mapped.

    Raises:
        FileNotFoundError: the directory or its `round.json` is missing, so the round never finished; names the
            finished rounds that are there.
        MatesError: a file is damaged, or is not of the type or length it must have.
    """
    path = expand_path(path)
    if not (path / ROUND_FILE).exists():
        raise FileNotFoundError(_no_round(path))
    candidates = read_array(path / "candidates.npy", np.int64)
    scores = read_array(path / "scores.npy", np.float32)
    if candidates is not None and scores is not None and len(candidates) != len(scores):
        raise MatesError(
            f"`{path / 'scores.npy'}` must have one entry a candidate ({len(candidates)}), got {len(scores)}. "
            f"{COPY_AGAIN}"
        )
    return RoundRecord(
        path=path,
        info=read_json(path / ROUND_FILE),
        labels=read_labels(path / PROBES_FILE),
        candidates=candidates,
        scores=scores,
        selection=read_array(path / "selection.npy", np.int64),
    )


def find_rounds(path: Path) -> tuple[Path, dict[int, Path]]:
    """The finished rounds of a run.

    Args:
        path: its `output_dir`, or the directory that holds its rounds.

    Returns:
        The directory that holds them (`path`, or its `_mates`), and the rounds by number, ascending.
    """
    held = [folder for folder in (path, path / "_mates") if folder.is_dir() and any(folder.glob("round-*"))]
    folder = held[0] if held else path
    names = {one.name: one for one in folder.glob("round-*") if (one / ROUND_FILE).exists()} if held else {}
    finished = {int(name[6:]): one for name, one in names.items() if re.fullmatch(r"round-\d{4,9}", name)}
    return folder, dict(sorted(finished.items()))


def newest_round(path: str | os.PathLike[str], number: int | None = None) -> Path:
    """The directory of a finished round.

    Args:
        path: a round's directory, a run's `output_dir`, or the directory that holds its rounds.
        number: which round of the run; None takes the newest.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: there is no such round; names those that are there.
    """
    path = expand_path(path)
    if (path / ROUND_FILE).exists():
        if number is None:
            return path
        path = path.parent
    _, finished = find_rounds(path)
    if not finished:
        raise FileNotFoundError(_no_round(path))
    chosen = max(finished) if number is None else number
    if chosen not in finished:
        raise FileNotFoundError(f"`{path}` has no finished round {chosen}. {_named(finished)}")
    return finished[chosen]


def _named(finished: Mapping[int, Path]) -> str:
    """The finished rounds in a sentence, with one to copy."""
    numbers = list(finished)
    listed = ", ".join(map(str, numbers if len(numbers) <= 8 else [*numbers[:3], "...", *numbers[-3:]]))
    return f"Finished rounds there: {listed}; the newest is `{finished[numbers[-1]]}`."


def _no_round(path: Path) -> str:
    """Why this is not a finished round, and which are near."""
    if not path.exists():
        near = find_rounds(path.parent)[1]
        return f"`{path}` is not there.{' ' + _named(near) if near else ''}"
    if not path.is_dir():
        return f"`{path}` must be the directory of a finished round, and is a file."
    folder, near = find_rounds(path)
    if near:
        return f"`{path}` is not a finished round, but holds some. {_named(near)}"
    begun = sorted(one.name for one in folder.glob("round-*"))
    if begun:
        return f"`{folder}` holds no finished round, only {', '.join(begun[:8])}: the run was stopped in a round."
    if path.name.startswith("round-"):
        near = find_rounds(path.parent)[1]
        rest = f" {_named(near)}" if near else " The run was stopped in it, and goes on with it when resumed."
        return f"`{path}` is not a finished round: it has no {ROUND_FILE}.{rest}"
    return (
        f"`{path}` is not a finished round: it has no {ROUND_FILE}, and no rounds below it. Rounds are in "
        "`<output_dir>/_mates`, or where `rounds_dir` says; a run writes the first one at step `update_steps`."
    )


def write_checksums(path: Path, info: Mapping[str, Any]) -> None:
    """Write `SHA256SUMS` of a round's files as `sha256sum` does, and of the `round.json` that is to hold `info`."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    kept = [name for name in files if name not in (CHECKSUMS_FILE, ROUND_FILE) and not name.endswith(".tmp")]
    digests = {name: sha256_of(path / name) for name in kept}
    digests[ROUND_FILE] = hashlib.sha256(json_bytes(info)).hexdigest()
    with written_whole(path / CHECKSUMS_FILE) as file:
        file.writelines(f"{digest}  {name}\n".encode() for name, digest in digests.items())


def read_checksums(path: Path) -> dict[str, str]:
    """What `write_checksums` wrote.

    Args:
        path: the round directory.

    Returns:
        SHA-256 by file name relative to the directory.

    Raises:
        FileNotFoundError: the directory has no `SHA256SUMS`.
        MatesError: it is damaged, or names a file outside the directory.
    """
    require_file(path / CHECKSUMS_FILE)
    try:
        lines = (path / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise MatesError(f"`{path / CHECKSUMS_FILE}` must be text, and is damaged ({error}). {COPY_AGAIN}") from error
    found = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        name = PurePosixPath(match[2]) if match else PurePosixPath("/")
        if match is None or name.is_absolute() or ".." in name.parts or "\0" in match[2]:
            raise MatesError(
                f"`{path / CHECKSUMS_FILE}` must have lines of a checksum and a file of the round, got {line[:80]!r}. "
                f"{COPY_AGAIN}"
            )
        found[match[2]] = match[1]
    return found


def round_path(rounds_dir: Path, number: int) -> Path:
    """Directory of a finished round.

    Args:
        rounds_dir: `<output_dir>/_mates`.
        number: the round's number.

    Returns:
        The directory, whether or not it is there.

    Raises:
        ValueError: `number`, which may come from a file, is no round's number.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"A round's number must be a whole number of at least 0, got {number!r}.")
    return rounds_dir / f"round-{number:04d}"
