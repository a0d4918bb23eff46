"""Where weights are: on the card, in pinned host memory, or on their way between the two."""
