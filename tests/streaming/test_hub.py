"""Quantized pipelines come from the hub, and go through its client, over the loopback interface."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.streaming.quantize import quantize_pipeline
from msfp_cli.streaming.recipe import QuantizeRecipe

# The hub's client reads its address when it is imported, so all runs in a process of its own.
_CHILD = """
import json, os, sys
from pathlib import Path
from hub_server import serve_hub
full, quantized = map(Path, sys.argv[1:])
results = {}
served = {"tiny/full": full, "tiny/quantized": quantized, "tiny/gated": full}
cut = ["tiny/full", "tiny/quantized"]
with serve_hub(served, gated=["tiny/gated"], cut=cut, uploads=Path("uploads")) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    import msfp_cli, torch
    from diffusers import DiffusionPipeline
    from tiny_pipelines import CALL_ARGUMENTS
    from typer.testing import CliRunner
    from msfp_cli.commands.app import app

    def draw(place):
        pipe = DiffusionPipeline.from_pretrained(place)
        generator = torch.Generator().manual_seed(0)
        options = CALL_ARGUMENTS[type(pipe).__name__]
        return pipe(**options, output_type="pt", generator=generator).images

    def run(name, *arguments):
        result = CliRunner().invoke(app, ["quantize", *arguments, "--out", name], prog_name="msfp")
        results[name] = [result.exit_code, result.stdout, result.stderr]

    picture = draw("tiny/quantized")
    results["equal"] = torch.equal(picture, draw(str(quantized)))
    DiffusionPipeline.from_pretrained("tiny/quantized").push_to_hub("tiny/pushed", token="hf_x")
    results["pushed"] = torch.equal(picture, draw("tiny/pushed"))
    run("download", "tiny/full", "--revision", hub.commits["tiny/full"])
    results["same"] = torch.equal(picture, draw("download"))
    run("revision", "tiny/full", "--revision", "v2")
    run("gated", "tiny/gated")
    run("unknown", "nobody/nothing")
    results["cut"] = [request for request in hub.requests if "safetensors" in request]
run("down", "somebody/something")
results["cached"] = torch.equal(picture, draw("tiny/quantized"))
print(json.dumps(results))
"""


# The same cache, where HF_HUB_OFFLINE is set.
_OFFLINE = """
import json, sys, torch, msfp_cli
from diffusers import DiffusionPipeline
from typer.testing import CliRunner
from msfp_cli.commands.app import app

def weights(place):
    layers = DiffusionPipeline.from_pretrained(place).unet.state_dict()
    return torch.cat([tensor.float().flatten() for tensor in layers.values()])

command = ["quantize", "somebody/something", "--out", "x"]
result = CliRunner().invoke(app, command, prog_name="msfp")
print(json.dumps({
    "offline": torch.equal(weights("tiny/quantized"), weights(sys.argv[2])),
    "offline, unknown": [result.exit_code, result.stdout, result.stderr],
}))
"""


@pytest.fixture(scope="module")
def said(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run everything against a hub whose connection is cut in the middle of a file."""
    directory = tmp_path_factory.mktemp("hub")
    source = tiny("DDIMPipeline")
    quantize_pipeline(ModelSource(model=str(source)), directory / "quantized", QuantizeRecipe())
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MSFP_"))
    }
    own = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {
        "HF_HOME": str(directory / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, own)),
        "COLUMNS": "200",
    }
    results = dict[str, Any]()
    for child, extra in ((_CHILD, {}), (_OFFLINE, {"HF_HUB_OFFLINE": "1"})):
        command = [sys.executable, "-c", child, source, directory / "quantized"]
        done = subprocess.run(
            command, cwd=directory, env=environment | extra, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results |= json.loads(done.stdout.splitlines()[-1])
    return results


def test_stock_loader_gets_a_quantized_pipeline_although_the_connection_is_cut(
    said: dict[str, Any],
) -> None:
    assert said["equal"]
    gets = [request for request in said["cut"] if request.startswith("GET /tiny/quantized")]
    assert len(gets) == len(set(gets)) + 1  # one file was asked for twice


def test_hub_model_is_downloaded_and_quantized(said: dict[str, Any]) -> None:
    code, stdout, stderr = said["download"]
    assert (code, stdout) == (0, "download\n"), stderr
    assert said["same"]


def test_a_reloaded_pipeline_is_pushed_and_loaded_again(said: dict[str, Any]) -> None:
    assert said["pushed"]


def test_offline_what_is_in_the_cache_is_loaded(said: dict[str, Any]) -> None:
    assert said["offline"]


def test_without_a_network_what_is_in_the_cache_is_loaded(said: dict[str, Any]) -> None:
    assert said["cached"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("revision", "tiny/full has no revision 'v2'"),
        ("gated", "tiny/gated is gated: accept its licence"),
        ("unknown", "'nobody/nothing' was not found on the hub"),
        ("down", "the hub cannot be reached"),
        ("offline, unknown", "the hub cannot be reached"),
    ],
)
def test_hub_failure_is_one_line(said: dict[str, Any], name: str, words: str) -> None:
    code, stdout, stderr = said[name]
    assert (code, stdout) == (1, "")
    assert len(stderr.splitlines()) == 1
    assert words in stderr
