"""What we change in diffusers' WanTransformer3DModel: its forward passes, with its weights."""
