"""The table of metrics: every row is computed, told and shown, and a new one needs nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Chained
from msfp_cli.commands.evaluate import show
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.metrics import table
from msfp_cli.evaluation.metrics.evidence import Evidence, PictureSet
from msfp_cli.evaluation.metrics.table import METRICS, Metric, compute_metrics, metrics_for
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import DenoiserError, Evaluation, Measurements
from msfp_cli.report.report import write_report


def drawn(seed: int, num_pictures: int = 4) -> PictureSet:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(
        0, 256, (num_pictures, 3, 32, 32), dtype=torch.uint8, generator=generator
    )
    return PictureSet(
        pictures=pictures, latents=torch.randn(num_pictures, 4, 8, 8, generator=generator)
    )


def full_evidence() -> Evidence:
    """Return evidence for every metric."""
    return Evidence(
        own=drawn(0),
        full=drawn(1),
        features=torch.randn(4, 3, generator=torch.Generator().manual_seed(2)),
        feature_sets={
            "full": torch.randn(4, 3, generator=torch.Generator().manual_seed(3)),
            "reference": torch.randn(9, 3, generator=torch.Generator().manual_seed(4)),
        },
        prompts=("a red dress", "a blue bag", "a boot", "cyan"),
        extractor="fashion",
        clip="some/clip",
        denoisers={"unet": DenoiserError(error=0.25, by_timestep=())},
        denoiser_bytes=3 << 20,
        cost=Cost(load_seconds=1, seconds_per_picture=2, peak_memory_bytes=5 << 20),
    )


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """Return evidence for every metric, with a CLIP model that likes everything equally."""
    monkeypatch.setattr("msfp_cli.evaluation.metrics.compute.clip_score", lambda *arguments: 31.0)
    return full_evidence()


def test_every_metric_has_a_name_and_a_sentence_of_help() -> None:
    for texts in ([m.key for m in METRICS], [m.title for m in METRICS], [m.help for m in METRICS]):
        assert all(texts) and len(set(texts)) == len(METRICS)
    assert all(metric.help.endswith(".") and metric.help.count(". ") == 0 for metric in METRICS)


def test_every_metric_is_computed_where_its_evidence_is_there(evidence: Evidence) -> None:
    values, per_picture = compute_metrics(evidence)
    assert [*values, *per_picture] == sorted(
        [metric.key for metric in METRICS], key=lambda key: key in per_picture
    )
    pictures = {metric.key for metric in METRICS if metric.kind == "picture"}
    assert per_picture.keys() == pictures
    assert all(len(numbers) == 4 for numbers in per_picture.values())
    assert (values["output"], values["size"], values["clip"]) == (0.25, 3.0, 31.0)
    assert (values["seconds"], values["memory"]) == (2, 5)


def test_metric_without_evidence_is_absent(evidence: Evidence) -> None:
    least = Evidence(
        own=evidence.own, features=evidence.features, extractor="squeezenet", denoiser_bytes=1 << 20
    )
    assert compute_metrics(least) == ({"size": 1.0}, {})


def test_what_looks_at_pixels_is_left_out_where_pictures_are_drawings(evidence: Evidence) -> None:
    own = replace(evidence.own, are_drawings=True)
    values, per_picture = compute_metrics(replace(evidence, own=own))
    assert values.keys() == {"output", "latents", "size", "seconds", "memory"}
    assert per_picture == {}
    assert replace(evidence, own=own).set_sizes() == {}


def test_metrics_are_shown_as_numbers_with_their_digits() -> None:
    model = Measurements(
        key="export",
        title="MSFP",
        values={"garment": 25.0, "seconds": 2.0, "memory": 3.0, "kernel_full": 1.0},
        per_picture={"psnr": (10.0, 11.0)},
    )
    full = Measurements(key="full", title="full precision")
    shown = {
        metric.key: metric.text(model.value(metric.key)) for metric in metrics_for([full, model])
    }
    assert shown == {"psnr": "10.50", "garment": "25.0", "seconds": "2.000", "memory": "3"}
    assert METRICS[0].text(full.value("output")) == ""


def test_new_row_shows_up_in_the_file_on_the_console_and_on_the_page(
    tiny_chained: Chained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    brightness = Metric(
        key="brightness",
        title="mean brightness",
        help="Mean of all pixels of all pictures.",
        kind="model",
        better="higher",
        digits=1,
        compute=lambda evidence: float(evidence.own.pictures.float().mean()),
    )
    monkeypatch.setattr(table, "METRICS", (*METRICS, brightness))
    recipe = EvaluateRecipe(num_images=1, num_trajectories=1, compare=(), layers=False, cost=False)
    evaluation = evaluate_run(
        tiny_chained.run, tiny_chained.export, recipe, directory=tmp_path / "it", device="cpu"
    )
    value = evaluation.models[-1].values["brightness"]
    assert value == float(evaluation.gallery("export").pictures().float().mean())
    written = json.loads((tmp_path / "it" / "evaluation.json").read_text())
    assert written["models"][-1]["values"]["brightness"] == value
    show(evaluation)
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "mean brightness" in row]
    assert f"{value:.1f}" in line
    page = write_report(tiny_chained.run, evaluation, tmp_path / "report", overwrite=False).page
    text = page.read_text()
    assert '"title":"mean brightness"' in text and f'"brightness":{json.dumps(value)}' in text
    monkeypatch.undo()
    old = replace(evaluation.models[-1], values={})
    assert Evaluation.load(evaluation.directory).models[-1].values["brightness"] == value
    assert metrics_for([old]) == [metric for metric in METRICS if metric.kind == "picture"]
