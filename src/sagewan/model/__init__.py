"""What we change in diffusers' WanTransformer3DModel: its attention, and nothing else."""
