"""Every decision, made from values alone: nothing here imports torch or touches a device."""
