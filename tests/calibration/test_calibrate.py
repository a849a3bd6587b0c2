"""What calibration chooses, what it refuses, and that it depends on its recipe alone."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from conftest import QUICK, SIX_PICTURES, Chained, Invoke, files_of
from msfp_cli.calibration import compensate as compensation
from msfp_cli.calibration import denoiser_search
from msfp_cli.calibration.calibrate import calibrate_denoisers_, calibrate_run
from msfp_cli.calibration.denoiser_search import held_out_error, observed_shards
from msfp_cli.calibration.keep import usual_role
from msfp_cli.calibration.layer_search import LIFTED_BITS
from msfp_cli.calibration.quantize import quantize_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration, LayerChoice
from msfp_cli.errors import CalibrationError, CheckpointError, ModelError, RunError
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, load_pipeline
from msfp_cli.pipelines.prefix import RepeatedCall
from msfp_cli.processes import LEFT_ALONE
from msfp_cli.recording import compare
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from together import run_together

Recordings = tuple[Recording, Recording]
KINDS = ("scales", "codes", "multipliers")  # of a calibration's tensors
Tensors = Mapping[str, Mapping[str, torch.Tensor]]
UNLIFTED = CalibrateRecipe(max_samples=4000, lift=0.0)
SHARED = replace(QUICK, input_lift=0.4, lift=0.2, formats="e2m1,ue2m2")  # all stages
NAN, INFINITY = float("nan"), float("inf")


def chosen(calibration: Calibration) -> dict[str, LayerChoice]:
    """Return the choices for the UNet's layers."""
    return dict(calibration.layers["unet"])


def assert_same_calibration(left: Calibration, right: Calibration) -> None:
    """Compare every field; tensors have no plain equality."""
    # What was typed is kept by `calibrate_run` only.
    no_tensors = {**{kind: {} for kind in KINDS}, "options": None}
    assert replace(left, **no_tensors) == replace(right, **no_tensors)
    for kind in KINDS:
        assert_same_tensors(getattr(left, kind), getattr(right, kind))


def assert_same_tensors(left: Tensors, right: Tensors) -> None:
    """Compare tensors by component and layer."""
    assert left.keys() == right.keys()
    for component, tensors in left.items():
        assert tensors.keys() == right[component].keys()
        assert all(torch.equal(each, right[component][name]) for name, each in tensors.items())


@pytest.fixture(scope="module")
def fashion_errors(fashion_recordings: Recordings) -> dict[str, float]:
    """Return the held-out errors of the built-in model with each set of formats and no lift."""
    errors = {}
    for formats in ("mixed", "signed", "integer"):
        pipe = load_pipeline(ModelSource(model=BUILT_IN), "cpu")
        recipe = replace(UNLIFTED, formats=formats, rounding="nearest")
        calibration = calibrate_denoisers_(pipe, *fashion_recordings, recipe)
        assert all(
            layer.reason != "lifted" and layer.sensitivity is None
            for layer in chosen(calibration).values()
        )
        errors[formats] = calibration.held_out_error["unet"]
    return errors


def test_mixed_formats_beat_signed_and_integer_ones(fashion_errors: dict[str, float]) -> None:
    assert 0 < fashion_errors["mixed"] < min(fashion_errors["signed"], fashion_errors["integer"])


def test_lifting_halves_the_error_within_its_budget(
    fashion_errors: dict[str, float], fashion_chained: Chained
) -> None:
    calibration = fashion_chained.calibration
    assert calibration.held_out_error["unet"] < 0.5 * fashion_errors["mixed"]
    lifted = [layer for layer in chosen(calibration).values() if layer.reason == "lifted"]
    spent = sum(layer.multiply_adds for layer in lifted)
    assert (
        0
        < spent
        <= calibration.recipe.lift
        * sum(layer.multiply_adds for layer in chosen(calibration).values())
    )
    assert {layer.scheme.weight.bits for layer in lifted} == {LIFTED_BITS}
    assert {layer.scheme.input.format.bits for layer in lifted} == {LIFTED_BITS}


def test_layers_left_behind_fit_no_more_or_matter_less_than_those_lifted(
    fashion_chained: Chained,
) -> None:
    layers = chosen(fashion_chained.calibration).values()
    lifted = [layer for layer in layers if layer.reason == "lifted"]
    budget = fashion_chained.calibration.recipe.lift * sum(layer.multiply_adds for layer in layers)
    left = budget - sum(layer.multiply_adds for layer in lifted)
    for other in (layer for layer in layers if layer.reason == "default"):
        assert other.scheme.weight.bits == other.scheme.input.format.bits == 4
        gain = other.sensitivity / other.multiply_adds
        assert other.multiply_adds > left or gain <= min(
            c.sensitivity / c.multiply_adds for c in lifted
        )


def test_trained_unet_takes_unsigned_formats_where_inputs_are_one_sided(
    fashion_chained: Chained,
) -> None:
    # SiLU, the activation before most convolutions, never goes below -0.2785.
    inputs = [c for c in chosen(fashion_chained.calibration).values() if c.scheme.input is not None]
    layers = [c for c in inputs if c.scheme.input.format.bits == 4]
    one_sided = [c for c in layers if c.minimum > -0.2785 and c.maximum > 10 * 0.2785]
    assert len(one_sided) > 5
    assert all(not c.scheme.input.format.signed for c in one_sided)
    assert any(c.scheme.input.format.signed for c in layers)


def test_outermost_layers_are_kept_in_floating_point_and_timestep_layers_at_eight_bits(
    fashion_chained: Chained,
) -> None:
    layers = chosen(fashion_chained.calibration)
    kept = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    assert {name for name, layer in layers.items() if layer.reason == "kept"} == set(kept)
    # They are those that earlier versions knew by name, so results of these hold.
    assert {name: layer.role for name, layer in layers.items()} == {
        name: usual_role(name) for name in layers
    }
    for name in kept:
        scheme = layers[name].scheme
        if name.startswith("conv"):
            assert scheme.weight is scheme.input is None
        else:
            assert scheme.weight.bits == scheme.input.format.bits == 8


def test_keep_rules_leave_layers_in_floating_point_or_at_their_bits(
    prompted_chained: Chained, tmp_path: Path
) -> None:
    source = prompted_chained.calibration.source
    pipe = load_pipeline(source, "cpu")
    recordings = Recording(prompted_chained.run.recording), Recording(prompted_chained.run.held_out)
    recipe = replace(QUICK, lift=0.0, keep=("*attn2*:none", "*attn2.to_out*:6", "conv_in:4"))
    layers = chosen(calibrate_denoisers_(pipe, *recordings, recipe))
    modules = dict(pipe.unet.named_modules())
    attention = {name for name in layers if "attn2" in name}
    assert attention
    for name in attention:
        if "to_out" in name:
            assert layers[name].scheme.weight.bits == layers[name].scheme.input.format.bits == 6
        else:
            assert layers[name].scheme.weight is layers[name].scheme.input is None
            assert type(modules[name]) is nn.Linear
    assert layers["conv_in"].scheme.weight.bits == 4
    assert {layers[name].reason for name in (*attention, "conv_in")} == {"kept"}
    assert {layers[name].reason for name in layers if "attn1" in name} == {"default"}


@pytest.mark.parametrize(
    ("formats", "inputs", "weights"),
    [
        ("signed", {"e1m2", "e2m1", "e3m0"}, {"e1m2", "e2m1", "e3m0"}),
        ("unsigned", {"ue1m3", "ue2m2", "ue3m1"}, {"e1m2", "e2m1", "e3m0"}),
        ("integer", {"ue1m3"}, {"e1m2"}),
        ("e2m1,ue2m2", {"e2m1", "ue2m2"}, {"e2m1"}),
        ("ue3m1", {"ue3m1"}, {"e1m2", "e2m1", "e3m0"}),
    ],
)
def test_only_the_formats_asked_for_are_candidates(
    tiny_pipe: DiffusionPipeline,
    tiny_recordings: Recordings,
    formats: str,
    inputs: set[str],
    weights: set[str],
) -> None:
    layers = chosen(
        calibrate_denoisers_(tiny_pipe, *tiny_recordings, replace(QUICK, lift=0.0, formats=formats))
    )
    default = [layer for layer in layers.values() if layer.reason == "default"]
    for layer in default:
        assert {score.format for score in layer.input_scores} == inputs
        assert {score.format for score in layer.weight_scores} == weights
        assert layer.scheme.input.format.name in inputs
        assert layer.scheme.weight.name in weights


def test_scores_are_best_first_and_hold_the_choice(tiny_chained: Chained) -> None:
    for layer in chosen(tiny_chained.calibration).values():
        for scores in (layer.weight_scores, layer.input_scores):
            assert [score.error for score in scores] == sorted(score.error for score in scores)
        assert layer.weight_error == layer.weight_scores[0].error
        # A signed input format is preferred to an unsigned one that is less than a tenth better.
        assert layer.input_error <= layer.input_scores[0].error / 0.9


def test_input_grids_hold_the_maximum_and_zero_point_of_their_score(tiny_chained: Chained) -> None:
    for layer in chosen(tiny_chained.calibration).values():
        grid = layer.scheme.input
        (score,) = (s for s in layer.input_scores if s.format == grid.format.name)
        assert grid.max_value == pytest.approx(score.max_value, rel=1e-6)
        assert grid.zero_point == pytest.approx(score.zero_point or 0.0, rel=1e-6)
        assert layer.minimum <= layer.maximum


def test_calibrating_leaves_the_denoiser_quantized_and_measures_it(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    recording, held_out = tiny_recordings
    assert held_out_error(tiny_pipe.unet, held_out, "unet") == 0
    calibration = calibrate_denoisers_(tiny_pipe, recording, held_out, QUICK)
    assert isinstance(tiny_pipe.unet.conv_in, QuantConv2d)
    assert isinstance(tiny_pipe.unet.time_embedding.linear_1, QuantLinear)
    assert calibration.held_out_error == {"unet": held_out_error(tiny_pipe.unet, held_out, "unet")}
    assert calibration.held_out_error["unet"] > 0


def test_equal_recipes_give_equal_calibrations(
    tiny_chained: Chained, tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    assert_same_calibration(
        calibrate_denoisers_(tiny_pipe, *tiny_recordings, QUICK), tiny_chained.calibration
    )


def calibrate_into(
    run: Path,
    source: ModelSource,
    recipe: CalibrateRecipe = SHARED,
    max_memory: int | None = None,
) -> None:
    """Calibrate on three shards, or do a part of it if this is one of several processes."""
    calibrate_run(Run(run), source, SIX_PICTURES, recipe, device="cpu", max_memory=max_memory)


@pytest.fixture(scope="module")
def files_of_one(
    tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Return the files of a run that one process has calibrated."""
    run = tmp_path_factory.mktemp("alone") / "run"
    calibrate_into(run, tiny_source)
    assert Calibration.load(run / "calibration").codes["unet"]
    return files_of(run)


@pytest.mark.parametrize(
    "max_memory", [None, pytest.param(8 << 30, marks=pytest.mark.slow)], ids=["whole", "bounded"]
)
def test_two_processes_calibrate_to_the_bytes_of_one(
    max_memory: int | None,
    files_of_one: dict[str, bytes],
    tiny_source: ModelSource,
    tmp_path: Path,
) -> None:
    def work(index: int) -> None:
        calibrate_into(tmp_path / "run", tiny_source, max_memory=max_memory)

    ends = run_together(work, tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    made = files_of(tmp_path / "run")
    memory, memory_of_one = made.pop("run.json"), files_of_one["run.json"]
    assert made == {name: data for name, data in files_of_one.items() if name != "run.json"}
    # What the run remembers is the command, with the bound.
    assert (memory == memory_of_one) == (max_memory is None)
    assert (b"--max-memory 8GiB" in memory) == (max_memory is not None)


@pytest.mark.slow
def test_three_processes_calibrate_groups_of_weights_to_the_bytes_of_one(
    tiny_source: ModelSource, tmp_path: Path
) -> None:
    recipe = replace(QUICK, activations=8, weight_groups=16, formats="e2m1,e1m6,ue1m7", lift=0.3)
    together = tmp_path / "together"
    ends = run_together(lambda index: calibrate_into(together, tiny_source, recipe), tmp_path, 3)
    assert [end.code for end in ends] == [0, 0, 0], ends
    calibrate_into(tmp_path / "alone", tiny_source, recipe)
    assert files_of(together) == files_of(tmp_path / "alone")


@pytest.mark.parametrize("dying", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_calibration_that_lost_a_process_goes_on_to_the_same_bytes(
    dying: int,
    files_of_one: dict[str, bytes],
    tiny_source: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def calibrate_and_die(index: int) -> None:
        if index == dying:
            monkeypatch.setattr(compensation, "_store", lambda *_: os.kill(os.getpid(), 9))
        calibrate_into(tmp_path / "run", tiny_source)

    ends = run_together(calibrate_and_die, tmp_path)
    assert ends.pop(dying).code == -9
    assert ends[0].code in (LEFT_ALONE, 99)  # told of it, or waiting for it
    assert not Run(tmp_path / "run").calibration.exists()
    calibrate_into(tmp_path / "run", tiny_source)
    assert files_of(tmp_path / "run") == files_of_one


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"max_samples": 500}], ids=lambda change: next(iter(change))
)
def test_another_sample_gives_other_grids(
    tiny_chained: Chained,
    tiny_pipe: DiffusionPipeline,
    tiny_recordings: Recordings,
    change: dict[str, int],
) -> None:
    other = chosen(
        calibrate_denoisers_(tiny_pipe, *tiny_recordings, replace(QUICK, lift=0.0, **change))
    )
    grids = {name: layer.scheme.input for name, layer in chosen(tiny_chained.calibration).items()}
    assert sum(layer.scheme.input != grids[name] for name, layer in other.items()) > len(grids) / 2


def test_more_sensitivity_calls_give_other_sensitivities(
    tiny_chained: Chained, tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    other = chosen(
        calibrate_denoisers_(tiny_pipe, *tiny_recordings, replace(QUICK, sensitivity_calls=2))
    )
    mine = chosen(tiny_chained.calibration)
    measured = {name for name, layer in mine.items() if layer.sensitivity is not None}
    assert measured == {name for name, layer in mine.items() if layer.reason != "kept"}
    assert all(mine[name].sensitivity != other[name].sensitivity for name in measured)


def test_layers_of_a_large_denoiser_are_measured_on_one_call(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[DenoiserCall]()

    def repeated(denoiser: nn.Module, call: DenoiserCall) -> RepeatedCall:
        calls.append(call)
        return RepeatedCall(denoiser, call)

    monkeypatch.setattr(compare, "LARGE", 1)
    monkeypatch.setattr(denoiser_search, "RepeatedCall", repeated)
    calibrate_denoisers_(tiny_pipe, *tiny_recordings, replace(QUICK, sensitivity_calls=3))
    assert len(calls) == 1


def test_layer_that_never_runs_is_reported_and_left_alone(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    tiny_pipe.unet.spare = nn.Linear(4, 4)
    tiny_pipe.unet.experts = nn.Parameter(torch.zeros(3, 5, 2))
    count = sum(parameter.numel() for parameter in tiny_pipe.unet.parameters())
    calibration = calibrate_denoisers_(tiny_pipe, *tiny_recordings, replace(QUICK, lift=0.0))
    assert calibration.unused == {"unet": ("spare",)}
    assert "spare" not in chosen(calibration)
    assert type(tiny_pipe.unet.spare) is nn.Linear
    shares = calibration.float_shares("unet")
    assert shares["spare.weight"] == pytest.approx(16 / count)
    assert shares["experts"] == pytest.approx(30 / count)
    packed = sum(each.num_weights for each in chosen(calibration).values() if each.scheme.weight)
    assert sum(shares.values()) == pytest.approx(1 - packed / count)
    words = calibration.floats_in_words("unet")
    assert words.startswith(f"{sum(shares.values()):.1%} of the parameters stay in floating point")
    assert replace(calibration, others={}).floats_in_words("unet") == ""


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["nan", "infinity"])
@pytest.mark.parametrize("name", ["conv_in", "mid_block.resnets.0.conv1", "conv_out"])
def test_weight_that_is_not_finite_is_named(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings, name: str, value: float
) -> None:
    tiny_pipe.unet.get_submodule(name).weight.data.view(-1)[3] = value
    with pytest.raises(
        ModelError, match=rf"the tensor {name}.weight in the files of unet holds a NaN or infinity"
    ):
        calibrate_denoisers_(tiny_pipe, *tiny_recordings, QUICK)


@pytest.mark.parametrize("value", [NAN, -INFINITY], ids=["nan", "infinity"])
def test_activation_that_is_not_finite_is_named_with_its_timestep(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings, value: float
) -> None:
    recording, held_out = tiny_recordings
    timesteps = [call.timestep for call in recording.calls()]
    runs = iter(range(len(timesteps)))

    def overflow_in_the_second_call(
        module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if next(runs) == 1:
            output.view(-1)[5] = value

    tiny_pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(overflow_in_the_second_call)
    # The layer that reads the value is the one with a bad input: between the two is a norm, which
    # spreads a NaN.
    layer = r"'mid_block\.resnets\.0\.conv2'"
    message = rf"the input of layer {layer} .* at timestep {timesteps[1]:g}; .*--dtype float32"
    with pytest.raises(CalibrationError, match=message):
        calibrate_denoisers_(tiny_pipe, recording, held_out, QUICK)


def test_calibration_comes_back_from_disk_as_it_was(
    fashion_chained: Chained, tmp_path: Path
) -> None:
    fashion_chained.calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert_same_calibration(loaded, fashion_chained.calibration)
    loaded.save(tmp_path / "again")
    for name in ("calibration.json", *(f"{kind}.safetensors" for kind in KINDS)):
        first = tmp_path / "calibration" / name
        again = tmp_path / "again" / name
        assert first.exists() == again.exists() != (name == "multipliers.safetensors")
        assert not first.exists() or first.read_bytes() == again.read_bytes()


def test_loaded_calibration_quantizes_to_the_same_codes(
    tiny_chained: Chained,
    tiny_pipe: DiffusionPipeline,
    tiny_recordings: Recordings,
    tiny_source: ModelSource,
) -> None:
    calibrate_denoisers_(tiny_pipe, *tiny_recordings, QUICK)
    other = load_pipeline(tiny_source, "cpu")
    quantize_(other.unet, Calibration.load(tiny_chained.run.calibration), "unet")
    state = other.unet.state_dict()
    assert state.keys() == tiny_pipe.unet.state_dict().keys()
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in tiny_pipe.unet.state_dict().items()
    )


def test_saving_over_a_calibration_needs_leave(tiny_chained: Chained, tmp_path: Path) -> None:
    tiny_chained.calibration.save(tmp_path / "calibration")
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        tiny_chained.calibration.save(tmp_path / "calibration")
    changed = replace(tiny_chained.calibration, held_out_error={"unet": 0.5})
    changed.save(tmp_path / "calibration", overwrite=True)
    assert Calibration.load(tmp_path / "calibration").held_out_error == {"unet": 0.5}


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        document = json.loads((directory / "calibration.json").read_text())
        change(document)
        (directory / "calibration.json").write_text(json.dumps(document))

    return damage


def _truncate(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return damage


def _lose_a_scale(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    scales = load_file(directory / "scales.safetensors")
    del scales["unet/conv_in"]
    save_file(scales, directory / "scales.safetensors")


def _flip_a_scale_bit(directory: Path) -> None:
    content = bytearray((directory / "scales.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "scales.safetensors").write_bytes(content)


DAMAGES = {
    "half a calibration.json": _truncate("calibration.json"),
    "half a scales.safetensors": _truncate("scales.safetensors"),
    "no layers": _edit(lambda document: document.pop("layers")),
    "unknown setting": _edit(lambda document: document["recipe"].update(rotation=1)),
    "unknown format": _edit(
        lambda document: document["layers"]["unet"]["conv_in"]["parameters"].update(weight="e9")
    ),
    "layers of another kind": _edit(lambda document: document.update(layers=[])),
    "a list": lambda directory: (directory / "calibration.json").write_text("[]"),
    "newer": _edit(lambda document: document.update(schema=99, rotation=1)),
    "lost scale": _lose_a_scale,
    "flipped bit in a scale": _flip_a_scale_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_calibration_is_refused_in_one_helpful_line(
    tiny_chained: Chained, copied: Callable[..., Path], msfp: Invoke, damage: str
) -> None:
    run = copied(tiny_chained.run.directory, "msfp-run")
    DAMAGES[damage](run / "calibration")
    with pytest.raises(CheckpointError, match="--overwrite|calibrate again") as caught:
        Calibration.load(run / "calibration")
    assert len(str(caught.value).splitlines()) == 1
    result = msfp("export", "--out", "elsewhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {caught.value}\n".replace(str(run), "msfp-run")


def test_missing_calibration_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run `msfp calibrate` first"):
        Calibration.load(tmp_path / "calibration")


@pytest.mark.parametrize(
    ("num_shards", "batch_size", "expected"),
    [(3, 8, 3), (10, 8, 10), (25, 8, 10), (200, 1, 80), (7, 100, 1)],
)
def test_search_looks_at_a_fair_share_of_a_long_recording(
    num_shards: int, batch_size: int, expected: int
) -> None:
    recording: Any = SimpleNamespace(
        num_shards=num_shards, recipe={"record": {"batch_size": batch_size}}
    )
    shards = observed_shards(recording)
    assert len(set(shards)) == len(shards) == expected
    gaps = {after - before for before, after in zip(shards, [*shards[1:], num_shards], strict=True)}
    assert shards[0] == 0 and max(gaps) - min(gaps) <= 1
