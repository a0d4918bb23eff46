"""Memory on one GPU made to look like a smaller card: what was planned, what was used.

    python -m benchmarks.memory [--cases A,B,…] [--layers N] [--context GIB] [--json FILE]

--list names the cases.

Whole pipelines at published shapes with random weights: text encoder, steps, VAE, mp4. The
process's share of the GPU is limited (``set_per_process_memory_fraction``), the host's memory only
in the plan (a stand-in: nothing stops the process from taking more; what it pins is measured). To
spare host memory and time, all blocks of a model are made from one block's weights, which stand for
pages of a file and are not counted as the host's; the copies that swapping pins are separate and
whole. Nothing is downloaded.

Cases that run at the same time on one GPU can't ask the driver how much is theirs: ``--context``
gives what a process holds beyond torch's memory, as the case ``context`` finds it alone.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.quantize import pack
from sagewan.errors import RejectedError, SagewanError
from sagewan.memory.placement import Place, Placement
from sagewan.model.attention import Attention, Turn
from sagewan.model.blocks import Blocks
from sagewan.model.linear import Multiplier, QuantLinear
from sagewan.model.transformer import install
from sagewan.model.vae import with_channels_last
from sagewan.pipeline import build as building
from sagewan.pipeline.decide import Decision
from sagewan.pipeline.fill import kept_in_float32
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import Event, Watch
from sagewan.pipeline.run import Prepared, execute
from sagewan.pipeline.session import Part, Session
from sagewan.pipeline.step_cache import Forwards
from sagewan.plan.blocks import block_rows
from sagewan.plan.budget import GIB, Chunks
from sagewan.plan.catalogue import ROWS, row_named
from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.linear import LINEAR_ROWS
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request
from sagewan.plan.weights import QUANTIZED_AS
from tests.published import TRANSFORMERS, VAES


@dataclass(frozen=True)
class Card:
    """One whole pipeline on a card of so many GB, with so much host memory in the plan."""

    model: str
    vram: float
    ram: float
    quantization: str
    size: tuple[int, int]
    frames: int
    steps: int = 2
    attention: str = "sdpa"
    # Of the blocks, how many attend; the others leave it out, for time. All have the same peak.
    attending: int | None = None


T2V, A14B, TI2V = "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
_LOW, _BALANCED, _HIGH = "fp4_scaled", "fp8_scaled", "fp8_scaled"

# Where sequences are long only some of the blocks attend, for time.
CARDS: Mapping[str, Card] = {
    "low-8": Card(T2V, 8, 16, _LOW, (1280, 720), 61, attending=4),
    "low-8-a14b": Card(A14B, 8, 16, _LOW, (1280, 720), 61, attention="sageattn_3", attending=4),
    "low-8-ti2v": Card(TI2V, 8, 16, _LOW, (1280, 704), 61),
    "low-12": Card(T2V, 12, 16, _LOW, (1280, 720), 61, attention="sageattn_3", attending=4),
    "balanced-12": Card(
        T2V, 12, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "balanced-12-ti2v": Card(TI2V, 12, 32, _BALANCED, (1280, 704), 121, attention="sageattn_3_fp8"),
    "balanced-16": Card(
        T2V, 16, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "balanced-16-a14b": Card(
        A14B, 16, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "small-12": Card(T2V, 12, 32, _BALANCED, (832, 480), 81),
    "small-16-1.3b": Card("wan2.1-t2v-1.3b", 16, 32, "none", (832, 480), 81),
    "odd-12": Card(T2V, 12, 32, _BALANCED, (960, 544), 49),
    "odd-24": Card(A14B, 24, 32, _BALANCED, (1024, 576), 97, attention="sageattn", attending=4),
    # 252,960 tokens: one step of each expert.
    "quality-16": Card(
        T2V, 16, 32, _HIGH, (1920, 1080), 121, 1, attention="sageattn_3", attending=2
    ),
    "quality-24-a14b": Card(
        A14B, 24, 32, _HIGH, (1920, 1080), 121, 2, attention="sageattn_3", attending=2
    ),
}
DEVICE = "cuda:0"
SHAPES = {"480p": (832, 480), "720p": (1280, 720)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="comma-separated; default: all but the longest")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick look")
    parser.add_argument(
        "--context", type=float, help="GiB of the device that are not torch's; others run beside"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, nargs="+", help="only the table of such files")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    _HELD.update(context=arguments.context)
    signal.signal(signal.SIGTERM, _cut_off)
    if arguments.show:
        read = (json.loads(path.read_text(encoding="utf-8"))["cases"] for path in arguments.show)
        _table({name: facts for cases in read for name, facts in cases.items()})
        return
    cases = {**_cards(arguments.layers), **_others()}
    if arguments.list:
        print("\n".join(cases))
        return
    usual = [name for name in cases if not name.startswith("quality")]
    names = arguments.cases.split(",") if arguments.cases else usual
    found = {}
    for name in names:
        began = time.perf_counter()
        try:
            facts = cases[name]()
        except (SagewanError, RuntimeError) as error:
            # The others are still of use.
            facts = {"failed": f"{type(error).__name__}: {error}"}
        _clear()
        facts["seconds"] = round(time.perf_counter() - began, 1)
        found[name] = facts
        print(name, json.dumps(facts), flush=True)
        if arguments.json:
            _write(arguments.json, found)
    _table(found)
    if any("failed" in {*facts, facts.get("outcome", "")[:6]} for facts in found.values()):
        sys.exit(1)


class _CutOffError(Exception):
    """The time is over; what was seen so far is told."""


def _cut_off(*_: object) -> None:
    raise _CutOffError


def _write(path: Path, found: Mapping[str, Any]) -> None:
    device = torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "cases": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# The plan's names of the stages, and the run's.
_STAGES = {"text": "encode", "denoise": "denoise", "decode": "decode"}


def _table(found: Mapping[str, Mapping[str, Any]]) -> None:
    """By stage, GiB: planned and used on the device, on the host, and pinned."""
    head = ("planned", "used", "ratio", "host", "used", "ratio", "pinned", "used", "ratio")
    print(f"\n{'case':18} {'stage':8}", *(f"{word:>7}" for word in head))
    for name, facts in found.items():
        if "used_by_stage" not in facts:
            print(f"{name:18}", {key: value for key, value in facts.items() if key != "seconds"})
            continue
        for stage, ran in _STAGES.items():
            if used := facts["used_by_stage"].get(ran):
                host = used["host"] - facts["stand_ins"].get(ran, 0)
                wanted = facts["planned_host_by_stage"][stage]
                device = facts["stages"][stage]
                numbers = [device, used["device"], used["device"] / device]
                numbers += [wanted, host, host / wanted]
                pinned = used["pinned_by_torch"] + facts["pinned"] * (stage == "denoise")
                wanted = facts["planned_pinned_by_stage"][stage]
                numbers += [wanted, pinned, pinned / wanted if wanted else 1]
                print(f"{name:18} {stage:8}", *(f"{number:7.3f}" for number in numbers))
        swaps = f"{facts['swapped']} blocks swapped, tile {facts['tile']}, {facts['attention']}"
        print(f"{'':18} {facts['outcome']}, {swaps}, ran out {facts['survived']} times")


# --- whole pipelines ---


def _cards(layers: int | None) -> dict[str, Callable[[], dict[str, Any]]]:
    return {name: (lambda card=card: _pipeline(card, layers)) for name, card in CARDS.items()}


def _pipeline(card: Card, layers: int | None) -> dict[str, Any]:
    """One video on the pretended card: memory planned and used, GiB."""
    # As from a file that has them quantised: nothing of them has to be on the host.
    format_ = QUANTIZED_AS.get(card.quantization)
    model = replace(PUBLISHED[card.model], quantized=format_)
    if layers:
        model = _with_layers(model, layers)
    _clear()
    context = _context()
    torch.cuda.set_per_process_memory_fraction(
        max(0.01, ((card.vram - 0.5) * GIB - context) / torch.cuda.mem_get_info()[1])
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "x.mp4"
            plan, hardware = _plan(card, model, output)
            decision = Decision(
                request=plan.request,
                model=model,
                hardware=hardware,
                evidence=_proved(),
                plan=plan,
            )
            components: list[Any] = []
            with _random_models(components), _attending(card, model), _watched() as peak:
                outcome, report, plans = _run(decision, output)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    beyond = [used - torch.cuda.memory_reserved() for used in _of_process()]
    # The first plan is what `sagewan plan` says; where memory ran out, the last is what was done.
    memory, last = plan.memory, plans[-1].memory
    return {
        "outcome": outcome,
        "context": round(context / GIB, 3),
        "beyond_torch_after": [round(nbytes / GIB, 3) for nbytes in beyond],
        "survived": len(plans) - 1,
        "planned": round(memory.device_peak / GIB, 3),
        "used": round(peak["device"] / GIB, 3),
        "limit": card.vram - 0.5,
        "stages": {stage.name: round(stage.device / GIB, 2) for stage in memory.stages},
        "used_by_stage": {
            name: {key: round(value / GIB, 3) for key, value in found.items()}
            for name, found in peak["stages"].items()
        },
        "stand_ins": {k: round(v / GIB, 3) for k, v in _HELD["stand_ins"].items()},
        "pinned": round(components[0].pinned_bytes / GIB, 3),
        "planned_pinned_by_stage": {s.name: round(s.pinned / GIB, 3) for s in last.stages},
        "planned_host": round(memory.host_peak / GIB, 2),
        "planned_host_by_stage": {s.name: round(s.host / GIB, 2) for s in last.stages},
        "items": {
            stage.name: {item.name: round(item.device / GIB, 3) for item in stage.items}
            for stage in last.stages
        },
        "experts_ran": sum(part.weight_bytes > 0 for part in components[0].transformers),
        "attention": plans[-1].attention.main.row.name,
        "swapped": last.block_swap,
        "text_swapped": last.text_swap,
        "chunks": [last.chunks.tokens, last.chunks.heads],
        "tile": last.decode_tile,
        "notes": report.get("memory", {}).get("notes", []) if report else [],
        "timings": report.get("timings", {}).get("stages", {}) if report else {},
    }


_STAGE: dict[str, Any] = {"now": "load", "allocated": {}}


def _enter(stage: str) -> None:
    """From here on it is this stage; of the one before torch knows the most that was allocated."""
    before = _STAGE["now"]
    if stage != before:
        most = max(_STAGE["allocated"].get(before, 0), torch.cuda.max_memory_allocated())
        _STAGE["allocated"][before] = most
        torch.cuda.reset_peak_memory_stats()
        _STAGE["now"] = stage


# What this process holds beyond torch's memory (GiB, None: the driver says), and the bytes of the
# random weights that stand for a file's pages.
_HELD: dict[str, Any] = {"context": None, "stand_ins": {}}


def _run(decision: Decision, output: Path) -> tuple[str, Mapping[str, Any], list[Plan]]:
    """The outcome in words, the report, and the plans: one, and one more for each shortage."""
    plans: list[Plan] = []

    began = time.perf_counter()

    def note(event: Event) -> None:
        if event.done in (0, 1, event.total):
            now = time.perf_counter() - began
            print(f"{now:7.1f} s {event.stage} {event.done}", file=sys.stderr, flush=True)
        _enter(event.stage)
        if event.plan:
            plans.append(event.plan)

    watch = Watch(note)
    try:
        result = execute(Prepared(decision=decision, pictures={}), watch)
    except RejectedError as error:
        # Random weights make no video to speak of; all of the memory was used all the same.
        path = decision.request.report
        report = json.loads(path.read_text()) if path and path.exists() else {}
        return f"rejected ({error})"[:80], report, plans
    except SagewanError as error:
        return f"failed ({error})", {}, plans
    except _CutOffError:
        return f"failed (cut off in {_STAGE['now']})", {}, plans
    assert output.exists()
    return "made", result.report, plans


def _plan(card: Card, model: Model, output: Path) -> tuple[Plan, Any]:
    hardware = pretend(probe(), gpu=None, vram=card.vram, ram=card.ram)
    request = Request(
        prompt="x",
        output=output,
        report=output.with_suffix(".json"),
        quantization=card.quantization,
        attention=card.attention,
        size=card.size,
        frames=card.frames,
        steps=card.steps,
        cfg=1.0,
        seed=1,
        # One step of each expert where there are two.
        boundary=0.95 if model.experts == 2 else None,
    )
    return make_plan(request, model, hardware, _proved()), hardware


def _proved() -> Evidence:
    """Every row as if its self-test had passed: those take time, and are not what is measured."""
    names = [row.name for row in (*ROWS, *LINEAR_ROWS, *block_rows())]
    passed = {
        name: SelfTest(implementation=name, error=0.0, limit=1.0, milliseconds=1.0)
        for name in names
    }
    return Evidence(tests=passed)


@contextmanager
def _attending(card: Card, model: Model) -> Iterator[None]:
    """Only some of the blocks attend, the first among them: the others' result is their Q."""
    if card.attending is None:
        yield
        return
    every = max(1, model.layers // card.attending)
    attend, attend_prepared = Attention.attend, Attention.attend_prepared

    def some(self: Any, q: Any, k: Any, v: Any, layer: int) -> Any:
        return q if layer % every else attend(self, q, k, v, layer)

    def some_prepared(self: Any, prepared: Any, out: Any, layer: int) -> Any:
        return out.zero_() if layer % every else attend_prepared(self, prepared, out, layer)

    with (
        mock.patch.object(Attention, "attend", some),
        mock.patch.object(Attention, "attend_prepared", some_prepared),
    ):
        yield


@contextmanager
def _watched() -> Iterator[dict[str, Any]]:
    """The most of the device that the process holds, as the driver tells, and of the host's memory,
    in bytes, sampled every 10 ms; and the most that torch allocated of the device."""
    peak: dict[str, Any] = {"device": 0, "stages": {}}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            found = {"device": _used(), **_host()}
            found["pinned_by_torch"] = torch.cuda.host_memory_stats().get(
                "allocated_bytes.current", 0
            )
            stage = peak["stages"].setdefault(_STAGE["now"], {})
            for key, value in found.items():
                stage[key] = max(stage.get(key, 0), value)
            peak["device"] = max(peak["device"], found["device"])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        _enter("after")
        for stage, allocated in _STAGE["allocated"].items():
            peak["stages"].setdefault(stage, {})["allocated"] = allocated


def _used() -> int:
    """Bytes of the device in use; without ``--context``, nothing else is to run on it."""
    if _HELD["context"] is not None:
        return torch.cuda.memory_reserved() + int(_HELD["context"] * GIB)
    free, total = torch.cuda.mem_get_info()
    return total - free


def _host() -> dict[str, int]:
    """Bytes of the host: all that is resident, and what of it is no file's page."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")
    }
    resident = {"host": found.get("RssAnon", 0) + found.get("RssShmem", 0)}
    return {**resident, "host_and_files": resident["host"] + found.get("RssFile", 0)}


def _context() -> int:
    """Bytes of the device that are not torch's, once the libraries of a run have been called."""
    x = torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16)
    packed = x.to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    torch._scaled_mm(packed, packed.t(), one, one, out_dtype=torch.bfloat16)  # noqa: SLF001
    heads = x.view(1, 4, 128, 512)[..., :128]
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.nn.functional.conv3d(x.view(1, 16, 4, 64, 64), x.view(-1)[:6912].view(16, 16, 3, 3, 3))
    torch.cuda.synchronize()
    del x, packed, one, heads
    _clear()
    return _used() - torch.cuda.memory_reserved()


def _context_alone() -> dict[str, Any]:
    """As :func:`_context`, by the driver's free memory and by what its library says of processes;
    the first is right only where nothing else runs on the GPU."""
    context = _context()
    cached = torch.cuda.memory_reserved()
    return {
        "context": round(context / GIB, 3),
        "by_process": [round((used - cached) / GIB, 3) for used in _of_process()],
        "cached": round(cached / GIB, 3),
    }


def _of_process() -> list[int]:
    """Bytes that the driver's library counts for this process; none where it knows other ids."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    processes = [x for one in devices for x in pynvml.nvmlDeviceGetComputeRunningProcesses(one)]
    return [x.usedGpuMemory for x in processes if x.pid == os.getpid() and x.usedGpuMemory]


def _clear() -> None:
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _with_layers(model: Model, layers: int) -> Model:
    from sagewan.plan.budget import block_parameters

    fewer = (model.layers - layers) * block_parameters(model)
    return replace(model, layers=layers, parameters=model.parameters - fewer)


# --- random models ---


@contextmanager
def _random_models(made: list[Any]) -> Iterator[None]:
    """Let a run build models of random weights in place of files."""

    def build(
        plan: Plan, launcher: Launcher, _session: Session | None = None, _watch: Any = None
    ) -> Any:
        names = ("transformer", "transformer_2")[: plan.model.experts]
        components = building.Components(
            tokenizer=_tokenize,
            text_encoder=Part(
                "text_encoder", _told("encode", _text_encoder), lambda m: m.encoder.block
            ),
            vae=Part("vae", lambda: _vae(plan.model, EXACT)),
            decoder=Part("vae", _told("decode", lambda: _vae(plan.model, plan.decoding))),
            transformers=tuple(
                Part(name, _told("denoise", lambda: _transformer(plan)), lambda m: m.blocks)
                for name in names
            ),
            image_encoder=None,
            image_processor=None,
            attention=Attention(launcher),
            multiplier=Multiplier(),
            forwards=Forwards(),
            blocks=Blocks(),
        )
        made.append(components)
        return components

    with mock.patch.object(building, "build", build):
        yield


def _told(stage: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """The same, and the bytes of what it makes are noted. Zeros are no memory until written to."""

    def made() -> Any:
        module = make()
        tensors = [*module.parameters(), *module.buffers()]
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
        words = getattr(module, "shared", None)
        zeros = 0 if words is None else words.weight.nbytes
        _HELD["stand_ins"][stage] = sum(storages.values()) - zeros
        return module

    return made


def _tokenize(_texts: Any, **_: Any) -> Any:
    tokens = mock.Mock()
    tokens.input_ids = torch.arange(512)[None] % 1000
    tokens.attention_mask = (torch.arange(512) < 40)[None].long()
    return tokens


def _transformer(plan: Plan) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = {**TRANSFORMERS[plan.model.name], "num_layers": plan.model.layers}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    kept = kept_in_float32(WanTransformer3DModel)
    first = model.blocks[0]
    _fill(first, dtype, kept)
    if plan.weights.format:
        for name, layer in list(first.named_modules()):
            if isinstance(layer, torch.nn.Linear) and plan.weights.quantises(f"blocks.0.{name}"):
                packed = pack(layer.weight.data.to(DEVICE), plan.weights.format).to("cpu")
                bias = None if layer.bias is None else layer.bias.data
                first.set_submodule(name, QuantLinear(packed, bias, dtype))
    blocks = [first, *(_alike(first, block) for block in list(model.blocks)[1:])]
    model.blocks = torch.nn.ModuleList(blocks)
    _fill(model, dtype, kept)
    # The rotary table is a buffer that is computed.
    fresh = type(model.rope)(config["attention_head_dim"], tuple(config["patch_size"]), 1024)
    model.rope = fresh
    return model


def _alike(first: Any, block: Any) -> Any:
    """A block with the first one's weights: the same storages, tensors of its own."""
    for name, layer in list(first.named_modules()):
        if isinstance(layer, QuantLinear):
            bias = None if layer.bias is None else layer.bias.data
            own = QuantLinear(layer.packed, bias, layer.dtype)
            for key, buffer in list(own.named_buffers()):
                setattr(own, key, buffer.detach())
            block.set_submodule(name, own)
    sources = dict(first.named_parameters())
    for name, _ in list(block.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        parameter = torch.nn.Parameter(sources[name].data, requires_grad=False)
        setattr(block.get_submodule(owner), attribute, parameter)
    return block


def _fill(module: Any, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> None:
    """Random values in place of each parameter that has none; norms are one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        kind = torch.float32 if any(part in name.split(".") for part in kept) else dtype
        shape = parameter.shape
        if len(shape) < 2 and name.endswith("weight"):
            value = torch.ones(shape, dtype=kind)
        else:
            scale = 0.02 if len(shape) < 3 else 1 / max(1, shape[1:].numel()) ** 0.5
            drawn = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float16)
            value = (drawn * scale).to(kind).cpu()
        owner, _, attribute = name.rpartition(".")
        found = torch.nn.Parameter(value, requires_grad=False)
        setattr(module.get_submodule(owner) if owner else module, attribute, found)
    torch.cuda.empty_cache()


def _text_encoder() -> Any:
    """UMT5-XXL; its blocks share one block's weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    first, *others = encoder.encoder.block
    _fill(first, torch.bfloat16)
    for block in others:
        _alike(first, block)
    _fill(encoder.encoder.final_layer_norm, torch.bfloat16)
    words = torch.nn.Parameter(torch.zeros(256384, 4096, dtype=torch.bfloat16), requires_grad=False)
    encoder.shared.weight = words
    encoder.encoder.embed_tokens.weight = words
    return encoder


def _vae(model: Model, decoding: Decoding) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    # The means and deviations, of which the published ones have as many, are no matter here.
    channels = model.latent_channels
    plain = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VAES[model.name], **plain)
    _fill(vae, getattr(torch, decoding.dtype))
    # A quiet picture: noise takes longer to write than to make.
    vae.decoder.conv_out.weight.data *= 0.1
    return with_channels_last(vae) if decoding.channels_last else vae


# --- single measurements ---


def _others() -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "context": _context_alone,
        "swap-480p": lambda: _swap_cost("480p"),
        "swap-720p": lambda: _swap_cost("720p"),
        "activations-480p": lambda: _activations("480p"),
        "activations-720p": lambda: _activations("720p"),
        "twenty": _twenty,
    }


def _inputs(model: Model, size: tuple[int, int], frames: int) -> dict[str, torch.Tensor]:
    shape = (
        1,
        model.in_channels,
        (frames - 1) // 4 + 1,
        size[1] // model.spatial,
        size[0] // model.spatial,
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    latents = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    text = torch.randn(1, 512, 4096, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([500.0], device=DEVICE),
        "encoder_hidden_states": text,
    }


def _full_plan(size: tuple[int, int], quantization: str, attention: str = "sdpa") -> Plan:
    request = Request(
        prompt="x", size=size, frames=81, attention=attention, quantization=quantization, cfg=1.0
    )
    return make_plan(request, PUBLISHED[T2V], probe(), Evidence())


@torch.inference_mode()
def _forward(
    model: Any, plan: Plan, chunks: Chunks, given: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    attention, multiplier = Attention(Launcher()), Multiplier()
    install(model, attention)
    multiplier.install(model, plan.weights)
    turn = Turn(plan.attention, 1, lambda: None, chunk=chunks.tokens, heads=chunks.heads)
    with attention.during(turn):
        found: torch.Tensor = model(**given)[0]
    torch.cuda.synchronize()
    return found


def _swap_cost(shape: str) -> dict[str, Any]:
    """Seconds of a step with no block swapped and with 20 of 40, fp8_scaled; the same bits. The
    faster the blocks, the less time there is to copy: FP8 attention where sequences are long."""
    attention = "sageattn_3_fp8" if shape == "720p" else "sdpa"
    plan = _full_plan(SHAPES[shape], "fp8_scaled", attention)
    given = _inputs(plan.model, SHAPES[shape], 81)
    seconds: dict[int, float] = {}
    results = []
    for swapped in (0, 20):
        model = _transformer(plan).eval().requires_grad_(requires_grad=False)
        place = Place(device=DEVICE, swapped=swapped, pin_budget=64 * GIB)
        placement = Placement(model, model.blocks, place)
        results.append(_forward(model, plan, plan.memory.chunks, given))
        times = []
        for _ in range(2 if shape == "720p" else 3):
            began = time.perf_counter()
            _forward(model, plan, plan.memory.chunks, given)
            times.append(time.perf_counter() - began)
        seconds[swapped] = min(times)
        pinned = placement.pinned_bytes
        placement.close()
        del placement, model
        _clear()
    same = torch.equal(results[0], results[1])
    assert same, "swapped blocks compute something else"
    return {
        "seconds_whole": round(seconds[0], 3),
        "seconds_20_swapped": round(seconds[20], 3),
        "cost": round(seconds[20] / seconds[0] - 1, 4),
        "pinned": round(pinned / GIB, 3),
        "limit": 0.03 if shape == "720p" else 0.10,
    }


def _activations(shape: str) -> dict[str, Any]:
    """The most that a forward pass of 4 blocks allocates beyond weights and inputs, GiB."""
    plan = _full_plan(SHAPES[shape], "none")
    plan = replace(plan, model=_with_layers(plan.model, 4))
    given = _inputs(plan.model, SHAPES[shape], 81)
    model = _transformer(plan).eval().requires_grad_(requires_grad=False).to(DEVICE)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        found["diffusers"], expected = _peak_of(lambda: model(**given, return_dict=False)[0])
    chunks = plan.memory.chunks
    found["ours"], ours = _peak_of(lambda: _forward(model, plan, chunks, given))
    found["smallest"], _ = _peak_of(lambda: _forward(model, plan, Chunks(1024, 1), given))
    difference = float((ours - expected).float().norm() / expected.float().norm())
    assert difference < 2e-2, f"not what diffusers computes: {difference}"
    found["difference"] = round(difference, 5)
    found["limit"] = {"480p": 1.5, "720p": 3.3}[shape]
    found["attention"] = row_named("torch.sdpa").name
    return found


def _peak_of(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    _clear()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / GIB, 3), result


def _twenty() -> dict[str, Any]:
    """Twenty videos of the demo model in one session: memory after the third and after twenty more,
    and what is left when the session is closed, in MiB, on the device and on the host."""
    import psutil

    def now() -> tuple[float, float, float]:
        _clear()
        device = (_of_process() or [_used()])[0]
        resident = psutil.Process().memory_info().rss
        return device / 2**20, resident / 2**20, _host()["host"] / 2**20

    with tempfile.TemporaryDirectory() as folder, Session() as session:
        request = Request(
            prompt="a red ball rolls to the right",
            steps=2,
            output=Path(folder) / "x.mp4",
            device="cuda",
            attention="sdpa",
            block_swap=4,
        )
        for seed in range(3):
            session.generate(replace(request, seed=seed))
        before = now()
        for seed in range(20):
            session.generate(replace(request, seed=seed))
        after = now()
    closed = now()
    names = ("device", "host", "host without files")
    return {
        name: {
            "before": round(a, 1),
            "after": round(b, 1),
            "growth": round(b / a - 1, 4),
            "closed": round(c, 1),
        }
        for name, a, b, c in zip(names, before, after, closed, strict=True)
    }


if __name__ == "__main__":
    main()
