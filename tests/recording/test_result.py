import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from msfp_cli.errors import CheckpointError, ModelError, RunError
from msfp_cli.layers.clock import Clock
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.encode import decode_items, tensor_sizes
from msfp_cli.recording.result import Recording

RECIPE: dict[str, Any] = {
    "source": {"model": "x"},
    "record": {"conditions": ["a", None], "seed": 0},
}
LARGE = 100_000  # elements; what makes a shard's size readable off the disk


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(timestep: float = 5.0, component: str = "unet", **arguments: Any) -> DenoiserCall:  # noqa: ANN401 (any)
    return DenoiserCall(
        component=component,
        timestep=timestep,
        arguments=arguments,
        output=draw(2, 3, seed=int(timestep)),
    )


def make(directory: Path, num_shards: int = 2, recipe: dict[str, Any] | None = None) -> Recording:
    return Recording.create(directory, recipe or RECIPE, num_shards)


def complete(directory: Path) -> Recording:
    """Two shards; the second needs a tensor of the first."""
    recording = make(directory)
    shared = draw(LARGE, seed=7)
    recording.write_shard(
        0, [call(9.0, sample=draw(4, seed=1), prompt=shared), call(5.0, prompt=shared)]
    )
    recording.write_shard(1, [call(9.0, sample=draw(4, seed=2), prompt=shared)])
    return recording


def assert_same(got: Any, expected: Any) -> None:  # noqa: ANN401 (a tree of arguments)
    if isinstance(expected, Tensor):
        assert (
            isinstance(got, Tensor) and got.dtype == expected.dtype and torch.equal(got, expected)
        )
    elif isinstance(expected, dict):
        assert isinstance(got, dict) and list(got) == list(expected)
        for key, item in expected.items():
            assert_same(got[key], item)
    elif isinstance(expected, list | tuple):
        assert type(got) is type(expected) and len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(got) is type(expected) and got == expected


def assert_same_calls(got: list[DenoiserCall], expected: list[DenoiserCall]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.component, one.timestep) == (other.component, other.timestep)
        assert_same(one.arguments, other.arguments)
        assert_same(one.output, other.output)


ARGUMENTS: dict[str, Any] = {
    "sample": draw(2, 3, 4),
    "transposed": draw(3, 2).t(),
    "bfloat16": draw(5).bfloat16(),
    "float16": draw(5).half(),
    "float64": draw(5).double(),
    "int64": torch.tensor([1, -(2**40)]),
    "bool": torch.tensor([[True, False]]),
    "scalar": torch.tensor(981),
    "empty": torch.empty(0, 4),
    "same bytes": torch.zeros(4),
    "same bytes, other type": torch.zeros(4, dtype=torch.int32),
    "same bytes, other shape": torch.zeros(2, 2),
    "nested": {
        "text_embeds": draw(2, 2),
        "deep": {"$tensor": "no tensor", "ids": [draw(2), None, [draw(1), "x"]]},
    },
    "pair": (draw(3), 2),
    "layers": {0: draw(2), 1: {"k": draw(3)}},
    "nothing": None,
    "flag": False,
    "scale": 0.1,
    "count": 3,
    "mode": "linear é",
    "no items": [],
    "no keys": {},
}


def test_calls_come_back_as_they_were(tmp_path: Path) -> None:
    calls = [call(981.0, **ARGUMENTS), call(0.5, "transformer", **ARGUMENTS)]
    recording = make(tmp_path / "new" / "recording")
    recording.write_shard(0, calls)
    recording.write_shard(1, calls[:1])
    for again in (recording, Recording(tmp_path / "new" / "recording")):
        assert_same_calls(again.shard(0), calls)
        assert_same_calls(again.shard(1), calls[:1])
        assert_same_calls(list(again.calls()), [*calls, calls[0]])
        assert (again.recipe, again.num_shards) == (RECIPE, 2)


def test_cache_of_diffusers_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = Flux2KVCache(num_double_layers=1, num_single_layers=1)
    cache.num_ref_tokens = 2
    cache.double_block_caches[0].store(draw(2), draw(3))
    recording = make(tmp_path, 1)
    recording.write_shard(0, [call(kv_cache=cache)])
    again = recording.shard(0)[0].arguments["kv_cache"]
    assert type(again) is Flux2KVCache and again.num_ref_tokens == 2
    assert_same(again.get_double(0).get(), cache.get_double(0).get())
    assert vars(again.get_single(0)) == vars(cache.get_single(0))


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "diffusers.models.modeling_utils:ModelMixin",
        "diffusers.models.transformers.transformer_flux2:NoSuchCache",
        "diffusers.models.transformers.transformer_flux2:Flux2KVCache.clear",
        "diffusers.models.transformers.transformer_flux2:torch",
        "diffusers.models.transformers.transformer_flux2:Tensor",
    ],
)
def test_file_can_name_no_class_but_a_cache_of_diffusers(name: str) -> None:
    with pytest.raises(ModelError, match="cannot read a cache of class"):
        decode_items({"kv_cache": {"$cache": name, "$dict": {}}}, dict[str, Tensor]().__getitem__)


def test_a_parameter_is_recorded_as_its_value(tmp_path: Path) -> None:
    recording = make(tmp_path, 1)
    recording.write_shard(0, [call(sample=torch.nn.Parameter(draw(3)))])
    (again,) = recording.shard(0)
    assert_same(again.arguments["sample"], draw(3))
    assert not again.arguments["sample"].requires_grad


def test_calls_of_one_component_are_counted_and_yielded_alone(tmp_path: Path) -> None:
    recording = make(tmp_path)
    recording.write_shard(0, [call(9.0, "unet"), call(9.0, "prior")])
    recording.write_shard(1, [call(5.0, "unet")])
    assert [c.timestep for c in recording.calls("unet")] == [9.0, 5.0]
    assert [recording.num_calls(c) for c in ("unet", "prior", "other", None)] == [2, 1, 0, 3]
    assert [c.timestep for c in recording.calls("unet", [1])] == [5.0]
    assert [recording.num_calls(c, [1]) for c in ("unet", "prior", "other", None)] == [1, 0, 0, 1]
    assert recording.timesteps(0, "prior") == [None, 9.0]


def test_denoising_factors_come_back_and_may_be_unknown(tmp_path: Path) -> None:
    known, unknown = make(tmp_path / "known", 1), make(tmp_path / "unknown", 1)
    pairs = [(981.0, 0.25), (1.0, 0.1)]
    known.write_shard(0, [call()], {"unet": pairs, "prior": None})
    unknown.write_shard(0, [call()])
    assert known.factors("unet") == pairs
    assert known.factors("prior") is None
    assert unknown.factors("unet") is None


def test_clocks_come_back_and_are_those_of_the_first_shard_that_is_there(tmp_path: Path) -> None:
    recording = make(tmp_path)
    assert recording.clocks() is None
    assert recording.clock("unet") == Clock()
    clock = Clock(argument="t", scale=-1000.0, offset=1000.0)
    recording.write_shard(1, [call()], {}, {"unet": clock})
    assert recording.clocks() == {"unet": clock}
    assert recording.clock("unet") == clock


def as_before_clocks(recording: Recording, timesteps: list[float], factors: Any) -> None:  # noqa: ANN401 (JSON)
    """Rewrite the header of the first shard as versions wrote it that had to guess the unit."""
    path = recording.shard_path(0)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["record"])
    del header["clocks"], header["sha256"]
    for each, timestep in zip(header["calls"], timesteps, strict=True):
        del each["time"], each["is_listed"]
        each["timestep"] = timestep
    header["factors"] = factors
    save_file(load_file(path), path, {"record": json.dumps(header)})


@pytest.mark.parametrize(
    ("timesteps", "unit"),
    [([999.0, 0.0], 1.0), ([1.5, 0.5], 1.0), ([1.0, 0.25], 1000.0), ([0.999, 0.0], 1000.0)],
    ids=str,
)
def test_timesteps_of_earlier_versions_are_read_in_their_unit(
    tmp_path: Path, timesteps: list[float], unit: float
) -> None:
    recording = make(tmp_path, 1)
    recording.write_shard(0, [call(9.0), call(5.0)])
    as_before_clocks(recording, timesteps, [(750.0, 0.5)])
    assert [each.timestep for each in recording.shard(0)] == [unit * t for t in timesteps]
    assert recording.timesteps(0, "unet") == [unit * t for t in timesteps]
    assert recording.clock("unet") == Clock(scale=unit)
    assert recording.factors("unet") == [(750.0, 0.5)]


def stored(recording: Recording) -> int:
    return sum(len(load_file(path)) for path in recording.directory.glob("*.safetensors"))


def test_equal_tensors_are_stored_once_in_a_shard(tmp_path: Path) -> None:
    recording = make(tmp_path, 1)
    prompt = draw(LARGE)
    recording.write_shard(
        0, [call(float(t), prompt=prompt.clone(), nested={"again": prompt[None]}) for t in range(4)]
    )
    assert stored(recording) == 2 + 4  # the prompt in two shapes, and four outputs
    assert 2 * prompt.nbytes < recording.shard_path(0).stat().st_size < 2.1 * prompt.nbytes
    sizes = tensor_sizes(recording.shard(0)).values()
    assert sum(sizes) == 2 * prompt.nbytes + 4 * draw(2, 3).nbytes


def test_equal_tensors_are_stored_once_across_shards_and_sessions(tmp_path: Path) -> None:
    prompt = draw(LARGE)
    make(tmp_path, 3).write_shard(0, [call(9.0, prompt=prompt)])
    second_session = make(tmp_path, 3)
    second_session.write_shard(1, [call(8.0, prompt=prompt)])
    second_session.write_shard(2, [call(9.0, prompt=prompt)])  # holds nothing of its own
    sizes = [second_session.shard_path(index).stat().st_size for index in range(3)]
    assert sizes[0] > prompt.nbytes > 50 * max(sizes[1:])
    assert_same_calls(Recording(tmp_path).shard(1), [call(8.0, prompt=prompt)])
    assert_same_calls(Recording(tmp_path).shard(2), [call(9.0, prompt=prompt)])


def test_recording_changes_no_argument_of_the_call(tmp_path: Path) -> None:
    sample = draw(3)
    recording = make(tmp_path, 1)
    recording.write_shard(0, [call(sample=sample)])
    sample.zero_()
    assert_same(recording.shard(0)[0].arguments["sample"], draw(3))


def test_interrupted_recording_names_the_missing_shards_and_goes_on(tmp_path: Path) -> None:
    recording = make(tmp_path, 3)
    assert recording.missing_shards() == [0, 1, 2]
    recording.write_shard(1, [call()])
    (tmp_path / ".00002.safetensors.msfp-tmp").write_bytes(b"half a shard")
    again = make(tmp_path, 3)
    assert again.missing_shards() == [0, 2]
    for index in again.missing_shards():
        again.write_shard(index, [call()])
    assert make(tmp_path, 3).missing_shards() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "msfp.json",
        "recording.json",
    ]


def test_failed_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = make(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        recording.write_shard(0, [call()])
    assert recording.missing_shards() == [0]


def test_missing_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="00000.safetensors is missing.*msfp calibrate"):
        make(tmp_path).shard(0)


def test_another_recipe_is_refused_and_the_recording_stays(tmp_path: Path) -> None:
    make(tmp_path).write_shard(0, [call()])
    for recipe, shards in (({**RECIPE, "record": {}}, 2), (RECIPE, 3)):
        with pytest.raises(RunError, match="--overwrite"):
            make(tmp_path, shards, recipe)
    assert make(tmp_path).missing_shards() == [1]


def test_shards_that_lost_their_manifest_are_taken_for_no_other_recording(tmp_path: Path) -> None:
    make(tmp_path).write_shard(0, [call()])
    (tmp_path / "recording.json").unlink()
    for recipe, shards in (({**RECIPE, "record": {}}, 2), (RECIPE, 3)):
        with pytest.raises(RunError, match="00000.safetensors was recorded with other settings"):
            make(tmp_path, shards, recipe)
    assert make(tmp_path).missing_shards() == [1]


def test_no_recording_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no recording.*msfp calibrate"):
        Recording(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"recipe": {}}',
        '{"schema": 1, "num_shards": 2}',
        '{"schema": 1, "recipe": {}, "num_shards": 1000000000}',
        '{"schema": 1, "recipe": {}, "num_shards": 0}',
        "\x00\x01",
        "{}{}",
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    complete(tmp_path)
    (tmp_path / "recording.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="recording.json.*--overwrite"):
        Recording(tmp_path)


def test_recording_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    complete(tmp_path)
    manifest = json.loads((tmp_path / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps({**manifest, "schema": 1000}))
    with pytest.raises(CheckpointError):
        Recording(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.001, 0.5, 0.999])
def test_truncated_shard_is_refused(tmp_path: Path, keep: float) -> None:
    path = complete(tmp_path).shard_path(0)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    again = Recording(tmp_path)
    for read in (
        lambda: again.shard(0),
        lambda: again.num_calls(),
        lambda: again.write_shard(1, [call()]),
    ):
        with pytest.raises(CheckpointError, match="00000.safetensors is damaged"):
            read()


@pytest.mark.parametrize("position", [-1, -LARGE * 2])
def test_altered_tensor_is_refused(tmp_path: Path, position: int) -> None:
    path = complete(tmp_path).shard_path(0)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        list(Recording(tmp_path).calls())


def test_shard_without_our_header_is_refused(tmp_path: Path) -> None:
    recording = complete(tmp_path)
    save_file({"x": draw(2)}, recording.shard_path(0))
    for read in (lambda: recording.shard(0), lambda: recording.num_calls()):
        with pytest.raises(CheckpointError, match="00000.safetensors"):
            read()


def test_shard_that_lost_a_tensor_it_refers_to_is_refused(tmp_path: Path) -> None:
    complete(tmp_path)
    make(tmp_path).shard_path(0).unlink()
    make(tmp_path).write_shard(0, [call()])
    with pytest.raises(CheckpointError, match="00001.safetensors is damaged"):
        Recording(tmp_path).shard(1)


def test_lost_shard_recorded_again_completes_the_recording(tmp_path: Path) -> None:
    expected = list(complete(tmp_path).calls())
    again = make(tmp_path)
    again.shard_path(0).unlink()
    make(tmp_path).write_shard(0, expected[:2])
    assert_same_calls(list(Recording(tmp_path).calls()), expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(object(), "object"), (torch.float32, "dtype"), ({1, 2}, "set"), (len, "builtin")],
)
def test_unrecordable_argument_is_named(tmp_path: Path, value: object, kind: str) -> None:
    recording = make(tmp_path, 1)
    with pytest.raises(ModelError, match=f"'arguments.added.odd' of type {kind}"):
        recording.write_shard(0, [call(added={"odd": value})])
    assert recording.missing_shards() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (0,)], ids=str)
def test_an_expanded_timestep_is_recorded(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    timestep = torch.tensor(7).to(dtype).expand(shape)
    call = DenoiserCall(
        component="unet", timestep=7.0, arguments={"timestep": timestep}, output=torch.ones(1)
    )
    recording = Recording.create(tmp_path / "recording", {}, 1)
    recording.write_shard(0, [call])
    assert torch.equal(recording.shard(0)[0].arguments["timestep"], timestep)
