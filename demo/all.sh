#!/bin/sh
# The demo model's weights, LoRAs and scores: all.sh OUT [PART]
# PART is "weights" or "rest"; both if it is left out. START, if set, is an earlier OUT to go on from.
set -e
out=$1
part=${2:-all}
here=$(dirname "$0")
model=$out/dit/model

if [ "$part" != rest ]; then
  vae=${START:+--start $START/vae/vae.safetensors}
  dit=${START:+--start $START/dit/model}
  python "$here/train_text.py" --out "$out/text" --seconds "${TEXT_SECONDS:-30}"
  # shellcheck disable=SC2086  # nothing, or an option and its path
  python "$here/train_vae.py" $vae --out "$out/vae" --seconds "${VAE_SECONDS:-600}"
  # shellcheck disable=SC2086
  python "$here/train_dit.py" $dit --vae "$out/vae" --text "$out/text" --out "$out/dit" \
    --seconds "${DIT_SECONDS:-900}"
fi
if [ "$part" != weights ]; then
  python "$here/score.py" --model "$model" --sweep 2.5 3.5 5 --out "$out/sweep"
  # Neither LoRA's failure is to cost the other one, or the scores.
  python "$here/train_distill.py" --model "$model" --out "$out/loras/four-steps.safetensors" || true
  python "$here/train_style.py" --model "$model" --out "$out/loras/night.safetensors" || true
  python "$here/score.py" --model "$model" --lora "$out/loras/four-steps.safetensors" \
    --out "$out/score"
fi
