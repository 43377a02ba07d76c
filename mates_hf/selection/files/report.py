"""What came of scoring files, for a person and for a program.

Where it is used: `file_scoring` returns it, and it is the summary in the output folder. Trade-off: what could not be
read is listed up to a thousand times, and counted beyond that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mates_hf.allow import Allow
from mates_hf.display import card, html_card

_SHOWN_GROUPS = 5  # where it is printed, the largest


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FilesReport:
    """What came of scoring files.

    Attributes:
        out: The output folder.
        asked_for: The budget, as it was given.
        files: Input files.
        files_left_out: Files that could not be read.
        lines_left_out: Lines of the other files that could not be read.
        rows: Rows that were scored.
        rows_kept: Rows that were written.
        tokens: Trained tokens of all rows; estimated at four bytes a token where the model reads texts.
        tokens_kept: Trained tokens of the rows that were written.
        threshold: Influence, or worth of a row, at which the best rows end; None where all rows are written.
        bytes_read: Bytes of the input files, as they lie.
        bytes_scored: Bytes of the scored column, unpacked.
        bytes_written: Bytes of the output files.
        seconds: Seconds of this call.
        gb_per_hour: Gigabytes (10^9) of input files an hour; None where an earlier call did a part of it.
        errors: What could not be read, the first thousand.
        rows_not_allowed: Rows that `allow` left out; they were not scored, and are not among `rows`.
        allow: Allowed entries by column; None allowed all rows.
        shares: By group: `rows` and `kept` as shares of all, and `boost`, how many times its share it got. Empty
            where no column says the groups.
    """

    out: str
    asked_for: str
    files: int
    files_left_out: int
    lines_left_out: int
    rows: int
    rows_kept: int
    tokens: int
    tokens_kept: int
    threshold: float | None
    bytes_read: int
    bytes_scored: int
    bytes_written: int
    seconds: float
    gb_per_hour: float | None
    errors: tuple[str, ...] = ()
    rows_not_allowed: int = 0
    allow: Allow | None = None
    shares: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `_mates/summary.json` in the output folder has them."""
        return {**dataclasses.asdict(self), "errors": list(self.errors)}

    def facts(self) -> dict[str, str]:
        """What is printed: a name and a few words each."""
        speed = "" if self.gb_per_hour is None else f", {self.gb_per_hour:,.1f} GB of files an hour"
        facts = {
            "files": f"{self.files:,}, {_bytes(self.bytes_read)}; scored text or tokens {_bytes(self.bytes_scored)}",
            "rows kept": f"{self.rows_kept:,} of {self.rows:,} ({self.asked_for})",
            "tokens kept": f"{self.tokens_kept:,} of {self.tokens:,}",
            "written": f"{_bytes(self.bytes_written)} in {self.out}",
            "time": f"{self.seconds:,.1f} s{speed}",
        }
        if self.allow is not None:
            rule = "; ".join(f"{name}={', '.join(entries)}" for name, entries in self.allow.items())
            facts["not allowed"] = f"{self.rows_not_allowed:,} other rows, not scored (allowed: {rule})"
        if self.threshold is not None:
            facts["threshold"] = f"{self.threshold:.6g}"
        if self.shares:
            largest = sorted(self.shares.items(), key=lambda one: -one[1]["rows"])[:_SHOWN_GROUPS]
            shown = ", ".join(f"{name} {of['rows']:.1%} to {of['kept']:.1%}" for name, of in largest)
            more = "" if len(self.shares) <= _SHOWN_GROUPS else f", {len(self.shares) - _SHOWN_GROUPS:,} more"
            facts["groups"] = f"{shown}{more} (share of the rows, and of those kept)"
        if self.files_left_out or self.lines_left_out:
            facts["left out"] = f"{self.files_left_out:,} files and {self.lines_left_out:,} lines: {self.errors[0]}"
        return facts

    def __repr__(self) -> str:
        return card("FilesReport", self.facts())

    def _repr_html_(self) -> str:
        return html_card("FilesReport", self.facts())


def _bytes(num: int) -> str:
    return next(f"{num / size:,.1f} {name}" for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num >= size
                or name == "kB")  # fmt: skip
