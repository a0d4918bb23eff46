"""Our kernels on a real GPU: against float64, against their emulation, and against themselves."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sagewan.attention import bench
from sagewan.errors import ShapeError
from sagewan.plan.catalogue import row_named, rows_of
from sagewan.reference import emulation
from sagewan.reference.attention import attention, attention_with_lse, relative_error

pytestmark = pytest.mark.gpu

# The most a kernel may differ from the emulation of the same formats in the same order. In 16-bit
# modes it is the rounding of the output; FP8's P falls to the other side of a tie now and then.
KERNEL_ERROR = {
    "sageattn": 1e-3,
    "sageattn_3": 1e-3,
    "sageattn_3_fp8": 3e-3,
    "sageattn_3_fp4": 1e-3,
    # Its product adds up to four steps in 14 bits.
    "sageattn_3_fp8_hopper": 6e-3,
}


HOPPER = ("sageattn_hopper", "sageattn_3_hopper", "sageattn_3_fp8_hopper")


@pytest.fixture(params=[*bench.OURS, *HOPPER])
def name(request: pytest.FixtureRequest) -> str:
    """One of our rows, without the package's name before it."""
    name = str(request.param)
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    ours = [row_named(f"sagewan.{name}")]
    if name not in HOPPER:
        # FP4 runs everywhere: in Blackwell's instructions, or unpacked.
        ours += [row for row in rows_of(name, emulate=True) if "kernels." in row.call]
    if not any(sm in row.sms for row in ours):
        pytest.skip("this GPU is not in the rows' list")
    return name


@pytest.fixture
def mode(name: str) -> str:
    return name.removesuffix("_hopper")


def run(name: str) -> Callable[..., Tensor]:
    from sagewan.attention.resolve import load

    return load(row_named(f"sagewan.{name}"))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def blocks_of(name: str) -> dict[str, object]:
    """What the emulation of a row's kernel is to be told: its blocks, and whose scales are one."""
    from sagewan.kernels import fp4_attention, fp8_attention, int8_attention

    if name.endswith("_hopper"):
        blocks = {"block_m": 64, "block_n": 128, "rows_per_scale": 64, "keys_per_scale": 64}
        fp8 = {"keys_per_scale": 128, "rounded_sums": True, "own_place": True, "headroom": 2}
        return blocks | (fp8 if name == "sageattn_3_fp8_hopper" else {})
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    if name == "sageattn_3_fp4":
        return {"block_n": fp4_attention.tile_for(sm, 128).block_n}
    module = fp8_attention if name == "sageattn_3_fp8" else int8_attention
    tile = module.tile_for(sm, 128)
    scales = {"rows_per_scale": tile.block_m, "keys_per_scale": max(64, tile.block_n)}
    return {"block_m": tile.block_m, "block_n": tile.block_n, **scales}


@pytest.mark.parametrize("family", ["bias", "local"])
def test_error_is_within_the_modes_class(name: str, mode: str, family: str) -> None:
    q, k, v = bench.inputs(family, (1, 4, 32768), "cuda")
    error = bench.error_of(run(name), q, k, v)
    assert error <= bench.OURS[mode][family == "local"], error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "size"),
    [(1000, 1000, 4, 2, 128), (333, 457, 2, 2, 128), (1, 1, 2, 1, 64), (130, 300, 2, 2, 72)],
)
def test_kernel_is_its_emulation(
    name: str,
    mode: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: int,
    key_heads: int,
    size: int,
) -> None:
    if size not in row_named(f"sagewan.{name}").head_dims:
        pytest.skip("another size than the row takes")
    q = 1.5 * normal(2, heads, queries, size, seed=1, dtype=dtype)
    k = normal(2, key_heads, keys, size, seed=2, dtype=dtype)
    k = k + 3 * normal(1, key_heads, 1, size, seed=3, dtype=dtype)
    v = normal(2, key_heads, keys, size, seed=4, dtype=dtype)
    out, lse = run(name)(q, k, v, return_lse=True)
    blocks = blocks_of(name)
    # The emulation rounds its output too: compared before that, in float32.
    wide = (x.float() for x in (q, k, v))
    same = getattr(emulation, mode)(*wide, **blocks) if dtype == torch.float16 else None
    _, same_lse = getattr(emulation, mode)(q, k, v, **blocks, return_lse=True)
    if same is not None:
        assert relative_error(out, same) < KERNEL_ERROR.get(name, KERNEL_ERROR[mode])
    # Where P is in FP8, a key with a tenth of a row's weight falls to the other side of a tie.
    most = 1e-2 if name == "sageattn_3_fp8_hopper" else 5e-3
    torch.testing.assert_close(lse, same_lse, atol=most, rtol=1e-3)
    expected = attention_with_lse(q, k, v)[1]
    assert relative_error(lse, expected) < (0.1 if mode == "sageattn_3_fp4" else 0.01)


def test_many_keys_far_below_a_peak_count() -> None:
    # One key a query 12 natural units above 75,600 flat ones, which have a third of the weight.
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the row is Hopper's")
    q = normal(1, 2, 64, 128, seed=1)
    k, v = (normal(1, 2, 75_600, 128, seed=seed) for seed in (2, 3))
    q, v = 0.7 * q, v + 0.5
    own = 12 * 128**0.5 * q.float() / q.float().square().sum(3, keepdim=True)
    k = torch.cat([own.to(k.dtype), k[:, :, 64:]], 2)
    found = run("sageattn_3_fp8_hopper")(q, k, v)
    assert relative_error(found, attention(q, k, v)) < 0.05


def test_runs_are_identical_layout_does_not_matter_and_inputs_are_kept(
    name: str, mode: str
) -> None:
    q, k, v = (normal(2, 500, 4, 128, seed=seed).transpose(1, 2) for seed in range(3))
    before = [x.clone() for x in (q, k, v)]
    first = run(name)(q, k, v)
    assert torch.equal(run(name)(q, k, v), first)
    assert torch.equal(run(name)(*(x.contiguous() for x in (q, k, v))), first)
    assert all(map(torch.equal, (q, k, v), before))
    assert first.stride() == q.stride()


def test_200000_keys(name: str, mode: str) -> None:
    q = 1.5 * normal(1, 1, 64, 128, seed=1)
    k = normal(1, 1, 200_000, 128, seed=2) + 3 * normal(1, 1, 1, 128, seed=3)
    v = normal(1, 1, 200_000, 128, seed=4) + 0.5 * normal(1, 1, 1, 128, seed=5)
    error = relative_error(run(name)(q, k, v), attention(q, k, v))
    assert error < (0.1 if mode == "sageattn_3_fp4" else 0.01)


@pytest.mark.parametrize("falling", [False, True])
def test_maxima_that_rise_or_fall_at_every_step(name: str, mode: str, falling: bool) -> None:
    # A kernel that rescales only where a maximum rises must do so at each step, or at none.
    place = torch.linspace(0, 24, 3000, device="cuda")[:, None]
    direction = normal(1, 2, 1, 128, seed=0).float().sign()
    q = (direction + 0.1 * normal(1, 2, 300, 128, seed=1)).to(torch.bfloat16)
    k = (direction * place / 128**0.5 + 0.3 * normal(1, 2, 3000, 128, seed=2)).to(torch.bfloat16)
    k, v = (k.flip(2) if falling else k), normal(1, 2, 3000, 128, seed=3)
    out, lse = run(name)(q, k, v, return_lse=True)
    expected, expected_lse = attention_with_lse(q, k, v)
    assert relative_error(out, expected) < (0.3 if mode == "sageattn_3_fp4" else 0.06)
    assert relative_error(lse, expected_lse) < (0.1 if mode == "sageattn_3_fp4" else 0.01)


def test_edges_of_the_range_stay_finite(name: str, mode: str) -> None:
    q, k, v = (normal(1, 2, 300, 128, seed=seed) for seed in range(3))
    for a, b, c in ((0.0, 0.0, 0.0), (1e-20, 1e-20, 1e-20), (1e3, 1e3, 1e30), (1.0, 1.0, 1e-30)):
        out = run(name)(a * q, b * k, c * v)
        assert out.isfinite().all(), (a, b, c)
    constant = torch.full_like(v, 3.0)
    torch.testing.assert_close(
        run(name)(q, k, constant), constant, atol=0, rtol=0.02 if mode != "sageattn_3_fp4" else 0.1
    )


def test_what_is_not_taken_is_refused(name: str, mode: str) -> None:
    q = normal(1, 2, 16, 128, seed=0)
    with pytest.raises(ShapeError, match="head size 100"):
        run(name)(q[..., :100], q[..., :100], q[..., :100])
    with pytest.raises(ShapeError, match="float32"):
        run(name)(q.float(), q.float(), q.float())


def test_a_compiled_program_and_a_cuda_graph_give_the_same(name: str, mode: str) -> None:
    q, k, v = (normal(1, 2, 300, 128, seed=seed) for seed in range(3))
    expected = run(name)(q, k, v)
    compiled = torch.compile(run(name), fullgraph=True)
    assert torch.equal(compiled(q, k, v), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name)(q, k, v)
    others = [normal(1, 2, 300, 128, seed=seed) for seed in range(3, 6)]
    for mine, other in zip((q, k, v), others, strict=True):
        mine.copy_(other)
    graph.replay()
    assert torch.equal(captured, run(name)(*others))


def test_sagewan_attend_compiles_without_a_break(name: str, mode: str) -> None:
    import sagewan

    q, k, v = (normal(1, 300, 2, 128, seed=seed) for seed in range(3))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sagewan.attend(q, k, v, mode=mode, layout="BNHD", emulate=True)
        assert isinstance(out, Tensor)
        return 2 * out

    assert torch.equal(torch.compile(program, fullgraph=True)(q, k, v), program(q, k, v))


def test_extra_memory_is_at_most_twice_that_of_q(name: str, mode: str) -> None:
    q = normal(1, 40, 75_600, 128, seed=0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(name)(q, q, q)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 2 * q.nbytes, f"{extra / q.nbytes:.2f}"


def test_blocks_of_keys_that_are_skipped_cost_nothing(name: str, mode: str) -> None:
    module = importlib.import_module(row_named(f"sagewan.{name}").call.partition(":")[0])
    q = normal(1, 4, 1024, 128, seed=0)
    prepared = getattr(module, f"prepare_{mode}")(q, q, q)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool, device="cuda")
    assert not module.attend(prepared, block_mask=mask).any()
    mask[..., :4] = True
    expected = attention(q, q[:, :, :512], q[:, :, :512])
    limit = 0.2 if mode == "sageattn_3_fp4" else 0.05
    assert relative_error(module.attend(prepared, block_mask=mask), expected) < limit
    for tokens in (1000, 1024, 4097):
        q, k, v = (normal(1, 2, tokens, 128, seed=seed) for seed in range(3))
        some = bench.some_blocks(tokens, 0.6, q.device)
        error = relative_error(
            run(name)(q, k, v, block_mask=some), attention(q, k, v, block_mask=some)
        )
        assert error < limit, (tokens, error)
