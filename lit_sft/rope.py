"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the Hub's rotate-half layout, and its scalings."""

import math

import torch
from torch import Tensor

from lit_sft.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """The angle per position of each pair of dimensions: (D/2,) float32, scaling applied."""
    D = config.head_size
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    if config.rope_type == "linear":
        return frequencies / config.rope_factor
    if config.rope_type == "llama3":
        return _llama3(frequencies, config)
    return frequencies


def _llama3(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended smoothly."""
    turns = config.rope_original_block_size * frequencies / (2 * math.pi)  # full turns within the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / config.rope_factor + keep * frequencies


def rotations(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, computed in fp32.

    Args:
        config: gives the frequencies.
        positions: (T,) int64, each token's place in its own example.
        dtype: of the result.

    Returns:
        Two tensors (T, D/2).
    """
    angles = positions.float().outer(inverse_frequencies(config, positions.device))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (B, H, T, D) by the angles of ``rotations``: dimension i is paired with i + D/2."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
