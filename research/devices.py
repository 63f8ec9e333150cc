"""Which device a command runs on."""

import torch

from research.errors import UserError


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` (with an index, if any), or `auto`: cuda where there is one.  UserError for another name, or a card that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device = {name!r}: no such device; valid: auto, cpu, cuda, cuda:0 and so on")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device = {name!r}: this machine shows torch {torch.__version__} {count} CUDA devices; valid: auto, cpu")
    return device
