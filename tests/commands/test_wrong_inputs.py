"""What users get wrong, each with its siblings: one line says what is wrong, before any work."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Chained, Invoke, only_line

PATH = "check the path, its disk and your rights to it"
NO_RUN = "afile is a file and not a run directory; give another --run"
TOO_MANY_STEPS = "--steps 5000 is more than the 1000 timesteps that the model was trained with"
UTF8 = "save it as UTF-8"


@pytest.fixture
def wrong(
    msfp: Invoke,
    tiny: Callable[[str], Path],
    prompted_chained: Chained,
    copied: Callable[..., Path],
) -> Callable[..., str]:
    """Return a function that runs a command and returns its one line of error."""
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("afile").write_text("a file")
    places = {"model": tiny("StableDiffusionPipeline")}

    def run(command: str, exit_code: int) -> str:
        if "{run}" in command:
            places["run"] = copied(prompted_chained.run.directory, "run")
        words = shlex.split(command.format(**places))
        line = only_line(msfp(*words), exit_code)
        assert "report it" not in line
        return line

    return run


@pytest.mark.parametrize(
    ("command", "exit_code", "message"),
    [
        ("calibrate {model} --prompts prompts.txt --steps 5000", 2, TOO_MANY_STEPS),
        ("sample --run {run} --prompt cat --steps 5000", 2, TOO_MANY_STEPS),
        ("evaluate --run {run} --num-images 2 --steps 5000", 2, TOO_MANY_STEPS),
        ("calibrate {model} --prompts prompts.txt --run afile", 1, f"afile: File exists; {PATH}"),
        ("calibrate {model} --run afile/inside", 1, f"afile/inside: Not a directory; {PATH}"),
        ("finetune --run afile", 1, NO_RUN),
        (
            "finetune --run nowhere",
            1,
            "no run directory nowhere here; `msfp calibrate --run nowhere` makes one, or give",
        ),
        ("export --run afile", 1, NO_RUN),
        ("status --run {model}", 1, "a pipeline and not a run directory; give another --run"),
        ("calibrate {model} --run {model}", 1, "a pipeline and not a run directory"),
        ("sample {run}/export --prompt cat --run {model}", 1, "a pipeline and not a run directory"),
        ("inspect --run afile", 1, NO_RUN),
        ("sample --run afile --prompt cat", 1, NO_RUN),
        ("evaluate --run afile", 1, NO_RUN),
        ("report --run afile", 1, NO_RUN),
        ("status --run afile", 1, NO_RUN),
        *(
            (
                f"calibrate {{model}} --max-recording-gib {value}",
                2,
                f"--max-recording-gib must be positive, got {value}",
            )
            for value in ("nan", "0", "-1", "inf")
        ),
        ("calibrate {model} --device meta", 1, "device 'meta' cannot be used here"),
        ("calibrate {model} --device mps", 1, "from the 'MPS' backend); try --device cpu"),
        (f"calibrate {{model}} --seed {2**63}", 2, f"--seed must be at most {2**62}, got {2**63}"),
        ("sample --run {run} --prompt cat --kernel openvino:", 2, "unknown kernel 'openvino:'; ch"),
        ("export --run {run} --out new --engine openvino:", 2, "unknown --engine 'openvino:'"),
        ("sample --run {run} --prompt cat --device meta", 1, "device 'meta' cannot be used here"),
        (
            "calibrate {model} --device gpu",
            1,
            "device 'gpu' cannot be used here (torch knows no such device); try --device cpu",
        ),
        ("export --run {run} --out /proc/x", 1, "/proc/.x.msfp-lock: No such file or di"),
        ("sample --run {run} --prompt cat --out /proc/x", 1, PATH),
        ("evaluate --run {run} --num-images 2 --out /proc/x", 1, PATH),
        ("quantize {model} --out /proc/x", 1, PATH),
        ("calibrate {model} --run /proc/x", 1, f"/proc/x: No such file or directory; {PATH}"),
        ("export --run {run} --out afile/x", 1, f"afile: File exists; {PATH}"),
        ("quantize {model} --out afile/x", 1, f"afile: File exists; {PATH}"),
        ("calibrate ''", 2, "MODEL is empty; give a directory or a hub id, or leave it out"),
        ("quantize '' --out x", 2, "MODEL is empty"),
        ("calibrate afile", 1, "afile is a file, and msfp reads directories in diffusers' format"),
        ("quantize afile --out x", 1, "afile is a file, and msfp reads directories"),
        ("evaluate --run {run} --against afile", 1, "afile is a file"),
        ("calibrate {model} --guidance-scale nan", 2, "--guidance-scale must be at least -1000"),
        ("calibrate {model} --guidance-scale inf", 2, "--guidance-scale must be at least -1000"),
        ("sample --run {run} --prompt cat --guidance-scale nan", 2, "--guidance-scale must be"),
        ("export --run {run} --overwrite --max-shard-size abc", 2, "'abc' is not a size"),
        ("quantize {model} --out x --max-shard-size 5XB", 2, "'5XB' is not a size"),
        ("export --reseal {run}/export --overwrite", 2, "leave the other options out"),
        ("export --reseal {run}/export --engine foo", 2, "leave the other options out"),
        ("evaluate --run {run} --guidance-scale=-inf", 2, "--guidance-scale must be at least"),
    ],
)
def test_it_is_one_line_and_nothing_is_written(
    command: str, exit_code: int, message: str, wrong: Callable[..., str]
) -> None:
    assert message in wrong(command, exit_code)
    assert {path.name for path in Path().iterdir()} <= {"prompts.txt", "afile", "run"}
    assert not list(Path().rglob("*.msfp-*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate {model} --num-images 1000000000", "--num-images must be at most 100000"),
        ("evaluate --run {run} --num-images 1000000000", "--num-images must be at most 100000"),
        ("sample --run {run} --prompt cat --num-images 1000000000", "at most 10000 pictures"),
    ],
)
def test_bounds_are_asked_before_the_work(
    command: str, message: str, wrong: Callable[..., str]
) -> None:
    start = time.process_time()
    assert message in wrong(command, 2)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat\n".encode("utf-16"), UTF8),
        ("a cat\n".encode("utf-16-le"), "it is in UTF-16; save it as UTF-8"),
        ("a cat\n".encode("utf-32"), UTF8),
        ("rötes Kleid\n".encode("latin-1"), UTF8),
        (b"\xef\xbb\xbf \n", "holds no prompts"),
    ],
    ids=["utf-16", "utf-16-le", "utf-32", "latin-1", "a mark alone"],
)
@pytest.mark.parametrize("command", ["calibrate {model}", "sample --run {run}"])
def test_prompts_in_another_encoding_are_refused(
    command: str, content: bytes, message: str, wrong: Callable[..., str]
) -> None:
    Path("odd.txt").write_bytes(content)
    assert message in wrong(f"{command} --prompts odd.txt", 2)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(
    name: str, wrong: Callable[..., str], tiny: Callable[[str], Path]
) -> None:
    shutil.copytree(tiny("StableDiffusionPipeline"), "partly")
    shutil.rmtree(Path("partly") / name)
    for command in ("calibrate partly", "quantize partly --out x"):
        assert f"partly lacks the folder of its {name}; download it again" in wrong(command, 1)


@pytest.mark.parametrize("file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_file_of_a_denoiser_that_is_missing_is_one_line(
    file: str, wrong: Callable[..., str], tiny: Callable[[str], Path]
) -> None:
    shutil.copytree(tiny("StableDiffusionPipeline"), "partly")
    (Path("partly") / file).unlink()
    for command in ("calibrate partly", "quantize partly --out x"):
        assert "partly/unet" in wrong(command, 1)


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell, in which ``msfp`` is this one."""
    program = f"{shlex.quote(sys.executable)} -m msfp_cli"
    return subprocess.run(
        ["bash", "-c", line.replace("msfp", program, 1)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    done = shell("msfp --help | head -1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_prompt_is_read_as_utf8_in_any_locale(prompted_chained: Chained, tmp_path: Path) -> None:
    done = shell(
        f"msfp sample --steps 2 --prompt 'rötes Kleid' --out made --run {prompted_chained.run}",
        tmp_path,
        LC_ALL="POSIX",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "000-r-tes-kleid-seed0.png").exists()


def test_a_prompt_in_another_encoding_is_refused(wrong: Callable[..., str]) -> None:
    line = wrong("sample --run {run} --prompt 'r\udcf6tes Kleid'", 2)
    assert line.endswith("it is not UTF-8; give it in a file with --prompts")


def test_a_working_directory_that_was_deleted_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell("rmdir ../gone; msfp calibrate", tmp_path / "gone")
    assert done.returncode == 1
    line = "error: the working directory was deleted; change to one that exists"
    assert done.stderr.splitlines() == [line]
