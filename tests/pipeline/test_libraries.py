"""What a run imports of the libraries."""

import gc
import subprocess
import sys

from sagewan.pipeline.libraries import import_libraries

# None of these is needed to make a video of the demo, and each takes a while.
UNUSED = (
    "diffusers.pipelines.pipeline_utils",
    "diffusers.pipelines.wan",
    "gradio",
    "pandas",
    "peft",
    "scipy",
    "sklearn",
    "torchvision",
)


def test_nothing_is_imported_that_a_run_does_not_use() -> None:
    words = (
        "import sys; from sagewan.pipeline.libraries import import_libraries; import_libraries(); "
        "import sagewan.pipeline.build, sagewan.pipeline.decode, sagewan.pipeline.denoise; "
        "import sagewan.pipeline.export, sagewan.pipeline.schedulers; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "diffusers.models.transformers.transformer_wan" in loaded
    assert not loaded.intersection(UNUSED)


def test_garbage_is_collected_again_afterwards() -> None:
    assert gc.isenabled()
    import_libraries()
    assert gc.isenabled()
    gc.disable()
    try:
        import_libraries()
        assert not gc.isenabled(), "as the caller had it"
    finally:
        gc.enable()
