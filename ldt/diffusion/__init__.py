"""The mathematics of diffusion: schedules, objectives, samplers."""
