"""``sagewan bench step``: a whole denoising step, ours beside diffusers', on the same inputs."""
