"""What an attention mode or a quantization costs in quality: clips, scores, bounds, a table."""
