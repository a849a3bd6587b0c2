"""Pictures: how many, from which seeds, under which names, and beside which others."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from conftest import Chained, Invoke, files_of, only_line
from msfp_cli.files.lock import only_writer
from msfp_cli.files.seal import MARK
from msfp_cli.picture_files import PictureFiles, new_samples
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.media import still
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.run import Run
from msfp_cli.sample import _names, _sheet_of, contact_sheet


def pixels(path: Path) -> np.ndarray:
    """Return a picture's values, without the wrap-around of bytes."""
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture
def sample(msfp: Invoke, prompted_chained: Chained) -> Invoke:
    """Return a function that samples the text-to-image export and fails unless that works."""

    def run(*arguments: object) -> Result:
        result = msfp("sample", prompted_chained.export, *arguments)
        assert result.exit_code == 0, result.stderr
        return result

    return run


def test_pictures_are_named_by_number_prompt_and_seed(sample: Invoke) -> None:
    prompts = ("--prompt", "A cat, on  the mat!", "--prompt", "der Hund \N{DOG FACE} läuft")
    result = sample(*prompts, "--num-images", 2, "--seed", 40, "--out", "pictures")
    assert result.stdout == "pictures/sheet.png\n"
    assert sorted(path.name for path in Path("pictures").glob("*.png")) == [
        "000-a-cat-on-the-mat-seed40.png",
        "001-a-cat-on-the-mat-seed41.png",
        "002-der-hund-l-uft-seed42.png",
        "003-der-hund-l-uft-seed43.png",
        "sheet.png",
    ]


def test_prompts_come_from_options_and_from_a_file(sample: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na photo\n")
    sample("--prompt", "a cat", "--prompts", "prompts.txt", "--out", "pictures")
    names = [path.name for path in sorted(Path("pictures").glob("0*"))]
    assert names == ["000-a-cat-seed0.png", "001-a-dog-seed1.png", "002-a-photo-seed2.png"]


def test_seed_decides_the_picture(sample: Invoke) -> None:
    for out, seed in (("first", 5), ("again", 5), ("other", 6)):
        sample("--prompt", "a cat", "--seed", seed, "--out", out)
    first, again = (Path(out, "000-a-cat-seed5.png").read_bytes() for out in ("first", "again"))
    assert again == first
    assert not np.array_equal(
        pixels(Path("other/000-a-cat-seed6.png")), pixels(Path("first/000-a-cat-seed5.png"))
    )


def test_picture_depends_neither_on_its_batch_nor_on_its_place(sample: Invoke) -> None:
    for size in (1, 3):
        sample(
            "--prompt",
            "a cat",
            "--num-images",
            4,
            "--batch-size",
            size,
            "--out",
            f"batches of {size}",
        )
    for i in range(4):
        alone, together = (
            pixels(Path(f"batches of {size}/00{i}-a-cat-seed{i}.png")) for size in (1, 3)
        )
        assert np.abs(alone - together).max() <= 1
    sample("--prompt", "a cat", "--seed", 2, "--out", "third only")
    third = pixels(Path("third only/000-a-cat-seed2.png"))
    assert np.array_equal(third, pixels(Path("batches of 1/002-a-cat-seed2.png")))


def test_comparison_adds_the_full_precision_pictures(
    sample: Invoke, prompted_chained: Chained
) -> None:
    sample("--prompt", "a cat", "--num-images", 2, "--compare", "--out", "pictures")
    names = [
        f"00{i}-a-cat-seed{i}{suffix}.png"
        for i in (0, 1)
        for suffix in ("-full-precision", "-msfp")
    ]
    assert sorted(path.name for path in Path("pictures").glob("*.png")) == [*names, "sheet.png"]
    pipe = load_pipeline(prompted_chained.calibration.source, "cpu")
    generator = torch.Generator().manual_seed(1)
    (expected,) = pipe(
        "a cat", num_inference_steps=2, guidance_scale=7.5, generator=generator
    ).images
    full, quantized = (pixels(Path("pictures", name)) for name in names[2:])
    assert np.abs(full - np.asarray(expected).astype(int)).max() <= 1
    assert not np.array_equal(full, quantized)


def test_contact_sheet_has_a_row_per_model_and_room_for_titles(sample: Invoke) -> None:
    for out, options in (("one", []), ("two", ["--compare"])):
        sample("--prompt", "a cat", "--num-images", 3, "--out", out, *options)
    # Pictures of 32 x 32 are enlarged four-fold, with gaps of 4 and titles of 24.
    assert pixels(Path("one/sheet.png")).shape == (132 + 4, 3 * 132 + 4, 3)
    assert pixels(Path("two/sheet.png")).shape == (2 * (24 + 132) + 4, 3 * 132 + 4, 3)


def test_contact_sheet_shows_each_picture_in_its_place() -> None:
    colours = [["red", "lime"], ["blue", "black"]]
    sheet = contact_sheet(
        [[Image.new("RGB", (64, 64), c) for c in row] for row in colours], titles=["a", "b"]
    )
    for y in range(2):
        for x in range(2):
            left, top = 4 + 132 * x, 4 + 156 * y + 24
            piece = sheet.crop((left, top, left + 128, top + 128))
            assert piece.getcolors() == [
                (128 * 128, Image.new("RGB", (1, 1), colours[y][x]).getpixel((0, 0)))
            ]


def test_grey_and_large_pictures_fit_a_contact_sheet() -> None:
    assert contact_sheet([[Image.new("L", (300, 200), 7)]]).size == (308, 208)


def test_contact_sheet_has_eight_columns_and_the_first_64_pictures(tmp_path: Path) -> None:
    files = PictureFiles(tmp_path / "out", {})
    files.begin(overwrite=False)
    names = [f"{i:03d}" for i in range(70)]
    for i, name in enumerate(names):
        files.add(name, Image.new("RGB", (128, 128), (i, 0, 0)), 0)
    one = np.asarray(_sheet_of(files, {"MSFP": names}))
    assert one.shape == (8 * 132 + 4, 8 * 132 + 4, 3)
    assert one[4 + 7 * 132, 4 + 7 * 132, 0] == 63
    two = np.asarray(_sheet_of(files, {"a": names[:10], "b": names[20:30]}))
    assert two.shape == (4 * 156 + 4, 8 * 132 + 4, 3)
    firsts = [two[4 + 24 + 156 * y, 4, 0] for y in range(4)]
    assert firsts == [0, 20, 8, 28]


def test_what_is_no_picture_is_kept_as_what_it_is_and_shown(tmp_path: Path) -> None:
    files = PictureFiles(tmp_path / "out", {})
    files.begin(overwrite=False)
    video = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    sound = np.sin(np.linspace(0, 60, 4000)).astype(np.float32)
    for name, work in (("video", video), ("sound", sound)):
        files.add(name, work, 16_000)
        assert np.array_equal(np.asarray(files.still(name)), np.asarray(still(work)))
    files.finish(["video", "sound"], Image.new("RGB", (8, 8)), overwrite=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"video.gif", "sound.wav", "sheet.png", MARK}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Return a function that lets so many batches be drawn, and returns the list of the drawn."""

    def stop(count: float) -> list[int]:
        drawn = list[int]()

        def call(*arguments: Any, first: int, **options: Any) -> object:  # noqa: ANN401
            if len(drawn) >= count:
                raise KeyboardInterrupt
            drawn.append(first)
            return call_pipeline(*arguments, first=first, **options)

        monkeypatch.setattr("msfp_cli.sample.call_pipeline", call)
        return drawn

    return stop


FIVE = ("--prompt", "a cat", "--num-images", 5, "--batch-size", 2, "--run", "run")


@pytest.mark.parametrize("compare", [(), ("--compare",)])
def test_stopped_command_keeps_its_pictures_and_goes_on_with_the_others(
    compare: tuple[str, ...],
    msfp: Invoke,
    prompted_chained: Chained,
    stop_after: Callable[[float], list[int]],
) -> None:
    command = ("sample", prompted_chained.export, *FIVE, *compare)
    assert msfp(*command, "--out", "whole").exit_code == 0
    stop_after(2)
    assert msfp(*command).exit_code == 1
    begun = Path("run/samples/001-unfinished")
    kept = {path.name: path.read_bytes() for path in begun.glob("*.png")}
    assert [name[:3] for name in sorted(kept)] == ["000", "001", "002", "003"]
    drawn = stop_after(math.inf)
    result = msfp(*command)
    assert result.stdout == "run/samples/001/sheet.png\n"
    assert drawn == [4, 0, 2, 4] if compare else [4]
    assert "4 of 5 pictures by MSFP are in run/samples/001-unfinished already" in result.stderr
    assert [path.name for path in Path("run/samples").iterdir()] == ["001"]
    assert files_of(Path("run/samples/001")) == files_of(Path("whole"))


def test_other_command_begins_another_directory(
    msfp: Invoke, prompted_chained: Chained, stop_after: Callable[[float], list[int]]
) -> None:
    command = ("sample", prompted_chained.export, *FIVE)
    stop_after(1)
    assert msfp(*command).exit_code == 1
    Path("run/samples/my-unfinished").mkdir()
    drawn = stop_after(math.inf)
    other = msfp(*command, "--seed", 7)
    assert other.stdout == "run/samples/002/sheet.png\n" and drawn == [0, 2, 4]
    assert msfp(*command).stdout == "run/samples/001/sheet.png\n" and drawn == [0, 2, 4, 2, 4]
    assert msfp(*command).stdout == "run/samples/003/sheet.png\n"


def test_directory_that_was_begun_with_other_settings_is_refused(
    msfp: Invoke, prompted_chained: Chained, stop_after: Callable[[float], list[int]]
) -> None:
    command = ("sample", prompted_chained.export, *FIVE, "--out", "mine")
    stop_after(1)
    assert msfp(*command).exit_code == 1
    drawn = stop_after(math.inf)
    line = only_line(msfp(*command, "--seed", 7), 1)
    assert line.startswith("mine-unfinished holds pictures that were begun with other settings; ")
    assert drawn == [] and not Path("mine").exists()
    assert msfp(*command, "--seed", 7, "--overwrite").exit_code == 0
    assert drawn == [0, 2, 4] and not Path("mine-unfinished").exists()


def test_directory_of_the_users_own_is_not_written_to(
    msfp: Invoke, prompted_chained: Chained
) -> None:
    Path("mine-unfinished").mkdir()
    Path("mine-unfinished/thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        line = only_line(msfp("sample", prompted_chained.export, *FIVE, "--out", "mine", *more), 1)
        assert line.startswith("mine-unfinished/thesis.txt was not written by msfp and is not")
    assert files_of(Path("mine-unfinished")) == {"thesis.txt": b"mine"}


def test_samples_are_numbered_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with new_samples(run) as first:
        assert first == tmp_path / "samples" / "001"
    assert not run.samples.exists()
    for name in ("001", "007", "mine", "100 best"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    with new_samples(run) as directory:
        assert directory.name == "008"


def test_samples_are_numbered_beyond_three_digits(tmp_path: Path) -> None:
    for name in ("999", "1000"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    with new_samples(Run(tmp_path)) as directory:
        assert directory.name == "1001"


def test_locks_of_killed_samples_go_and_a_held_one_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.samples.mkdir()
    (run.samples / ".001.msfp-lock").touch()
    (run.samples / "001").mkdir()
    (run.samples / ".007.msfp-lock").touch()
    with only_writer(run.samples, run.samples / ".mine.msfp-lock"), new_samples(run):
        names = sorted(path.name for path in run.samples.glob(".*"))
    assert names == [".002.msfp-lock", ".mine.msfp-lock"]


def test_two_who_make_samples_get_directories_of_their_own(tmp_path: Path) -> None:
    with new_samples(Run(tmp_path)) as first, ThreadPoolExecutor(1) as other:
        second = other.submit(lambda: new_samples(Run(tmp_path)).__enter__()).result()
    assert (first.name, second.name) == ("001", "002")


def test_directories_of_samples_are_numbered(msfp: Invoke, prompted_chained: Chained) -> None:
    for number in ("001", "002"):
        result = msfp("sample", prompted_chained.export, "--prompt", "a cat", "--run", "somewhere")
        assert result.stdout == f"somewhere/samples/{number}/sheet.png\n"
    assert sorted(path.name for path in Path("somewhere/samples").iterdir()) == ["001", "002"]


def test_steps_and_guidance_are_those_of_the_calibration_unless_given(sample: Invoke) -> None:
    def picture(*options: object) -> np.ndarray:
        sample("--prompt", "a cat", "--out", "pictures", "--overwrite", *options)
        return pixels(Path("pictures/000-a-cat-seed0.png"))

    calibrated = picture()
    assert np.array_equal(picture("--steps", 2, "--guidance-scale", 7.5), calibrated)
    assert not np.array_equal(picture("--steps", 3), calibrated)
    assert not np.array_equal(picture("--guidance-scale", 2), calibrated)


def test_unconditional_export_needs_no_prompt(msfp: Invoke, tiny_chained: Chained) -> None:
    result = msfp("sample", tiny_chained.export, "--num-images", 2, "--out", "pictures")
    assert result.exit_code == 0
    assert sorted(path.name for path in Path("pictures").glob("*.png")) == [
        "000-seed0.png",
        "001-seed1.png",
        "sheet.png",
    ]


@pytest.mark.parametrize("options", [(), ("--prompt", "a cat", "--num-images", 0)])
def test_missing_prompt_is_said_before_anything_is_loaded(
    options: tuple[object, ...],
    msfp: Invoke,
    prompted_chained: Chained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("msfp_cli.sample.load_export", lambda *rest, **more: pytest.fail("loaded"))
    line = only_line(msfp("sample", prompted_chained.export, *options, "--out", "pictures"), 2)
    assert line.startswith("--num-images must be at least 1" if options else "no prompt; give at")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_to_compute_in_is_an_option(sample: Invoke, dtype: str) -> None:
    sample("--prompt", "a cat", "--out", "default")
    sample("--prompt", "a cat", "--dtype", dtype, "--compare", "--out", "typed")
    default, typed = (
        pixels(Path("default/000-a-cat-seed0.png")),
        pixels(Path("typed/000-a-cat-seed0-msfp.png")),
    )
    assert np.array_equal(default, typed) == (dtype == "float32")


def test_type_that_the_pipeline_cannot_turn_into_pictures_is_explained(
    msfp: Invoke, tiny_chained: Chained
) -> None:
    # numpy has no bfloat16, and this stock pipeline does not convert.
    result = msfp("sample", tiny_chained.export, "--dtype", "bfloat16", "--out", "pictures")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "--dtype float32" in result.stderr


@pytest.mark.parametrize(
    ("prompt", "title", "name"),
    [
        ("猫", "", "000-seed2"),
        ("A cat!", "", "000-a-cat-seed2"),
        (None, "MSFP W4A4", "000-seed2-msfp-w4a4"),
    ],
)
def test_files_are_named_by_the_latin_letters_of_the_prompt(
    prompt: str | None, title: str, name: str
) -> None:
    assert _names([prompt], 2, title) == [name]
