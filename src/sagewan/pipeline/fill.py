"""A model that is made without memory, and filled with the weights of its files one by one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.resolve import one_line
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.quantize import pack
from sagewan.checkpoint.source import Source
from sagewan.checkpoint.whole import SAME, check_whole
from sagewan.errors import CheckpointError
from sagewan.model.linear import QuantLinear

# CLIP's weights have it before their names or not, by the version that made the class.
_CLIP_PREFIX = "vision_model."


def empty(make: Callable[[], Any]) -> Any:
    """The module that ``make`` gives, its parameters on the meta device, its buffers real."""
    from accelerate import init_empty_weights

    with _quietly(), init_empty_weights(include_buffers=False):
        return make()


@dataclass(frozen=True)
class Packing:
    """What becomes of a module's matrices on the way in: ``formats`` gives the format to quantise a
    layer to by its name, None to leave it as it is; ``directions``, by a layer's name and how many
    inputs it has, those in which they lie, if that was measured; ``unpacks`` says to unpack what a
    file holds quantised; the quantising is done on ``device``; ``told`` hears how many of all the
    module's weights are in."""

    formats: Callable[[str], str | None] = lambda _: None
    directions: Callable[[str, int], Tensor | None] = lambda _layer, _inputs: None
    unpacks: bool = False
    device: str = "cpu"
    told: Callable[[int, int], None] = lambda _done, _all: None


def fill(
    module: Any,
    source: Source,
    dtype: torch.dtype,
    kept: tuple[str, ...] = (),
    packing: Packing | None = None,
) -> Any:
    """The module with every parameter read from the source, in ``dtype``, or in float32 where a
    part of its name is in ``kept``. Weights that keep their dtype stay in the file's pages. The
    layer of a matrix that is packed becomes a :class:`QuantLinear`; matrices are quantised one
    after the other, so that the host never holds the whole in 16 bit.

    Raises CheckpointError if a weight is missing, of another shape, or one too many.
    """
    wanted = {name.removeprefix(_CLIP_PREFIX): name for name, _ in module.named_parameters()}
    same = {name: first for name, first in SAME.items() if name in wanted and first in wanted}
    names = {name: full for name, full in wanted.items() if name not in same}
    shapes = {name: module.get_parameter(full).shape for name, full in names.items()}
    check_whole(source, shapes)
    packing = packing or Packing()
    for done, (name, full) in enumerate(names.items(), start=1):
        kind = torch.float32 if any(part in name.split(".") for part in kept) else dtype
        found = _packed(source.read(name), full, module, packing)
        if isinstance(found, Packed):
            layer = full.removesuffix(".weight")
            module.set_submodule(layer, QuantLinear(found, None, kind))
        else:
            # Some layouts have sides of 1 that others have not.
            weight = found.to(kind).view(shapes[name])
            _place(module, full, nn.Parameter(weight, requires_grad=False))
        packing.told(done, len(names))
    for name, first in same.items():
        _place(module, wanted[name], module.get_parameter(wanted[first]))
    return module


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Parts of names that one of diffusers' classes keeps in float32, whatever the dtype."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def _packed(
    found: Tensor | Packed, name: str, module: nn.Module, packing: Packing
) -> Tensor | Packed:
    """A weight as it is to be in memory; only the matrix of a linear layer is ever packed."""
    layer, _, last = name.rpartition(".")
    linear = last == "weight" and isinstance(module.get_submodule(layer), nn.Linear)
    if isinstance(found, Packed):
        # Whatever it is unpacked to, float32 holds it exactly.
        return found if linear and not packing.unpacks else unpack(found, torch.float32)
    format_ = packing.formats(layer) if linear else None
    if format_ is None:
        return found
    directions = packing.directions(layer, found.shape[1])
    return pack(found.to(packing.device), format_, directions=directions).to("cpu")


def _place(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Whatever a library makes of damaged files and of values of a wrong type, in one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    # KeyError, TypeError, AttributeError, and from tokenizers' own code a plain Exception.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} can't be read ({one_line(error)}): fetch it again"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Neither library draws its own progress bars into ours, nor tells what we refuse."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    with ExitStack() as stack:
        for library in (of_diffusers, of_transformers):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
