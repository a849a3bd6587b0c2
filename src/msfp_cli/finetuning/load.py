"""Load what a fine-tuning begins with, and refuse what does not belong together."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import MsfpError, RunError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.result import Recording, refuse_other_recordings
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run holds for fine-tuning.

    Arguments:
        calibration: where training begins.
        recording: calls to train on.
        held_out: calls to measure on.
        states: the saved states to go on from, by component; empty if there are none.
    """

    calibration: Calibration
    recording: Recording
    held_out: Recording
    states: dict[str, FinetuneState]


def load_material(run: Run, recipe: FinetuneRecipe, *, restart: bool) -> Material:
    """Load a run's calibration, recordings and, unless it restarts, saved states.

    Raises:
        RunError: something is missing, incomplete, or was made from something else, or nothing has
            a quantized weight.
    """
    run.require()
    calibration = Calibration.load(run.calibration)
    recording = Recording(run.recording)
    held_out = Recording(run.held_out)
    made_from = calibration.source.to_json(), calibration.record.to_json()
    refuse_other_recordings(recording, held_out, *made_from)
    states = {} if restart else load_finetunings(run, calibration)
    for state in states.values():
        _refuse_different_recipe(state.recipe, recipe)
    return Material(calibration=calibration, recording=recording, held_out=held_out, states=states)


def settings_of(
    run: Run,
    change: Callable[[FinetuneRecipe], FinetuneRecipe],
    *,
    resume: bool | None,
    processes: int,
) -> tuple[FinetuneRecipe, bool]:
    """Return the settings of a state to go on from, or else the defaults, with changes.

    Where a denoising factor is not known, the loss is ``plain`` by default.

    Arguments:
        change: puts what the user typed in place of other settings.
        resume: whether to go on from a state; None goes on if there is one.
        processes: how many share the calls of an update.

    Returns:
        The settings, and whether all updates with them are done.

    Raises:
        RunError: the run is not calibrated, or has no state to go on from and `resume` is set.
    """
    run.require()
    calibration = Calibration.load(run.calibration)
    states = {} if resume is False else load_finetunings(run, calibration)
    if resume and not states:
        raise RunError(
            f"{run.directory} holds no fine-tuning to go on with; leave --resume out to begin"
        )
    fresh = shared_evenly(_defaults(run, calibration), processes)
    recipe = change(next((state.recipe for state in states.values()), fresh))
    done = [state for state in states.values() if state.finished and state.recipe == recipe]
    return recipe, len(done) == len(calibration.tunable())


def _defaults(run: Run, calibration: Calibration) -> FinetuneRecipe:
    """Return the default settings for what was recorded."""
    recording = Recording(run.recording)
    try:
        factors = [recording.factors(component) for component in calibration.tunable()]
    except MsfpError:  # what is wrong with the recording is said when it is loaded
        factors = []
    return FinetuneRecipe(loss="plain") if None in factors else FinetuneRecipe()


def shared_evenly(recipe: FinetuneRecipe, processes: int) -> FinetuneRecipe:
    """Return the recipe with as many calls per update, or a few more, as processes can share."""
    calls = math.ceil(recipe.calls_per_update / processes) * processes
    return replace(recipe, calls_per_update=calls)


def load_denoisers(material: Material, device: str) -> dict[str, nn.Module]:
    """Load the denoisers in the type they were recorded in.

    The type is the calibration's, and where none was chosen, the one that the device had at the
    time of the recording.

    Raises:
        RunError: there is nothing to train, or a denoiser is not the one that was recorded.
    """
    calibration, recording = material.calibration, material.recording
    if not calibration.tunable():
        raise RunError(
            "no layer has a quantized weight, so there is nothing to train; run `msfp export`"
        )
    dtype = calibration.source.dtype or str(recording.shard(0)[0].output.dtype)
    source = replace(calibration.source, dtype=dtype.removeprefix("torch."))
    denoisers = find_denoisers(load_pipeline(source, device))
    fingerprints = recording.recipe.get("fingerprint", {})
    for component in calibration.tunable():
        denoiser = denoisers.get(component)
        if denoiser is None or fingerprint(denoiser) != fingerprints.get(component):
            raise RunError(
                f"{recording.directory} is of another model than {source.model} is now; "
                "run the same `msfp calibrate` again, with --overwrite"
            )
    return denoisers


def _refuse_different_recipe(saved: FinetuneRecipe, recipe: FinetuneRecipe) -> None:
    """Refuse to go on with other settings; the message names the first difference."""
    for name, then, now in saved.differences(recipe):
        raise RunError(
            f"the fine-tuning of this run was begun with {name} {then}, not {now}; "
            f"give {name} {then} to go on, or --restart to begin again"
        )
