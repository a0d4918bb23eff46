import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.pipeline.schedulers import Sampler, make_sampler
from sagewan.plan.request import SCHEDULERS

ONE_SHIFT = ("unipc", "euler", "dpm++2m", "lcm")


def sampler_of(name: str, steps: int, shift: float = 5.0, seed: int = 0) -> Sampler:
    generator = torch.Generator().manual_seed(seed)
    return make_sampler(name, shift=shift, steps=steps, generator=generator, device="cpu")


def run(sampler: Sampler, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Follow the straight flow from the noise to the data."""
    latents = noise
    for time in sampler.times:
        latents = sampler.step(noise - data, time, latents)
    return latents


@given(
    name=st.sampled_from(SCHEDULERS),
    steps=st.integers(1, 60),
    shift=st.floats(0.5, 16),
)
def test_times_go_down_from_1000(name: str, steps: int, shift: float) -> None:
    times = sampler_of(name, steps, shift).times.double()
    assert len(times) == steps
    assert times[0] == pytest.approx(1000, abs=3)
    assert (times.diff() <= 0).all()
    assert times[-1] > 0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_a_straight_flow_ends_at_the_data(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 1, 16, 2, 4, 4, generator=generator)
    if name == "lcm":
        # It draws new noise after each step, so the flow to follow is another each time.
        latents, sampler = noise, sampler_of(name, steps)
        for time in sampler.times:
            flow = (latents - data) / (time / 1000)
            latents = sampler.step(flow, time, latents)
    else:
        latents = run(sampler_of(name, steps), data, noise)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, data, atol=2e-2)


def test_distilled_models_are_stepped_on_the_times_they_were_taught() -> None:
    for name in ("euler", "lcm"):
        assert sampler_of(name, 4, shift=1.0).times.tolist() == [1000, 750, 500, 250]
        shifted = [5 * s / (1 + 4 * s) * 1000 for s in (1, 0.75, 0.5, 0.25)]
        assert sampler_of(name, 4, shift=5.0).times.tolist() == pytest.approx(shifted)


@given(name=st.sampled_from(ONE_SHIFT), shift=st.floats(1.1, 16))
def test_a_larger_shift_stays_longer_with_the_noise(name: str, shift: float) -> None:
    small, large = (sampler_of(name, 8, s).times.double() for s in (1.0, shift))
    assert (large >= small - 1).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_goes_on_from_where_it_was_taken(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    latents, *flows = torch.randn(7, 1, 16, 2, 4, 4, generator=generator)
    sampler = sampler_of(name, 6)
    ends = []
    for step, time in enumerate(sampler.times):
        if step == 3:
            held, kept = sampler.copy(), latents
        latents = sampler.step(flows[step], time, latents)
    ends.append(latents)
    latents = kept
    for step in range(3, 6):
        latents = held.step(flows[step], held.times[step], latents)
    assert torch.equal(latents, ends[0])


def test_the_noise_of_lcm_comes_from_its_generator_alone() -> None:
    data, noise = torch.zeros(2, 1, 4, 1, 2, 2)
    one = run(sampler_of("lcm", 3, seed=5), data, noise + 1)
    torch.manual_seed(99)
    assert torch.equal(run(sampler_of("lcm", 3, seed=5), data, noise + 1), one)
    assert not torch.equal(run(sampler_of("lcm", 3, seed=6), data, noise + 1), one)
