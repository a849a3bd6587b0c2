from msfp_cli.pipelines.sampling import Sampling


def test_defaults_take_the_place_of_what_is_none_only() -> None:
    defaults = {"num_inference_steps": 20, "guidance_scale": 3.0}
    assert Sampling().or_else(defaults) == Sampling(num_inference_steps=20, guidance_scale=3.0)
    assert Sampling(guidance_scale=0.0).or_else(defaults) == Sampling(
        num_inference_steps=20, guidance_scale=0.0
    )
