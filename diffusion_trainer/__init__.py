"""Distributed, large-scale training of diffusion models. Read `conventions.py` first."""

__version__ = "0.1.0"
