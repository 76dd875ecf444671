"""Runs step plans on torch: the executor, sampling, and the building of an engine from its options."""
