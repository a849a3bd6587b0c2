import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.sampling import Sampling
from msfp_cli.pipelines.watch import final_sample, watch_calls, watch_layers, watch_scheduler
from pipelines.test_denoiser import Denoiser, draw


def watched(denoiser: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, DenoiserCall]:  # noqa: ANN401 (any)
    seen: list[DenoiserCall] = []
    with watch_calls({"unet": denoiser}, seen.append):
        output = denoiser(*args, **kwargs)
    (call,) = seen
    return output, call


@pytest.mark.parametrize("num_positional", range(5))
def test_sees_positional_and_keyword_arguments_by_name(num_positional: int) -> None:
    arguments = {
        "sample": draw(1),
        "timestep": torch.tensor([7, 7]),
        "encoder_hidden_states": draw(2),
        "added": {"text": draw(3)},
        "residuals": [draw(4), draw(5)],
    }
    positional = list(arguments.values())[:num_positional]
    keyword = dict(list(arguments.items())[num_positional:])
    output, call = watched(Denoiser(), *positional, **keyword)
    assert call.component == "unet" and call.timestep == 7.0
    assert call.arguments.keys() == arguments.keys()
    for name in ("sample", "timestep", "encoder_hidden_states"):
        assert torch.equal(call.arguments[name], arguments[name])
    assert torch.equal(call.arguments["added"]["text"], arguments["added"]["text"])
    assert all(map(torch.equal, call.arguments["residuals"], arguments["residuals"]))
    assert torch.equal(call.output, output[0])


@pytest.mark.parametrize("return_dict", [True, False])
def test_how_the_output_was_wrapped_is_not_recorded(return_dict: bool) -> None:
    output, call = watched(Denoiser(), draw(1), 3.0, return_dict=return_dict)
    assert call.arguments.keys() == {"sample", "timestep"}
    assert torch.equal(call.output, output[0])


def test_calls_are_kept_as_they_were_though_tensors_are_written_to() -> None:
    """As by a pipeline that writes the next sample into the tensor that it passed."""
    denoiser, calls, expected = Denoiser(), list[DenoiserCall](), []
    sample, text = draw(1), draw(2)
    with watch_calls({"unet": denoiser}, calls.append), torch.no_grad():
        for timestep in (3.0, 2.0, 1.0):
            expected.append(sample.clone())
            output = denoiser(sample, timestep, text)[0]
            sample[:] = output
            output.zero_()
    for call, before in zip(calls, expected, strict=True):
        assert torch.equal(call.arguments["sample"], before)
        assert torch.equal(replay(denoiser, call), call.output)
    assert calls[0].output.any()
    texts = [call.arguments["encoder_hidden_states"] for call in calls]
    assert all(each is texts[0] for each in texts)  # nobody has written to it


@pytest.mark.parametrize(
    "timestep", [981, 0.5, torch.tensor(981), torch.tensor([0.5, 0.5]), torch.tensor([[3]])]
)
def test_timestep_is_a_number_however_it_was_passed(timestep: Tensor | float) -> None:
    _, call = watched(Denoiser(), draw(1), timestep)
    assert call.timestep == float(torch.as_tensor(timestep).reshape(-1)[0])
    assert type(call.timestep) is float


def test_each_denoiser_is_seen_under_its_own_name_in_order() -> None:
    both, seen = {"transformer": Denoiser(1), "transformer_2": Denoiser(2)}, []
    with watch_calls(both, seen.append):
        for name, timestep in (("transformer", 3.0), ("transformer_2", 2.0), ("transformer", 1.0)):
            both[name](draw(1), timestep)
    assert [(c.component, c.timestep) for c in seen] == [
        ("transformer", 3.0),
        ("transformer_2", 2.0),
        ("transformer", 1.0),
    ]


def test_watching_ends_with_the_context() -> None:
    denoiser, seen = Denoiser(), []
    with watch_calls({"unet": denoiser}, seen.append):
        denoiser(draw(1), 1.0)
    denoiser(draw(1), 2.0)
    assert [call.timestep for call in seen] == [1.0]


def test_watching_ends_when_the_pipeline_the_denoiser_or_the_watcher_fails() -> None:
    denoiser, seen = Denoiser(), []
    with pytest.raises(KeyError), watch_calls({"unet": denoiser}, seen.append):
        raise KeyError("pipeline")
    with (
        pytest.raises(ValueError, match="not finite"),
        watch_calls({"unet": denoiser}, seen.append),
    ):
        denoiser(draw(1) / 0, 1.0)

    def fail(call: DenoiserCall) -> None:
        raise RuntimeError(f"full at {call.timestep}")

    with pytest.raises(RuntimeError, match="full at 3.0"), watch_calls({"unet": denoiser}, fail):
        denoiser(draw(1), 3.0)
    denoiser(draw(1), 4.0)
    assert seen == []
    assert not denoiser._forward_hooks


def test_watching_does_not_change_the_output() -> None:
    denoiser = Denoiser()
    output, _ = watched(denoiser, draw(1), 3.0)
    assert torch.equal(output[0], denoiser(draw(1), 3.0)[0])


class Scheduler:
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0) -> Tensor:
        return sample - model_output * (1 + eta)


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of the object"])
def test_steps_are_seen_and_not_changed(own: bool) -> None:
    scheduler, seen = Scheduler(), list[tuple[object, Tensor, Tensor]]()
    output, sample = torch.randn(2, 3)
    if own:
        scheduler.step = scheduler.step
    before = scheduler.step
    with watch_scheduler(scheduler, lambda *report: seen.append(report)):
        assert list(inspect.signature(scheduler.step).parameters) == [
            "model_output",
            "timestep",
            "sample",
            "eta",
        ]
        for got in (
            scheduler.step(output, 7, sample, eta=1.0),
            scheduler.step(model_output=output, timestep=7, sample=sample, eta=1.0),
        ):
            assert torch.equal(got, sample - 2 * output)
    assert [timestep for timestep, *_ in seen] == [7, 7]
    assert all(each[1] is output for each in seen)
    assert all(torch.equal(result, sample - 2 * output) for *_, result in seen)
    assert scheduler.step == before and ("step" in vars(scheduler)) == own


def test_copy_of_a_scheduler_steps_by_itself_and_is_seen_as_well() -> None:
    scheduler, seen = Scheduler(), list[object]()
    scheduler.owner = "the first"
    with watch_scheduler(scheduler, lambda timestep, *_: seen.append(timestep)):
        twin = copy.deepcopy(scheduler)
        twin.owner = "the copy"
        assert twin.step.__self__ is twin
        twin.step(draw(1), 5, draw(2))
    assert seen == [5]
    assert torch.equal(twin.step(draw(1), 4, draw(2)), draw(2) - draw(1))


def test_what_has_no_steps_is_left_alone() -> None:
    with (
        watch_scheduler(None, lambda *report: pytest.fail("no step")),
        watch_scheduler(object(), lambda *report: None),
    ):
        pass


def test_scheduler_is_as_before_after_an_error() -> None:
    scheduler = Scheduler()
    with (
        pytest.raises(KeyboardInterrupt),
        watch_scheduler(scheduler, lambda *report: None),
    ):
        raise KeyboardInterrupt
    assert not vars(scheduler)


def test_layers_are_reported_by_name_with_inputs_and_outputs_each_time_they_run() -> None:
    layers = {"first": nn.Linear(4, 3), "second": nn.Linear(3, 2), "idle": nn.Linear(1, 1)}
    reports = []
    with watch_layers(layers, lambda *report: reports.append(report)):
        hidden = layers["first"](draw(1))
        output = layers["second"](hidden)
        layers["first"](input=draw(2))
    layers["first"](draw(3))
    assert [name for name, *_ in reports] == ["first", "second", "first"]
    name, layer, args, result = reports[1]
    assert layer is layers["second"] and args[0] is hidden and result is output
    assert torch.equal(reports[2][2][0], draw(2))


@pytest.mark.parametrize("layers", [{}, {"a": nn.Linear(2, 2)}], ids=len)
def test_no_hook_is_left_when_a_report_fails(layers: dict[str, nn.Module]) -> None:
    def fail(*report: object) -> None:
        raise RuntimeError("full")

    for layer in layers.values():
        with pytest.raises(RuntimeError, match="full"), watch_layers(layers, fail):
            layer(torch.zeros(2))
    assert not any(layer._forward_hooks for layer in layers.values())


class Emptying(Denoiser):
    """Takes items out of a list that it is given, as UNets with adapters and HunyuanDiT do."""

    def forward(
        self, sample: Tensor, timestep: float, residuals: list[Tensor], return_dict: bool = True
    ) -> tuple[Tensor]:
        """Add the residuals, from the last to the first."""
        while residuals:
            sample = sample + residuals.pop()
        return (sample,)


def test_arguments_are_those_before_the_call_and_replay_leaves_them_whole() -> None:
    residuals = [draw(2), draw(3)]
    (output,), call = watched(Emptying(), draw(1), 1.0, list(residuals))
    for _ in range(2):
        assert torch.equal(replay(Emptying(), call), output)
    assert all(map(torch.equal, call.arguments["residuals"], residuals))
    assert len(call.arguments["residuals"]) == 2


class Filling(Denoiser):
    """Fills a cache in one call, and reads it in the next, as autoregressive video models do."""

    def forward(
        self,
        sample: Tensor,
        timestep: float,
        cache: dict[int, Tensor] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Return nothing but a cache, or a prediction."""
        return (None, {0: sample}) if cache is None else (sample + cache[0], cache)


def test_call_that_only_fills_a_cache_is_not_reported() -> None:
    denoiser, calls = Filling(), []
    with watch_calls({"transformer": denoiser}, calls.append):
        _, cache = denoiser(draw(1), 0.0)
        output, _ = denoiser(draw(2), 5.0, cache)
    assert [call.timestep for call in calls] == [5.0]
    assert torch.equal(replay(denoiser, calls[0]), output)


def test_layer_that_runs_on_nothing_is_not_reported() -> None:
    layer, runs = nn.Linear(4, 3), []
    with watch_layers({"layer": layer}, lambda *run: runs.append(run)):
        layer(torch.empty(0, 4))
        layer(draw(1))
    assert [len(run[2][0]) for run in runs] == [2]


def test_final_samples_are_drawn_in_batches_of_the_size_asked_for(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    original = StableDiffusionPipeline.__call__

    @functools.wraps(original)
    def counted(pipe: object, prompt: list[str], **arguments: object) -> object:
        sizes.append(len(prompt))
        return original(pipe, prompt, **arguments)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    pipe = load_pipeline(ModelSource(model=str(tiny("StableDiffusionPipeline"))), "cpu")
    conditions = ("a cat", "a dog", "a cow")
    drawn = [
        final_sample(pipe, conditions, Sampling(num_inference_steps=2, batch_size=size))
        for size in (8, 2, 1)
    ]
    assert sizes == [3, 2, 1, 1, 1, 1]
    assert all(torch.allclose(drawn[0], each, atol=1e-3) for each in drawn)
