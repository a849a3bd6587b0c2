"""Finding and loading the user's model, and one helpful line where that fails."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from conftest import Invoke
from msfp_cli.checkpoint.engine import device_of
from msfp_cli.errors import ModelError, UsageError
from msfp_cli.pipelines.loading import (
    BUILT_IN,
    ModelSource,
    choose_device,
    choose_dtype,
    default_prompts,
    load_pipeline,
    resolve_model,
)

SUCCESSOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"

# The hub's client reads its address when it is imported, so its commands run in a process of their
# own, all in one.
_CHILD = """
import json, os, sys
from pathlib import Path
from hub_server import serve_hub
sd, ddim = map(Path, sys.argv[1:])
results = {}
served = {"stable-diffusion-v1-5/stable-diffusion-v1-5": sd, "tiny/ddim": ddim, "tiny/gated": ddim}
with serve_hub(served, gated=["tiny/gated"]) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from typer.testing import CliRunner
    from msfp_cli.commands.app import app

    def calibrate(name, *arguments):
        sizes = ("--num-images", "2", "--steps", "1", "--lift", "0")
        command = ["calibrate", *arguments, "--run", name, *sizes]
        result = CliRunner().invoke(app, command, prog_name="msfp")
        results[name] = [result.exit_code, result.stdout, result.stderr]

    calibrate("download", "tiny/ddim", "--revision", hub.commits["tiny/ddim"])
    calibrate("removed", "runwayml/stable-diffusion-v1-5")
    calibrate("unknown", "nobody/nothing")
    calibrate("revision", "tiny/ddim", "--revision", "v2")
    calibrate("gated", "tiny/gated")
    calibrate("variant", "tiny/ddim", "--variant", "fp8")
calibrate("down", "somebody/something")
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Said:
    """What one command line gave."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def hub(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """Run some command lines against a hub on the loopback interface."""
    import os

    directory = tmp_path_factory.mktemp("hub")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MSFP_"))
    }
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), environment.get("PYTHONPATH")])
    )
    environment |= {"HF_HOME": str(directory / "cache"), "PYTHONPATH": path, "COLUMNS": "200"}
    command = [sys.executable, "-c", _CHILD, tiny("StableDiffusionPipeline"), tiny("DDIMPipeline")]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return {
        name: Said(*result) for name, result in json.loads(done.stdout.splitlines()[-1]).items()
    }


def test_hub_model_is_downloaded_and_calibrated(hub: dict[str, Said]) -> None:
    assert hub["download"].exit_code == 0, hub["download"].stderr
    assert hub["download"].stdout == "download/calibration\n"
    assert "left the hub" not in hub["download"].stderr


def test_removed_hub_model_is_replaced_by_its_successor_with_one_line(hub: dict[str, Said]) -> None:
    assert hub["removed"].exit_code == 0, hub["removed"].stderr
    assert [line for line in hub["removed"].stderr.splitlines() if "hub" in line] == [
        "runwayml/stable-diffusion-v1-5 has left the hub; "
        f"using its maintained successor {SUCCESSOR}"
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "unknown",
            [
                "'nobody/nothing' was not found on the hub",
                "misspelt",
                "hf auth login",
                "local directory",
            ],
        ),
        ("revision", ["tiny/ddim has no revision 'v2'", "leave --revision out"]),
        ("variant", ["tiny/ddim", "variant", "fp8"]),
        ("gated", ["tiny/gated is gated", "accept its licence", "hf auth login"]),
        ("down", ["'somebody/something'", "the hub cannot be reached", "network"]),
    ],
)
def test_hub_failure_is_one_helpful_line(hub: dict[str, Said], name: str, parts: list[str]) -> None:
    said = hub[name]
    assert (said.exit_code, said.stdout) == (1, "")
    assert len(said.stderr.splitlines()) == 1
    assert said.stderr.startswith("error: ")
    assert [part for part in parts if part not in said.stderr] == [], said.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("empty", "is not a diffusers pipeline: it has no model_index.json"),
        ("a/b/c", "'a/b/c' is neither a directory nor a hub id (owner/name)"),
        ("nowhere", "'nowhere' is not a local directory"),
        ("./nowhere", "'./nowhere' is neither a directory nor a hub id (owner/name)"),
        (
            "owner/name",
            "model 'owner/name' is not a local directory, and the hub cannot be reached",
        ),
    ],
)
def test_model_that_is_not_there_is_one_helpful_line(
    msfp: Invoke, model: str, message: str
) -> None:
    Path("empty").mkdir()
    result = msfp("calibrate", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("msfp-run").exists()


def test_damaged_model_is_named_with_the_reason(
    tiny: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    model = copied(tiny("DDIMPipeline"))
    (model / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=f"cannot load {model}: .*config.json") as caught:
        load_pipeline(ModelSource(model=str(model)), "cpu")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("shard", ["", "-00001-of-00001"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_files_of_a_variant_alone_are_named_with_the_option(
    component: str, shard: str, tiny: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    model = copied(tiny("StableDiffusionPipeline"))
    (plain,) = (model / component).glob("*.safetensors")
    plain.rename(plain.with_name(f"{plain.stem}.fp16{shard}.safetensors"))
    for streamed in (False, True):
        with pytest.raises(ModelError, match=f"{component} has .*; give --variant fp16$"):
            load_pipeline(ModelSource(model=str(model)), "cpu", streamed=streamed)
    if not shard:  # of which diffusers wants an index
        load_pipeline(ModelSource(model=str(model), variant="fp16"), "cpu")


def test_variant_that_a_directory_lacks_is_refused_with_advice(
    tiny: Callable[[str], Path],
) -> None:
    source = ModelSource(model=str(tiny("DDIMPipeline")), variant="fp8")
    with pytest.raises(ModelError, match="has no files of the variant 'fp8'; leave --variant out"):
        load_pipeline(source, "cpu")


def test_directory_named_like_a_removed_model_is_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("runwayml/stable-diffusion-v1-5")[0] == SUCCESSOR
    (tmp_path / "runwayml" / "stable-diffusion-v1-5").mkdir(parents=True)
    resolved = str(tmp_path / "runwayml" / "stable-diffusion-v1-5")
    assert resolve_model("runwayml/stable-diffusion-v1-5") == (resolved, None)


def test_models_are_resolved_to_what_a_later_command_finds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve_model("mine") == (str(tmp_path / "mine"), None)
    assert resolve_model("owner/name") == ("owner/name", None)
    assert resolve_model(None) == (BUILT_IN, None)


def test_built_in_model_has_prompts_of_its_own() -> None:
    fashion, general = default_prompts(BUILT_IN), default_prompts("owner/name")
    for prompts in (fashion, general):
        assert len(prompts) >= 40
        assert len(set(prompts)) == len(prompts)
        assert all(prompt.strip() == prompt != "" for prompt in prompts)
    assert not set(fashion) & set(general)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_device_that_is_not_there_is_one_helpful_line(msfp: Invoke, device: str) -> None:
    result = msfp("calibrate", "--device", device)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert f"device '{device}' cannot be used here" in result.stderr
    assert "try --device cpu" in result.stderr


def test_type_follows_from_the_device_unless_given(tiny_source: ModelSource) -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_dtype(None, "cpu") == torch.float32
    assert choose_dtype(None, "cuda") == torch.bfloat16
    assert choose_dtype("float16", "cpu") == torch.float16
    pipe = load_pipeline(ModelSource(model=tiny_source.model, dtype="bfloat16"), "cpu")
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_cpu_is_the_cpu_however_it_is_named(
    tiny_source: ModelSource, device: str | torch.device
) -> None:
    assert choose_device(device) == "cpu"
    assert device_of("openvino", device) == "cpu"
    assert load_pipeline(tiny_source, device).unet.dtype == torch.float32


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'int4'.*float32, float16, bfloat16"):
        ModelSource(model="x", dtype="int4")


def test_two_threads_that_load_at_once_leave_torch_as_it_was(
    tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, register = DiffusionPipeline.from_pretrained, nn.Module.register_parameter
    both = threading.Barrier(2)

    def meet(*args: object, **kwargs: object) -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.2)  # passed at once only if both threads were inside
        return load(*args, **kwargs)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", meet)
    with ThreadPoolExecutor(2) as pool:
        pipes = list(pool.map(lambda _: load_pipeline(tiny_source, "cpu"), range(2)))
    assert both.broken
    assert nn.Module.register_parameter is register
    assert all(not p.is_meta for pipe in pipes for p in pipe.unet.parameters())
