from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Chained, Lines
from msfp_cli.evaluation.plan import pictures_to_draw
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.pipelines.conditions import say_cut_prompts
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.sampling import Sampling
from msfp_cli.processes import Processes
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_both
from msfp_cli.run import Run
from msfp_cli.sample import sample_run

LONG = "a photo of the cat " * 200
# The limit of the tokenizer that takes most.
LIMITS = {
    "LDMTextToImagePipeline": 77,
    "StableDiffusionPipeline": 77,
    "StableDiffusionXLPipeline": 77,
    "StableDiffusion3Pipeline": 256,
    "FluxPipeline": 512,
    "PixArtSigmaPipeline": 300,
}


@pytest.mark.parametrize("name", LIMITS)
def test_prompt_that_no_encoder_reads_to_its_end_is_said(
    tiny: Callable[[str], Path], name: str
) -> None:
    progress = Lines()
    pipe = load_pipeline(ModelSource(model=str(tiny(name))), "cpu")
    say_cut_prompts(pipe, ["a cat", "a dog", None], progress)
    assert progress.lines == []
    say_cut_prompts(pipe, ["a cat", LONG, LONG, LONG + "!"], progress)
    (line,) = progress.lines
    assert f"only the first {LIMITS[name]} tokens are read; shorten it" in line
    assert "' and 1 more: " in line.replace("...", "")


def test_class_labels_and_nothing_are_never_cut(tiny: Callable[[str], Path]) -> None:
    progress = Lines()
    for name, condition in (("DiTPipeline", "1" * 500), ("DDIMPipeline", None)):
        pipe = load_pipeline(ModelSource(model=str(tiny(name))), "cpu")
        say_cut_prompts(pipe, [condition], progress)
    assert progress.lines == []


def test_calibrate_sample_and_evaluate_say_it(prompted_chained: Chained, tmp_path: Path) -> None:
    source = prompted_chained.calibration.source
    pipe = load_pipeline(source, "cpu")
    said = dict[str, Lines]()
    options = RecordOptions(
        prompts=("a cat", LONG), num_images=2, num_inference_steps=1, batch_size=2
    )
    processes = Processes(progress=said.setdefault("a", Lines()))
    record_both(pipe, Run(tmp_path), source, options, processes=processes)
    sample_run(
        prompted_chained.run,
        [LONG],
        Sampling(num_inference_steps=1),
        directory=tmp_path / "pictures",
        progress=said.setdefault("b", Lines()),
    )
    origin = provenance_of(prompted_chained.run, prompted_chained.export)
    recipe = EvaluateRecipe(prompts=(LONG,), num_images=2)
    pictures_to_draw(origin, recipe, source, pipe, said.setdefault("c", Lines()))
    for lines in said.values():
        assert [line for line in lines.lines if "only the first 77 tokens are read" in line]
