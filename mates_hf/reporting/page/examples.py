"""Texts and pictures as the page shows them: which kinds there are, what each means, how strong a colour is.

What a run kept of them is read back with distrust.

Trade-off: a colour says how a token compares with the others that are shown, since path labels have no unit of their
own; the numbers are in the JSON.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.display import number as figure
from mates_hf.reporting.page.rounds import Facts, number
from mates_hf.reporting.page.thumbnails import is_thumbnail

_KINDS = {
    "top": ("Best of the candidates", "The highest predicted worth among the candidates of the round."),
    "border": ("At the threshold", "The last rows that were chosen, and the first that were not."),
    "bottom": ("Worst of the candidates", "The lowest predicted worth among the candidates of the round."),
    "measured_top": ("Best of the probed rows", "The highest labels, with what was measured of each token."),
    "measured_bottom": ("Worst of the probed rows", "The lowest labels, with what was measured of each token."),
}  # fmt: skip
NGRAM_KINDS = {"token": "this token", "previous": "after this token", "bigram": "this pair"}
_MAX_ENTRIES = 40  # of a kind that are read back
_STRONG = 0.95  # quantile of what is shown at which a colour is at its strongest


def example_kinds(texts: Mapping[str, Any]) -> Facts | None:
    """The texts of a round, kind by kind.

    Args:
        texts: `round`, and `examples` as `texts.example_texts` makes them.

    Returns:
        None where there are none. Else `round`, `coloured`, a sentence on what the colours are, and `kinds`: each with
        `title`, `about`, `entries`, and `scale`, the influence at which a colour is at its strongest.
    """
    examples = texts.get("examples") or {}
    kinds = [
        {"kind": kind, "title": title, "about": about, "entries": examples[kind], "scale": _scale(examples[kind])}
        for kind, (title, about) in _KINDS.items()
        if examples.get(kind)
    ]
    if not kinds:
        return None
    coloured = any(kind["scale"] for kind in kinds)
    said = (
        f"Texts of round {texts.get('round')}, tokens coloured by their influence; of candidates it is predicted, of "
        "probed rows it was measured."
        if coloured
        else f"Texts of round {texts.get('round')}. The influence model of this run has no value for each token."
    )
    return {"round": texts.get("round"), "coloured": said, "kinds": kinds}


def checked_texts(found: Mapping[str, Any]) -> Facts:
    """Texts as a run keeps them, read back with distrust: what is not as it must be raises.

    Args:
        found: What was read.

    Returns:
        `round`, `order_sha256`, `examples` and `ngrams`, with the entries that the page shows and no others.

    Raises:
        KeyError: an entry lacks something.
        TypeError: something is of another type.
        ValueError: a number or a kind is none.
    """
    ngrams = found["ngrams"]
    return {
        "round": int(found["round"]),
        "order_sha256": str(found["order_sha256"]),
        "examples": {
            kind: [_entry(one) for one in found["examples"][kind]] for kind in _KINDS if kind in found["examples"]
        },
        "ngrams": None if ngrams is None else {s: [_ngram(one) for one in ngrams[s]] for s in ("raises", "lowers")},
    }


def media_kinds(media: Mapping[str, Any]) -> Facts | None:
    """Pictures and sounds of a round, kind by kind.

    Args:
        media: `round`, and `examples` as `media.example_media` makes them.

    Returns:
        None where there are none. Else `round`, and `kinds`: each with `title`, `about` and `entries`. An entry has an
        `alt`, which says its row, label, length and influence.
    """
    examples = media.get("examples") or {}
    kinds = [
        {"kind": kind, "title": title, "about": about, "entries": [_told(one) for one in examples[kind]]}
        for kind, (title, about) in _KINDS.items()
        if examples.get(kind)
    ]
    return {"round": media.get("round"), "kinds": kinds} if kinds else None


def _told(one: Facts) -> Facts:
    """An entry with its words for those who do not see the picture."""
    parts = [f"Row {one['row']:,}"]
    parts += [f"label {one['label']}"] if one["label"] is not None else []
    parts += [f"{one['seconds']:.1f} seconds"] if one["seconds"] is not None else []
    measured = "measured" if one["selected"] is None else "predicted"
    return {**one, "alt": ", ".join([*parts, f"{measured} influence {figure(one['influence'])}"])}


def checked_media(found: Mapping[str, Any]) -> Facts:
    """Pictures as a run keeps them, read back with distrust: what is not as it must be raises.

    Args:
        found: What was read.

    Returns:
        `round`, `order_sha256`, `examples` and `missing`, with the entries that the page shows and no others.

    Raises:
        KeyError: an entry lacks something.
        TypeError: something is of another type.
        ValueError: a picture is no PNG within the limits, or a number is none.
    """
    return {
        "round": int(found["round"]),
        "order_sha256": str(found["order_sha256"]),
        "examples": {
            kind: [_media_entry(one) for one in found["examples"][kind][:_MAX_ENTRIES]]
            for kind in _KINDS
            if kind in found["examples"]
        },
        "missing": [str(line) for line in found["missing"][:_MAX_ENTRIES]],
    }


def _media_entry(one: Mapping[str, Any]) -> Facts:
    png = one["png"]
    if png is not None:
        data = base64.b64decode(png, validate=True)
        if not is_thumbnail(data):
            raise ValueError("no PNG within the limits")
        png = base64.b64encode(data).decode()
    return {
        "row": int(one["row"]),
        "influence": number(one["influence"]),
        "selected": None if one["selected"] is None else bool(one["selected"]),
        "label": None if one["label"] is None else str(one["label"]),
        "seconds": number(one["seconds"]),
        "png": png,
    }


def _entry(one: Mapping[str, Any]) -> Facts:
    return {
        "row": int(one["row"]),
        "influence": number(one["influence"]),
        "selected": None if one["selected"] is None else bool(one["selected"]),
        "num_tokens": int(one["num_tokens"]),
        "cut": bool(one["cut"]),
        "pieces": [{"text": str(p["text"]), "influence": number(p["influence"])} for p in one["pieces"]],
    }


def _ngram(one: Mapping[str, Any]) -> Facts:
    if one["kind"] not in NGRAM_KINDS:
        raise ValueError(f"no kind of n-gram: {one['kind']!r}")
    return {
        "kind": one["kind"],
        "text": None if one["text"] is None else str(one["text"]),
        "ids": [int(token) for token in one["ids"]],
        "effect": number(one["effect"]),
        "count": number(one["count"]),
    }


def _scale(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """The size of influence that only one token in twenty exceeds; None where nothing is known."""
    known = [number(piece.get("influence")) for entry in entries for piece in entry["pieces"]]
    sizes = sorted(abs(value) for value in known if value is not None)
    return sizes[int(_STRONG * (len(sizes) - 1))] or None if sizes else None


def level_of(influence: float | None, scale: float | None) -> str:
    """The class of a token's colour: `p1` to `p3` where it raises, `n1` to `n3` where it lowers, empty in between."""
    if influence is None or not scale:
        return ""
    share = influence / scale
    size = 3 if abs(share) >= 0.75 else 2 if abs(share) >= 0.4 else 1 if abs(share) >= 0.15 else 0
    return f"{'p' if share > 0 else 'n'}{size}" if size else ""
