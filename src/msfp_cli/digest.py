"""One number for many tensors: so that an altered file is noticed, and one model told from another."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


_SAMPLES = 256  # elements of each tensor


def fingerprint(module: nn.Module) -> str:
    """Return a digest of a float model's parameters that tells it from other models and other trainings of itself.

    It reads evenly spaced elements of each tensor, so it takes no time on large models; it is no
    proof against damage.
    """
    sampled = {}
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        sampled[f"{name} {tuple(parameter.shape)}"] = flat[::stride].cpu()
    return digest(sampled)
