"""The training scripts, each run for a moment at toy size; and what their parts promise."""

import json

import dit
import flow
import low_rank
import models
import pytest
import sample
import score
import torch
import train_distill
import train_dit
import train_style
import train_text
import train_vae
from pace import Clock
from safetensors.torch import load_file

# In bf16 on a CPU: torch says that it uses no fused norm.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
TOY = ["--seconds", "1.5", "--batch", "2", "--side", "64", "--frames", "5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which every script has left what it makes."""
    out = tmp_path_factory.mktemp("trained")
    train_vae.main(["--out", str(out / "vae"), "--seconds", "1", "--batch", "1", "--side", "64",
                    "--block", "8", "--scored", "2"])  # fmt: skip
    train_text.main(["--out", str(out / "text"), "--seconds", "0.5", "--batch", "4",
                     "--captions", "20", "--scored", "4"])  # fmt: skip
    train_dit.main(["--vae", str(out / "vae"), "--text", str(out / "text"), "--out", str(out),
                    "--layers", "1", "--clips", "8",
                    "--captions", "2", "--long-clips", "3", "--long-batch", "1", "--long-side",
                    "64", "--long-frames", "9", *TOY])  # fmt: skip
    model = ["--model", str(out / "model")]
    train_distill.main([*model, "--out", str(out / "four.safetensors"), "--trails", "6", *TOY])
    train_style.main([*model, "--out", str(out / "night.safetensors"), "--clips", "6", *TOY])
    small = ["--batch", "2", "--side", "64", "--frames", "5", "--count", "8", "--long-count", "1",
             "--long-batch", "1", "--long-side", "64", "--long-frames", "9"]  # fmt: skip
    score.main([*model, "--out", str(out / "sweep"), "--sweep", "2", "3", *small])
    lora = ["--lora", str(out / "four.safetensors")]
    score.main([*model, *lora, "--out", str(out / "score"), *small])
    return out


def test_every_script_leaves_its_facts(trained):
    for name in ("training.json", "four.json", "night.json"):
        facts = json.loads((trained / name).read_text())
        assert facts["steps"] > 0
        assert facts["losses"][-1]["loss"] > 0
        assert facts["torch"] == torch.__version__
    assert json.loads((trained / "vae" / "vae.json").read_text())["training"]["steps"] > 0


def test_scores_cover_every_kind(trained):
    table = json.loads((trained / "score" / "scores.json").read_text())["table"]
    assert set(table) == set(score.KINDS)
    lines = json.loads((trained / "score" / "clips.json").read_text())["english"]
    assert len(lines) == 8
    assert {len(line["asked"]["shape"]) for line in lines} == {1, 2}
    assert "first_frame_psnr" in table["image"]


def test_the_best_guidance_becomes_the_default(trained):
    best = json.loads((trained / "sweep" / "sweep.json").read_text())["best"]
    assert sample.default_sampling(trained / "model").cfg == best


def test_a_lora_names_layers_of_the_model_and_its_sampling(trained):
    parts = sample.load(trained / "model", "cpu", torch.float32)
    layers = {n for n, m in parts.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    names = {n.removeprefix("transformer.").rpartition(".lora_")[0]
             for n in load_file(trained / "four.safetensors")}  # fmt: skip
    assert names <= layers
    assert len(names) == 10
    assert low_rank.merge(parts.transformer, trained / "four.safetensors") == len(names)


def test_merging_equals_the_layers_beside():
    torch.manual_seed(0)
    model = models.build_transformer(layers=1)
    latents = torch.randn(1, models.LATENT_CHANNELS, 2, 4, 4)
    text = torch.randn(1, 8, 128), torch.zeros(1, 1, 1, 8)
    times = torch.tensor([[500.0, 500.0]])

    def forward(transformer):
        with torch.no_grad():
            return dit.forward(transformer, latents, times, text)

    plain = forward(model)
    trained = low_rank.add(model, 4)
    assert torch.allclose(forward(model), plain, atol=1e-6)
    for parameter in trained:
        parameter.data.normal_(0, 0.1)
    beside = forward(model)
    for low in [m for m in model.modules() if isinstance(m, low_rank.LowRank)]:
        low.weight.data += low.lora_B.data @ low.lora_A.data
        low.lora_B.data.zero_()
    assert not torch.allclose(beside, plain, atol=1e-3)
    assert torch.allclose(forward(model), beside, atol=1e-5)


def test_loss_is_least_for_the_true_velocity():
    clean = torch.randn(4, 2, 3, 2, 2)
    noisy, velocity, levels, wanted = flow.noised(clean, 3.0)
    for clip in range(4):
        level = levels[clip, 1]
        assert torch.allclose(noisy[clip, :, 1:] - level * velocity[clip, :, 1:],
                              clean[clip, :, 1:], atol=1e-5)  # fmt: skip
        known = levels[clip, 0] == 0
        assert bool(wanted[clip, 0, 0, 0, 0]) is not bool(known)


def test_the_rate_moves_the_weights():
    matrix, bias = torch.nn.Parameter(torch.eye(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = flow.Optimizer([matrix], [bias])
    for rate in (0.0, 0.1):
        optimizer.rate.fill_(rate)
        (matrix.square().sum() + bias.sum()).backward()
        optimizer.step()
        assert torch.equal(bias, torch.ones(4)) is (rate == 0)
        assert matrix.grad is None
    assert not torch.equal(matrix, torch.eye(4))


def test_the_average_is_no_part_of_a_graph():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = flow.Average([parameter])
    parameter.data += 1
    average.update(flow.Average.EVERY)
    assert not average.slow[0].requires_grad
    assert 0 < average.slow[0][0] < 1


def test_a_clock_that_has_run_out_leaves_no_time():
    clock = Clock(0.001)
    while clock.progress < 1:
        pass
    assert 0 < clock.rest().seconds <= 0.001


def test_student_levels_are_those_of_the_euler_sampler():
    levels = train_distill.student_levels(torch.device("cpu"))
    assert levels.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
