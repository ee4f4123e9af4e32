"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the Hub's rotate-half layout, and its scalings."""

import math

import torch
from torch import Tensor

from lit_sft.config import ModelConfig


def inverse_frequencies(
    config: ModelConfig, device: torch.device | None = None, local: bool = False, long: bool = False
) -> Tensor:
    """The angle per position of each pair of dimensions: (turned/2,) float32, scaling applied.

    ``local``: of the sliding layers, where they have a theta of their own. ``long``: longrope's for long examples.
    """
    size = config.turned
    theta = config.rope_local_theta if local else config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, device=device).float() / size)
    if local or config.rope_type == "default":
        return frequencies
    if config.rope_type == "linear":
        return frequencies / config.rope_factor
    if config.rope_type == "llama3":
        return _llama3(frequencies, config)
    if config.rope_type == "yarn":
        return _yarn(frequencies, config)
    factors = config.rope_long_factors if long else config.rope_short_factors
    return frequencies / torch.tensor(factors, dtype=torch.float32, device=device)


def _llama3(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended smoothly."""
    turns = config.rope_original_block_size * frequencies / (2 * math.pi)  # full turns within the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / config.rope_factor + keep * frequencies


def _yarn(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): as above, blended along the pairs' numbers instead of their turns."""

    def pair(turns: float) -> float:  # the pair that turns this often within the original context
        log = math.log(config.rope_original_block_size / (turns * 2 * math.pi))
        return config.turned * log / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair(config.rope_beta_slow)), config.turned - 1)
    number = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    keep = 1 - ((number - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (1 - keep) * frequencies / config.rope_factor + keep * frequencies


def turned_anew(config: ModelConfig, start: int, end: int) -> bool:
    """Whether an example that grows from ``start`` to ``end`` tokens is turned by other angles from its start on."""
    return config.rope_type == "longrope" and start <= config.rope_original_block_size < end


def rotations(
    config: ModelConfig, positions: Tensor, lengths: Tensor, dtype: torch.dtype, local: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, computed in fp32.

    Args:
        config: gives the frequencies.
        positions: (T,) int64, each token's place in its own example.
        lengths: (T,) int64, how many tokens its example has.
        dtype: of the result.
        local: for the sliding layers, where they have a theta of their own.

    Returns:
        Two tensors (T, turned/2).
    """
    angles = positions.float().outer(inverse_frequencies(config, positions.device, local))
    factor = 1.0
    if not local and config.rope_type in ("yarn", "longrope"):
        factor = config.rope_attention_factor
    if not local and config.rope_type == "longrope":
        long = positions.float().outer(inverse_frequencies(config, positions.device, long=True))
        angles = torch.where((lengths > config.rope_original_block_size)[:, None], long, angles)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (…, T, H, D) by the angles of ``rotations``: of the first n dimensions, i is paired with i + n/2."""
    cos, sin = (part[:, None] for part in rotation)  # (T, 1, turned/2)
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., size:]), dim=-1).to(x.dtype)
