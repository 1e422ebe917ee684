"""HTML from values: whatever isn't `Markup` already is escaped, so nothing from a file becomes a tag by accident.

Elements are made by functions and not by a template: mypy checks what they are given.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

__all__ = ["Markup", "content_hash", "join", "pairs", "script_json", "table", "tag"]


def join(parts: Iterable[Any]) -> Markup:
    """Concatenate values as HTML."""
    return Markup("").join(parts)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. `class_` is class, `data_x` is data-x; True is a bare attribute, None and False are none."""
    shown = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            shown.append(f" {key}")
        elif value is not None and value is not False:
            shown.append(f' {key}="{escape(value)}"')
    opening = f"<{name}{''.join(shown)}>"
    return Markup(opening if name in ("img", "input", "meta", "br") else f"{opening}{join(children)}</{name}>")


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no character in it can end the element; NaN and infinities are null."""
    shown = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        shown = shown.replace(character, f"\\u{ord(character):04x}")
    return Markup(shown)


def content_hash(content: str) -> str:
    """The hash by which a Content-Security-Policy allows one inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], class_: str = "") -> Markup:
    """A table that scrolls sideways where the screen is narrow."""
    header = tag("tr", *(tag("th", cell) for cell in head))
    body = join(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", tag("thead", header), tag("tbody", body)), class_=f"scroll {class_}".strip())


def pairs(items: Iterable[tuple[str, Any]]) -> Markup:
    """Names and values, one pair a line; pairs without a value are left out."""
    shown = [(k, v) for k, v in items if v not in (None, "")]
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in shown))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
