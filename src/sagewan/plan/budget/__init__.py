"""What a run takes of the device's and the host's memory, stage by stage, in bytes.

Activations were counted at full width on the meta device (``sagewan.memory.meter``): live tensors,
not the workspaces of libraries. A test counts them again. What only a GPU shows (its context, its
libraries, what its allocator loses) are constants with a name; ``benchmarks/memory.py`` holds them
against one.
"""
