"""Euler's method on the probability-flow ODE."""

from collections.abc import Callable

from jax import Array


def euler(denoise: Callable[[Array, Array], Array], x: Array, sigma: Array, sigma_next: Array) -> Array:
    """x + (σ' − σ) · (x − D) / σ."""
    return x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
