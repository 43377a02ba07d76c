"""Text of other people made harmless to look at: cut, without control characters, and without a direction of its own.

A pool holds whatever was on the web: scripts, marks that turn the direction of writing around, a line of a megabyte,
NUL, half of a surrogate pair, a thousand accents on one letter. Escaping is the templates' work (autoescape); what is
here is what escaping leaves: a character that cannot be seen is shown by its name, as `⟨NUL⟩`.

Trade-off: joiners (U+200C, U+200D) are kept, since Persian, Hindi and emoji cannot be read without them.
"""

from __future__ import annotations

import unicodedata

MAX_TEXT = 2_000  # characters of any text on the page
MAX_PIECE = 60  # of one token
_MAX_MARKS = 4  # accents on one letter
_KEPT = {"\u200c", "\u200d"}
_NAMES = {
    0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x09: "TAB", 0x0B: "VT", 0x0C: "FF", 0x0D: "CR", 0x1A: "SUB", 0x1B: "ESC",
    0x7F: "DEL", 0x85: "NEL", 0xAD: "SHY", 0x61C: "ALM", 0x200B: "ZWSP", 0x200E: "LRM", 0x200F: "RLM",
    0x2028: "LSEP", 0x2029: "PSEP", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO", 0x202E: "RLO",
    0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xFEFF: "BOM",
}  # fmt: skip
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format, surrogate, private, unassigned, separators


def plain(text: str, width: int = MAX_TEXT) -> str:
    """A text that shows what it holds and does nothing else.

    Args:
        text: Any text, of any length.
        width: Number of characters that are read of it.

    Returns:
        The text in one line, at most `width` of its characters with an ellipsis where it was cut. Line breaks are `⏎`,
        characters that cannot be seen are shown by name. It can be written as UTF-8. HTML in it is not escaped.
    """
    shown: list[str] = []
    marks = 0
    for char in text[:width]:
        kind = unicodedata.category(char)
        if kind in ("Mn", "Me"):
            marks += 1
            if marks > _MAX_MARKS:
                continue
        else:
            if marks > _MAX_MARKS:
                shown.append(f"⟨{marks - _MAX_MARKS} more marks⟩")
            marks = 0
        if char == "\n":
            shown.append("⏎")
        elif kind in _UNSEEN and char not in _KEPT:
            shown.append(f"⟨{_NAMES.get(ord(char), f'U+{ord(char):04X}')}⟩")
        else:
            shown.append(char)
    if marks > _MAX_MARKS:
        shown.append(f"⟨{marks - _MAX_MARKS} more marks⟩")
    return "".join(shown) + ("…" if len(text) > width else "")
