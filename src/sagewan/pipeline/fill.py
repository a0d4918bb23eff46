"""A model that is made without memory, and filled with the weights of its files one by one."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.resolve import one_line
from sagewan.checkpoint.packed import unpack
from sagewan.checkpoint.source import Source
from sagewan.checkpoint.whole import SAME, check_whole
from sagewan.errors import CheckpointError

# CLIP's weights have it before their names or not, by the version that made the class.
_CLIP_PREFIX = "vision_model."


def empty(make: Callable[[], Any]) -> Any:
    """The module that ``make`` gives, its parameters on the meta device, its buffers real."""
    from accelerate import init_empty_weights

    with _quietly(), init_empty_weights(include_buffers=False):
        return make()


def fill(module: Any, source: Source, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> Any:
    """The module with every parameter read from the source, in ``dtype``, or in float32 where a
    part of its name is in ``kept``. Weights that keep their dtype stay in the file's pages.

    Raises CheckpointError if a weight is missing, of another shape, or one too many.
    """
    wanted = {name.removeprefix(_CLIP_PREFIX): name for name, _ in module.named_parameters()}
    same = {name: first for name, first in SAME.items() if name in wanted and first in wanted}
    names = {name: full for name, full in wanted.items() if name not in same}
    check_whole(source, {name: module.get_parameter(full).shape for name, full in names.items()})
    for name, full in names.items():
        kind = torch.float32 if any(part in name.split(".") for part in kept) else dtype
        _place(module, full, _read(source, name, kind, module.get_parameter(full).shape))
    for name, first in same.items():
        _place(module, wanted[name], module.get_parameter(wanted[first]))
    return module


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Parts of names that one of diffusers' classes keeps in float32, whatever the dtype."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def _read(source: Source, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> nn.Parameter:
    found = source.read(name)
    weight = found.to(dtype) if isinstance(found, Tensor) else unpack(found, dtype)
    # Some layouts have sides of 1 that others have not.
    return nn.Parameter(weight.view(shape), requires_grad=False)


def _place(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


def check_statistics(config: Mapping[str, Any], path: Path) -> None:
    """CheckpointError unless a VAE's config gives the mean and deviation of every channel."""
    for name in ("latents_mean", "latents_std"):
        values = config[name]
        if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
            raise CheckpointError(f"{path}: {name} is no list of numbers: fetch its config again")
        if len(values) != config["z_dim"]:
            raise CheckpointError(
                f"{path}: {name} has {len(values)} numbers for {config['z_dim']} channels: "
                "fetch its config again"
            )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


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
