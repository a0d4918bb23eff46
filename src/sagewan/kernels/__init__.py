"""Our own kernels: one family a file, each with its limits, configurations and launchers."""
