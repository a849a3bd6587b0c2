"""Weights rounded for the output of their layers: better where they were not made, and kept."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import FEW_UPDATES, QUICK, Chained
from msfp_cli.calibration import compensate as module
from msfp_cli.calibration import samples
from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.compensate import held_back, round_layer
from msfp_cli.calibration.quantize import move_weights_, quantize_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.calibration.samples import LayerSamples, weight_rows
from msfp_cli.finetuning.student import Student
from msfp_cli.formats.compensation import compensated_steps
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.multipliers import step_sizes
from msfp_cli.formats.objective import DAMPINGS, CheckRows
from msfp_cli.formats.packing import unpack
from msfp_cli.formats.rounding import Grid, dequantize, fake_quantize, per_channel, quantize
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.result import Recording

E2M1 = FloatFormat.parse("e2m1")
GRIDS = {"rounded": Grid(FloatFormat.parse("ue2m2"), 0.2, -0.5), "exact": None}
Recordings = tuple[Recording, Recording]


def sampled(layer: nn.Module, grid: Grid | None) -> LayerSamples:
    """Return samples of correlated inputs, and as many others to check on."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    each = LayerSamples("layer", layer, LayerScheme(weight=E2M1, input=grid))
    for take in (each.add, each.keep):
        x = torch.randn(40, 6, 6, 8, generator=generator) @ mixing / 2
        x = x.movedim(-1, 1) if isinstance(layer, nn.Conv2d) else x
        take(x, layer(x), 1000)
    return each


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 6),
        nn.Conv2d(8, 6, 3, padding=1, stride=2),
        nn.Conv2d(8, 6, 3, groups=2, dilation=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_layer_gets_the_codes_of_least_error_on_the_rows_to_check(
    layer: nn.Module, grid: Grid | None
) -> None:
    each = sampled(layer, grid)
    scale = layer.weight.flatten(1).abs().amax(1) / 12
    complete = sampled(layer, grid)
    complete.complete_()
    (rows,) = complete.checks
    place = Grid(E2M1, per_channel(scale, layer.weight.ndim))

    def error(weight: torch.Tensor) -> float:
        outputs = rows.rounded @ weight_rows(layer, weight).mT
        return float((outputs - rows.outputs).square().sum())

    steps = weight_rows(layer, layer.weight / place.scale)
    missing = complete.missing[0] / weight_rows(layer, scale) if complete.missing else None
    values = torch.tensor(DAMPINGS)
    candidates = compensated_steps(steps, complete.moments[0], missing, E2M1, values)
    expected = min(error(c.reshape(layer.weight.shape) * place.scale) for c in candidates)

    result = round_layer(each, E2M1, scale)
    assert result.codes is not None
    weight = dequantize(unpack(result.codes, 4, layer.weight.shape), place)
    assert error(weight) == pytest.approx(expected, rel=1e-4)
    assert error(weight) < error(fake_quantize(layer.weight, place))
    assert result.compensation.error < result.compensation.nearest_error
    assert result.compensation.damping in DAMPINGS


@torch.no_grad()
def test_a_layer_that_compensation_does_not_help_keeps_nearest_rounding() -> None:
    layer = nn.Linear(8, 6)
    each = sampled(layer, None)
    # Sums of other inputs than those to check on: what they say is wrong.
    each.moments[0].copy_(torch.ones(8, 8) + 1e-3 * torch.eye(8))
    rows = torch.eye(8).repeat(125, 1)[None]
    each.checks = [CheckRows(rows @ layer.weight.mT, rows)]
    result = round_layer(each, E2M1, layer.weight.abs().amax(1) / 12)
    assert result.codes is None
    assert result.compensation.damping is None
    assert result.compensation.error == result.compensation.nearest_error


def test_calls_of_the_last_pictures_are_held_back() -> None:
    assert held_back([0, 4, 8], [2, 2, 3]) == [False] * 4 + [True] * 3
    assert held_back([0], [11]) == [i in (4, 9) for i in range(11)]
    assert held_back([0], [2]) == [False, True]
    assert held_back([0], [1]) == [False]


@pytest.fixture
def compensated(tiny_chained: Chained) -> Calibration:
    return tiny_chained.calibration


@pytest.fixture(params=["a step a channel", "groups"])
def either(
    request: pytest.FixtureRequest, tiny_chained: Chained, tiny_grouped: Chained
) -> Calibration:
    grouped: bool = request.param == "groups"
    calibration = (tiny_grouped if grouped else tiny_chained).calibration
    assert bool(calibration.multipliers["unet"]) == grouped
    return calibration


def codes_of(calibration: Calibration) -> dict[str, torch.Tensor]:
    return dict(calibration.codes["unet"])


def test_codes_are_saved_loaded_and_what_the_quantized_model_holds(
    either: Calibration, tiny_source: ModelSource, tmp_path: Path
) -> None:
    either.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert codes_of(loaded).keys() == codes_of(either).keys() != set()
    assert loaded.identity() == either.identity()
    unet = load_pipeline(tiny_source, "cpu").unet
    quantize_(unet, loaded, "unet")
    layers = quantized_layers(unet)
    for name, packed in codes_of(either).items():
        assert torch.equal(layers[name].packed_codes()[0], packed), name


def test_moved_weights_round_to_the_codes_and_change_nowhere_else(
    either: Calibration, tiny_source: ModelSource
) -> None:
    unet = load_pipeline(tiny_source, "cpu").unet
    before = {name: layer.weight.clone() for name, layer in find_layers(unet).items()}
    move_weights_(unet, either, "unet")
    for name, layer in find_layers(unet).items():
        if name not in codes_of(either):
            assert torch.equal(layer.weight, before[name])
            continue
        fmt = either.table("unet")[name].weight
        sizes = step_sizes(*either.steps_of("unet", name), layer.weight.shape)
        codes = quantize(layer.weight, Grid(fmt, sizes))
        assert torch.equal(codes, unpack(codes_of(either)[name], fmt.bits, codes.shape))


@pytest.mark.parametrize("name", ["e3m1", "e4m3", "e5m2"])
def test_formats_of_integers_beyond_a_byte_are_compensated(
    name: str, tiny_source: ModelSource, tiny_recordings: Recordings
) -> None:
    pipe = load_pipeline(tiny_source, "cpu")
    weights = FloatFormat.parse(name).bits
    recipe = CalibrateRecipe(
        weights=weights, formats=name, activations=None, lift=0.0, max_samples=200
    )
    calibration = calibrate_denoisers_(pipe, *tiny_recordings, recipe)
    codes = codes_of(calibration)
    layers = quantized_layers(pipe.unet)
    assert any(layer.scheme.weight == FloatFormat.parse(name) for layer in layers.values())
    assert codes
    for each, packed in codes.items():
        assert torch.equal(layers[each].packed_codes()[0], packed), each


def test_training_begins_at_the_codes(either: Calibration, tiny_source: ModelSource) -> None:
    unet = load_pipeline(tiny_source, "cpu").unet
    move_weights_(unet, either, "unet")
    table = either.table("unet")
    scales = either.scales["unet"]
    student = Student(unet, table, scales, FEW_UPDATES, either.multipliers["unet"])
    for name, packed in codes_of(either).items():
        layer = student.layers[name]
        sizes = step_sizes(*either.steps_of("unet", name), layer.layer.weight.shape)
        place = Grid(table[name].weight, sizes)
        codes = unpack(packed, place.format.bits, layer.layer.weight.shape)
        for member in range(FEW_UPDATES.hub_size):
            assert torch.equal(layer.rounded_weight(member), dequantize(codes, place)), name


def test_nearest_rounding_keeps_no_codes_and_has_an_identity_of_its_own(
    compensated: Calibration,
    tiny_source: ModelSource,
    tiny_recordings: Recordings,
    tmp_path: Path,
) -> None:
    pipe = load_pipeline(tiny_source, "cpu")
    nearest = calibrate_denoisers_(pipe, *tiny_recordings, replace(QUICK, rounding="nearest"))
    nearest.save(tmp_path / "nearest")
    assert not (tmp_path / "nearest" / "codes.safetensors").exists()
    assert all(layer.compensation is None for layer in nearest.layers["unet"].values())
    assert nearest.identity() != compensated.identity()
    assert nearest.table("unet") == compensated.table("unet")


def test_the_bound_on_memory_does_not_change_the_codes(
    compensated: Calibration,
    tiny_source: ModelSource,
    tiny_recordings: Recordings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "_GROUP_BYTES", 2**18)
    pipe = load_pipeline(tiny_source, "cpu")
    again = calibrate_denoisers_(pipe, *tiny_recordings, QUICK)
    assert again.identity() == compensated.identity()


def test_a_killed_compensation_goes_on_with_the_group_that_is_missing(
    compensated: Calibration,
    tiny_source: ModelSource,
    tiny_recordings: Recordings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(samples, "_GROUP_BYTES", 2**18)
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        calibrate_denoisers_(
            load_pipeline(tiny_source, "cpu"), *tiny_recordings, QUICK, work=tmp_path
        )
    finished = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(finished) == 2

    monkeypatch.undo()
    monkeypatch.setattr(samples, "_GROUP_BYTES", 2**18)
    pipe = load_pipeline(tiny_source, "cpu")
    resumed = calibrate_denoisers_(pipe, *tiny_recordings, QUICK, work=tmp_path)
    assert resumed.identity() == compensated.identity()
    assert resumed.layers == compensated.layers
    assert finished.items() <= {p.name: p.read_bytes() for p in tmp_path.iterdir()}.items()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
def test_codes_are_mapped_from_the_files_of_their_groups(
    compensated: Calibration, tiny_source: ModelSource, tiny_recordings: Recordings, tmp_path: Path
) -> None:
    """So they take no memory that the system could not take back, however large the model."""
    pipe = load_pipeline(tiny_source, "cpu")
    calibration = calibrate_denoisers_(pipe, *tiny_recordings, QUICK, work=tmp_path)
    assert calibration.identity() == compensated.identity()
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if f"{tmp_path}/" in line]
    for name, codes in codes_of(calibration).items():
        address = codes.data_ptr()
        assert any(int(low, 16) <= address < int(high, 16) for low, high in places), name


def stop_after(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Interrupt when a number of groups were sampled."""
    sample = module.sample
    left = [None] * groups

    def interrupted(*arguments: object) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        sample(*arguments)

    monkeypatch.setattr(module, "sample", interrupted)


def test_what_other_settings_left_is_not_used(
    compensated: Calibration, tiny_source: ModelSource, tiny_recordings: Recordings, tmp_path: Path
) -> None:
    for recipe in (replace(QUICK, weights=6), QUICK):
        pipe = load_pipeline(tiny_source, "cpu")
        calibration = calibrate_denoisers_(pipe, *tiny_recordings, recipe, work=tmp_path)
    assert calibration.identity() == compensated.identity()


def test_a_run_keeps_the_errors_of_each_layer_and_nothing_unfinished(
    tiny_chained: Chained,
) -> None:
    run = tiny_chained.run
    document = json.loads((run.calibration / "calibration.json").read_text())
    errors = [layer["compensation"] for layer in document["layers"]["unet"].values()]
    assert any(each and each["damping"] is not None for each in errors)
    assert all(each["error"] <= each["nearest_error"] for each in errors if each)
    assert not run.unfinished_codes.exists()
