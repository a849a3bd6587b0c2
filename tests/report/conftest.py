"""An evaluation of a fine-tuned export, and its document."""

from typing import Any

import pytest

from conftest import Finetuned
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.report.document import gather

OPTIONS = EvaluateRecipe(num_images=2, num_trajectories=1, batch_size=2, cost=False)


@pytest.fixture(scope="session")
def evaluated(tiny_tuned: Finetuned, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Evaluate the smallest model's fine-tuned export and its precursors. Not to be changed."""
    place = tmp_path_factory.mktemp("reported") / "evaluation"
    return evaluate_run(tiny_tuned.run, tiny_tuned.export, OPTIONS, directory=place, device="cpu")


@pytest.fixture(scope="session")
def document(tiny_tuned: Finetuned, evaluated: Evaluation) -> dict[str, Any]:
    return gather(tiny_tuned.run, evaluated, 2)
