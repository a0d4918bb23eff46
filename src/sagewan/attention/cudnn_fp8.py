"""cuDNN's FP8 attention, as a rival to measure against; no mode is served by it.

It takes Q, K and V with one scale each and, on Hopper, gives its output in FP8 with one more: fast,
and too coarse for video. Needs the package ``nvidia-cudnn-frontend``.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

_E4M3_MAX = 448.0
# P is at most 1 and is rounded to e4m3: scaled up, fewer of its small values vanish.
_P_SCALE = 256.0
_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, H, N, D], 16 bit, on a CUDA device → [B, H, N, D] in q's dtype.

    Each is quantised with one scale, K minus its mean over N; the output's scale is V's, whose
    range it never leaves. Raises what the package raises: ImportError, and its own errors.
    """
    smooth = k - k.float().mean(2, keepdim=True).to(k.dtype)
    operands = [_quantised(x) for x in (q, smooth, v)]
    data, descales = zip(*operands, strict=True)
    one = torch.ones_like(descales[0])
    values = (*descales, one / _P_SCALE, one * _P_SCALE, 1 / descales[2])
    graph, tensors, handle = _graph(tuple(q.shape), q.device.index or 0)
    out = torch.empty_like(data[0])
    amax = [torch.empty_like(one) for _ in range(2)]
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    buffers = (*data, *values, out, *amax)
    graph.execute(dict(zip(tensors, buffers, strict=True)), workspace, handle=handle)
    output: Tensor = out.float() * descales[2]
    return output.to(q.dtype)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous e4m3, and the scale [1, 1, 1, 1] that gives the values back."""
    low, high = x.aminmax()
    descale = torch.maximum(high, -low).float().clamp(min=1e-12).view(1, 1, 1, 1) / _E4M3_MAX
    data = (x / descale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return data.contiguous(), descale


@cache
def _graph(shape: tuple[int, ...], device: int) -> tuple[Any, tuple[Any, ...], Any]:
    """The built graph for [B, H, N, D], the tensors of its operands and results, its handle."""
    import cudnn

    heads, count, size = shape[1:]
    place = {"dim": shape, "stride": (heads * count * size, count * size, size, 1)}
    single = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1), "data_type": cudnn.data_type.FLOAT}
    e4m3 = cudnn.data_type.FP8_E4M3
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=e4m3,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    operands = {name: graph.tensor(name=name, data_type=e4m3, **place) for name in "qkv"}
    scales = {name: graph.tensor(name=name, **single) for name in _SCALES}
    out, _, *amax = graph.sdpa_fp8(
        **operands, **scales, attn_scale=size**-0.5, generate_stats=False, name="sdpa"
    )
    out.set_output(True).set_dim(place["dim"]).set_stride(place["stride"]).set_data_type(e4m3)
    for tensor in amax:
        tensor.set_output(True).set_dim(single["dim"]).set_stride(single["stride"])
        tensor.set_data_type(single["data_type"])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, (*operands.values(), *scales.values(), out, *amax), handle
