"""Measurements as msfp wrote them before it had one table of metrics: a field for each metric.

Then ``to_full`` and ``to_reference`` held the distances between sets of pictures, ``noise`` the
errors of the denoisers, and shares were in 0..1 where the table has percent.
"""

from msfp_cli.files.documents import Json

_PER_PICTURE = ("psnr", "ssim", "deep")
# A distance between sets, by its key against full precision and against real pictures.
_DISTANCES = {
    "frechet": ("frechet_full", "frechet"),
    "kernel": ("kernel_full", "kernel"),
    "precision": ("precision_full", "precision"),
    "recall": ("recall_full", "recall"),
}


def from_schema_1(data: Json) -> Json:
    """Return the same measurements as today's JSON values; a missing metric stays missing."""
    sets = {"full": data.get("to_full"), "reference": data.get("to_reference")}
    denoisers = data.get("noise") or {}
    return {
        "key": data["key"],
        "title": data["title"],
        "values": {key: value for key, value in _values(data).items() if value is not None},
        "per_picture": {key: data[key] for key in _PER_PICTURE if data.get(key)},
        "sets": {key: _set_sizes(entry) for key, entry in sets.items() if entry is not None},
        "denoisers": denoisers,
        "denoiser_bytes": data.get("denoiser_bytes"),
        "cost": data.get("cost"),
    }


def _set_sizes(entry: Json) -> Json:
    """Return what an entry says of its sets, without the distances between them."""
    return {key: entry[key] for key in ("num_pictures", "few")}


def _values(data: Json) -> dict[str, float | None]:
    """Return the single values by the key of their metric, None for what is not there."""
    to_full = data.get("to_full") or {}
    to_reference = data.get("to_reference") or {}
    values: dict[str, float | None] = {
        "output": max(
            (entry["error"] for entry in (data.get("noise") or {}).values()), default=None
        ),
        "latents": data.get("latents"),
        "clip": data.get("clip"),
    }
    for name, (key_full, key_reference) in _DISTANCES.items():
        values[key_full] = to_full.get(name)
        values[key_reference] = to_reference.get(name)
    for key in ("garment", "colour"):
        values[key] = None if data.get(key) is None else 100 * data[key]
    if data.get("denoiser_bytes") is not None:
        values["size"] = data["denoiser_bytes"] / 2**20
    if data.get("cost") is not None:
        values["seconds"] = data["cost"]["seconds_per_picture"]
        values["memory"] = data["cost"]["peak_memory_bytes"] / 2**20
    return values
