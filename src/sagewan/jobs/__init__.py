"""A durable record of every run: what was asked, how it went, and how it ended."""
