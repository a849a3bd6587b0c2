"""How the LoRA hubs and the router are trained; nothing here needs torch."""

import math
from dataclasses import dataclass

from msfp_cli.errors import UsageError
from msfp_cli.recipe import Recipe, at_least

LOSSES = ("dfa", "plain")
INITS = ("zero", "svd")
SAMPLINGS = ("error", "uniform")
PRECISIONS = ("no", "bf16")
MAX_HUB = 255


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """How to train the LoRA hubs and the router.

    Arguments:
        steps: updates.
        batch_size: rows that each lane contributes to an update, each at a timestep of its own, as
            one call.
        lanes: calls per update, each of another stretch of the schedule, shared evenly among
            processes; the recording is parted among them.
        hub_size: LoRAs per layer; 1 is plain LoRA.
        rank: of each LoRA.
        init: a name in `INITS`: B begins at ``zero``, or A and B at the singular value
            decomposition (``svd``) of the weight's rounding error.
        learning_rate: of the LoRAs, decaying linearly to 0; B counts in steps of the weight's grid.
        router_learning_rate: of the router; a fast one moves timesteps among members before these
            have learned.
        input_learning_rate: of the scale and zero point of each layer's input; 0 leaves them as
            calibrated.
        loss: ``dfa`` weights each timestep by its denoising factor, ``plain`` does not.
        loss_power: the factor's exponent.
        timesteps: how a row's timestep is drawn: by the ``error`` that it makes, or ``uniform``ly;
            the gradient's mean is the same.
        mixed_precision: a name in `PRECISIONS`, what the denoiser computes in while training.
        seed: of the initial values and of the order of the data.
        evaluate_every: updates between two measurements on held-out calls.
    """

    steps: int = 2000
    batch_size: int = 16
    lanes: int = 2
    hub_size: int = 2
    rank: int = 32
    init: str = "zero"
    learning_rate: float = 4e-2
    router_learning_rate: float = 1e-4
    input_learning_rate: float = 1e-3
    loss: str = "dfa"
    loss_power: float = 0.25
    timesteps: str = "error"
    mixed_precision: str = "no"
    seed: int = 0
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        for what, value in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--gradient-accumulation", self.lanes),
            ("--hub-size", self.hub_size),
            ("--rank", self.rank),
            ("--evaluate-every", self.evaluate_every),
        ):
            at_least(what, value, 1)
        if self.hub_size > MAX_HUB:
            raise UsageError(f"--hub-size must be at most {MAX_HUB}, got {self.hub_size}")
        for what, name, known in (
            ("--loss", self.loss, LOSSES),
            ("--init", self.init, INITS),
            ("--timesteps", self.timesteps, SAMPLINGS),
            ("--mixed-precision", self.mixed_precision, PRECISIONS),
        ):
            if name not in known:
                raise UsageError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
        for what, rate in (
            ("--learning-rate", self.learning_rate),
            ("--router-learning-rate", self.router_learning_rate),
        ):
            if not 0 < rate < math.inf:
                raise UsageError(f"{what} must be positive, got {rate:g}")
        if not 0 < self.loss_power <= 4:
            raise UsageError(f"--loss-power must be above 0 and at most 4, got {self.loss_power:g}")
        if not 0 <= self.input_learning_rate < math.inf:
            raise UsageError(
                f"--input-learning-rate must not be negative, got {self.input_learning_rate:g}"
            )
