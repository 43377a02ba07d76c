"""What all arms of a pilot read: rows of the pool, passages in three disjoint parts, a tokenizer; made once and kept.

Where it is used: `run_pilot`, before the first unit. The reference is parted into what labels and filters may see,
what filters are tuned on, and what arms are judged by. No two parts, and no document of the pool with one of them,
share a run of 13 words: what does is left out and counted.

Trade-off: rows of one length, each of one group, so that arms train on equal tokens; a passage is cut into pieces of
that length, and is one passage when intervals are drawn.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.files import load_rows
from mates_hf.data.overlap import find_overlap
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.disk import make_directory, read_json, replace_path, sync_tree, write_json
from mates_hf.display import cut as shortened
from mates_hf.pilot.settings import PilotSettings

logger = logging.getLogger(__name__)

BUILT_IN = "built-in"
PARTS = ("reference", "tuning", "held_out")
_SHARES = (0.5, 0.2)  # of the reference: for labels, for tuning; the rest is held out
_LEAST = 8  # passages of a part
_LEAST_PIECE = 8  # tokens of a piece that is not a passage's only one
_AT_ONCE = 1_000
_NO_GROUP, _OTHERS = "(no group)", "(other groups)"
_MOST_GROUPS, _LONGEST_NAME = 40, 60


@dataclasses.dataclass(frozen=True)
class Passages:
    """Passages in pieces of at most a row.

    Attributes:
        rows: The M pieces.
        owner: (M,) int64, the passage of each piece.
    """

    rows: TokenRows
    owner: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.owner.max()) + 1


@dataclasses.dataclass(frozen=True)
class PilotInputs:
    """What is read.

    Attributes:
        pool: A `datasets.Dataset` of `input_ids`, `labels` and `group`, rows of one length.
        kept_out: Rows of the pool that no arm trains on, and the group of each.
        passages: Passages of each part.
        tokenizer: The tokenizer.
        facts: Counts, JSON values.
    """

    pool: Any
    kept_out: tuple[TokenRows, list[str]]
    passages: Mapping[str, Passages]
    tokenizer: Any
    facts: Mapping[str, Any]

    @property
    def reference(self) -> ReferenceTask:
        """What labels read."""
        rows = self.passages["reference"].rows
        pieces = [{"input_ids": rows.row(i)[0].tolist()} for i in range(len(rows))]
        return ReferenceTask.from_dataset(pieces, input_ids_column="input_ids")


def read_pilot_inputs(folder: Path, pool: Any, reference: Any, held_out: Any, settings: PilotSettings) -> PilotInputs:
    """Read what an earlier call left in the folder, or read the sources and leave it there.

    Args:
        folder: Where it is kept, whole or not at all.
        pool: Documents in any form that `load_rows` takes, or `"built-in"`.
        reference: Passages in such a form; None with the built-in pool.
        held_out: Passages that arms are judged by; None takes them from the reference.
        settings: How the pilot is run.

    Returns:
        The inputs.

    Raises:
        OSError: there are no such files.
        ValueError: a column is missing, or there are too few passages or rows.
    """
    if not folder.exists():
        texts, groups, parts = _read_texts(pool, reference, held_out, settings)
        texts, groups, parts, facts = _disjoint(texts, groups, parts)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_directory(partial)
        _write(partial, texts, groups, parts, facts, settings)
        sync_tree(partial)
        replace_path(partial, folder)
    return _open(folder)


def _read_texts(
    pool: Any, reference: Any, held_out: Any, settings: PilotSettings
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Texts and groups of the pool, and passages of each part."""
    if isinstance(pool, str) and pool == BUILT_IN:
        corpus = builtin_corpus(seed=0)
        texts, groups = [row["text"] for row in corpus.pool], [row["kind"] for row in corpus.pool]
        if reference is None:
            order = np.random.default_rng(0).permutation(len(corpus.development)).tolist()
            middle = len(order) // 3
            tuning, judged = ([corpus.development[i] for i in part] for part in (order[:middle], order[middle:]))
            return (
                texts,
                groups,
                _limited({"reference": corpus.reference, "tuning": tuning, "held_out": judged}, settings),
            )
    else:
        texts, groups = _documents(pool, settings)
    if reference is None:
        raise ValueError("A pool of your own must have a `reference`: a file of passages that the model should learn.")
    passages = _texts_of(reference, settings.reference_column, "reference")
    order = np.random.default_rng(0).permutation(len(passages)).tolist()
    shares = _SHARES if held_out is None else (0.75, 0.25)
    first, second = (round(edge * len(order)) for edge in np.cumsum(shares))
    found = {
        name: [passages[i] for i in part]
        for name, part in (("reference", order[:first]), ("tuning", order[first:second]))
    }
    rest = [passages[i] for i in order[second:]]
    found["held_out"] = rest if held_out is None else _texts_of(held_out, settings.reference_column, "held_out")
    return texts, groups, _limited(found, settings)


def _limited(parts: dict[str, list[str]], settings: PilotSettings) -> dict[str, list[str]]:
    """No more passages than are wanted; they are in a random order."""
    most = {
        "reference": settings.reference_limit,
        "tuning": settings.held_out_limit,
        "held_out": settings.held_out_limit,
    }
    return {name: texts[: most[name]] for name, texts in parts.items()}


def _documents(pool: Any, settings: PilotSettings) -> tuple[list[str], list[str]]:
    """Texts of the pool and their groups."""
    wanted = settings.group_column

    def columns(names: Sequence[str]) -> list[str]:
        group = wanted or ("kind" if "kind" in names else None)
        missing = [name for name in (settings.column, wanted) if name is not None and name not in names]
        if missing:
            raise ValueError(
                f"`pool` must have the column `{missing[0]}`, got the columns {list(names)}. Name the texts by "
                "`column` and the groups by `group_column`."
            )
        return [settings.column, *([group] if group else [])]

    loaded = load_rows(pool, columns, name="pool", num_rows=settings.pool_documents, seed=0).dataset
    texts = _checked(loaded[settings.column], "pool", settings.column)
    others = [name for name in loaded.column_names if name != settings.column]
    groups = _group_names(loaded[others[0]]) if others else [_NO_GROUP] * len(texts)
    kept = [i for i, text in enumerate(texts) if text.strip()]
    return [texts[i] for i in kept], [groups[i] for i in kept]


def _group_names(values: Any) -> list[str]:
    """Groups as they are shown: short, printable, and those with few documents together."""
    names = [_NO_GROUP if one is None else shortened(str(one), _LONGEST_NAME) for one in values]
    largest = {name for name, _ in Counter(names).most_common(_MOST_GROUPS)}
    return [name if name in largest else _OTHERS for name in names]


def _texts_of(source: Any, column: str, name: str) -> list[str]:
    """All passages of a file, without empty ones."""

    def columns(names: Sequence[str]) -> list[str]:
        if column not in names:
            raise ValueError(
                f"`{name}` must have the column `{column}`, got the columns {list(names)}. Name it: "
                "`reference_column`."
            )
        return [column]

    texts = _checked(load_rows(source, columns, name=name).dataset[column], name, column)
    return [text for text in texts if text.strip()]


def _checked(values: Any, name: str, column: str) -> list[str]:
    found = ["" if one is None else one for one in values]
    wrong = next((one for one in found if not isinstance(one, str)), None)
    if wrong is not None:
        raise ValueError(f"`{name}` must have texts in the column `{column}`, got {type(wrong).__name__}.")
    return found


def _disjoint(
    texts: list[str], groups: list[str], parts: dict[str, list[str]]
) -> tuple[list[str], list[str], dict[str, list[str]], dict[str, Any]]:
    """The same without copies and without what shares 13 words with another part, and how much was left out."""
    facts: dict[str, Any] = {"documents": len(texts)}
    first = list({text: i for i, text in reversed(list(enumerate(texts)))}.values())
    keep = sorted(first)
    facts["copies"] = len(texts) - len(keep)
    texts, groups = [texts[i] for i in keep], [groups[i] for i in keep]
    later: list[str] = []
    for name in reversed(PARTS):  # what is judged by stays whole
        shared = set(find_overlap(parts[name], later).tolist()) if later else set()
        unique = list(dict.fromkeys(text for i, text in enumerate(parts[name]) if i not in shared))
        facts[name] = {"passages": len(unique), "left_out": len(parts[name]) - len(unique)}
        if len(unique) < _LEAST:
            raise ValueError(
                f"A pilot must have at least {_LEAST} passages in each part, and {name.replace('_', '-')} has "
                f"{len(unique)} that share no text with the others. Give more passages as `reference`."
            )
        parts[name] = unique
        later += unique
    shared = set(find_overlap(texts, later).tolist())
    facts["shared_with_passages"] = len(shared)
    keep = [i for i in range(len(texts)) if i not in shared]
    return [texts[i] for i in keep], [groups[i] for i in keep], parts, facts


def _write(
    folder: Path, texts: list[str], groups: list[str], parts: dict[str, list[str]], facts: dict[str, Any],
    settings: PilotSettings,
) -> None:  # fmt: skip
    """Tokenise, cut, keep rows out, and write all of it."""
    tokenizer = _tokenizer(texts, settings)
    rows, names = _rows(texts, groups, tokenizer, settings.row_tokens)
    order = np.random.default_rng(1).permutation(len(rows))
    rows, names = rows[order], names[order]
    kept = np.concatenate([np.flatnonzero(names == name)[: settings.group_rows] for name in np.unique(names)])
    train = np.setdiff1d(np.arange(len(rows)), kept)
    if len(train) < 10 * settings.batch_rows:
        raise ValueError(
            f"`pool` must have rows to train on, got {len(train):,} of {settings.row_tokens} tokens. Give more "
            "documents, or lower `row_tokens`."
        )
    _dataset(rows[train], names[train]).save_to_disk(str(folder / "pool"))
    _dataset(rows[kept], names[kept]).save_to_disk(str(folder / "kept-out"))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    found = {name: _pieces(passages, tokenizer, settings.row_tokens) for name, passages in parts.items()}
    write_json(folder / "passages.json", found)
    counts = dict(zip(*(part.tolist() for part in np.unique(names, return_counts=True)), strict=True))
    facts |= {
        "rows": len(train),
        "kept_out": len(kept),
        "groups": {name: num / len(rows) for name, num in counts.items()},
    }
    write_json(folder / "facts.json", facts)


def _tokenizer(texts: list[str], settings: PilotSettings) -> Any:
    """The tokenizer that was named, or a byte-level BPE trained on the pool."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = settings.tokenizer or settings.model
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # whatever is missing or cannot be read
            raise ValueError(
                f"`tokenizer` must be a folder or a repository on the Hub that holds one, and {name!r} cannot be read "
                f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})."
            ) from error
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        iter(texts), vocab_size=settings.vocab_size, special_tokens=["<|end|>"], show_progress=False
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def _rows(
    texts: list[str], groups: list[str], tokenizer: Any, length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """(N, length) tokens and (N,) groups: each text is cut by itself, and what is left over is joined in its group."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    blocks: list[npt.NDArray[np.int32]] = []
    names: list[str] = []
    rest: dict[str, list[int]] = {}
    for start in range(0, len(texts), _AT_ONCE):
        chunk = tokenizer(texts[start : start + _AT_ONCE], add_special_tokens=False)["input_ids"]
        for group, text in zip(groups[start : start + _AT_ONCE], chunk, strict=True):
            ids = [*text, *ends]
            whole = len(ids) - len(ids) % length
            left = rest.setdefault(group, [])
            left += ids[whole:]
            joined = len(left) - len(left) % length
            block = np.array([*ids[:whole], *left[:joined]], np.int32).reshape(-1, length)
            rest[group] = left[joined:]
            blocks.append(block)
            names += [group] * len(block)
    return np.concatenate([*blocks, np.zeros((0, length), np.int32)]), np.array(names, object)


def _pieces(passages: list[str], tokenizer: Any, length: int) -> dict[str, list[Any]]:
    """Tokens of each piece, and the passage that it is of."""
    pieces: list[list[int]] = []
    owner: list[int] = []
    num = 0
    for ids in tokenizer(passages, add_special_tokens=False)["input_ids"]:
        found = [ids[i : i + length] for i in range(0, len(ids), length)]
        found = [piece for i, piece in enumerate(found) if len(piece) >= (2 if i == 0 else _LEAST_PIECE)]
        pieces += found
        owner += [num] * len(found)
        num += bool(found)
    return {"pieces": pieces, "owner": owner}


def _dataset(rows: npt.NDArray[np.int32], names: npt.NDArray[Any]) -> Any:
    import datasets
    import pyarrow as pa

    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    ids = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
    return datasets.Dataset(
        pa.table({"input_ids": ids, "labels": ids, "group": pa.array(names.tolist(), pa.string())})
    )


def _open(folder: Path) -> PilotInputs:
    """What was written."""
    import datasets
    from transformers import AutoTokenizer

    kept = datasets.load_from_disk(str(folder / "kept-out"))
    passages = {
        name: Passages(TokenRows.from_lists(one["pieces"]), np.array(one["owner"], np.int64))
        for name, one in json.loads((folder / "passages.json").read_text(encoding="utf-8")).items()
    }
    return PilotInputs(
        pool=datasets.load_from_disk(str(folder / "pool")),
        kept_out=(TokenRows.from_lists(kept["input_ids"][:]), list(kept["group"][:])),
        passages=passages,
        tokenizer=AutoTokenizer.from_pretrained(str(folder / "tokenizer"), trust_remote_code=False),
        facts=read_json(folder / "facts.json"),
    )
