"""Text by strangers in a Markdown page: names of cases and teams, what containers print."""

import html

from inference.files import printable


def cell(text: object) -> str:
    """Text that neither ends a table's cell nor a line, nor becomes a tag or code."""
    shown = printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return html.escape(shown, quote=False)
