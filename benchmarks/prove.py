"""Random problems against float64, to find what chosen ones miss.

    python -m benchmarks.prove [--count 1000] [--first 0] [--rows NAME,…] [--seconds 220]

Shapes, strides, dtypes, softmax scales and values are drawn from the problem's number alone. Of
1,000, one has 200,000 keys, 20 have 65,536 and more, 200 more have 8,192 and more. A result must be
finite and like the float64 formula within its mode's class; on values that are hard for a format
(see ``HARD``), within a little of the error of the plain-torch emulation, which has the format and
nothing else.
"""

import argparse
import concurrent.futures
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sagewan.attention.launch import call
from sagewan.attention.problems import LIMITS
from sagewan.attention.resolve import ImplementationError, load
from sagewan.plan.catalogue import ROWS, Implementation, row_named
from sagewan.plan.modes import MODES
from sagewan.reference import emulation
from sagewan.reference.attention import attention_with_lse, relative_error

KINDS = ("normal", "bias", "local", "channel", "magnitude", "constant", "zeros", "peaked", "token")
# Few keys carry the weight, or one token's size decides the step of a block's quantisation.
HARD = ("peaked", "token", "channel")
# How much worse than its emulation a kernel may be there: its blocks of keys may differ in size.
SLACK = 1.3
_FLOOR = 0.01


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A problem: ``layout`` is how the tensors lie in memory, ``scale`` None for D**-0.5."""

    seed: int
    kind: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    layout: str
    scale: float | None
    with_lse: bool

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, Hk, M, D], in the drawn layout."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        q = normal(self.batch, self.heads, self.queries, self.head_dim)
        k, v = (normal(self.batch, self.key_heads, self.keys, self.head_dim) for _ in range(2))
        q, k, v = _VALUES[self.kind](self, q, k, v)
        dtype: torch.dtype = getattr(torch, self.dtype)
        q, k, v = (_laid_out(x.to(dtype), self.layout) for x in (q, k, v))
        return q, k, v


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "BNHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), 7.0)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "part":
        wide = x.new_full((*x.shape[:3], x.shape[3] + 16), 7.0)
        wide[..., 16:] = x
        return wide[..., 16:]
    return x


def _values_bias(_: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 1.5 * q, k + 3 * torch.sign(k[:, :, :1]), v + 0.5 * torch.sign(v[:, :, :1])


def _values_local(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.arange(drawn.queries, device=q.device) * drawn.keys // drawn.queries
    groups = drawn.heads // drawn.key_heads
    base = k[:, :, ::32].repeat_interleave(32, 2)[:, :, : drawn.keys] + 0.5 * k
    near = base[:, :, places].repeat_interleave(groups, 1)
    return 1.2 * near + 0.5 * q, base + 3 * torch.sign(k[:, :, :1]), v


def _values_channel(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = drawn.seed % drawn.head_dim
    factor = torch.ones(drawn.head_dim, device=q.device)
    factor[one] = 6.0
    return q * factor, k * factor, v * factor


def _values_token(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = drawn.seed % drawn.keys
    k[:, :, one] *= 8
    v[:, :, one] *= 8
    return q, k, v


def _values_magnitude(
    drawn: Drawn, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q tiny where K is huge, so that the scores are as usual; V anything."""
    both, values = drawn.seed % 17 - 8, drawn.seed % 16 - 6
    return q * 2.0**both, k * 2.0**-both, v * 2.0**values


def _values_constant(_: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v + 2


def _values_zeros(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = drawn.seed % 3
    v[..., : drawn.head_dim // 2] = 0
    return (q * (zero != 0), k * (zero != 1), v * (zero != 2))


_VALUES: dict[str, Callable[[Drawn, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "normal": lambda _, q, k, v: (q, k, v),
    "bias": _values_bias,
    "local": _values_local,
    "channel": _values_channel,
    "magnitude": _values_magnitude,
    "constant": _values_constant,
    "zeros": _values_zeros,
    "peaked": lambda _, q, k, v: (4 * q, k, v),
    "token": _values_token,
}


def draw(number: int, row: Implementation, *, small: bool = False) -> Drawn:
    """The problem of this number for a row; ``small`` for the interpreter, which is slow and has
    float16 alone."""
    chance = random.Random(number)
    key_heads = chance.choice((1, 2))
    queries, keys = _lengths(number, chance, small=small)
    # Most have Wan's head size, in any form; each other size comes in one form of its own.
    others = [size for size in (8, 64, 72, 96, 136, 248) if size in row.head_dims]
    head_dim, dtype = 128, chance.choice(("bfloat16", "float16"))
    layout = chance.choice(("BHND", "BNHD", "every second", "part"))
    if others and chance.random() < 0.4:
        head_dim = chance.choice(others)
        dtype, layout = (("bfloat16", "BNHD"), ("float16", "BHND"))[others.index(head_dim) % 2]
    return Drawn(
        seed=number,
        kind=KINDS[number % len(KINDS)],
        batch=chance.choice((1, 2)) if keys < 8192 else 1,
        heads=key_heads * chance.choice((1, 2, 3)) if row.grouped_heads else key_heads,
        key_heads=key_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        dtype="float16" if small else dtype,
        layout=layout,
        scale=chance.choice((None, 0.7 * head_dim**-0.5)),
        with_lse=row.log_sum_exp and chance.random() < 0.5,
    )


def _lengths(number: int, chance: random.Random, *, small: bool) -> tuple[int, int]:
    """How many queries and keys."""
    if small:
        return chance.randint(1, 100), chance.randint(1, 140)
    if number == 0:
        return 64, 200_000
    if number % 50 == 1:
        return chance.randint(1, 300), chance.randint(65_536, 131_072)
    if number % 5 == 2:
        return chance.randint(1, 1000), chance.randint(8192, 32_768)
    return chance.randint(1, 2000), chance.randint(1, 2500)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A problem and how a row did; ``wrong`` is empty if it did well."""

    drawn: Drawn
    error: float
    limit: float
    wrong: str = ""


def judge(row: Implementation, drawn: Drawn, device: str) -> Verdict:
    """Run one problem and hold it to the float64 formula."""
    q, k, v = drawn.tensors(device)
    before = [x.clone() for x in (q, k, v)]
    try:
        out, lse = call(load(row), row, q, k, v, scale=drawn.scale, with_lse=drawn.with_lse)
    except ImplementationError as failure:
        return Verdict(drawn=drawn, error=float("inf"), limit=0.0, wrong=str(failure))
    expected, expected_lse = attention_with_lse(q, k, v, scale=drawn.scale)
    limit = limit_of(row, drawn, (q, k, v), expected)
    wrong = ""
    if not all(map(torch.equal, (q, k, v), before)):
        wrong = "inputs changed"
    elif not out.isfinite().all():
        wrong = "not finite"
    # Without any value to be relative to, zero is the answer.
    nothing = not expected.any()
    error = float(out.double().abs().max()) if nothing else relative_error(out, expected)
    if not error <= limit:
        wrong = wrong or f"error {error:.4g} above {limit:.4g}"
    if lse is not None:
        wrong = wrong or _wrong_lse(row, drawn, lse, expected_lse)
    return Verdict(drawn=drawn, error=error, limit=limit, wrong=wrong)


def limit_of(
    row: Implementation, drawn: Drawn, tensors: Sequence[Tensor], expected: Tensor
) -> float:
    """The most error a row may have: its class's, or a little more than its emulation's."""
    usual = LIMITS["local"][MODES[row.mode].quality]
    if drawn.kind not in HARD and drawn.head_dim >= 64 and drawn.keys >= 16:
        return usual
    emulated = getattr(emulation, row.mode)(*tensors, scale=drawn.scale)
    return max(usual, SLACK * relative_error(emulated, expected) + _FLOOR)


def _wrong_lse(row: Implementation, drawn: Drawn, lse: Tensor, expected: Tensor) -> str:
    """The log-sum-exp is off by the error of the scores; a hard kind's by as much as they are."""
    most = {"sageattn_3_fp4": 0.5}.get(row.mode, 0.1) * (8 if drawn.kind in HARD else 1)
    off = float((lse.double() - expected).abs().mean())
    return "" if off <= most else f"log-sum-exp off by {off:.4g}, at most {most}"


def _sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def ours(sm: int) -> list[Implementation]:
    """The rows of our kernels that run on this compute capability."""
    return [row for row in ROWS if row.call.startswith("sagewan.kernels.") and sm in row.sms]


def prove(
    row: Implementation,
    numbers: range,
    device: str,
    *,
    small: bool = False,
    seconds: float = float("inf"),
) -> list[Verdict]:
    """The verdicts on these problems, or on as many as that time allows."""
    end = time.perf_counter() + seconds
    numbers_in_time = itertools.takewhile(lambda _: time.perf_counter() < end, numbers)
    return [judge(row, draw(number, row, small=small), device) for number in numbers_in_time]


def _in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One row's proof in a process of its own, so that compilation goes on in parallel."""
    command = [sys.executable, "-m", "benchmarks.prove", "--only", name]
    for option in ("first", "count", "seconds", "device"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"row": name, "crashed": done.stderr[-2000:]}
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _report(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    start = time.perf_counter()
    numbers = range(arguments.first, arguments.first + arguments.count)
    small, seconds = arguments.device == "cpu", arguments.seconds
    verdicts = prove(row_named(name), numbers, arguments.device, small=small, seconds=seconds)
    worst = max(verdicts, key=lambda one: one.error / (one.limit or 1.0))
    return {
        "row": name,
        "problems": len(verdicts),
        "wrong": [{**asdict(one.drawn), "wrong": one.wrong} for one in verdicts if one.wrong],
        "nearest_to_its_limit": {**asdict(worst.drawn), "error": worst.error, "limit": worst.limit},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rows", help="all of ours that run here if left out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=220, help="the most time for a row")
    parser.add_argument("--device", default="cuda", help="cpu: small ones, under the interpreter")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(_report(arguments.only, arguments)))
        return 0
    names = arguments.rows.split(",") if arguments.rows else [row.name for row in ours(_sm())]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda name: _in_own_process(name, arguments), names))
    for one in found:
        print(json.dumps(one, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(one.get("wrong") or one.get("crashed") for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
