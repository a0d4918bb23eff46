"""Made-up machines and models that the tests plan for."""

from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.models import PUBLISHED, Model, Sampling

CPU = Device(name="two cores")
GiB = 2**30

GPUS = {
    "3080": Device(name="NVIDIA RTX 3080", sm=86, memory_total=10 * GiB, memory_free=9 * GiB),
    "4090": Device(name="NVIDIA RTX 4090", sm=89, memory_total=24 * GiB, memory_free=23 * GiB),
    "H100": Device(name="NVIDIA H100", sm=90, memory_total=80 * GiB, memory_free=79 * GiB),
    "5090": Device(name="NVIDIA RTX 5090", sm=120, memory_total=32 * GiB, memory_free=31 * GiB),
}


def machine(*gpus: str, torch_cuda: str | None = "13.0", **packages: str) -> Hardware:
    """A Linux machine with these GPUs; package names take _ for -."""
    return Hardware(
        cpu=CPU,
        devices=tuple(GPUS[name] for name in gpus),
        torch_cuda=torch_cuda if gpus else None,
        packages={name.replace("_", "-"): version for name, version in packages.items()},
    )


WAN_14B = PUBLISHED["wan2.1-t2v-14b"]
DEMO = Model(
    name="demo",
    family="demo",
    tasks=("t2v", "i2v"),
    layers=8,
    heads=2,
    ffn=1024,
    in_channels=24,
    latent_channels=24,
    spatial=16,
    expand_timesteps=True,
    parameters=9_000_000,
    sampling=Sampling(size=(256, 256), frames=17, fps=12, steps=16, cfg=4.0, shift=3.0),
    words={
        "shape": ("ball", "star", "球", "星星"),
        "colour": ("red", "红色"),
        "other": ("a", "moves", "to", "the", "right", "一个", "的", "向右", "移动"),
    },
)
