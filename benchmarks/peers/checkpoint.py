"""A checkpoint as a careful user of plain PyTorch saves it: one file, replaced at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """``step`` is the number of steps done."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, f"{path}.new")
    os.replace(f"{path}.new", path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps done; 0 where there is no checkpoint yet."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])
