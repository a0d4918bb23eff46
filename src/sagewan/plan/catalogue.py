"""The implementations of each attention mode: a table of rows, and what a row objects to.

A row is plain data: nothing is imported to read it. Its callable takes query, key and value by
position, and everything else by keyword.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.objection import Objection
from sagewan.plan.row import ADA_UP, AMPERE_UP, ANY_FLOAT, Row, listed

# What INT8 itself costs on the easiest inputs. Wan's usual sizes stay below; clips of a few hundred
# tokens may not.
MAX_PADDING_SHARE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one attention call asks for. ``dtype`` is torch's name of it, such as ``bfloat16``;
    ``keys`` how many tokens are attended to, None if not known yet; ``block_mask`` whether some
    blocks of them are left out."""

    head_dim: int
    dtype: str
    keys: int | None = None
    grouped_heads: bool = False
    log_sum_exp: bool = False
    block_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Implementation(Row):
    """One way to compute a mode.

    ``layout`` is the axis order its function takes (B batch, H heads, N tokens, D head size);
    ``qk`` and ``pv`` the formats its two products multiply in.

    ``scale``, ``lse_option``, ``grouped_option`` and ``block_mask`` are the keywords for the
    softmax scale, for the log-sum-exp (returned second), for fewer key heads than query heads, and
    for the mask of the blocks to attend to. Without ``scale`` the launcher multiplies q instead;
    without ``lse_option`` it computes a wanted log-sum-exp itself; without ``grouped_option`` the
    function sees the head counts by itself. ``only_masked`` rows are for masks alone.

    ``changes_key`` marks functions known to smooth the caller's K in place: they get a copy.
    ``key_block`` marks functions that take the padding of their last block of so many keys for
    keys of score zero (they mask the load but not the score).
    """

    mode: str
    qk: str
    pv: str
    layout: str = "BHND"
    scale: str | None = "scale"
    lse_option: str | None = None
    grouped_option: str | None = None
    block_mask: str | None = None
    only_masked: bool = False
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    head_dims: tuple[int, ...] = ()
    grouped_heads: bool = False
    log_sum_exp: bool = False
    changes_key: bool = False
    key_block: int = 1

    def objections(
        self, problem: Problem, device: Device, hardware: Hardware
    ) -> Iterator[Objection]:
        """Why this row can't serve the problem on the device; the machine's lack comes first."""
        yield from self.needs(problem.dtype, device, hardware)
        if self.head_dims and problem.head_dim not in self.head_dims:
            yield Objection(
                "head-dim", {"needed": listed(self.head_dims), "found": str(problem.head_dim)}
            )
        if problem.keys is not None and self.padding_share(problem.keys) > MAX_PADDING_SHARE:
            yield Objection(
                "key-padding", {"block": str(self.key_block), "found": str(problem.keys)}
            )
        if problem.grouped_heads and not self.grouped_heads:
            yield Objection("grouped-heads")
        if problem.log_sum_exp and not self.log_sum_exp:
            yield Objection("log-sum-exp")
        if problem.block_mask and not self.block_mask:
            yield Objection("block-mask")
        if self.only_masked and not problem.block_mask:
            yield Objection("only-masked")

    def padding_share(self, keys: int) -> float:
        """The most of a row's weight that padding taken for keys can get.

        With K smoothed, a row's scores average zero, so that their exponentials sum to at least
        ``keys`` (Jensen's inequality), and each place of padding adds one.
        """
        padding = -keys % self.key_block
        return padding / (keys + padding)

    def objection(self, problem: Problem, device: Device, hardware: Hardware) -> Objection | None:
        """The first of :meth:`objections`, or None: the row can be tried."""
        return next(self.objections(problem, device, hardware), None)


CUDA_BINDINGS = "cuda-bindings"
# Distributions of the compiler that it calls: of CUDA 13, and of 12.
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")

_OUR_HEAD_DIMS = tuple(range(8, 257, 8))
# What our kernels in CUDA C++ have in common.
_HOPPER: dict[str, Any] = {
    "lse_option": "return_lse",
    "block_mask": "block_mask",
    "sms": (90,),
    "head_dims": tuple(range(72, 129, 8)),
    "package": CUDA_BINDINGS,
    "versions": ("12.8", "14"),
    "install": "pip install cuda-bindings nvidia-cuda-nvrtc",
    "systems": ("Linux", "Windows"),
    "grouped_heads": True,
    "log_sum_exp": True,
}
_FP4_HEAD_DIMS = tuple(range(8, 256, 8))

ROWS: tuple[Implementation, ...] = (
    Implementation(
        name="torch.sdpa",
        mode="sdpa",
        call="torch.nn.functional:scaled_dot_product_attention",
        qk="16 bit",
        pv="16 bit",
        grouped_option="enable_gqa",
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        log_sum_exp=True,
        trusted=True,
    ),
    Implementation(
        name="sagewan.sdpa_blocks",
        mode="sdpa",
        call="sagewan.attention.block_sparse:sdpa",
        qk="16 bit",
        pv="16 bit",
        block_mask="block_mask",
        only_masked=True,
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        trusted=True,
    ),
    Implementation(
        name="flash_attn.cute",
        mode="flash_attn",
        call="flash_attn.cute:flash_attn_func",
        qk="16 bit",
        pv="16 bit",
        layout="BNHD",
        scale="softmax_scale",
        lse_option="return_lse",
        sms=(90, 100, 103, 120, 121),
        head_dims=(64, 96, 128),
        package="flash-attn-4",
        versions=("4.0.0b36", "5"),
        install='pip install --pre "flash-attn-4>=4.0.0b36"',
        systems=("Linux",),
        grouped_heads=True,
        log_sum_exp=True,
        # It passes None for an argument that its compiler can't type.
        quiet=(r"Argument aux_data \(position 17\) cannot be converted to a JitArgument",),
    ),
    Implementation(
        name="flash_attn_3",
        mode="flash_attn",
        call="flash_attn_interface:flash_attn_func",
        qk="16 bit",
        pv="16 bit",
        layout="BNHD",
        scale="softmax_scale",
        sms=(90,),
        head_dims=(64, 96, 128, 192, 256),
        package="flash-attn-3",
        versions=("3.0.0b1", "4"),
        install="build FlashAttention 3 from its sources (hopper/)",
        grouped_heads=True,
    ),
    Implementation(
        name="flash_attn",
        mode="flash_attn",
        call="flash_attn:flash_attn_func",
        qk="16 bit",
        pv="16 bit",
        layout="BNHD",
        scale="softmax_scale",
        sms=AMPERE_UP,
        head_dims=(64, 96, 128, 192, 256),
        package="flash-attn",
        versions=("2.6", "3"),
        install="pip install flash-attn --no-build-isolation",
        grouped_heads=True,
    ),
    Implementation(
        name="sagewan.sageattn_hopper",
        mode="sageattn",
        call="sagewan.kernels.hopper_attention:sageattn",
        qk="int8 per block",
        pv="16 bit",
        **_HOPPER,
    ),
    Implementation(
        name="sagewan.sageattn",
        mode="sageattn",
        call="sagewan.kernels.int8_attention:sageattn",
        qk="int8 per block",
        pv="16 bit",
        lse_option="return_lse",
        block_mask="block_mask",
        sms=AMPERE_UP,
        head_dims=_OUR_HEAD_DIMS,
        package="triton",
        versions=("3.6", "4"),
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
        grouped_heads=True,
        log_sum_exp=True,
    ),
    Implementation(
        name="sageattention.int8_fp16_cuda",
        mode="sageattn",
        call="sageattention:sageattn_qk_int8_pv_fp16_cuda",
        qk="int8 per thread",
        pv="fp16",
        scale="sm_scale",
        lse_option="return_lse",
        options={"pv_accum_dtype": "fp32"},
        sms=AMPERE_UP,
        head_dims=(64, 96, 128),
        package="sageattention",
        versions=("2", "3"),
        install="build SageAttention 2 from its sources",
        grouped_heads=True,
        log_sum_exp=True,
    ),
    Implementation(
        name="sageattention.int8_fp16_triton",
        mode="sageattn",
        call="sageattention:sageattn_qk_int8_pv_fp16_triton",
        qk="int8 per block",
        pv="fp16",
        scale="sm_scale",
        lse_option="return_lse",
        sms=(80, 86, 87, 89, 90, 100, 103),  # its authors: not usable on sm_120
        head_dims=(64, 96, 128),
        package="sageattention",
        versions=("2", "3"),
        install="build SageAttention 2 from its sources",
        grouped_heads=True,
        log_sum_exp=True,
        key_block=64,
    ),
    Implementation(
        name="sageattention.sageattn_1",
        mode="sageattn",
        call="sageattention:sageattn",
        qk="int8 per block",
        pv="fp16",
        scale="sm_scale",
        sms=AMPERE_UP,
        head_dims=(64, 96, 128),
        package="sageattention",
        versions=("1.0.6", "2"),
        install="pip install sageattention==1.0.6",
        grouped_heads=True,
        changes_key=True,
        key_block=64,
    ),
    Implementation(
        name="comfy_kitchen.int8_attention",
        mode="sageattn",
        call="comfy_kitchen:int8_attention",
        qk="int8, rotated",
        pv="int8",
        sms=(75, *AMPERE_UP),
        head_dims=(64, 96, 128, 256),
        package="comfy-kitchen",
        versions=("0.2.40", "0.3"),
        install='pip install "comfy-kitchen>=0.2.40,<0.3"',
        systems=("Linux", "Windows"),
        grouped_heads=True,
    ),
    Implementation(
        name="sagewan.sageattn_3_hopper",
        mode="sageattn_3",
        call="sagewan.kernels.hopper_attention:sageattn_3",
        qk="int8 per block",
        pv="16 bit",
        **_HOPPER,
    ),
    Implementation(
        name="sagewan.sageattn_3",
        mode="sageattn_3",
        call="sagewan.kernels.int8_attention:sageattn_3",
        qk="int8 per block",
        pv="16 bit",
        lse_option="return_lse",
        block_mask="block_mask",
        sms=AMPERE_UP,
        head_dims=_OUR_HEAD_DIMS,
        package="triton",
        versions=("3.6", "4"),
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
        grouped_heads=True,
        log_sum_exp=True,
    ),
    Implementation(
        name="sagewan.sageattn_3_fp8_hopper",
        mode="sageattn_3_fp8",
        call="sagewan.kernels.hopper_attention:sageattn_3_fp8",
        qk="int8 per block",
        pv="fp8 e4m3",
        **_HOPPER,
    ),
    Implementation(
        name="sagewan.sageattn_3_fp8",
        mode="sageattn_3_fp8",
        call="sagewan.kernels.fp8_attention:sageattn_3_fp8",
        qk="int8 per block",
        pv="fp8 e4m3",
        lse_option="return_lse",
        block_mask="block_mask",
        sms=ADA_UP,
        head_dims=_OUR_HEAD_DIMS,
        package="triton",
        versions=("3.6", "4"),
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
        grouped_heads=True,
        log_sum_exp=True,
    ),
    Implementation(
        name="sagewan.sageattn_3_fp4",
        mode="sageattn_3_fp4",
        call="sagewan.kernels.fp4_attention:sageattn_3_fp4",
        qk="nvfp4",
        pv="nvfp4",
        lse_option="return_lse",
        block_mask="block_mask",
        sms=(100, 103, 120, 121),
        head_dims=_FP4_HEAD_DIMS,
        package="triton",
        versions=("3.6", "4"),
        sm_versions=((121, "3.8"),),  # older ones do not compile FP4 products for it
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
        grouped_heads=True,
        log_sum_exp=True,
    ),
    Implementation(
        name="sageattn3.blackwell",
        mode="sageattn_3_fp4",
        call="sageattn3:sageattn3_blackwell",
        qk="nvfp4",
        pv="nvfp4",
        scale=None,
        options={"per_block_mean": True},
        sms=(100, 120),  # what its build accepts
        head_dims=(64, 128),
        package="sageattn3",
        versions=("1", "2"),
        install="build SageAttention 3 from its sources",
        systems=("Linux", "Windows"),
        changes_key=True,
    ),
    Implementation(
        name="emulated.sageattn",
        mode="sageattn",
        call="sagewan.reference.emulation:sageattn",
        qk="int8 per block",
        pv="16 bit",
        lse_option="return_lse",
        block_mask="block_mask",
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        log_sum_exp=True,
        emulated=True,
        trusted=True,
    ),
    Implementation(
        name="emulated.sageattn_3",
        mode="sageattn_3",
        call="sagewan.reference.emulation:sageattn_3",
        qk="int8 per block",
        pv="16 bit",
        lse_option="return_lse",
        block_mask="block_mask",
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        log_sum_exp=True,
        emulated=True,
        trusted=True,
    ),
    Implementation(
        name="emulated.sageattn_3_fp8",
        mode="sageattn_3_fp8",
        call="sagewan.reference.emulation:sageattn_3_fp8",
        qk="int8 per block",
        pv="fp8 e4m3",
        lse_option="return_lse",
        block_mask="block_mask",
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        log_sum_exp=True,
        emulated=True,
        trusted=True,
    ),
    Implementation(
        # The kernel of sagewan.sageattn_3_fp4, which multiplies the same numbers in float16.
        name="emulated.sageattn_3_fp4_unpacked",
        mode="sageattn_3_fp4",
        call="sagewan.kernels.fp4_attention:sageattn_3_fp4",
        qk="nvfp4",
        pv="nvfp4",
        lse_option="return_lse",
        block_mask="block_mask",
        sms=(80, 86, 87, 89, 90),
        head_dims=_FP4_HEAD_DIMS,
        package="triton",
        versions=("3.6", "4"),
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
        grouped_heads=True,
        log_sum_exp=True,
        emulated=True,
    ),
    Implementation(
        name="emulated.sageattn_3_fp4",
        mode="sageattn_3_fp4",
        call="sagewan.reference.emulation:sageattn_3_fp4",
        qk="nvfp4",
        pv="nvfp4",
        lse_option="return_lse",
        block_mask="block_mask",
        dtypes=ANY_FLOAT,
        grouped_heads=True,
        log_sum_exp=True,
        emulated=True,
        trusted=True,
    ),
)


def rows_of(mode: str, *, emulate: bool = False) -> tuple[Implementation, ...]:
    """The rows that serve a mode, in order of preference; the emulation only where allowed."""
    return tuple(row for row in ROWS if row.mode == mode and (emulate or not row.emulated))


def row_named(name: str) -> Implementation:
    """The row of that name; KeyError if there is none."""
    return {row.name: row for row in ROWS}[name]
