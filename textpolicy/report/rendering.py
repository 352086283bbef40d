"""Fill in the HTML templates: everything is escaped, and characters that cannot be seen are shown as their codes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters but for tab and line feed, those that turn the direction of writing, and those that draw nothing
# (Default_Ignorable_Code_Point and the blanks of Unicode 16).
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; text is escaped unless it is ``Markup``."""
    return _environment().get_template(template).render(**values)


def visible(value: Any) -> Any:
    """Return plain text with each unseen character as its code, such as ⟨U+202E⟩; anything else as it is."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible)
