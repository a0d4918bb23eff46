"""Loads, launches, proves and remembers the implementations that a plan chose."""
