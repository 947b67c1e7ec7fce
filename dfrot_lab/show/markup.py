"""Token text made safe to show: white space visible, markup escaped, so that no token is ever run."""

import html
from unicodedata import category

VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}
"""What stands for white space in a token."""


def visible(text: str) -> str:
    """`text` with white space and control characters made visible, as plain text: not yet safe for HTML."""
    hidden = ("Cc", "Cf", "Co", "Cs")
    return "".join(VISIBLE.get(c) or (f"<0x{ord(c):02X}>" if category(c) in hidden else c) for c in text)


def safe(text: str) -> str:
    """A token's text for HTML and plotly's hover labels: white space visible, markup escaped."""
    return html.escape(visible(text))


def span(text: str, colour: str | None = None, title: str = "") -> str:
    """One token as HTML, apart from its neighbours' writing direction; marked by `colour`, with a tooltip."""
    mark = f"background:{colour};color:#fff;" if colour else ""
    style = f"{mark}border-radius:3px;padding:0 1px"
    return f'<bdi class="dfrot-token" title="{html.escape(title)}" style="{style}">{safe(text)}</bdi>'
