"""Where a pass's time on the GPU goes, by the names of the kernels that torch's profiler saw.

Preparation is what quantises: Q, K and V for attention, activations for products; and what unpacks
weights. Cross-attention counts as attention.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch._C._autograd import DeviceType

ATTENTION = "attention"
PREPARATION = "preparation"
PRODUCTS = "products"
OTHER = "everything else"
STAGES = (ATTENTION, PREPARATION, PRODUCTS, OTHER)

# What torch.compile generates fuses what is between the products, and is named after all of it.
_COMPILED = re.compile(r"triton_(poi|red|per)_")
# In this order: an attention kernel of CUTLASS says "gemm" too.
_PATTERNS = (
    (PREPARATION, r"prepare|quanti[sz]e|unpack|_(rows|columns|reduce|corrections)_kernel"),
    (ATTENTION, r"attention|attend|flash|fmha|sdpa|_attn"),
    (PRODUCTS, r"gemm|nvjet|cutlass|cublas|xmma|splitk|scaled_mm|_linear_kernel|^product$"),
)


def stage_of(kernel: str) -> str:
    """The stage that a kernel belongs to, by its name.

    >>> [stage_of(name) for name in ("nvjet_tst_192x192", "product", "cudnn_…_sdpa", "copy_")]
    ['products', 'products', 'attention', 'everything else']
    """
    if _COMPILED.match(kernel):
        return OTHER
    for stage, pattern in _PATTERNS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return stage
    return OTHER


def by_stage(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each stage, of (name, milliseconds) of kernels."""
    found = dict.fromkeys(STAGES, 0.0)
    for name, milliseconds in kernels:
        found[stage_of(name)] += milliseconds
    return found


def kernels_of(run: Callable[[], object]) -> Mapping[str, float]:
    """The milliseconds that each kernel took on the GPU in one call, all its launches together."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        run()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            spent[event.name] += event.self_device_time_total / 1000
    return spent
