"""The libraries that every run takes its models from, imported at once."""

import contextlib
import gc
from collections.abc import Iterator


def import_libraries() -> None:
    """Import what a run uses of them, and no more; and quiet their progress bars, one for each
    file, which would draw over ours."""
    with _uncollected():
        import diffusers.models.autoencoders.autoencoder_kl_wan
        import diffusers.models.transformers.transformer_wan
        import diffusers.utils.logging
        import transformers.models.umt5.modeling_umt5
        import transformers.utils.logging
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage within the block: what is imported is none, and looking through it
    again and again takes a fourth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
