"""One HTML page about an export, with PNG plots beside it."""
