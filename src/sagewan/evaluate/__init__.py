"""What a clip of the demo model should show, what it shows, and how sure that makes us."""
