"""Seal an export again after it was changed on purpose: `msfp export --reseal DIR`."""

import json
from pathlib import Path

from safetensors.torch import save_file

from msfp_cli.checkpoint.contents import Contents, header_of, model_text
from msfp_cli.checkpoint.export import sort_header_
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.checkpoint.quantizer import to_text
from msfp_cli.engines.conversions import CONVERSIONS
from msfp_cli.files.atomic import replace_file, write_text
from msfp_cli.files.documents import read_tensors
from msfp_cli.files.seal import MARK, REDO, Seal, unchecked


def reseal(directory: Path) -> None:
    """Take an export as it is now for what msfp wrote.

    The denoisers' files get the digest and the config of today in their headers, and `msfp.json`
    names the index, all files of components, and conversions for an engine. What lies beside them
    stays somebody else's.

    Raises:
        ModelError, CheckpointError: it cannot be loaded, so it is not sealed.
    """
    pipe = MSFPPipeline.from_pretrained(directory, device="cpu", check=False)
    for component, config in pipe.configs.items():
        _rewrite_headers(directory / component, to_text(config))
    components = (f"{name}/*" for name in pipe.pipe.components)
    patterns = ("model_index.json", *components, *CONVERSIONS)
    write_text(directory / MARK, Seal.of(directory, patterns).to_text())


def _rewrite_headers(denoiser: Path, config: str) -> None:
    """Write a denoiser's files again if their header does not fit what is there."""
    paths = sorted(denoiser.glob("*.safetensors"))
    with unchecked():
        contents = Contents.read(paths)
    model = model_text(json.loads((denoiser / "config.json").read_text("utf-8")))
    header = header_of(contents.tensors, config, model)
    if header.items() <= contents.header.items():
        return
    for path in paths:
        tensors = read_tensors(path, redo=REDO)
        with replace_file(path) as temporary:
            save_file(tensors, temporary, {**contents.header, **header})
            sort_header_(temporary)
