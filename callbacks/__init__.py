"""What surrounds the training loop: checkpoints, pictures, the run record."""
