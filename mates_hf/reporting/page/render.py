"""From plain values to one HTML file: the templates, and what they are allowed to print.

Every value that a template prints goes through `plain` and through autoescape, so a template cannot forget either.
The policy in the page's head allows the style sheet by its hash and nothing else: no script, no request, no form.

Trade-off: jinja2 is loaded when a page is written, and a run without it trains as well, without pages.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mates_hf.display import number
from mates_hf.reporting.page.examples import level_of
from mates_hf.reporting.page.plain import plain

_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = "style.css.jinja"


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page.

    Args:
        template: Name of the template.
        values: What it shows.

    Returns:
        HTML that can be written as UTF-8.

    Raises:
        ImportError: jinja2 is not installed.
    """
    environment = _environment()
    style = environment.get_template(_STYLE).render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page: str = environment.get_template(template).render(values, style_digest=digest)
    return page


@functools.cache
def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            'A report must have jinja2, which is not installed: `pip install "mates-hf[report]"`.'
        ) from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fixed": _fixed, "signed": _signed, "percent": _percent, "seconds": _seconds, "count": _count,
        "figure": number, "money": _money, "level": level_of, "png": _png, "named": _named,
    }  # fmt: skip
    return environment


class _Address(str):
    """A `data:` address, whose characters HTML gives no meaning."""

    def __html__(self) -> str:
        return str(self)


def _png(data: str) -> _Address:
    """The address of a PNG in base64; of anything else an empty one."""
    return _Address(f"data:image/png;base64,{data}" if re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", data) else "data:,")


def _named(text: str) -> list[tuple[str, bool]]:
    """The parts of a sentence, each with whether it is a name, which stands between backticks."""
    parts = plain(text).split("`")
    if len(parts) % 2 == 0:  # one of them has no partner
        return [("`".join(parts), False)]
    return [(part, i % 2 == 1) for i, part in enumerate(parts)]


def _printed(value: Any) -> Any:
    """What a template may print: text made plain; markup of a macro as it is, for its parts came through here."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return plain(value)
    return value


def _fixed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:+.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    """Seconds in the unit that a person would use."""
    if value is None:
        return "–"
    if value >= 3600:
        return f"{value / 3600:,.1f} h"
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.1f} s"


def _money(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
