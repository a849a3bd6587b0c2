import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Finetuned, Invoke, only_line
from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import ModelError
from msfp_cli.evaluation import cost
from msfp_cli.evaluation.cost import CallTime
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_table
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.layers.kernels import registry
from msfp_cli.layers.kernels.cpu import Cpu
from msfp_cli.layers.kernels.simulated import Simulated
from msfp_cli.layers.routing import table_index
from msfp_cli.layers.trial import measured

Copied = Callable[..., Path]


@pytest.fixture
def inspected(tiny_tuned: Finetuned, copied: Copied) -> FinetuneState:
    """A fine-tuned run in the working directory; its only denoiser's state."""
    copied(tiny_tuned.run.directory, "msfp-run")
    return FinetuneState.load(tiny_tuned.run.finetuned("unet"))


def test_errors_are_those_of_the_first_and_of_the_best_evaluation(
    inspected: FinetuneState, msfp: Invoke
) -> None:
    errors = json.loads(msfp("inspect", "--json").stdout)["unet"]["errors"]
    assert [(e["timestep"], e["before"]) for e in errors] == list(inspected.history[0].by_timestep)
    assert [(e["timestep"], e["after"]) for e in errors] == list(inspected.best.by_timestep)


def test_members_are_those_of_the_exported_table(
    inspected: FinetuneState, tiny_tuned: Finetuned, msfp: Invoke
) -> None:
    members = json.loads(msfp("inspect", "--json").stdout)["unet"]["members"]
    names = tuned_names(Calibration.load(tiny_tuned.run.calibration).table("unet"))
    table = member_table(inspected, names)
    rows = [table_index(timestep) for timestep in sorted(inspected.timesteps, reverse=True)]
    assert members == {name: table[rows, slot].tolist() for slot, name in enumerate(names)}
    assert any(len(set(row)) > 1 for row in members.values())


def test_map_draws_blocks_or_the_layers_of_a_pattern(
    inspected: FinetuneState, msfp: Invoke
) -> None:
    blocks = msfp("inspect").stderr
    assert "down_blocks.0 " in blocks and "down_blocks.0.resnets" not in blocks
    layers = msfp("inspect", "--layers", "down_blocks.0.*conv1")
    members = json.loads(msfp("inspect", "--layers", "down_blocks.0.*conv1", "--json").stdout)[
        "unet"
    ]["members"]
    assert list(members) == ["down_blocks.0.resnets.0.conv1"]
    assert "".join(map(str, members["down_blocks.0.resnets.0.conv1"])) in layers.stderr


def test_pattern_of_no_layer_names_one_that_there_is(
    inspected: FinetuneState, msfp: Invoke
) -> None:
    assert only_line(msfp("inspect", "--layers", "decoder*"), 2).endswith("'conv_in'")


def test_run_without_fine_tuning_names_the_command(
    tiny_tuned: Finetuned, copied: Copied, msfp: Invoke
) -> None:
    for file in (copied(tiny_tuned.run.directory, "msfp-run") / "finetune").iterdir():
        file.unlink()
    assert only_line(msfp("inspect"), 1).endswith("run `msfp finetune` first")


def test_kernels_are_shown_for_every_layer_of_the_export(
    tiny_tuned: Finetuned, copied: Copied, msfp: Invoke
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")
    result = msfp("inspect", "--kernels", "--device", "cpu", "--json")
    data = json.loads(result.stdout)["unet"]
    assert set(data["seconds"]) == {"quantized", "full_precision"}
    shown = data["layers"]
    assert set(shown) == set(tiny_tuned.calibration.table("unet"))
    assert {how["kernel"] for how in shown.values()} <= {"cpu", "simulated"}
    assert all(
        how["why"] if how["kernel"] == "simulated" else not how["why"] for how in shown.values()
    )
    some = json.loads(
        msfp("inspect", "--kernels", "--layers", "*conv1", "--device", "cpu", "--json").stdout
    )["unet"]["layers"]
    assert some == {name: how for name, how in shown.items() if name.endswith("conv1")} != {}


@pytest.mark.parametrize(("seconds", "is_slower"), [(0.9, False), (1.01, False), (1.5, True)])
def test_kernels_come_with_the_time_of_a_recorded_call(
    seconds: float,
    is_slower: bool,
    tiny_tuned: Finetuned,
    copied: Copied,
    msfp: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")
    shown = msfp("inspect", "--kernels", "--device", "cpu").stderr
    assert re.search(r"a recorded call of unet: [\d.]+ s, in full precision [\d.]+ s", shown)
    time = CallTime(quantized=seconds, full_precision=1.0)
    monkeypatch.setattr(cost, "time_calls", lambda *arguments: {"unet": time})
    shown = msfp("inspect", "--kernels", "--device", "cpu").stderr
    assert f"a recorded call of unet: {seconds:.3g} s, in full precision 1 s" in shown
    assert ("it takes 1.50 times as long as in full precision" in shown) == is_slower


def test_kernels_without_a_recording_are_shown_without_times(
    tiny_tuned: Finetuned, copied: Copied, msfp: Invoke
) -> None:
    run = copied(tiny_tuned.run.directory, "msfp-run")
    shutil.rmtree(run / "held-out")
    result = msfp("inspect", "--kernels", "--device", "cpu")
    assert "not timed: the run has no recorded calls of this export" in result.stderr
    assert result.exit_code == 0


def test_kernels_are_shown_where_full_precision_is_gone_or_large(
    tiny_tuned: Finetuned, copied: Copied, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")

    def gone(*arguments: object) -> None:
        raise ModelError("the model is gone")

    monkeypatch.setattr(cost, "time_calls", gone)
    result = msfp("inspect", "--kernels", "--device", "cpu")
    assert (result.exit_code, "not timed: the model is gone" in result.stderr) == (0, True)
    monkeypatch.setattr("msfp_cli.commands.inspect._MOST_WEIGHTS", 100)
    result = msfp("inspect", "--kernels", "--device", "cpu")
    assert "not timed: full precision may not fit into memory" in result.stderr


def test_kernels_that_are_measured_are_shown_with_their_times(
    tiny_tuned: Finetuned,
    copied: Copied,
    msfp: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    # As if this were a GPU with a kernel that does what `cpu` does.
    monkeypatch.setattr(measured.Measured, "device", "cpu")
    monkeypatch.setattr(measured, "RIVALS", (Cpu,))
    monkeypatch.setattr(registry, "_IN_TURN", (measured.Measured, Simulated))
    result = msfp("inspect", "--kernels", "--device", "cpu", "--json")
    layers = json.loads(result.stdout)["unet"]["layers"].values()
    tried = [each for each in layers if each["seconds"]]
    assert len(tried) > len(layers) / 2
    for each in tried:
        assert set(each["seconds"]) == {"cpu", "simulated", measured.FLOAT}
        assert each["kernel"] == min(("cpu", "simulated"), key=each["seconds"].__getitem__)
    assert not [each for each in layers if each["kernel"] == registry.MEASURED]
    shown = msfp("inspect", "--kernels", "--layers", "*conv1", "--device", "cpu").stderr
    times = re.compile(r"cpu [\d.e-]+ ms, simulated [\d.e-]+ ms, not rounded [\d.e-]+ ms")
    assert times.search(" ".join(shown.split()))


def test_kernels_of_no_layer_are_one_clear_line(
    tiny_tuned: Finetuned, copied: Copied, msfp: Invoke
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")
    result = msfp("inspect", "--kernels", "--layers", "nothing*", "--device", "cpu")
    assert "no layer matches 'nothing*'" in only_line(result, 2)
