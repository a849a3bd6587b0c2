"""Pictures: how many, from which seeds, under which names, and beside which others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from conftest import Chained, Invoke
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.sampling import Sampling
from msfp_cli.sample import Sheet, contact_sheet, save_pictures


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


def test_sheets_of_different_models_do_not_overwrite_each_other(tmp_path: Path) -> None:
    sheets = [
        Sheet(title=title, works=[Image.new("RGB", (8, 8))])
        for title in ("signed FP4", "MSFP W4A4")
    ]
    save_pictures(sheets, (None,), Sampling(seed=2), tmp_path / "out", overwrite=False)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["000-seed2-msfp-w4a4.png", "000-seed2-signed-fp4.png", "sheet.png"]


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


@pytest.mark.parametrize(("prompt", "name"), [("猫", "000-seed0"), ("A cat!", "000-a-cat-seed0")])
def test_files_are_named_by_the_latin_letters_of_the_prompt(
    prompt: str, name: str, tmp_path: Path
) -> None:
    sheets = [Sheet(title="MSFP", works=[Image.new("RGB", (8, 8))])]
    save_pictures(sheets, [prompt], Sampling(seed=0), tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / f"{name}.png").exists()
