"""What is right, in plain torch: float64 formulas, and emulations exact in their formats."""
