"""The parts of the scripts that train the mini diffusion model and its ControlNets."""
