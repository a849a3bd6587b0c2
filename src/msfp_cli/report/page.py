"""The page of a report: a template, whose script draws one JSON document. Nothing is fetched.

The document is written into the page as JSON; every ``<`` in it is escaped, so no prompt can end
the script element.
"""

import html
import json
from importlib.resources import files
from typing import Any


def render(document: dict[str, Any]) -> str:
    """Return the page of a document (see `document.gather`), self-contained HTML."""
    template = (files("msfp_cli") / "data" / "report.html").read_text("utf-8")
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    title = html.escape(f"{document['title']}: {document['model']}")
    return template.replace("{{ title }}", title, 1).replace("{{ document }}", data, 1)
