"""In which precision matrix products run: float32, or bfloat16 where the machine is fast in it."""

import torch

from atlas.errors import ConfigError


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpu = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def matmul_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; weights, sums and the optimiser stay float32.

    Raises:
        ConfigError: bfloat16 was asked for where the machine only emulates it, hundreds of times slower.

    >>> matmul_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    if precision == "float32":
        return torch.float32
    if fast_bfloat16(device):
        return torch.bfloat16
    if precision == "bfloat16":
        raise ConfigError(
            f"precision 'bfloat16' is not allowed on this {device.type}, which has no bfloat16 matrix "
            "products; allowed: float32, auto"
        )
    return torch.float32
