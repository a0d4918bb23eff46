"""Memory on one GPU made to look like a smaller card: what was planned, what was used.

    python -m benchmarks.memory [--cases A,B,…] [--layers N] [--context GIB] [--json FILE]
    python -m benchmarks.memory --cases A,B,… --context GIB --within GIB --folder DIR

--list names the cases. The second form runs several side by side, each in a process of its own,
with so much of the GPU for all together.

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
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_parts import activations, swap_cost, twenty
from benchmarks.memory_vae import decode, decode_speed, encode
from benchmarks.pipelines import CARDS, CutOffError, pipeline
from benchmarks.side_by_side import Limits, given_back, side_by_side
from benchmarks.watching import HELD, clear, context_alone
from sagewan.errors import SagewanError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="comma-separated; default: all but the longest")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick look")
    parser.add_argument(
        "--context", type=float, help="GiB of the device that are not torch's; others run beside"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--within", type=float, help="GiB of the GPU for all that run at once")
    parser.add_argument("--lanes", type=int, default=3, help="how many run at once at most")
    parser.add_argument("--seconds", type=float, default=3600, help="for all of them")
    parser.add_argument("--folder", type=Path, help="where those side by side leave their facts")
    parser.add_argument("--show", type=Path, nargs="+", help="only the table of such files")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.within and not (arguments.folder and arguments.cases and arguments.context):
        parser.error("--within wants --cases, --context and --folder")
    if arguments.show:
        _show(arguments.show)
        return
    cases = {**_cards(arguments.layers), **_others(arguments.layers)}
    if arguments.list:
        print("\n".join(cases))
        return
    usual = [name for name in cases if not name.startswith("quality")]
    names = arguments.cases.split(",") if arguments.cases else usual
    if arguments.within:
        work = partial(_beside, arguments=arguments)
        limits = Limits(gib=arguments.within, lanes=arguments.lanes, seconds=arguments.seconds)
        side_by_side({name: _takes(name) for name in names}, work, limits, arguments.folder)
        _show(path for name in names if (path := arguments.folder / f"{name}.json").exists())
        return
    if not _run({name: cases[name] for name in names}, arguments):
        sys.exit(1)


def _run(cases: Mapping[str, Callable[[], dict[str, Any]]], arguments: Namespace) -> bool:
    """Whether none of them failed."""
    HELD.update(context=arguments.context)
    signal.signal(signal.SIGTERM, _cut_off)
    found = {}
    for name, case in cases.items():
        found[name] = _facts(case)
        print(name, json.dumps(found[name]), flush=True)
        if arguments.json:
            _write(arguments.json, found)
    _table(found)
    return not any("failed" in {*facts, facts.get("outcome", "")[:6]} for facts in found.values())


def _beside(name: str, arguments: Namespace) -> None:
    """One case, in a process of its own."""
    cases = {**_cards(arguments.layers), **_others(arguments.layers)}
    arguments.json = arguments.folder / f"{name}.json"
    HELD.update(given_back=given_back(arguments.folder, name))
    _run({name: cases[name]}, arguments)


# GiB of the GPU that cases take which are no card.
_TAKEN = {
    "twenty": 2.0,
    "decode": 16.0,
    "decode-growing": 12.0,
    "encode": 12.0,
    "decode-speed": 6.0,
}


def _takes(name: str) -> float:
    return CARDS[name].vram - 0.5 if name in CARDS else _TAKEN.get(name, 80.0)


def _show(paths: Iterable[Path]) -> None:
    read = (json.loads(path.read_text(encoding="utf-8"))["cases"] for path in paths)
    _table({name: facts for cases in read for name, facts in cases.items()})


def _facts(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case found, or how it failed: the others are still of use."""
    began = time.perf_counter()
    try:
        facts = case()
    except (SagewanError, RuntimeError, CutOffError) as error:
        facts = {"failed": f"{type(error).__name__}: {error}"}
    clear()
    return {**facts, "seconds": round(time.perf_counter() - began, 1)}


def _cut_off(*_: object) -> None:
    raise CutOffError


def _write(path: Path, found: Mapping[str, Any]) -> None:
    device = torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "cases": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# The plan's names of the stages, and the run's.
_STAGES = {"text": "encode", "denoise": "denoise", "decode": "decode"}


def _table(found: Mapping[str, Mapping[str, Any]]) -> None:
    """GiB, by stage: planned and used on the device, and on the host; what is pinned, at most."""
    head = ("planned", "used", "ratio", "host", "used", "ratio")
    print(f"\n{'case':18} {'stage':8}", *(f"{word:>7}" for word in head))
    for name, facts in found.items():
        if "used_by_stage" not in facts:
            print(f"{name:18}", {key: value for key, value in facts.items() if key != "seconds"})
            continue
        for stage, ran in _STAGES.items():
            if used := facts["used_by_stage"].get(ran):
                host = used["host"] - facts["stand_ins"].get(ran, 0)
                device, wanted = facts["stages"][stage], facts["planned_host_by_stage"][stage]
                numbers = device, used["device"], used["device"] / device
                more = wanted, host, host / wanted
                print(f"{name:18} {stage:8}", *(f"{number:7.3f}" for number in (*numbers, *more)))
        print(f"{'':18} {facts['outcome']}; {_told(facts)}")


def _told(facts: Mapping[str, Any]) -> str:
    by_torch = max(used.get("pinned_by_torch", 0) for used in facts["used_by_stage"].values())
    planned = max(facts["planned_pinned_by_stage"].values())
    return (
        f"pinned {facts['pinned'] + by_torch:.3f} of {planned:.3f}, {facts['swapped']} blocks "
        f"swapped, tile {facts['tile']}, {facts['attention']}, ran out {facts['survived']} times"
    )


def _cards(layers: int | None) -> dict[str, Callable[[], dict[str, Any]]]:
    return {name: partial(pipeline, card, layers) for name, card in CARDS.items()}


def _others(layers: int | None) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "context": context_alone,
        "swap-480p": lambda: swap_cost("480p", layers),
        "swap-720p": lambda: swap_cost("720p", layers),
        "activations-480p": lambda: activations("480p"),
        "activations-720p": lambda: activations("720p"),
        "decode": decode,
        "encode": encode,
        "decode-speed": decode_speed,
        "decode-growing": lambda: decode(("growing",)),
        "twenty": twenty,
    }


if __name__ == "__main__":
    main()
