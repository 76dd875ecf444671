"""Runs step plans on torch: kernels, the batch a step computes, sampling, the executor."""
