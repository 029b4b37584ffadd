"""Measurements of speed; results lie in results/."""
