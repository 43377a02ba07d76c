"""The words of a text, equal for every form in which people store that text, in any script.

Where it is used: `overlap` compares texts by runs of these words. Upper and lower case, full and half width, composed
and decomposed letters, ligatures, optional signs (accents, Arabic and Hebrew vowel points), invisible characters,
kinds of digits, quotes, dashes and spaces, HTML entities and hyphenation at line ends make no difference.

Scripts that put no spaces between words, and Korean, whose spaces people set as they like, are read letter by letter:
one letter with its marks is a part of a word. How large a part is what a translation comes to. Article 1 of the
Universal Declaration of Human Rights has 30 words in English, 39 letters in Chinese (1.3 a word), 76 in Japanese
(2.5), 62 in Korean (2.1) and about 100 in Thai (3.4). So 13 words are 20 Chinese letters, 26 kana, 26 Korean
syllables, 26 Tibetan syllables, or 39 letters of Thai, Lao, Khmer, Burmese or Javanese.

Trade-off: what differs in more than form is other text: simplified against traditional characters, one language in two
alphabets, "ue" for "ü". English goes through one regular expression, which is fast; letter by letter is several times
slower a byte.
"""

from __future__ import annotations

import bisect
import functools
import html
import re
import sys
import unicodedata
from typing import NamedTuple

WORD = 6  # the weight of a word; that of a letter is a whole number too

# First and last code point, and the weight of one letter, in order.
_LETTERS = (
    (0x0E00, 0x0EFF, 2),  # Thai, Lao
    (0x1000, 0x109F, 2),  # Burmese
    (0x1100, 0x11FF, 3),  # Hangul, decomposed
    (0x1780, 0x17FF, 2),  # Khmer
    (0x1950, 0x19DF, 2),  # Tai Le, New Tai Lue
    (0x1A00, 0x1AAF, 2),  # Buginese, Tai Tham
    (0x1B00, 0x1B7F, 2),  # Balinese
    (0x3005, 0x3007, 4),  # Han iteration mark and zero
    (0x3021, 0x3029, 4),
    (0x3031, 0x3035, 3),
    (0x3038, 0x303C, 4),
    (0x3041, 0x31BF, 3),  # kana, Bopomofo, single Hangul letters
    (0x31F0, 0x31FF, 3),
    (0x3400, 0x4DBF, 4),  # Han
    (0x4E00, 0x9FFF, 4),
    (0xA000, 0xA4CF, 3),  # Yi
    (0xA960, 0xA97F, 3),
    (0xA980, 0xA9FF, 2),  # Javanese, Burmese
    (0xAA60, 0xAADF, 2),  # Burmese, Tai Viet
    (0xAC00, 0xD7FF, 3),  # Hangul
    (0xF900, 0xFAFF, 4),
    (0x17000, 0x18DFF, 3),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF, 3),  # kana, Nushu
    (0x20000, 0x3FFFF, 4),  # Han
)
_FIRST_LETTER = _LETTERS[0][0]
_STARTS = [first for first, _, _ in _LETTERS]
_TIBETAN, _TIBETAN_SYLLABLE = range(0x0F00, 0x1000), 3  # written with a mark between syllables, not between words

# Modifier letters that stand for an apostrophe, which parts words like any other.
_APOSTROPHES = frozenset("\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u02ee\ua78c")
# Letters that are one letter to a reader: dotless i, Arabic and Persian kaf and yeh, and yeh without its dots.
_SAME = {"\u0131": "i", "\u06a9": "\u0643", "\u06cc": "\u064a", "\u0649": "\u064a", "\u06d2": "\u064a",
         "\u06c1": "\u0647", "\u06be": "\u0647"}  # fmt: skip
_INVISIBLE = frozenset("\u0640\u07fa\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")
_HYPHENS = r"[-\u00ad\u2010\u2011]"
_BROKEN = re.compile(rf"{_HYPHENS}(?<=[^\W\d_]{_HYPHENS})[ \t\r]*\n[ \t]*(?=[^\W\d_])")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def words_of(text: str) -> list[str]:
    """The words of a text in the one form that all its forms have; a letter with its marks in scripts without spaces.

    Args:
        text: Any text.

    Returns:
        Lower-case runs of letters, digits and underscores, and single letters of scripts without spaces.
    """
    return _split(_unescaped(text))


def readings_of(text: str) -> list[list[str]]:
    """Every way to read a text as words: as it stands, and with words joined that a hyphen breaks at a line's end.

    Args:
        text: Any text.

    Returns:
        One list of words, or two; the first is what `words_of` gives.
    """
    text = _unescaped(text)
    found = [_split(text)]
    # Whether the hyphen is the word's own cannot be told, so that both are kept.
    if "\n" in text:
        joined = _BROKEN.sub("", text)
        if len(joined) != len(text):
            found.append(_split(joined))
    return found


def weight_of(word: str) -> int:
    """Weight of one of the words of `words_of`, where that of a word between spaces is `WORD`."""
    first = ord(word[0])
    if first < _FIRST_LETTER:
        return WORD
    if first in _TIBETAN:
        return _TIBETAN_SYLLABLE
    place = bisect.bisect_right(_STARTS, first) - 1
    _, last, weight = _LETTERS[place]
    return weight if first <= last else WORD


def _unescaped(text: str) -> str:
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text


def _split(text: str) -> list[str]:
    if not text.isascii():
        text = _NOT_ASCII.sub(_folded, unicodedata.normalize("NFKC", text))
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    found: list[str] = _patterns().word.findall(text)
    return found


def _folded(match: re.Match[str]) -> str:
    text = match[0].translate(_FOLDS)
    if len(text) < 3 or text.isascii() or text.replace(" ", "").isalnum():  # a mark is neither letter nor digit
        return text.replace("\u0e40\u0e40", "\u0e41")
    # Several marks of a letter look the same in whatever order they were typed; so do two signs of Thai and a third.
    text = _patterns().several_marks.sub(lambda marks: "".join(sorted(marks[0])), text)
    return text.replace("\u0e40\u0e40", "\u0e41")


class _Folds(dict[int, str]):
    """What each character that is not ASCII becomes, found when it is first met."""

    def __missing__(self, code: int) -> str:
        folded = self[code] = _fold(chr(code))
        return folded


_FOLDS = _Folds()


def _fold(character: str) -> str:
    """A character without case and without the signs that people leave out."""
    if character in _APOSTROPHES or unicodedata.category(character)[0] in "PSZ":
        return " "
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    kept = "".join(_SAME.get(c, c) for c in plain if not _is_left_out(c))
    digits = "".join(str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else c for c in kept)
    return unicodedata.normalize("NFC", digits)


def _is_left_out(character: str) -> bool:
    """True for what is invisible, and for signs over and under letters that are not letters themselves.

    The classes of combining characters are: 7 the dot that makes another letter of one of India's, 10 to 36 vowel
    points of Hebrew, Arabic and Syriac, from 200 on accents. The vowel signs of India's scripts and of Thai have other
    classes, and the voicing marks of kana too; a word without these is another word.
    """
    if character in _INVISIBLE or unicodedata.category(character) == "Cf":
        return True
    if 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF:
        return True  # variation selectors
    combining = unicodedata.combining(character)
    return combining == 7 or 10 <= combining <= 36 or combining >= 200


class _Patterns(NamedTuple):
    """Regular expressions made of Unicode's tables.

    Attributes:
        word: a letter of a script without spaces, with its marks, or a word.
        several_marks: two marks or more, one after the other.
    """

    word: re.Pattern[str]
    several_marks: re.Pattern[str]


@functools.cache
def _patterns() -> _Patterns:
    marks = _ranges([code for code in range(0x300, sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"])
    letters = _ranges(
        [
            code
            for first, last, _ in _LETTERS
            for code in range(first, last + 1)
            if unicodedata.category(chr(code))[0] in "LN"
        ]
    )
    return _Patterns(
        word=re.compile(f"[^\\W{letters}]+(?:[{marks}]+[^\\W{letters}]*)*|[{letters}][{marks}]*"),
        several_marks=re.compile(f"[{marks}]{{2,}}"),
    )


def _ranges(codes: list[int]) -> str:
    """Ascending code points as the inside of a character class."""
    parts: list[list[int]] = []
    for code in codes:
        if parts and code == parts[-1][1] + 1:
            parts[-1][1] = code
        else:
            parts.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in parts)
