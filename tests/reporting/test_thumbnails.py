"""Thumbnails: a small PNG of whatever is a picture, and nothing but a sentence of what is none or too much."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mates_hf.reporting.page.thumbnails import MAX_BYTES, MAX_SIDE, NotShownError, is_thumbnail, thumbnail

Image = pytest.importorskip("PIL.Image")


def decoded(value: Any) -> Any:
    """The thumbnail, decoded; it is within the limits and holds nothing but pixels."""
    data = thumbnail(value)
    assert is_thumbnail(data)
    assert len(data) <= MAX_BYTES
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert picture.format == "PNG"
    assert max(picture.size) <= MAX_SIDE
    assert picture.info == {}
    return picture


def encoded(picture: Any, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def noise(width: int, height: int, channels: int = 3) -> Any:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


def test_a_digit_is_enlarged_without_smoothing() -> None:
    digit = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / 63 - 0.5  # normalised, as a collator hands it over
    for value in (digit, torch.from_numpy(digit), digit[0], np.moveaxis(digit, 0, 2)):
        picture = decoded(value)
        assert (picture.size, picture.mode) == ((96, 96), "L")
        pixels = np.asarray(picture)
        assert (pixels.reshape(8, 12, 8, 12) == pixels[::12, ::12][:, None, :, None]).all()
        assert pixels[0, 0] == 0
        assert pixels[-1, -1] == 255
    assert decoded(torch.rand(3, 8, 8, dtype=torch.bfloat16)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_of_each_format(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (640, 480), (200, 30, 30)), kind)
    (tmp_path / "a").write_bytes(data)
    for value in (data, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a")}, tmp_path / "a"):
        picture = decoded(value)
        assert picture.size == (96, 72)
        assert np.abs(np.asarray(picture.convert("RGB"))[36, 48].astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV"])
@pytest.mark.parametrize("side", [5, 300])
def test_each_mode_of_pillow(mode: str, side: int) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.arange(side * side, dtype=np.uint16).reshape(side, side))
    else:
        picture = noise(side, side).convert("L").convert(mode) if mode == "LA" else noise(side, side).convert(mode)
    assert picture.mode == mode
    assert max(decoded(picture).size) == MAX_SIDE // side * side or side > MAX_SIDE


@pytest.mark.parametrize(
    "value",
    [
        noise(1, 1), noise(1, 300), noise(300, 1), noise(96, 96), noise(95, 97), noise(2_000, 3_000),
        np.where(np.eye(4) > 0, np.nan, np.arange(4)), np.where(np.eye(4) > 0, np.inf, np.arange(4)),
        np.full((3, 4, 4), 7.0), np.random.default_rng(0).normal(size=(3, 224, 224)), np.ones((4, 4), bool),
        np.array([[-1e308, 1e308]]), np.zeros((4, 6, 6), np.uint8),
    ],
)  # fmt: skip
def test_odd_sizes_and_numbers_stay_within_the_limits(value: Any) -> None:
    decoded(value)


def test_nothing_of_the_file_but_pixels() -> None:
    from PIL.PngImagePlugin import PngInfo

    secret = PngInfo()
    secret.add_text("Comment", "secret")
    exif = Image.Exif()
    exif[0x010E] = "secret"
    for data in (
        encoded(noise(8, 8), "PNG", pnginfo=secret, exif=exif, icc_profile=b"secret"),
        encoded(noise(200, 200), "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret"),
        encoded(noise(8, 8).quantize(4), "PNG", transparency=0, pnginfo=secret),
    ):
        decoded(data)
        assert b"secret" not in thumbnail(data)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


WHOLE = encoded(noise(300, 300), "JPEG")
HOSTILE: dict[str, Any] = {
    "bomb": bomb(60_000, 60_000),
    "larger than pillow allows": bomb(2**31 - 1, 2**31 - 1),
    "a line": bomb(40_000, 2),
    "no width": bomb(0, 5),
    "truncated": WHOLE[: len(WHOLE) // 2],
    "half a header": encoded(noise(9, 9))[:20],
    "half a PNG": encoded(noise(300, 300))[:20_000],
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
    "HTML": b"<script>",
    "nothing": b"",
    "too many bytes": bytes(33 * 2**20),
    "no file": {"bytes": None, "path": "/nowhere/picture.png"},
    "an address": {"bytes": None, "path": "https://example.org/picture.png"},
    "no path": {"bytes": None, "path": None},
    "text": np.array(["a"]),
    "objects": np.array([[object()]]),
    "no numbers": np.full((4, 4), np.nan),
    "empty": np.zeros((3, 0, 4)),
    "channels": np.zeros((7, 7, 7)),
    "five dimensions": np.zeros((1, 1, 3, 4, 4)),
    "a long line of pixels": np.zeros((3, 1, 5_000)),
    "a number": 3,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_is_a_sentence_and_takes_no_time(name: str) -> None:
    began = time.perf_counter()
    with pytest.raises(NotShownError) as error:
        thumbnail(HOSTILE[name])
    assert time.perf_counter() - began < 2
    assert "/nowhere" not in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(NotShownError):
            thumbnail(path)


def test_a_large_photo_is_small_and_quick() -> None:
    data = encoded(noise(600, 400).resize((6_000, 4_000)), "JPEG")
    began = time.perf_counter()
    assert decoded(data).size == (96, 64)
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", WHOLE, encoded(noise(97, 9)), encoded(noise(96, 96))])
def test_what_is_read_back_is_a_small_png_or_refused(data: bytes) -> None:
    assert not is_thumbnail(data)
