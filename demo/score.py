"""Score the demo model on held-out prompts: does each clip show everything its prompt says?

    python demo/score.py --model build/dit/model --sweep 2.5 3.5 5 --out build/sweep
    python demo/score.py --model build/dit/model --lora build/four.safetensors --out build/score

With `--sweep` some other held-out prompts are tried at each guidance, and the best becomes the
model's default. Otherwise writes scores.json (the table), clips.json (every prompt, and what was
right), sheet.png (24 clips, not chosen) and failures.png (the ten worst, with failures.json).

A quarter of the prompts name two objects. Half of them also name the size (of one object) and the
background. A clip is right if the number of objects and all that its prompt names are.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import dit
import low_rank
import models
import sample
import torch
import whole_clip
import world
from data import labels_of
from sheet import save_sheet
from torch import Tensor

from sagewan.evaluate import checker
from sagewan.evaluate.prompts import plain

log = logging.getLogger("score")
KINDS = ("english", "chinese", "image", "four steps", "long")
SHOWN = {"english": 12, "chinese": 6, "image": 6}
FOUR_STEPS = sample.Sampling(steps=4, cfg=1.0, scheduler="euler")


@dataclass(frozen=True)
class Case:
    """One batch of prompts and what they promise."""

    scene: world.Scene
    prompts: list[str]
    named: Tensor  # bool [B]: size and background are named


def cases(options: argparse.Namespace, kind: str) -> Iterator[Case]:
    """Held-out scenes; the same ones for every kind."""
    generator = torch.Generator().manual_seed(options.seed)
    batch = options.long_batch if kind == "long" else options.batch
    count = options.long_count if kind == "long" else options.count
    for number in range(-(-count // batch)):
        objects = 2 if number % 4 == 3 else 1
        scene = world.sample_scene(batch, generator, unseen=not options.seen, objects=objects)
        named = (torch.arange(batch) % 2 == 0) & (kind != "image")
        prompts = []
        for clip, (things, background) in enumerate(labels_of(scene)):
            full = bool(named[clip])
            said = [
                {n: v for n, v in thing.items() if n != "size" or (full and objects == 1)}
                for thing in things
            ]
            language = "zh" if kind == "chinese" else "en"
            prompts.append(plain(said, background if full else None, language))
        yield Case(scene, prompts, named)


def judge(seen: checker.Seen, case: Case) -> dict[str, Tensor]:
    """Float [B] for each attribute, NaN where it is not named, and "all": everything named."""
    hits = {k: v.float().cpu() for k, v in seen.right(case.scene.attributes()).items()}
    for name in ("size", "background"):
        if name in hits:
            hits[name][~case.named] = float("nan")
    every = torch.stack(list(hits.values())).nan_to_num(1.0).amin(0)
    return hits | {"all": every}


@torch.no_grad()
def decode(parts: sample.Parts, latents: Tensor) -> Tensor:
    """Normalised latents → video [B, 3, T, H, W] in 0..1, a few clips at a time."""
    gpu = latents.device.type == "cuda"
    mean, deviation = parts.statistics()
    pixels = latents[0, 0].numel()
    done = []
    for part in latents.float().split(max(1, 16 * 5 * 16 * 16 // pixels)):
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=gpu):
            video = whole_clip.decode(parts.vae, part * deviation + mean, gpu)
        done.append((video.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(done)


@torch.no_grad()
def make(
    parts: sample.Parts,
    case: Case,
    kind: str,
    seed: int,
    sampling: sample.Sampling,
    options: argparse.Namespace,
    step: object,
) -> tuple[Tensor, Tensor | None]:
    """→ clips [B, 3, T, H, W], and the first frames they were given."""
    device = parts.transformer.device
    long = kind == "long"
    frames, side = (
        (options.long_frames, options.long_side) if long else (options.frames, options.side)
    )
    shape = (
        len(case.prompts),
        models.LATENT_CHANNELS,
        1 + (frames - 1) // 4,
        side // 16,
        side // 16,
    )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    first = given = None
    if kind == "image":
        given = world.render(case.scene.to(device), frames, side)[0][:, :, :1]
        first = sample.encode(parts, given)
    if kind == "four steps":
        sampling = FOUR_STEPS
    if long:
        sampling = replace(sampling, shift=models.LONG_SHIFT)
    latents = sample.generate(parts, case.prompts, noise, first, sampling, step)
    return decode(parts, latents), given


@dataclass
class Result:
    """What came of one kind of prompt."""

    lines: list[dict]
    shown: list[Tensor]
    failures: list[tuple[int, Tensor, dict]]

    def table(self) -> dict[str, float | dict[str, float]]:
        """The mean of every hit; "all" also by number of objects, and by what was asked for."""
        names = dict.fromkeys(n for line in self.lines for n in line["right"])
        out: dict = {n: _mean(line["right"].get(n) for line in self.lines) for n in names}
        for group in ("objects", "shape", "motion", "named"):
            values = dict.fromkeys(v for line in self.lines for v in line["asked"][group])
            out[f"by {group}"] = {
                str(v): _mean(
                    line["right"]["all"] for line in self.lines if v in line["asked"][group]
                )
                for v in values
            }
        return out


def _mean(values: Iterator[float | None]) -> float:
    kept = [v for v in values if v is not None]
    return round(sum(kept) / max(1, len(kept)), 4)


def run(
    parts: sample.Parts,
    kind: str,
    sampling: sample.Sampling,
    options: argparse.Namespace,
    step: object,
) -> Result:
    result = Result([], [], [])
    for number, case in enumerate(cases(options, kind)):
        seed = options.seed + 1 + number
        video, given = make(parts, case, kind, seed, sampling, options, step)
        seen = checker.look(video)
        hits = judge(seen, case)
        if given is not None:
            error = (video[:, :, :1] - given).square().mean((1, 2, 3, 4))
            hits["first_frame_psnr"] = (-10 * error.log10()).cpu()
        for clip, (things, _) in enumerate(labels_of(case.scene)):
            right = {
                n: None if v[clip].isnan() else round(v[clip].item(), 3) for n, v in hits.items()
            }
            asked = {
                "objects": [len(things)],
                "shape": [thing["shape"] for thing in things],
                "motion": [thing["motion"] for thing in things],
                "named": [bool(case.named[clip])],
            }
            line = {"prompt": case.prompts[clip], "noise": [seed, clip], "right": right,
                    "asked": asked, "seen": checker.shown(seen, clip)}  # fmt: skip
            result.lines.append(line)
            if not right["all"] and kind in SHOWN:
                wrong = sum(v == 0 for n, v in right.items() if n != "all")
                result.failures.append((wrong, video[clip].half().cpu(), line))
        # The ten worst so far: the most attributes wrong, the earliest of those.
        result.failures = sorted(result.failures, key=lambda f: -f[0])[:10]
        if number in (0, 3):  # of one object, then of two
            result.shown += list(video[: SHOWN.get(kind, 0) * (3 if number == 0 else 1) // 4].cpu())
    return result


def sweep(parts: sample.Parts, options: argparse.Namespace, step: object) -> None:
    """Tries each guidance in both languages and writes the best into the model's folder."""
    table = {}
    default = sample.default_sampling(options.model)
    for cfg in options.sweep:
        results = [run(parts, k, replace(default, cfg=cfg), options, step)
                   for k in ("english", "chinese")]  # fmt: skip
        table[cfg] = [r.table()["all"] for r in results]
        log.info("guidance %s: English %.4f, Chinese %.4f", cfg, *table[cfg])
    best = max(table, key=lambda cfg: sum(table[cfg]))
    file = options.model / "sagewan.json"
    facts = json.loads(file.read_text()) | {"cfg": best}
    file.write_text(json.dumps(facts, indent=1) + "\n")
    (options.out / "sweep.json").write_text(json.dumps({"all right": table, "best": best}) + "\n")
    log.info("guidance %s is now the model's default", best)


def score(parts: sample.Parts, options: argparse.Namespace, step: object) -> None:
    sampling = sample.default_sampling(options.model)
    table, clips, shown, failures = {}, {}, [], []
    for kind in options.kinds:
        if kind == "four steps":
            if not (options.lora and options.lora.exists()):
                log.warning("no four-step LoRA, so no score of it")
                continue
            low_rank.merge(parts.transformer, options.lora)
        start = time.perf_counter()
        result = run(parts, kind, sampling, options, step)
        table[kind], clips[kind] = result.table(), result.lines
        shown += result.shown
        failures += result.failures
        log.info("%s (%.0f s): %s", kind, time.perf_counter() - start, table[kind])
    about = {"sampling": vars(sampling), "count": options.count, "seed": options.seed,
             "torch": torch.__version__, "table": table}  # fmt: skip
    save = {"ensure_ascii": False, "indent": 1}
    (options.out / "scores.json").write_text(json.dumps(about, **save) + "\n", encoding="utf-8")
    lines = json.dumps(clips, ensure_ascii=False)
    (options.out / "clips.json").write_text(lines + "\n", encoding="utf-8")
    save_sheet(shown, options.out / "sheet.png")
    worst = sorted(failures, key=lambda f: -f[0])[:10]
    if worst:
        save_sheet([f[1].float() for f in worst], options.out / "failures.png", columns=1)
    text = json.dumps([f[2] for f in worst], **save)
    (options.out / "failures.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", nargs="+", type=float, help="guidances to try")
    parser.add_argument("--lora", type=Path, help="the four-step LoRA")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--long-count", type=int, default=16)
    parser.add_argument("--long-batch", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["english", "chinese", "image", "long",
                                                       "four steps"], choices=KINDS)  # fmt: skip
    parser.add_argument("--seen", action="store_true", help="combinations of training instead")
    parser.add_argument("--bf16", action="store_true", help="transformer and text encoder")
    parser.add_argument("--side", type=int, default=world.SIDE)
    parser.add_argument("--frames", type=int, default=world.FRAMES)
    parser.add_argument("--long-side", type=int, default=world.LONG_SIDE)
    parser.add_argument("--long-frames", type=int, default=world.LONG_FRAMES)
    parser.add_argument("--seed", type=int, default=10_002)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = sample.load(options.model, device, torch.bfloat16 if options.bf16 else torch.float32)
    step = dit.compiled_block(torch.device(device))
    if options.sweep:
        options.seed, options.count = options.seed + 50_000, options.count // 4
        sweep(parts, options, step)
    else:
        score(parts, options, step)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
