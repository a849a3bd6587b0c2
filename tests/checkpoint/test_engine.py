"""Exports whose denoiser an engine runs."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Chained, Finetuned, Invoke, only_line
from msfp_cli.checkpoint.convert import convert_export
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.checkpoint.reseal import reseal
from msfp_cli.errors import MsfpError, UsageError
from msfp_cli.files.seal import MARK
from msfp_cli.pipelines.sampling import Sampling, call_pipeline

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def pictures(export: Path, kernel: str) -> np.ndarray:
    pipe = MSFPPipeline.from_pretrained(export, device="cpu", kernel=kernel).pipe
    drawn = call_pipeline(pipe, (None,) * 4, Sampling(num_inference_steps=2))
    return np.stack([np.asarray(picture, dtype=np.float32) for picture in drawn])


def test_pictures_are_those_of_the_kernel_cpu(tiny_chained: Chained) -> None:
    difference = pictures(tiny_chained.export, "openvino") - pictures(tiny_chained.export, "cpu")
    assert np.abs(difference).mean() <= 1


@pytest.mark.slow
def test_pictures_of_a_hub_are_those_of_the_kernel_cpu(tiny_tuned: Finetuned) -> None:
    difference = pictures(tiny_tuned.export, "openvino") - pictures(tiny_tuned.export, "cpu")
    assert np.abs(difference).mean() <= 1


def test_description_names_the_engine(tiny_chained: Chained) -> None:
    pipe = MSFPPipeline.from_pretrained(tiny_chained.export, kernel="openvino")
    assert "run by openvino on CPU (" in pipe.describe()


def test_other_devices_of_torch_are_refused(tiny_chained: Chained) -> None:
    with pytest.raises(UsageError, match="takes its tensors from the CPU, not from device 'meta'"):
        MSFPPipeline.from_pretrained(tiny_chained.export, kernel="openvino", device="meta")


def test_offloading_is_refused(tiny_chained: Chained) -> None:
    pipe = MSFPPipeline.from_pretrained(tiny_chained.export, kernel="openvino")
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(UsageError, match=f"{method} does not work with kernel 'openvino'"):
            getattr(pipe, method)()


def test_conversion_in_the_export_is_sealed_and_used(
    tiny_chained: Chained, copied: Callable[..., Path], msfp: Invoke, cache: Path
) -> None:
    run = copied(tiny_chained.run.directory, "run")
    done = msfp("export", "--run", run, "--engine", "openvino", "--overwrite")
    assert done.exit_code == 0, done.stderr
    (conversion,) = (run / "export" / "openvino").iterdir()
    before = (run / "export" / MARK).read_bytes()
    reseal(run / "export")
    assert (run / "export" / MARK).read_bytes() == before
    pictures(run / "export", "openvino")
    assert not cache.exists()
    with (conversion / "model.bin").open("r+b") as file:
        file.write(b"\xff")
    assert "model.bin is altered" in only_line(
        msfp("sample", "--run", run, "--kernel", "openvino"), 1
    )


@pytest.mark.slow
def test_two_at_once_convert_or_say_so(
    tiny_chained: Chained, copied: Callable[..., Path], cache: Path
) -> None:
    outcomes = list[str]()

    def convert(name: str) -> None:
        try:
            pictures(tiny_chained.export, "openvino")
            outcomes.append("right")
        except MsfpError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=convert, args=(str(i),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(line == "right" or "is being written by" in line for line in outcomes)
    assert len(list(cache.iterdir())) == 1


def test_engine_that_there_is_not_is_one_line(msfp: Invoke, tiny_chained: Chained) -> None:
    run = tiny_chained.run.directory
    failed = msfp("export", "--run", run, "--engine", "tensorrt", "--overwrite")
    assert only_line(failed, 2) == "unknown --engine 'tensorrt'; choose openvino"


def test_no_conversion_is_left_of_a_killed_one(
    tiny_chained: Chained, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = copied(tiny_chained.export)

    def stop(denoiser: object, call: object, path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("msfp_cli.engines.openvino.write_converted", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_export(export, "openvino")
    assert not list((export / "openvino").iterdir())
