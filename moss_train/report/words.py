"""Words of users and models made fit to be shown: both may hold anything."""

import html

#: without them some scripts and emoji fall apart; all other letters that cannot be seen become a box
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """White space as single blanks, what cannot be seen or would steer the display as ▯."""
    letters = (c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "▯" for c in text)
    return " ".join("".join(letters).split())


def shortened(text: str, most: int) -> str:
    """At most `most` letters, the last one "…" where some are left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def escaped(text: str, most: int = 2000) -> str:
    """Ready to stand in an HTML page, in text or in a quoted attribute."""
    return html.escape(shortened(visible(text), most))
