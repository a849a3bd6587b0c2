"""Every script in benchmarks/ runs on tiny sizes, to its last printed line.

Each runs in a process of its own, as a user runs it. `gpu.py` needs a GPU; its parts that need none
are tested in tests/layers/kernels/test_gpu_benchmark.py.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Finetuned
from msfp_cli.calibration.result import Calibration
from msfp_cli.run import Run
from scripts.run_script import run_script

TINY = "StableDiffusionPipeline"
BITS = ("4/4", "4/8", "4/16")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rounding_compares_nearest_with_compensated(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--num-images", 2, "--steps", 2, "--num-tests", 1, "--work", tmp_path / "work")
    page = tmp_path / "page.md"
    lines = run_script(
        "benchmarks/rounding.py", "--model", tiny(TINY), *options, "--markdown", page
    )
    rows = [cells(line) for line in lines[:6]]
    assert [row[:2] for row in rows] == [
        [bits, rounding] for bits in BITS for rounding in ("nearest", "compensated")
    ]
    assert all(0 < float(row[2]) < 1 for row in rows)
    assert lines[0] in page.read_text()


def test_rounding_takes_a_pipeline_without_prompts(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--num-images", 2, "--steps", 2, "--num-tests", 1, "--work", tmp_path)
    lines = run_script("benchmarks/rounding.py", "--model", tiny("DDIMPipeline"), *options)
    assert all(0 < float(cells(line)[2]) < 1 for line in lines[:6])


def test_calibration_compares_formats_and_lists_the_layers_fed_by_silu(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--num-images", 2, "--steps", 1, "--num-tests", 1, "--rows", "mixed")
    page = tmp_path / "page.md"
    lines = run_script(
        "benchmarks/calibration.py", "--model", tiny(TINY), *options, "--markdown", page
    )
    formats, plain, lifted = cells(lines[0])
    assert formats == "mixed"
    assert 0 < float(lifted) < float(plain)
    assert cells(lines[-1])[-1] == "default"
    assert page.read_text().splitlines()[2:] == ["| formats | no lift | lift 5 % |", *lines[2:]]


def test_sensitivity_compares_numbers_of_calls(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--num-images", 5, "--steps", 4, "--work", tmp_path, "--markdown", tmp_path / "page")
    lines = run_script("benchmarks/sensitivity.py", "--model", tiny(TINY), *options)
    rows = [cells(line) for line in lines[:7]]
    assert [row[:2] for row in (rows[0], rows[-1])] == [["16", "4"], ["1", "1"]]
    assert float(rows[0][3]) == 1
    assert all(0.5 < float(row[3]) <= 1 and float(row[5]) > 0 for row in rows)
    assert lines[0] in (tmp_path / "page").read_text()


def test_input_scales_compares_four_ways(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--num-images", 5, "--steps", 2, "--work", tmp_path, "--markdown", tmp_path / "page")
    lines = run_script("benchmarks/input_scales.py", "--model", tiny(TINY), "--bits", 4, *options)
    rows = [cells(line) for line in lines[:4]]
    errors = [float(row[2]) for row in rows]
    assert len(set(errors)) > 1 and all(0 < error < 1 for error in errors)
    assert rows[0][3].startswith("0 and 0 of") and rows[0][4] == "1.00"
    assert all(float(row[4]) > 0 for row in rows)
    assert lines[0] in (tmp_path / "page").read_text()


def test_search_finds_what_brute_force_finds() -> None:
    lines = run_script("benchmarks/search.py", "--num-samples", 200, "--width", 32)
    assert len([line for line in lines if line.startswith(("e", "ue"))]) == 7
    (worst,) = (line for line in lines if line.startswith("greatest"))
    assert float(worst.split(": ")[1].split()[0]) < 1e-9
    assert lines[-1].startswith("peak memory")


@linux_only
def test_execution_compares_kernels_with_float32(tmp_path: Path) -> None:
    options = ("--work", tmp_path, "--models", "tiny", "--calls", 1)
    lines = run_script(
        "benchmarks/execution.py", *options, "--only", "msfp reference", "--rounds", 2
    )
    float32, reference = (cells(line) for line in lines[-2:])
    assert float32[0] == "float32" and float(float32[4]) == 1
    assert reference[0] == "msfp reference" and float(reference[4]) < 0.25
    peer = run_script("benchmarks/execution.py", *options, "--only", "quanto qint8")[-1]
    assert peer.startswith("| quanto qint8 | give --peers")


@linux_only
def test_where_time_goes_shows_the_kernel_and_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    made = ("--work", tmp_path, "--models", "tiny", "--calls", 1, "--only", "msfp openvino")
    run_script("benchmarks/execution.py", *made)
    lines = run_script("benchmarks/where_time_goes.py", "--work", tmp_path, "--model", "tiny")
    titles = [line for line in lines if line.startswith("###")]
    assert [title.split(",")[0] for title in titles] == ["### kernel `cpu`", "### msfp in OpenVINO"]
    assert sum(line.startswith("| 8-bit products | 0.") for line in lines) == 2
    assert lines[-1].startswith("| the whole call | ")


def test_ablation_climbs_a_rung(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--work", tmp_path, "--model", tiny(TINY), "--jobs", 1, "--only", "mixed, LoRA")
    sizes = ("--rates", 0.01, "--seeds", 1, "--updates", 8, "--num-images", 6, "--steps", 2)
    options += ("--preset", "paper", "--markdown", tmp_path / "page", "--extractor", "fashion")
    few = run_script("benchmarks/ablation.py", *options, *sizes, "--num-tests", 1, code=1)
    assert "fashion needs --num-tests 128" in few
    lines = run_script("benchmarks/ablation.py", *options, *sizes, "--num-tests", 128)
    (run,) = (tmp_path / "W4A4-paper" / "jobs").iterdir()
    calibration = Calibration.load(Run(run).calibration)
    assert (calibration.recipe.weights, calibration.recipe.rounding) == (4, "nearest")
    assert "\nW4A4, the paper's conditions: 6 pictures" in (tmp_path / "page").read_text()
    assert cells(lines[0])[1:3] == ["learning rate", "output error"]
    calibrated, tuned = (cells(line) for line in lines[-2:])
    assert calibrated[:2] == ["mixed, calibrated only", ""]
    assert tuned[:2] == ["mixed, LoRA", "0.01"]
    assert cells(lines[0])[-1] == "Fréchet distance"
    for column in (2, -1):
        assert 0 < float(tuned[column]) != float(calibrated[column]) > 0


def test_trajectory_finds_the_timesteps_that_change_the_picture(
    tiny_tuned: Finetuned, prompted_tuned: Finetuned, tmp_path: Path
) -> None:
    runs = ("--run", tiny_tuned.run.directory, "--run", prompted_tuned.run.directory)
    options = ("--num-tests", 2, "--steps", 3, "--markdown", tmp_path / "page")
    lines = run_script("benchmarks/trajectory.py", *runs, *options)
    rows = [cells(line) for line in lines if line.startswith("| ") and "output" not in line]
    assert len(rows) == 2 * (3 + 3)
    for *each, total, together, everything in (rows[:6], rows[6:]):
        assert all(0 < float(cell) < 1 for row in each[:2] for cell in row[1:])
        assert float(total[3]) == pytest.approx(sum(float(row[3]) for row in each), abs=3e-5)
        assert float(together[3]) > 0 and float(everything[3]) > 0
    # Without guidance the sampler is given what the denoiser predicts.
    assert all(row[1] == row[2] for row in rows[:3])
    assert all(row[1] != row[2] for row in rows[6:9])
    assert "| all |" in (tmp_path / "page").read_text()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "DDIMPipeline"])
def test_ablation_trains_a_transformer_and_a_pipeline_without_prompts(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    options = ("--work", tmp_path, "--model", tiny(name), "--jobs", 1, "--only", "TALoRA, DFA")
    sizes = ("--rates", 0.01, "--seeds", 1, "--updates", 2, "--num-images", 4, "--steps", 2)
    lines = run_script("benchmarks/ablation.py", *options, *sizes, "--num-tests", 1)
    calibrated, tuned = (cells(line) for line in lines[-2:])
    assert calibrated[:2] == ["mixed, calibrated only", ""]
    assert tuned[:2] == ["mixed, TALoRA, DFA", "0.01"]
    assert all(float(cell) > 0 for cell in (*calibrated[2:], *tuned[2:]))


def test_peers_measures_a_run_and_says_which_peer_is_missing(
    prompted_tuned: Finetuned, tmp_path: Path
) -> None:
    run = prompted_tuned.run.directory
    model = prompted_tuned.calibration.source.model
    options = ["--work", tmp_path, "--model", model, "--run", run, "--steps", 2, "--num-tests", 1]
    for row in ("full precision", "msfp", "hqq, Linear"):
        options += ["--only", row]
    page = tmp_path / "page.md"
    lines = run_script("benchmarks/peers.py", *options, "--markdown", page)
    rows = [cells(line) for line in lines[4:7]]
    assert rows[0][0] == "**full precision**" and rows[0][5] == "0"
    assert {row[0].strip("*").split("`")[0] for row in rows[1:]} == {"msfp, calibrated "}
    assert sum("fine-tuned" in row[0] for row in rows) == 1
    latents = [float(row[6].split()[0]) for row in rows]
    assert latents == sorted(latents)
    sizes = [float(row[4]) for row in rows]
    is_best = [size < min(sizes[:i], default=1e9) for i, size in enumerate(sizes)]
    assert [row[0].startswith("**") for row in rows] == is_best
    assert lines[-1].startswith("- hqq, Linear only: not installed: ")
    assert page.read_text().startswith(f"<!-- peers.py {TINY} begins -->")


def test_peers_measures_a_pipeline_without_prompts(tiny_tuned: Finetuned, tmp_path: Path) -> None:
    options = ("--work", tmp_path, "--run", tiny_tuned.run.directory, "--steps", 2)
    model = tiny_tuned.calibration.source.model
    lines = run_script(
        "benchmarks/peers.py", "--model", model, *options, "--num-tests", 2, "--only", "msfp"
    )
    row = cells(lines[4])
    assert row[0].strip("*").startswith("msfp, calibrated ")
    assert float(row[5]) > 0 and float(row[6].split()[0]) > 0 and float(row[7].split()[0]) > 10


def test_hub_compares_one_member_with_both_ways_to_hold_two(
    tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    options = ("--run", tiny_tuned.run.directory, "--calls", 1, "--markdown", tmp_path / "page")
    lines = run_script("benchmarks/hub.py", *options, "--work", tmp_path / "work")
    one, folded, full = (cells(line) for line in lines[2:5])
    assert 1 == float(one[2]) < float(folded[2]) < float(full[2])
    assert one[3] < folded[3] == full[3]
    assert lines[-1] == "same pictures from both ways to hold a hub: True"
    assert lines[-1] in (tmp_path / "page").read_text()


def test_results_puts_a_row_and_a_sheet_where_they_are_wanted(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    places = ("--work", tmp_path / "work", "--sheet", tmp_path / "sheet.png", "--markdown", page)
    sizes = ("--only", "+ comp", "--num-recorded", 2, "--num-images", 4, "--steps", 2)
    lines = run_script("benchmarks/results.py", tiny(TINY), *places, *sizes)
    assert lines[0].startswith("4 pictures a row from the same prompts and seeds")
    full, calibrated = (cells(line) for line in lines[-2:])
    assert full[:2] == ["full precision", ""]
    assert calibrated[0] == "+ compensated rounding" and float(calibrated[1]) > 0
    assert lines[-1] in page.read_text()
    assert (tmp_path / "sheet.png").exists()


@linux_only
def test_finetune_step_times_an_update(tiny: Callable[[str], Path]) -> None:
    sizes = ("--num-images", 5, "--steps", 8, "--rounds", 1, "--updates", 1, "--threads", 1)
    lines = run_script("benchmarks/finetune_step.py", "--model", tiny(TINY), *sizes)
    rows = [cells(line) for line in lines[2:]]
    (ours,) = (row for row in rows if row[0] == "msfp, W4A4, hub of two")
    assert float(ours[1]) > 0 and float(ours[2]) > 100
    if importlib.util.find_spec("peft") is None:
        assert rows[-1][1] == "peft is not installed"
        pytest.skip("peft is not installed: its half of the comparison did not run")
    assert rows[-1][0] == "ratio"


def test_cpu_kernel_compares_the_pictures_of_kernels(tiny: Callable[[str], Path]) -> None:
    sizes = ("--num-images", 2, "--steps", 2)
    lines = run_script(
        "benchmarks/cpu_kernel.py", "--only", "pictures", "--model", tiny(TINY), *sizes
    )
    cpu, reference, simulated, in_float64 = (cells(line) for line in lines[-4:])
    assert cpu[0] == "kernel `cpu`" and in_float64[0] == "the same, sums in float64"
    assert reference[2] == simulated[3] == "0.00, 0"


def test_cpu_kernel_compares_candidates(tiny: Callable[[str], Path]) -> None:
    sizes = ("--num-images", 2, "--steps", 1, "--widths", 2)
    lines = run_script(
        "benchmarks/cpu_kernel.py", "--only", "candidates", "--model", tiny(TINY), *sizes
    )
    rows = [cells(line) for line in lines[-4:]]
    assert [row[0] for row in rows] == ["8", "16 (default)", "any", "16"]
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_cpu_kernel_times_rounding() -> None:
    sizes = ("--side", 8, "--formats", "e2m1")
    lines = run_script("benchmarks/cpu_kernel.py", "--only", "rounding", *sizes)
    row = cells(lines[-1])
    assert row[:2] == ["e2m1", "1"]
    assert all(float(cell) >= 0 for cell in row[2:])


def test_busy_machine_compares_threads_that_spin_and_sleep() -> None:
    lines = run_script("benchmarks/busy_machine.py", "--calls", 1, "--rounds", 1)
    spinning, sleeping = (cells(line) for line in lines[-2:])
    assert [spinning[0], sleeping[0]] == ["torch's default", "OMP_WAIT_POLICY=passive"]
    assert all(float(cell) > 0 for cell in [*spinning[1:], *sleeping[1:]])


def test_seal_loads_an_export_with_and_without_the_check() -> None:
    lines = run_script("benchmarks/seal.py", "--tiny", "--loads", 1)
    way = ["threads that wait", "not checked", "checked", "ratio"]
    assert [line.partition(":")[0] for line in lines[1:]] == [*way, *way]
    assert float(lines[-1].split()[-1]) > 0


@linux_only
def test_larger_than_memory_goes_on_after_kills_and_loads(tmp_path: Path) -> None:
    options = ("--billions", 0.3, "--width", 16, "--kills", 1, "--longest", 5)
    lines = run_script("benchmarks/larger_than_memory.py", "--work", tmp_path, *options)
    killed, quantized, loaded = (line for line in lines if "exit code" in line)
    assert "exit code -9" in killed
    assert "exit code 0" in quantized
    assert "exit code 0" in loaded
    assert (tmp_path / "quantized" / "model_index.json").exists()


@linux_only
def test_two_hosts_calibrate_to_the_bytes_of_one_process_and_go_on_after_a_loss(
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.md"
    options = ("--work", tmp_path / "work", "--size", "tiny", "--markdown", page)
    lines = run_script("benchmarks/two_hosts.py", *options)
    same = [line.partition("; ")[2] for line in lines if "same bytes" in line]
    assert same == ["same bytes as one process: recording, held-out, calibration"] * 2
    (lost,) = (line for line in lines if "second host killed" in line)
    assert "another process of this command has ended" in lost
    assert float(lines[-1].split()[-1]) < 1e-3
    assert lines[-1] in page.read_text()


def test_weight_only_compares_with_calibrations(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--num-images", 2, "--steps", 2, "--num-tests", 1, "--work", tmp_path / "work")
    lines = run_script("benchmarks/weight_only.py", "--model", tiny(TINY), *options)
    rows = [cells(line) for line in lines]
    assert rows[0][0] == "`msfp quantize`"
    assert len(rows) == 5
    assert all(0 < float(row[1]) < 1 for row in rows)


def test_whole_pipeline_draws_equal_pictures_before_and_after(tmp_path: Path) -> None:
    options = ("--work", tmp_path / "work", "--billions", 0.001)
    lines = run_script("benchmarks/whole_pipeline.py", *options)
    assert "equal before and after: True" in lines


@linux_only
def test_calibration_memory_finds_the_same_in_both_ways(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    options = ("--size", "tiny", "--sensitivity-calls", 1, "--markdown", page)
    lines = run_script("benchmarks/calibration_memory.py", "--work", tmp_path / "work", *options)
    assert "same formats, scales, codes and errors of layers: True" in lines
    every = next(cells(line) for line in lines if line.startswith("| all"))
    assert all(float(cell) > 0 for cell in every[1:5])
    assert "calibration_memory.py begins" in page.read_text()
