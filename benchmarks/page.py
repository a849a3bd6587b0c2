"""Put what a script printed into a page, between two comments that bear its name; the text around it is people's."""

from pathlib import Path

from msfp_cli.files import write_text


def put(page: Path, name: str, text: str) -> None:
    """Replace the part of that name, or append it where the page has none; a page that is not there is begun.

    Raises:
        SystemExit: the part begins but does not end.
    """
    begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
    old = page.read_text("utf-8") if page.exists() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if found and not closed:
        raise SystemExit(f"{page} has {begin!r} without {end!r}; mend it")
    before = before if found or not before else f"{before.rstrip()}\n\n"
    write_text(page, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after if found else chr(10)}")
