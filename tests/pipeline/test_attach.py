"""``sagewan.attach``: our modes in diffusers' own pipelines, and the README's example of it."""

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sagewan
from sagewan.errors import RequestError, UnsupportedError

LAYERS, STEPS = 8, 2


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(files("sagewan") / "assets/demo")


def frames(pipeline: Any) -> Tensor:
    made: Tensor = pipeline(
        "a red ball rolls to the right",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    return made


def test_sdpa_is_diffusers_own_result_bit_for_bit_and_is_counted(pipeline: Any) -> None:
    expected = frames(pipeline)
    with sagewan.attach(pipeline, attention="sdpa") as attached:
        assert torch.equal(frames(pipeline), expected)
        pipeline.transformer.fuse_qkv_projections()
        torch.testing.assert_close(frames(pipeline), expected, atol=1e-3, rtol=0)
        pipeline.transformer.unfuse_qkv_projections()
    (ran,) = attached.ran()
    assert (ran["implementation"], ran["calls"]) == ("torch.sdpa", 2 * LAYERS * STEPS)
    assert torch.equal(frames(pipeline), expected)
    assert ran == attached.ran()[0], "detached, it counts no more"


def test_fallbacks_are_told_and_strict_refuses(
    pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with sagewan.attach(pipeline, attention="sageattn_3_fp4") as attached:
        frames(pipeline)
    assert attached.fallbacks()[0]["from"] == "sageattn_3_fp4"
    assert "needs an NVIDIA GPU" in attached.fallbacks()[0]["why"]
    assert attached.ran()[0]["mode"] == "sdpa"
    assert "sageattn_3_fp4" in caplog.text
    with (
        sagewan.attach(pipeline, attention="sageattn_3_fp4", strict=True),
        pytest.raises(UnsupportedError, match="strict"),
    ):
        frames(pipeline)


def test_a_mode_changes_the_frames_a_little(pipeline: Any) -> None:
    expected = frames(pipeline)
    with sagewan.attach(pipeline, attention="sageattn_3", emulate=True) as attached:
        found = frames(pipeline)
    assert attached.ran()[0]["implementation"] == "emulated.sageattn_3"
    assert 0 < (found - expected).abs().mean() < 0.02


def test_both_experts_of_wan_2_2(shrunken_folder: Callable[[str], Path]) -> None:
    from diffusers import WanTransformer3DModel

    folder = shrunken_folder("wan2.2-t2v-a14b")
    experts = [
        WanTransformer3DModel.from_pretrained(folder / name)
        for name in ("transformer", "transformer_2")
    ]

    class Pipeline:
        transformer, transformer_2 = experts

    before = [block.attn1.processor for expert in experts for block in expert.blocks]
    attached = sagewan.attach(Pipeline(), attention="sdpa")
    layers = [block.attn1.processor for expert in experts for block in expert.blocks]
    assert not set(map(id, layers)) & set(map(id, before))
    attached.detach()
    assert [b.attn1.processor for e in experts for b in e.blocks] == before


def test_a_compiled_transformer_has_no_break_in_its_blocks(
    shrunken_folder: Callable[[str], Path],
) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(
        shrunken_folder("wan2.1-t2v-1.3b") / "transformer"
    )
    attached = sagewan.attach(model, attention="sageattn", emulate=True)
    block = model.blocks[0].attn1
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    size = model.config.num_attention_heads * model.config.attention_head_dim
    hidden = torch.randn(1, 12, size)
    angles = torch.randn(1, 12, 1, model.config.attention_head_dim)
    rotary = (angles.cos(), angles.sin())
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(hidden, None, None, rotary), block(hidden, None, None, rotary)
        )
    assert attached.ran()[0]["calls"] == 2


@pytest.mark.parametrize("wrong", [object(), None])
def test_what_is_not_wan_is_refused(wrong: object) -> None:
    with pytest.raises(RequestError, match="give a diffusers Wan pipeline"):
        sagewan.attach(wrong, attention="sdpa")


def test_an_unknown_mode_is_refused_at_once(pipeline: Any) -> None:
    with pytest.raises(RequestError, match="sageattn_9"):
        sagewan.attach(pipeline, attention="sageattn_9")


@pytest.mark.filterwarnings("ignore")  # those of diffusers are its users' matter
@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_example_of_the_readme_runs(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / readme).read_text(encoding="utf-8")
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "sagewan.attach" in code
    ]
    exec(compile(example, readme, "exec"), {})
    assert "torch.sdpa" in capsys.readouterr().out
