"""Put what a script prints into a page, between two comments with its name.

The text around these comments is written by hand and stays as it is.
"""

from pathlib import Path

from msfp_cli.files.atomic import write_text


def put(page: Path, name: str, text: str) -> None:
    """Replace the part of that name; append it to a page that has none, and make a missing page.

    Raises:
        SystemExit: the part begins but does not end.
    """
    begin = f"<!-- {name} begins -->"
    end = f"<!-- {name} ends -->"
    old = page.read_text("utf-8") if page.exists() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if found and not closed:
        raise SystemExit(f"{page} has {begin!r} without {end!r}; mend it")
    if before and not found:
        before = f"{before.rstrip()}\n\n"
    after = after if found else "\n"
    write_text(page, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
