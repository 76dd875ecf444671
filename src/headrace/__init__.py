"""Headrace: a distributed inference system for large language models."""

__version__ = "0.1.0"
