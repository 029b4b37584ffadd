"""The parts of scripts/train_mini_diffusion.py."""
