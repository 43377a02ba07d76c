"""Units of a text, read straight from its UTF-8 bytes: words, signs and letters, hashed into buckets.

Where it is used: under `text_model`, for fitting and for scoring, so that both see the same units. Trade-off: no
normal form and no dictionary, so that a byte is read once; two spellings of a word are two words. The kernels are
compiled with numba on a machine's first use, let go of the interpreter, and read no byte outside of a text.

How a text is cut, which is part of a saved model's format:

- A *word* is a run of ASCII letters and digits and of letters of two bytes (Latin, Greek, Cyrillic, Hebrew, Arabic,
  ...) and of the scripts of India, at most 16 bytes long. What is left of a longer one is the next word.
- A *letter* is one character of a script without spaces between words: Thai, Lao, Burmese, Khmer, and all from
  U+2E80 on.
- A *sign* is any other character, and a run of white space that is more than one space, at most 16 bytes long. One
  space alone parts words and is no unit.

- Of a word or a sign of six bytes or more the first three and the last three bytes are two *pieces*, which count where
  the model says so.

The key of a unit of L bytes is `mix(first 8 bytes, L)`, and with more than 8 bytes `mix(key ^ next 8 bytes, L)`, both
read as little-endian numbers that end in zero bytes; `mix(x, L) = f((x ^ L * A) * B)` with `f(x) = x ^ (x >> 32)`. The
key of a pair is `f((f(first * A) ^ second) * B)`. Of a piece it is `mix(bytes, 32)`, of last bytes `mix(bytes, 33)`.
A bucket is the highest bits of `key * B`. All is modulo 2**64.
Signs and units: effects are in the unit of what was fitted, > 0 helps.

Shape suffixes: U units of all texts, H buckets.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mates_hf.data.rows import Piece
from mates_hf.data.text_spans import TextSpans
from mates_hf.prediction.compiled import compiled
from mates_hf.prediction.threads import spread

_A = np.uint64(0xD6E8FEB86659FD93)
_B = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_ZERO, _ONE, _EIGHT, _SIXTEEN, _ALL = (np.uint64(n) for n in (0, 1, 8, 16, 64))
_TWO, _SIX = np.uint64(2), np.uint64(6)
_THREE, _BITS = np.uint64(3), np.uint64(56)  # positions of a byte's first bit
_FIRST, _LAST = np.uint64(32), np.uint64(33)  # kinds of pieces; no unit has such a length
_SPACE, _BYTE, _LONG_BYTE, _LETTERS, _FOUR_BYTES = (np.uint64(n) for n in (0x20, 0xFF, 0x80, 0xE3, 0xF0))
_THREE_BYTES = np.uint64(0xFFFFFF)
_WORD, _SIGN, _WHITE, _LONG = range(4)  # classes of bytes; of the last, the character's further bytes decide
_NOTHING, _PLAIN, _LETTER = range(3)  # kinds of units
_SMALL = 2**20  # bytes below which threads are not worth starting
_PART = 2**17  # bytes below which handing a part to a thread costs more than it saves
_NATIVE = sys.byteorder == "little"

# Bytes of eight at once, each below 0x80: `0x80` stands where a sum passed the bound, and no sum reaches 0x100.
_HIGH = np.uint64(0x8080808080808080)
_LOWER = np.uint64(0x2020202020202020)
_FROM_A, _PAST_Z = np.uint64(0x1F1F1F1F1F1F1F1F), np.uint64(0x0505050505050505)
_FROM_0, _PAST_9 = np.uint64(0x5050505050505050), np.uint64(0x4646464646464646)


def _class_of(byte: int) -> int:
    if byte >= 0x80:
        return _LONG
    return _WORD if chr(byte).isalnum() else _WHITE if chr(byte) in " \t\n\r\v\f" else _SIGN


_CLASSES = np.array([_class_of(byte) for byte in range(256)], np.uint8)


def _load_code(typingctx: Any, address: Any, offset: Any) -> Any:
    """Eight bytes at an address, which need not be aligned, as a number in the machine's order."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.add(arguments[0], arguments[1])
        pointer = builder.inttoptr(where, ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.uintp, types.uint64), build


def _byte_code(typingctx: Any, address: Any, offset: Any) -> Any:
    """The byte at an address. Handing an array on to another compiled function would count its references instead."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.add(arguments[0], arguments[1])
        return builder.load(builder.inttoptr(where, ir.IntType(8).as_pointer()))

    return types.uint8(types.uintp, types.uint64), build


def _trailing_zeros_code(typingctx: Any, value: Any) -> Any:
    """Number of zero bits below the lowest one of a number that is not 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), build


_load: Any = intrinsic(_load_code)
_byte: Any = intrinsic(_byte_code)
_trailing_zeros: Any = intrinsic(_trailing_zeros_code)


@numba.njit(inline="always")
def _fold(value: Any) -> Any:
    return value ^ (value >> _HALF)


@numba.njit(inline="always")
def _key_of(low: Any, high: Any, length: Any) -> Any:
    """Key of a unit from its bytes as two numbers."""
    key = _fold((low ^ length * _A) * _B)
    if length > _EIGHT:
        key = _fold((key ^ high ^ length * _A) * _B)
    return key


@numba.njit
def _slow_eight(text: Any, begin: Any, end: Any) -> Any:
    """Bytes from `begin` to before `end`, at most eight, as a little-endian number."""
    value, shift = _ZERO, _ZERO
    for i in range(begin, min(end, begin + _EIGHT)):
        value |= np.uint64(_byte(text, i)) << shift
        shift += _EIGHT
    return value


@numba.njit
def _key_between(text: Any, begin: Any, end: Any) -> Any:
    """Key of the unit from `begin` to before `end`, at most 16 bytes."""
    high = _slow_eight(text, begin + _EIGHT, end) if end - begin > _EIGHT else _ZERO
    return _key_of(_slow_eight(text, begin, end), high, end - begin)


@numba.njit
def _width(text: Any, i: Any) -> Any:
    """Bytes of the character that starts at `i`, as its first byte says."""
    first = _byte(text, i)
    return np.uint64(1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4)


@numba.njit
def _kind_of_long(text: Any, i: Any, end: Any) -> Any:
    """Whether a character of several bytes goes into a word (0), is a sign (1) or a letter of its own (2)."""
    first = _byte(text, i)
    second = _byte(text, i + _ONE) if i + _ONE < end else np.uint8(0)
    if first < 0xC2:  # no character starts so; the byte is a sign
        return 1
    if first == 0xC2:  # U+0080 to U+00BF
        return 1
    if first < 0xE0:
        return 0
    if first == 0xE0:  # Thai and Lao are U+0E00 to U+0EFF
        return 2 if 0xB8 <= second <= 0xBB else 0
    if first == 0xE1:  # Burmese is U+1000 to U+10BF, Khmer U+1780 to U+17FF
        return 2 if second <= 0x82 or second == 0x9E or second == 0x9F else 0
    if first == 0xE2:  # up to U+2E7F: punctuation, arrows, mathematics, boxes
        return 2 if second >= 0xBA else 1
    return 2


@numba.njit
def _end_of_word(text: Any, i: Any, end: Any) -> Any:
    """Where the word ends that goes on at `i`, at most at `end`."""
    while i < end:
        kind = _CLASSES[_byte(text, i)]
        if kind == _WORD:
            i += _ONE
        elif kind == _LONG and _kind_of_long(text, i, end) == 0:
            following = i + _width(text, i)
            if following > end:
                break
            i = following
        else:
            break
    return i


@numba.njit
def _other_unit(text: Any, i: Any, end: Any) -> Any:
    """The unit at `i`, whatever it is: where it ends, its key, and its kind."""
    kind = _CLASSES[_byte(text, i)]
    limit = min(end, i + _SIXTEEN)
    if kind == _WHITE:
        stop = i + _ONE
        while stop < limit and _CLASSES[_byte(text, stop)] == _WHITE:
            stop += _ONE
        if stop == i + _ONE and _byte(text, i) == _SPACE:
            return stop, _ZERO, _NOTHING
        return stop, _key_between(text, i, stop), _PLAIN
    if kind == _SIGN:
        return i + _ONE, _key_between(text, i, i + _ONE), _PLAIN
    if kind == _LONG:
        of_long = _kind_of_long(text, i, end)
        if of_long != 0:
            stop = min(end, i + _width(text, i))
            return stop, _key_between(text, i, stop), _LETTER if of_long == 2 else _PLAIN
    stop = _end_of_word(text, i, limit)
    if stop == i:  # a character that the text ends in the middle of
        stop = end
    return stop, _key_between(text, i, stop), _PLAIN


# Almost all of a text are ASCII words and signs. They are found eight bytes at a time, without a branch a byte: a word
# is as long as where the first byte stands that is neither letter nor digit. A byte of 0x80 and above carries into
# later bytes alone, so what stands before it is found right. Everything else, and the last bytes of a text, is read
# byte by byte, and gives the same keys.
@numba.njit(inline="always")
def _ends(eight: Any) -> Any:
    """The high bit of each byte that is no ASCII letter or digit, right up to the first such byte."""
    lower = eight | _LOWER
    letter = (lower + _FROM_A) & ~(lower + _PAST_Z)
    digit = (eight + _FROM_0) & ~(eight + _PAST_9)
    return (~(letter | digit) | eight) & _HIGH


@numba.njit(inline="always")
def _next_unit(text: Any, i: Any, end: Any, safe: Any) -> Any:
    """The unit at `i`: where it ends, its key, and its kind. Sixteen bytes are the text's own from below `safe`."""
    if i < safe:
        eight = _load(text, i)
        ends = _ends(eight)
        if ends:
            bits = _trailing_zeros(ends) & _BITS
            following = (eight >> bits) & _BYTE
            if bits and following < _LONG_BYTE:
                length = bits >> _THREE
                return i + length, _key_of(eight & ((_ONE << bits) - _ONE), _ZERO, length), _PLAIN
            if not bits and _SPACE < following < _LONG_BYTE:
                return i + _ONE, _key_of(following, _ZERO, _ONE), _PLAIN
            if not bits and _LETTERS <= following < _FOUR_BYTES:
                return i + _THREE, _key_of(eight & _THREE_BYTES, _ZERO, _THREE), _LETTER
        else:
            more = _load(text, i + _EIGHT)
            ends = _ends(more)
            if ends:
                bits = _trailing_zeros(ends) & _BITS
                if (more >> bits) & _BYTE < _LONG_BYTE:
                    length = _EIGHT + (bits >> _THREE)
                    return i + length, _key_of(eight, more & ((_ONE << bits) - _ONE), length), _PLAIN
    return _other_unit(text, i, end)


@numba.njit(inline="always")
def _pair_of(first: Any, second: Any) -> Any:
    return _fold((_fold(first * _A) ^ second) * _B)


@numba.njit(inline="always")
def _piece(text: Any, begin: Any, which: Any) -> Any:
    """Key of the three bytes at `begin`."""
    second, third = np.uint64(_byte(text, begin + _ONE)), np.uint64(_byte(text, begin + _TWO))
    low = np.uint64(_byte(text, begin)) | (second << _EIGHT) | (third << _SIXTEEN)
    return _fold((low ^ which * _A) * _B)


@compiled
def _score(
    data: Any, starts: Any, lengths: Any, effects_H: Any, shift: Any, pairs: Any, pieces: Any, fast: Any, out: Any
) -> None:
    """Sum of effects over each text's units, pairs and pieces, divided by the number of units; 0 without any."""
    text = data.ctypes.data
    for row in range(len(out)):
        i = np.uint64(starts[row])
        end = i + np.uint64(lengths[row])
        safe = end - _SIXTEEN if fast and end > i + _SIXTEEN else _ZERO
        total = num = np.int64(0)
        before, kind_before = _ZERO, _NOTHING
        while i < end:
            begin = i
            i, key, kind = _next_unit(text, i, end, safe)
            if kind == _NOTHING:
                continue
            total += np.int64(effects_H[(key * _B) >> shift])
            if pieces and i - begin >= _SIX:
                total += np.int64(effects_H[(_piece(text, begin, _FIRST) * _B) >> shift])
                total += np.int64(effects_H[(_piece(text, i - _THREE, _LAST) * _B) >> shift])
            if num and (pairs or (kind == _LETTER and kind_before == _LETTER)):
                total += np.int64(effects_H[(_pair_of(before, key) * _B) >> shift])
            num += 1
            before, kind_before = key, kind
            if i < safe and _byte(text, i) == _SPACE and _byte(text, i + _ONE) > _SPACE:
                i += _ONE
        out[row] = total / num if num else 0.0


@compiled
def _collect(data: Any, start: Any, end: Any, shift: Any, pairs: Any, pieces: Any, units: Any, others: Any) -> Any:
    """Buckets of one text's units, and of its pairs and pieces, into `units` and `others`; how many of each."""
    text = data.ctypes.data
    i, end = np.uint64(start), np.uint64(end)
    num, num_others = 0, 0
    before, kind_before = _ZERO, _NOTHING
    while i < end:
        begin = i
        i, key, kind = _next_unit(text, i, end, _ZERO)
        if kind == _NOTHING:
            continue
        units[num] = (key * _B) >> shift
        if num and (pairs or (kind == _LETTER and kind_before == _LETTER)):
            others[num_others] = (_pair_of(before, key) * _B) >> shift
            num_others += 1
        if pieces and i - begin >= _SIX:
            others[num_others] = (_piece(text, begin, _FIRST) * _B) >> shift
            others[num_others + 1] = (_piece(text, i - _THREE, _LAST) * _B) >> shift
            num_others += 2
        num += 1
        before, kind_before = key, kind
    return num, num_others


def _shift(num_buckets: int) -> np.uint64:
    return _ALL - np.uint64(num_buckets.bit_length() - 1)


def score_texts(
    spans: TextSpans, effects_H: npt.NDArray[np.int16], pairs: bool, pieces: bool = False
) -> npt.NDArray[np.float64]:
    """Mean effect of each text's units, pairs of neighbours and pieces among them.

    Args:
        spans: N texts; their bytes are read once and not copied.
        effects_H: (H,) int16, H a power of two. Whole numbers of a smallest effect, so that
            sums are exact in any order.
        pairs: Whether all pairs of neighbouring units count; otherwise only those of letters do.
        pieces: Whether the ends of long units count as well.

    Returns:
        (N,) float64: the sum over units, pairs and pieces, divided by the number of units; 0 where a text has none. It
        is, bit for bit, what each text gives alone, whatever the number of threads.
    """
    out = np.zeros(spans.num_rows, np.float64)
    shift = _shift(len(effects_H))

    def score(piece: Piece) -> None:
        found = np.empty(len(piece.where), np.float64)
        _score(piece.values, piece.starts, piece.lengths, effects_H, shift, pairs, pieces, _NATIVE, found)
        out[piece.where] = found

    spread(score, spans.pieces, small=_SMALL, part=_PART)
    return out


def buckets_of(
    spans: TextSpans, num_buckets: int, pairs: bool, pieces: bool = False
) -> tuple[npt.NDArray[np.int32], ...]:
    """Buckets of all texts' units, text by text, as a sparse matrix wants them.

    Args:
        spans: N texts.
        num_buckets: Number of buckets, a power of two of at most 2**31.
        pairs: As `score_texts` takes it.
        pieces: As `score_texts` takes it.

    Returns:
        (E,) int32 buckets of units, pairs and pieces; (N,) int32 how many of them each text has; (N,) int32 units of
        each.
    """
    parts: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)] * spans.num_rows
    num_units = np.zeros(spans.num_rows, np.int32)
    shift = _shift(num_buckets)
    for piece in spans.pieces:
        longest = int(piece.lengths.max()) if len(piece.lengths) else 0
        units, others = np.empty(longest, np.int32), np.empty(2 * longest, np.int32)
        for start, length, row in zip(piece.starts, piece.lengths, piece.where, strict=True):
            num, num_others = _collect(piece.values, start, start + length, shift, pairs, pieces, units, others)
            parts[row] = np.concatenate([units[:num], others[:num_others]])
            num_units[row] = num
    sizes = np.array([len(part) for part in parts], np.int32)
    return np.concatenate(parts) if parts else np.zeros(0, np.int32), sizes, num_units
