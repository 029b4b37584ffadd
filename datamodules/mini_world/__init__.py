"""The mini world: procedural scenes with exact labels in several sensors."""
