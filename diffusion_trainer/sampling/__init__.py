"""From noise to data: one loop, grids of times, solvers of one step, guidance as wrappers of a denoiser."""
