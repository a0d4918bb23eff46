"""Make the README's picture: frames of the demo model's own videos, made by the command line.

python tools/pictures.py docs/images/demo.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

PROMPTS = (
    "a red ball rolls to the right on a navy background",
    "a yellow star bounces and a blue ring moves in a circle on a brown background",
    "a large pink heart grows on a beige background",
    "青色背景上，一个绿色的三角形向下移动，一个白色的方块变大",
)
SHOWN = 6
SIDE = 160
GAP = 4


def frames_of(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def strip(video: Path) -> np.ndarray:
    """[SIDE, SHOWN · (SIDE + GAP) − GAP, 3]: frames evenly spaced from the first to the last."""
    frames = frames_of(video)
    chosen = [frames[round(i * (len(frames) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    row = np.full((SIDE, SHOWN * (SIDE + GAP) - GAP, 3), 255, np.uint8)
    for number, frame in enumerate(chosen):
        small = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        row[:, number * (SIDE + GAP) : number * (SIDE + GAP) + SIDE] = np.asarray(small)
    return row


def main(target: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, prompt in enumerate(PROMPTS, 1):
            video = Path(folder) / f"{seed}.mp4"
            command = [sys.executable, "-m", "sagewan", "generate", prompt, "--seed", str(seed)]
            subprocess.run([*command, "-o", str(video)], check=True)
            rows += [strip(video), np.full((GAP, SHOWN * (SIDE + GAP) - GAP, 3), 255, np.uint8)]
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows[:-1])).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
