"""What mkdocs does with links of docs/ that lead to other places of the repository, which are no part of the site."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn each link to a file outside docs/ into its words and the file's name."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("docs", folder, found[2].partition("#")[0]))
        if place.startswith("docs/") or place == "docs":
            return found[0]
        name = f"`{place}`"
        return name if found[1].strip("`") in (place, posixpath.basename(place)) else f"{found[1]} ({name})"

    return LINK.sub(link, markdown)
