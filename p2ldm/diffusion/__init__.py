"""The mathematics of diffusion: schedule, loss, guidance, samplers."""
