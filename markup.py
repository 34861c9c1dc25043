"""Markdown as the tables and pages here write it."""

import html
import re
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Text that is safe in a markdown table or page: no HTML, no markup, no column breaks, one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    # emphasis, code, links and images, by which a reply could hide a part of itself or fetch something
    text = re.sub(r"[\\`*\[\]~]|(?<!\w)_|_(?!\w)", lambda sign: f"&#{ord(sign[0])};", text)
    return text.replace("|", "\\|")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their titles, as they stand: what others wrote goes through `cell` before."""
    head, *body = [f"| {' | '.join(line)} |" for line in (titles, *rows)]
    return "\n".join([head, "|" + "---|" * len(titles), *body])
