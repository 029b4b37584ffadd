"""Few-shot segmentation networks that supports, real or made by diffusion, are given to."""
