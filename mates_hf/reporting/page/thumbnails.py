"""Small pictures of rows for the page: a PNG of at most 96 x 96 pixels and 8 KB of whatever a row has.

A pool's pictures are written by strangers. So a file is decoded within limits of bytes and pixels, by the decoders of
five usual formats alone, and what is written is made of pixels anew: no comment, place or profile of the file gets
into it. What fails is a picture that is not shown, whatever the failure is.

Trade-off: pillow is not needed by a run and is loaded when a picture is made. Limits leave very large pictures out.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.disk import require_file

MAX_SIDE = 96  # pixels
MAX_BYTES = 8_192  # of a PNG
_MAX_FILE = 32 * 2**20  # bytes that are decoded
_MAX_PIXELS = 40_000_000
_MAX_NORMALISED = 512  # pixels of a side that are turned into bytes, at least
_MAX_RATIO = 400  # of the sides: of a longer one nothing could be seen
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SIDES = (MAX_SIDE, 64, 48, 32)  # the first that is small enough in bytes
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class NotShownError(Exception):
    """A value of which no thumbnail is made; the message says why."""


def can_draw() -> bool:
    """Whether pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def thumbnail(value: Any) -> bytes:
    """A PNG of a picture.

    Args:
        value: A picture of PIL, encoded bytes, a path, a dict of `bytes` or `path` as `datasets` stores pictures, or
            an array of pixels (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels.

    Returns:
        The PNG, without any metadata. Numbers that are no bytes are normalised to 0..255 by their own least and
        largest. Pictures smaller than `MAX_SIDE` are enlarged by a whole factor, without smoothing.

    Raises:
        NotShownError: it is no picture, is damaged, or exceeds a limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library about a file of a stranger
            return _encoded(_small(_opened(value)))
    except NotShownError:
        raise
    except Exception as error:  # decoders raise what they like for a damaged file
        raise NotShownError(f"no picture that can be read ({type(error).__name__})") from None


def is_thumbnail(data: bytes) -> bool:
    """Whether some bytes are a PNG within the limits, by its size and its header."""
    if len(data) > MAX_BYTES or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        return False
    sides = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    return all(0 < side <= MAX_SIDE for side in sides)


def is_picture(value: Any) -> bool:
    """Whether a value is a picture of PIL, by its look: pillow need not be there."""
    return hasattr(value, "mode") and hasattr(value, "getpixel") and hasattr(value, "size")


def _opened(value: Any) -> Any:
    """A picture of PIL that is not decoded yet and is within the limits."""
    from PIL import Image

    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        value = _file(Path(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) > _MAX_FILE:
            raise NotShownError(f"more than {_MAX_FILE // 2**20} MB")
        value = Image.open(io.BytesIO(bytes(value)), formats=_FORMATS)
    elif not is_picture(value):
        value = Image.fromarray(_bytes_of_pixels(value))
    width, height = value.size
    if width < 1 or height < 1 or width * height > _MAX_PIXELS:
        raise NotShownError(f"{width:,} x {height:,} pixels")
    if max(width, height) > _MAX_RATIO * min(width, height):
        raise NotShownError(f"{width:,} x {height:,} pixels, a line")
    return value


def _file(path: Path) -> bytes:
    require_file(path)
    with open(path, "rb") as file:
        return file.read(_MAX_FILE + 1)


def _bytes_of_pixels(value: Any) -> npt.NDArray[np.uint8]:
    """(H, W) or (H, W, 3) uint8 of numbers."""
    pixels = np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)
    if pixels.dtype.kind not in "biuf" or pixels.ndim not in (2, 3) or not 0 < pixels.size <= 4 * _MAX_PIXELS:
        raise NotShownError("no array of pixels")
    if pixels.ndim == 3:
        if pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, 2)
        if pixels.shape[2] not in (1, 3, 4):
            raise NotShownError(f"{pixels.shape[2]} channels")
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]
    if max(pixels.shape[:2]) > _MAX_RATIO * min(pixels.shape[:2]):
        raise NotShownError("a line of pixels")
    return np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else _normalised(pixels))


def _normalised(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Numbers between the least and the largest of the picture as 0..255, of a large one every so many."""
    step = max(1, max(pixels.shape[:2]) // _MAX_NORMALISED)
    values = pixels[::step, ::step].astype(np.float64)
    known = np.isfinite(values)
    if not known.any():
        raise NotShownError("no finite pixel")
    low, high = float(values[known].min()), float(values[known].max())
    scaled = (np.where(known, values, low) - low) * (255 / (high - low) if high > low else 0.0)
    found: npt.NDArray[np.uint8] = scaled.round().clip(0, 255).astype(np.uint8)
    return found


def _small(picture: Any) -> Any:
    """A grey or coloured picture of PIL whose longer side is at most `MAX_SIDE`, made of pixels alone."""
    from PIL import Image

    if hasattr(picture, "draft"):
        picture.draft(None, (2 * MAX_SIDE, 2 * MAX_SIDE))  # a JPEG is decoded at a fraction of its size
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        picture = Image.fromarray(_normalised(np.asarray(picture)))
    longest = max(picture.size)
    if longest > MAX_SIDE and picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "LA" else "RGB")
    if longest > MAX_SIDE:
        sides = _within(picture.size, MAX_SIDE)
        picture = picture.resize(sides, Image.Resampling.BOX, reducing_gap=2.0)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        above = picture.convert("RGBA")
        picture = Image.new("RGBA", above.size, (255, 255, 255, 255))
        picture.alpha_composite(above)
    grey = picture.mode in ("1", "L")
    return picture.convert("L" if grey else "RGB")


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    share = side / max(size)
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _encoded(picture: Any) -> bytes:
    """The PNG; with fewer colours, and then smaller, where it would be too large."""
    from PIL import Image

    for side in _SIDES:
        factor = side // max(picture.size)
        if factor >= 1:
            sides = (picture.width * factor, picture.height * factor)
            sized = picture.resize(sides, Image.Resampling.NEAREST)
        else:
            sized = picture.resize(_within(picture.size, side), Image.Resampling.BOX)
        for made in (sized, sized.quantize(32) if sized.mode == "RGB" else sized):
            made.info = {}
            file = io.BytesIO()
            made.save(file, "PNG", optimize=True)
            if file.tell() <= MAX_BYTES:
                return file.getvalue()
    raise NotShownError("too many bytes")
