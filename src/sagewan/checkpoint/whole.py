"""Whether a part has all of its weights, each in its shape, and no others: a weight that is left at
random makes a video of noise, one too many means another model."""

from collections.abc import Iterator, Mapping

from sagewan.checkpoint.source import Source
from sagewan.errors import CheckpointError

# Weights that a module has under a second name.
SAME: Mapping[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}
# What files hold beyond the model, and diffusers leaves out too.
_UNUSED = "norm_added_q"


def check_whole(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError unless the source holds these weights in these shapes, and no others."""
    for problem in problems(source, shapes):
        raise CheckpointError(problem)


def same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes are one but for sides of 1, which some layouts have and others lack."""
    return [side for side in found if side != 1] == [side for side in wanted if side != 1]


def problems(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong, a sentence each."""
    if missing := sorted(shapes.keys() - source.entries.keys()):
        yield (
            f"{source.path} lacks {len(missing)} of its weights, such as {missing[0]}: "
            "fetch it again"
        )
    for name in sorted(shapes.keys() & source.entries.keys()):
        found, wanted = source.entries[name].shape, tuple(shapes[name])
        if not same_shape(found, wanted):
            yield (
                f"{source.path} holds {name} in the shape {list(found)}, and by its config or its "
                f"other weights it is {list(wanted)}: fetch it again"
            )
    others = [*source.unknown, *(source.entries.keys() - shapes.keys())]
    if more := sorted(name for name in others if _UNUSED not in name):
        yield (
            f"{source.path} holds {len(more)} weights that this model has no place for, such as "
            f"{more[0]}: it is another kind of model, which this version does not run"
        )
