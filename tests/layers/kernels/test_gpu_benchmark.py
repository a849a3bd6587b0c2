"""The parts of benchmarks/gpu.py that need no GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.fixture
def gpu_checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_checks

    return gpu_checks


@without_gpu
def test_machine_without_a_gpu_is_told_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu.py needs a CUDA device, and torch sees none\n"


def test_unknown_model_is_refused_with_the_names_there_are(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.parse(["--models", "sd15,sd3"])
    assert "unknown model 'sd3'; choose from sd15, dit-xl, sdxl, sd15-16" in capsys.readouterr().err


def test_defaults_stay_below_eight_minutes(gpu: ModuleType) -> None:
    options = gpu.parse([])
    assert options.budget < 480 and options.models.split(",") == list(gpu.MODELS)


def test_budget_is_shared_and_what_a_part_leaves_goes_to_the_others(gpu: ModuleType) -> None:
    parts, left = [gpu.CHECKS, *gpu.MODELS], 460.0
    given = []
    for i, name in enumerate(parts):
        given.append(gpu.seconds_for(name, left, parts[i + 1 :]))
        left -= given[-1]
    assert left == pytest.approx(0) and min(given) > 0
    assert gpu.seconds_for("sd15", 100.0, []) == 100.0


def test_row_is_left_out_when_the_longest_of_its_kind_would_not_fit(gpu: ModuleType) -> None:
    now, ran = [0.0], []
    for row, in_time in gpu.rows_in_time(gpu.ROWS, 100.0, lambda: now[0]):
        ran.append(in_time)
        if in_time:
            now[0] += 45.0 if row.endswith("compiled") else 2.0
    assert dict(zip(gpu.ROWS, ran, strict=True)) == {
        "bf16": True,
        "bf16 compiled": True,
        "msfp int8": True,
        "msfp int8 compiled": True,
        "msfp auto": True,
        "msfp auto compiled": False,
        "msfp fp8": True,
        "msfp fp8 compiled": False,
    }


def test_table_has_a_row_for_everything_and_says_what_is_missing(gpu: ModuleType) -> None:
    results = {
        "sd15": [
            {"row": "bf16 compiled", "milliseconds": 30.0, "peak_bytes": 2e9},
            {"row": "msfp int8 compiled", "milliseconds": 20.0, "peak_bytes": 1.5e9},
            {"row": "msfp fp8", "failed": "RuntimeError: no"},
            {"ended": "killed"},
        ],
        "dit-xl": [],
    }
    lines = gpu.table(results)
    assert len(lines) == 2 + 2 * len(gpu.ROWS) and all(line.count("|") == 6 for line in lines)
    assert "| SD 1.5-sized UNet, 2 rows | msfp int8 compiled | 20.00 | 1.50 | 1500 |" in lines
    assert "| SD 1.5-sized UNet, 2 rows | msfp fp8 | RuntimeError: no | | |" in lines
    assert "| SD 1.5-sized UNet, 2 rows | msfp fp8 compiled | killed | | |" in lines
    assert "| DiT-XL/2, 2 rows | bf16 | out of time | | |" in lines


def test_row_without_a_base_has_no_ratio(gpu: ModuleType) -> None:
    lines = gpu.table({"sdxl": [{"row": "bf16", "milliseconds": 10.0, "peak_bytes": 1e6}]})
    assert "| SDXL-sized UNet, 2 rows | bf16 | 10.00 |  | 1 |" in lines


def test_checks_fail_when_one_is_wrong_or_none_ran(gpu: ModuleType) -> None:
    good = {"path": "Triton", "count": 3, "largest": 2e-7}
    assert gpu.check_lines([good]) == (["Triton: 3 layers, largest error 2.0e-07"], True)
    assert gpu.check_lines([good, {"wrong": "a"}]) == (
        ["Triton: 3 layers, largest error 2.0e-07", "WRONG: a"],
        False,
    )
    assert gpu.check_lines([good, {"ended": "killed"}])[1] is False
    assert gpu.check_lines([]) == ([], False)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ('print(\'{"row": "a"}\', flush=True)', [{"row": "a"}]),
        (
            "print('noise'); print('{\"row\": \"a\"}', flush=True); raise ValueError(3)",
            [{"row": "a"}, "ValueError: 3"],
        ),
        (
            'import time; print(\'{"row": "a"}\', flush=True); time.sleep(60)',
            [{"row": "a"}, "out of time"],
        ),
    ],
    ids=["ends", "fails", "hangs"],
)
def test_part_gives_what_it_printed_before_it_ended(
    script: str,
    found: list[object],
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "part.py").write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    expected = [{"ended": item} if isinstance(item, str) else item for item in found]
    assert gpu.run_part("sd15", 5.0, gpu.parse([])) == expected


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit-xl"])
def test_denoisers_have_their_size_and_their_arguments(name: str, gpu: ModuleType) -> None:
    model = gpu.MODELS[name]
    with torch.device("meta"):
        denoiser = model.kind(**model.config)
    millions = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    assert round(millions) == {"sd15": 860, "sdxl": 2567, "dit-xl": 750}[name]
    arguments = gpu.arguments_of(name, denoiser, 16)
    sample = arguments["sample" if "sample" in arguments else "hidden_states"]
    assert sample.shape == (16, 4, *[denoiser.config.sample_size] * 2)
    assert name != "sdxl" or arguments["added_cond_kwargs"]["text_embeds"].shape == (16, 1280)
    assert arguments["timestep"].numel() == (16 if name == "dit-xl" else 1)


def test_rule_of_thumb_quantizes_every_layer(gpu: ModuleType) -> None:
    from msfp_cli.layers.replace import find_layers, quantized_layers
    from tiny_pipelines import build_tiny

    denoiser = build_tiny("StableDiffusionPipeline").unet
    names = list(find_layers(denoiser))
    weights = {name: layer.weight.detach().clone() for name, layer in find_layers(denoiser).items()}
    gpu.quantize_(denoiser)
    layers = quantized_layers(denoiser)
    assert list(layers) == names
    assert layers["conv_in"].scheme.weight.name == "e1m6"
    assert {layer.scheme.input.format.name for layer in layers.values()} == {
        "e2m1",
        "ue2m2",
        "e2m5",
    }
    for name, layer in layers.items():
        assert (
            torch.nn.functional.cosine_similarity(
                layer.weight.flatten(), weights[name].flatten(), dim=0
            )
            > 0.95
        )


def test_checks_pass_on_the_cpu(gpu_checks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_checks.print_checks("cpu", limited_to=45)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = {figures["path"]: figures for figures in found}
    assert {"torch", "float8"} <= paths.keys() and all(
        figures["largest"] < 1e-5 for figures in found
    )


def test_every_kind_of_layer_is_checked_on_every_path(gpu_checks: ModuleType) -> None:
    ran = set(gpu_checks.checks())
    for path in ("Triton", "torch"):
        assert {check.layer for check in ran if check.path == path} == set(gpu_checks.LAYERS)
        assert {check.format for check in ran if check.path == path} == set(gpu_checks.FORMATS)
    assert {check.path for check in ran if check.hub == 2} == {
        "Triton",
        "torch",
        "packed",
        "compiled",
    }


def test_check_that_is_wrong_is_told(
    gpu_checks: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gpu_checks.formula
    monkeypatch.setattr(gpu_checks, "formula", lambda *arguments: plain(*arguments) * 1.001)
    gpu_checks.print_checks("cpu", limited_to=2)
    assert "torch, odd linear, e1m2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("layer", ["odd linear", "3x3"])
def test_compiled_check_passes_with_several_sets_of_weights(
    layer: str, gpu_checks: ModuleType
) -> None:
    assert gpu_checks.error_of(gpu_checks.Check("compiled", layer, "ue2m2", hub=2), "cpu") < 1e-5
