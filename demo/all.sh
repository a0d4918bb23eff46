#!/bin/sh
# The demo model's weights, LoRAs and scores, from the weights that the package has: all.sh OUT [PART]
# PART is "weights" (about nine minutes on an H100) or "rest" (about five); both if it is left out.
set -e
out=$1
part=${2:-all}
here=$(dirname "$0")
shipped=$here/../src/sagewan/assets/demo
model=$out/dit/model

if [ "$part" != rest ]; then
  # Compiles and captures what the long run will, on a handful of clips: a mistake shows at once.
  python "$here/train_dit.py" --start "$shipped" --out "$out/try" --clips 256 --long-clips 8 --seconds 1
  python "$here/train_vae.py" --start "$shipped/vae" --out "$out/vae" --seconds "${VAE_SECONDS:-110}"
  python "$here/train_dit.py" --start "$shipped" --vae "$out/vae" --out "$out/dit" \
    --seconds "${DIT_SECONDS:-330}"
fi
if [ "$part" != weights ]; then
  python "$here/score.py" --model "$model" --sweep 2.5 3.5 5 --out "$out/sweep"
  # Neither LoRA's failure is to cost the other one, or the scores.
  python "$here/train_distill.py" --model "$model" --out "$out/loras/four-steps.safetensors" || true
  python "$here/train_style.py" --model "$model" --out "$out/loras/night.safetensors" || true
  python "$here/score.py" --model "$model" --lora "$out/loras/four-steps.safetensors" \
    --out "$out/score"
fi
