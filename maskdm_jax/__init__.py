"""Masked diffusion models in JAX: pre-train on the visible patches, fine-tune on whole images."""

__version__ = "0.1.0"
