"""Memory on one GPU made to look like a smaller card: what was planned, what was used.

    python -m benchmarks.memory [--cases A,B,…] [--layers N] [--json FILE]; --list names the cases

Whole pipelines at published shapes with random weights: text encoder, steps, VAE, mp4. The
process's share of the GPU is limited (``set_per_process_memory_fraction``), the host's memory only
in the plan (a stand-in: nothing stops the process from taking more; what it pins is measured). To
spare host memory and time, all blocks of a model are made from one block's weights; the copies that
swapping pins are separate and whole. Nothing is downloaded.
"""

import argparse
import json
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
from sagewan.plan.budget import GIB, Chunks
from sagewan.plan.catalogue import row_named
from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.evidence import Evidence
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request
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


T2V, A14B, TI2V = "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
_LOW, _BALANCED, _HIGH = "fp4_scaled", "fp8_scaled", "fp8_scaled"

CARDS: Mapping[str, Card] = {
    "low-8": Card(T2V, 8, 16, _LOW, (1280, 720), 61),
    "low-8-a14b": Card(A14B, 8, 16, _LOW, (1280, 720), 61),
    "low-8-ti2v": Card(TI2V, 8, 16, _LOW, (1280, 704), 61),
    "low-12": Card(T2V, 12, 16, _LOW, (1280, 720), 61),
    "balanced-12": Card(T2V, 12, 32, _BALANCED, (1280, 720), 81),
    "balanced-12-ti2v": Card(TI2V, 12, 32, _BALANCED, (1280, 704), 121),
    "balanced-16-a14b": Card(A14B, 16, 32, _BALANCED, (1280, 720), 81),
    "small-12": Card(T2V, 12, 32, _BALANCED, (832, 480), 81),
    "odd-12": Card(T2V, 12, 32, _BALANCED, (960, 544), 49),
    # Minutes each: one step of each expert at 252,960 tokens.
    "quality-16": Card(T2V, 16, 32, _HIGH, (1920, 1080), 121, 1),
    "quality-24-a14b": Card(A14B, 24, 32, _HIGH, (1920, 1080), 121, 2),
}
DEVICE = "cuda:0"
SHAPES = {"480p": (832, 480), "720p": (1280, 720)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="comma-separated; default: all but the longest")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick look")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
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
    if any("failed" in facts for facts in found.values()):
        sys.exit(1)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    device = torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "cases": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _table(found: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{'case':20} {'planned':>8} {'used':>8} {'ratio':>6} {'pinned':>15} {'swap':>5}")
    for name, facts in found.items():
        if "used" in facts:
            pinned = f"{facts['pinned']:.2f} of {facts['planned_pinned']:.2f}"
            print(
                f"{name:20} {facts['planned']:8.2f} {facts['used']:8.2f} "
                f"{facts['used'] / facts['planned']:6.3f} {pinned:>15} {facts['swapped']:5}"
                + f" ran out {facts['survived']} times"
                * (facts["survived"] > 0)
            )
        else:
            print(f"{name:20}", {key: value for key, value in facts.items() if key != "seconds"})


# --- whole pipelines ---


def _cards(layers: int | None) -> dict[str, Callable[[], dict[str, Any]]]:
    return {name: (lambda card=card: _pipeline(card, layers)) for name, card in CARDS.items()}


def _pipeline(card: Card, layers: int | None) -> dict[str, Any]:
    """One video on the pretended card: memory planned and used, GiB."""
    model = PUBLISHED[card.model]
    if layers:
        model = _with_layers(model, layers)
    _clear()
    # torch's limit is on what torch reserves, so that does not count as the context's.
    cached = torch.cuda.memory_reserved()
    context = _used() - cached
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
                evidence=Evidence(),
                plan=plan,
            )
            components: list[Any] = []
            with _random_models(components), _watched() as peak:
                outcome, report, plans = _run(decision, output)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    # The first plan is what `sagewan plan` says; where memory ran out, the last is what was done.
    memory, last = plan.memory, plans[-1].memory
    return {
        "outcome": outcome,
        "context": round(context / GIB, 3),
        "cached": round(cached / GIB, 3),
        "survived": len(plans) - 1,
        "planned": round(memory.device_peak / GIB, 3),
        "used": round(peak["device"] / GIB, 3),
        "limit": card.vram - 0.5,
        "stages": {stage.name: round(stage.device / GIB, 2) for stage in memory.stages},
        "used_by_stage": {k: round(v / GIB, 2) for k, v in peak["stages"].items()},
        "pinned": round(components[0].pinned_bytes / GIB, 3),
        "planned_pinned": round(last.pinned / GIB, 3),
        "planned_host": round(memory.host_peak / GIB, 2),
        "swapped": last.block_swap,
        "text_swapped": last.text_swap,
        "tile": last.decode_tile,
        "notes": report.get("memory", {}).get("notes", []) if report else [],
        "timings": report.get("timings", {}).get("stages", {}) if report else {},
    }


_STAGE = {"now": "load"}


def _run(decision: Decision, output: Path) -> tuple[str, Mapping[str, Any], list[Plan]]:
    """The outcome in words, the report, and the plans: one, and one more for each shortage."""
    plans: list[Plan] = []

    def note(event: Event) -> None:
        _STAGE.update(now=event.stage)
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
    assert output.exists()
    return "made", result.report, plans


def _plan(card: Card, model: Model, output: Path) -> tuple[Plan, Any]:
    hardware = pretend(probe(), gpu=None, vram=card.vram, ram=card.ram)
    request = Request(
        prompt="x",
        output=output,
        report=output.with_suffix(".json"),
        quantization=card.quantization,
        attention="sdpa",
        size=card.size,
        frames=card.frames,
        steps=card.steps,
        cfg=1.0,
        seed=1,
        # One step of each expert where there are two.
        boundary=0.9 if model.experts == 2 else None,
    )
    return make_plan(request, model, hardware, Evidence()), hardware


@contextmanager
def _watched() -> Iterator[dict[str, Any]]:
    """The most of the device that the process holds, as the driver tells, sampled every 5 ms."""
    peak: dict[str, Any] = {"device": 0, "stages": {}}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            used, stage = _used(), _STAGE["now"]
            peak["device"] = max(peak["device"], used)
            peak["stages"][stage] = max(peak["stages"].get(stage, 0), used)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _used() -> int:
    """Bytes of the device in use; nothing else is to run on it."""
    free, total = torch.cuda.mem_get_info()
    return total - free


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
            text_encoder=Part("text_encoder", _text_encoder, lambda m: m.encoder.block),
            vae=Part("vae", lambda: _vae(plan.model, EXACT)),
            decoder=Part("vae", lambda: _vae(plan.model, plan.decoding)),
            transformers=tuple(
                Part(name, lambda: _transformer(plan), lambda m: m.blocks) for name in names
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

    with torch.device("meta"):
        vae = AutoencoderKLWan(**VAES[model.name])
    _fill(vae, getattr(torch, decoding.dtype))
    return with_channels_last(vae) if decoding.channels_last else vae


# --- single measurements ---


def _others() -> dict[str, Callable[[], dict[str, Any]]]:
    return {
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


def _full_plan(size: tuple[int, int], quantization: str) -> Plan:
    request = Request(
        prompt="x", size=size, frames=81, attention="sdpa", quantization=quantization, cfg=1.0
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
    """Seconds of a step with no block swapped and with 20 of 40, fp8_scaled; the same bits."""
    plan = _full_plan(SHAPES[shape], "fp8_scaled")
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
    """Twenty videos of the demo model in one session: memory after the second and after the
    last, in MiB, on the device and on the host."""
    import psutil

    def now() -> tuple[float, float]:
        _clear()
        return _used() / 2**20, psutil.Process().memory_info().rss / 2**20

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
    names = ("device", "host")
    return {
        name: {"before": round(a, 1), "after": round(b, 1), "growth": round(b / a - 1, 4)}
        for name, a, b in zip(names, before, after, strict=True)
    }


if __name__ == "__main__":
    main()
