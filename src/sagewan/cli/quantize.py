"""``sagewan quantize``: a model's transformer to FP8 or FP4 files."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.cli.show import shown
from sagewan.cli.streams import say
from sagewan.errors import RequestError
from sagewan.pipeline.progress import Watch
from sagewan.plan.weights import QUANTIZED_AS

if TYPE_CHECKING:
    from sagewan.checkpoint.convert import Written
    from sagewan.checkpoint.source import Source

_LAYOUTS = ("comfy", "diffusers")
_WORST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, the target, and what it is to become."""
    parser.add_argument(
        "source", metavar="SRC", help="a model's folder or name, or its transformer"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="for comfy a .safetensors file (a folder for a model of two experts), for diffusers a "
        "folder",
    )
    parser.add_argument("--to", required=True, choices=list(QUANTIZED_AS), help="the quantization")
    parser.add_argument(
        "--layout", choices=_LAYOUTS, default="comfy", help="whose names and files (comfy)"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda:N")
    parser.add_argument("--report", type=Path, metavar="FILE", help="every layer's error, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert each transformer, and print what its worst layers lost."""
    from sagewan.checkpoint.calibration import find_calibration
    from sagewan.checkpoint.convert import Conversion, convert
    from sagewan.cli.generate import stopped_by_signals
    from sagewan.pipeline.files import check_file, written_whole
    from sagewan.pipeline.probe import probe

    if arguments.report:
        check_file("report", arguments.report)
    sources, family = _sources(arguments.source)
    targets = _targets(arguments.target, sources, arguments.layout)
    conversion = Conversion(
        to=arguments.to,
        layout=arguments.layout,
        device=probe().device(arguments.device).torch_name,
        family=family,
    )
    watch = Watch()
    errors = {}
    with stopped_by_signals(watch), shown(watch), _disk_told(arguments.target):
        for source, target in zip(sources.values(), targets, strict=True):
            watch.stage(f"quantising to {target}", len(source.entries))
            own = replace(conversion, measured=find_calibration(source.path))
            written = convert(source, target, own, lambda done, _: watch.step(done))
            _tell(source, target, written)
            if own.measured:
                say(f"  rounded by the inputs in {own.measured}")
            errors[str(target)] = written.errors
        if arguments.layout == "diffusers":
            _complete(arguments.source, arguments.target, sources)
    if arguments.report:
        with written_whole(arguments.report) as partial:
            partial.write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")
    return 0


@contextlib.contextmanager
def _disk_told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"{target} could not be written ({error.strerror or error}): make room, or choose "
            "another place; what was broken off goes on from there"
        ) from error


def _sources(name: str) -> "tuple[dict[str, Source], str]":
    """The transformers of a model, by diffusers' names of them, and its family."""
    from sagewan.checkpoint.experts import find_experts
    from sagewan.checkpoint.find import find_model
    from sagewan.checkpoint.roles import TRANSFORMER
    from sagewan.checkpoint.source import open_source
    from sagewan.plan.models import DEMO, PUBLISHED

    path = Path(name).expanduser()
    if name in (DEMO, *PUBLISHED) or (path / "model_index.json").is_file():
        model = find_model(name)
        names = [part for part in ("transformer", "transformer_2") if part in model.parts]
        sources = {part: open_source(model.parts[part], TRANSFORMER) for part in names}
        return sources, model.family
    if not path.exists():
        raise RequestError(f"{name} is neither a file nor a folder nor a model's name")
    found = find_experts(path)
    return dict(zip(("transformer", "transformer_2"), found.sources, strict=False)), "wan"


def _targets(target: Path, sources: "dict[str, Source]", layout: str) -> list[Path]:
    is_file = target.suffix == ".safetensors"
    if layout == "diffusers":
        if is_file or target.is_file():
            raise RequestError(f"{target}: the diffusers layout is a folder; name one")
        return [target / name for name in sources]
    if len(sources) == 1:
        if not is_file:
            raise RequestError(f"{target}: name the file, ending in .safetensors")
        return [target]
    if is_file:
        raise RequestError(f"{target}: this model has two experts; name a folder for their files")
    return [target / "high_noise.safetensors", target / "low_noise.safetensors"]


def _complete(source: str, target: Path, sources: "dict[str, Source]") -> None:
    """Beside the transformers of the diffusers layout: their configs, and the model's other parts
    where the source has them, so that the folder is a model by itself."""
    for name, part in sources.items():
        if part.config is not None:
            text = json.dumps(part.config, indent=2) + "\n"
            (target / name / "config.json").write_text(text, encoding="utf-8")
    home = _home(source)
    if home is None:
        say("only the transformer was written: the source is no diffusers folder")
        return
    for item in sorted(home.iterdir()):
        copy = target / item.name
        if item.name not in sources and not copy.exists():
            if item.is_dir():
                shutil.copytree(item, copy)
            else:
                shutil.copy2(item, copy)


def _home(source: str) -> Path | None:
    from sagewan.checkpoint.find import find_model
    from sagewan.plan.models import DEMO, PUBLISHED

    if source in (DEMO, *PUBLISHED):
        return find_model(source).location
    path = Path(source).expanduser()
    return path if (path / "model_index.json").is_file() else None


def _tell(source: "Source", target: Path, written: "Written") -> None:
    share = written.bytes / max(source.bytes, 1)
    say(
        f"{target}: {written.bytes / 1e9:.2f} GB, {share:.0%} of the source; "
        f"{len(written.errors)} layers read back and compared"
    )
    for name, error in written.worst(_WORST):
        say(f"  {error:.4f} {name}")
