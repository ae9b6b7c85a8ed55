"""The mathematics of diffusion: schedules, parameterizations, objectives, samplers, guidance. Imports torch alone."""
