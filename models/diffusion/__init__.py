"""The shared diffusion backbone: loading, features, attention, inversion, conditioning."""
