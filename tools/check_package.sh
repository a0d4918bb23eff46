#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, make a video outside the checkout, and
# resolve its dependencies for Windows. Needs .venv; leaves nothing behind but dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf dist
.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
wheel=$(echo "$checkout"/dist/sagewan-*.whl)

python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet -c constraints.txt "$wheel"
cd "$scratch"
venv/bin/sagewan generate "a red ball rolls to the right" --seed 1 -o ball.mp4 --report ball.json
venv/bin/python -c '
import json, av
frames = sum(1 for _ in av.open("ball.mp4").decode(video=0))
assert frames == json.load(open("ball.json"))["output"]["frames"] > 1, frames
print(f"installed wheel: {frames} frames")'

cd "$checkout"
for version in 3.11 3.12 3.13; do
  .venv/bin/python tools/resolve_windows.py "$wheel" "$version" --quiet -c constraints.txt
  echo "dependencies resolve on Windows with Python $version"
done
