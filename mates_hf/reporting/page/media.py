"""Rows of a round that are more than text: a thumbnail of each picture, the length of each sound, and the label.

Where it is used: by a run whose `round_page` asks for pictures, in its main process. A picture is the dataset's own
where it has one, else what the collator made of it. Sound is not kept: its length in seconds stands for it.

Trade-off: pictures are made within a time for all of them, so a page never takes long. Rows beyond it have their
numbers and no picture.
"""

from __future__ import annotations

import base64
import io
import time
import wave
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.batches import IGNORED
from mates_hf.data.collated import collate, drawn_row
from mates_hf.data.examples import LABELS
from mates_hf.data.pool import CandidatePool
from mates_hf.reporting.page.rounds import Facts
from mates_hf.reporting.page.texts import all_shown
from mates_hf.reporting.page.thumbnails import NotShownError, can_draw, is_picture, thumbnail

MAX_LABEL = 80  # characters
MAX_SECONDS = 10.0  # for all pictures of a page
_MAX_TOKENS = 40  # of a label that is a text
_MAX_SOUND = 64 * 2**20  # bytes that are looked at for a length
_PIXELS = ("pixel_values", "image", "images", "pixels")
_NO_PILLOW = 'Pictures are not shown: pillow is not installed (`pip install "mates-hf[report]"`).'


def example_media(path: Path, info: Facts, pool: CandidatePool, tokenizer: Any, names: Any = None) -> Facts:
    """Pictures, lengths and labels of the rows that a round's page shows.

    Args:
        path: The round's directory.
        info: Its `round.json`.
        pool: The pool that it chose from.
        tokenizer: Decodes labels that are token ids, or None.
        names: The name of each class by its number, or None.

    Returns:
        `examples`, one list for each kind of `texts.Shown`, and `missing`, sentences on what is left out. An entry has
        `row`, `influence` (higher is better), `selected`, `label`, `seconds` of its sound, and `png` in base64.
    """
    reader = _Reader(pool, tokenizer, names)
    examples = {
        shown.kind: [
            {
                "row": int(row),
                "influence": float(shown.influence[i]),
                "selected": None if shown.selected is None else bool(shown.selected[i]),
                **reader.read(int(row)),
            }
            for i, row in enumerate(shown.ids)
        ]
        for shown in all_shown(path, int(info.get("num_random") or 0))
    }
    return {"examples": examples, "missing": reader.missing()}


class _Reader:
    """Reads rows, each once, and counts what it could not show."""

    def __init__(self, pool: CandidatePool, tokenizer: Any, names: Any) -> None:
        self._pool, self._tokenizer = pool, tokenizer
        self._names = _class_names(pool.dataset) or names
        self._raw = _stored(pool.dataset)
        self._seen: dict[int, Facts] = {}
        self._began, self._draws = time.perf_counter(), can_draw()
        self._problems: Counter[str] = Counter()
        self._has_pictures = False

    def read(self, row: int) -> Facts:
        """Picture, length and label of a row."""
        if row not in self._seen:
            self._seen[row] = self._read(row)
        return dict(self._seen[row])

    def missing(self) -> list[str]:
        """Sentences on pictures that are left out."""
        if self._has_pictures and not self._draws:
            return [_NO_PILLOW]
        return [f"No picture of {num} rows is shown: {why}." for why, num in self._problems.most_common(4)]

    def _read(self, row: int) -> Facts:
        try:
            own = self._own(row)
            batch = self._collated(row) or own
        except Exception as error:  # code of others on data of strangers; a page is not worth a run
            self._problems[f"it cannot be read ({type(error).__name__})"] += 1
            return {"label": None, "seconds": None, "png": None}
        found: Facts = {"label": self._label(batch), "seconds": self._seconds(own, batch), "png": None}
        picture = _own_picture(own)
        picture = _pixels(batch) if picture is None else picture
        if picture is None:
            if found["seconds"] is None and not _is_sound(own, batch):
                self._problems["its inputs have no form of a picture"] += 1
            return found
        self._has_pictures = True
        if not self._draws:
            return found
        if time.perf_counter() - self._began > MAX_SECONDS:
            self._problems[f"pictures took {MAX_SECONDS:.0f} seconds"] += 1
            return found
        try:
            found["png"] = base64.b64encode(thumbnail(picture)).decode()
        except NotShownError as error:
            self._problems[str(error)] += 1
        return found

    def _collated(self, row: int) -> Mapping[str, Any]:
        """What the run's collator makes of the row; empty without one, or where only the stored row can be read."""
        try:
            return {} if self._pool.collate_fn is None else collate(self._pool.dataset, self._pool.collate_fn, [row])
        except Exception:
            if self._raw is None:
                raise
            return {}

    def _own(self, row: int) -> Mapping[str, Any]:
        """The row as the dataset stores it: pictures are decoded here, within limits."""
        if self._raw is None:
            found = drawn_row(self._pool.dataset, row)
            return found if isinstance(found, Mapping) else {"": found}
        return {name: column[0] for name, column in self._raw[row : row + 1].to_pydict().items()}

    def _label(self, batch: Mapping[str, Any]) -> str | None:
        value = next((batch[name] for name in LABELS if batch.get(name) is not None), None)
        if value is None:
            return None
        found = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value).reshape(-1)
        if found.dtype.kind not in "biuf":
            return None
        known = found[found != IGNORED]
        if len(known) == 1 and float(known[0]).is_integer():
            number = int(known[0])
            return str(_name(self._names, number))[:MAX_LABEL]
        some = known[:_MAX_TOKENS]
        decode = getattr(getattr(self._tokenizer, "tokenizer", self._tokenizer), "decode", None)
        whole = bool((some == np.round(some)).all())
        if callable(decode) and whole:
            return str(decode([int(each) for each in some], skip_special_tokens=True))[:MAX_LABEL]
        return " ".join(f"{each:.4g}" for each in some)[:MAX_LABEL]

    def _seconds(self, own: Mapping[str, Any], batch: Mapping[str, Any]) -> float | None:
        for _, value in _values(own):
            seconds = _length(value)
            if seconds is not None:
                return seconds
        rate = getattr(getattr(self._tokenizer, "feature_extractor", self._tokenizer), "sampling_rate", None)
        samples = getattr(batch.get("input_values"), "shape", None)
        return None if not rate or not samples else samples[-1] / float(rate)


def _stored(dataset: Any) -> Any:
    """A view of a `datasets.Dataset` that gives pictures and sounds as they are stored; None for others."""
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "features"):
        return None
    media = [
        name
        for name, kind in dataset.features.items()
        if type(getattr(kind, "feature", kind)).__name__ in ("Image", "Audio")
    ]
    labels = [name for name in LABELS if name in dataset.features]
    return dataset.with_format("arrow", columns=[*media, *labels]) if media else None


def _class_names(dataset: Any) -> Any:
    features = getattr(dataset, "features", None) or {}
    return next((features[name].names for name in LABELS if hasattr(features.get(name), "names")), None)


def _name(names: Any, number: int) -> Any:
    """The name of a class; its number where there is none, or one that transformers made up."""
    try:
        found = names[number] if number >= 0 else number
    except (KeyError, IndexError, TypeError):
        return number
    return number if str(found) == f"LABEL_{number}" else found


def _own_picture(own: Mapping[str, Any]) -> Any:
    """The picture of a row: one of PIL, or one that `datasets` or a user stored encoded."""
    for name, value in _values(own):
        if is_picture(value):
            return value
        encoded = isinstance(value, Mapping) and {"bytes", "path"} <= set(value)
        if encoded and "audio" not in name and _length(value) is None:
            return value
    return None


def _values(own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a row holds, of a list the first thing."""
    for name, value in own.items():
        yield str(name).lower(), value[0] if isinstance(value, list) and value else value


def _pixels(batch: Mapping[str, Any]) -> Any:
    """The first picture of what a collator made of a row: (C, H, W), (H, W, C) or (H, W) numbers, or None."""
    for name, value in sorted(batch.items(), key=lambda item: (item[0] not in _PIXELS, str(item[0]))):
        shape = tuple(getattr(value, "shape", ()))
        deep = 4 if name not in _PIXELS else 3
        if len(shape) < deep or "mask" in str(name) or not all(shape):
            continue
        while len(value.shape) > 3:
            value = value[0]
        if value.shape[0] in (1, 3, 4) or value.shape[2] in (1, 3, 4):
            return value
    return None


def _is_sound(own: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
    named = any("audio" in name for name, _ in _values(own))
    return named or "input_features" in batch or "input_values" in batch


def _length(value: Any) -> float | None:
    """Seconds of a sound as a dataset holds it; None where it is none, or nobody can say."""
    if not isinstance(value, Mapping):
        return None
    rate, array = value.get("sampling_rate"), value.get("array")
    if rate and array is not None:
        return float(np.asarray(array).shape[-1] / float(rate))
    data = value.get("bytes")
    if not isinstance(data, bytes) or len(data) > _MAX_SOUND or data[:4] != b"RIFF":
        return None
    try:
        with wave.open(io.BytesIO(data)) as sound:
            return float(sound.getnframes() / sound.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return None
