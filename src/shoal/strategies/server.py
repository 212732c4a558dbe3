"""All that is trained in shards: workers pull what a step needs, and push what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.comm.exchange import Times
from shoal.errors import ConfigError
from shoal.strategies.agreed import Agreed
from shoal.strategies.memories import Memories
from shoal.tables import SGD, Adagrad, Adam, Rule, TableSpec
from shoal.tables.consistency import Async, Consistency, Durability, Sync, check_shards
from shoal.tables.frame import Part

_ROW = 256
Pull = Callable[[str, npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ParameterServer:
    """Workers do not wait for each other, or no more than ``consistency`` asks: ``Sync()``, ``Bounded(steps)`` or
    ``Async()``. Rows of ``shoal.Embedding`` and dense parameters alike are in ``shards`` processes.

    Dense parameters are updated there by what the job's optimizer says: torch's ``SGD`` without momentum, ``Adagrad``
    or ``Adam``, without weight decay. ``round_steps``: so often all workers tell what they have done, which makes a
    version. ``durability``: ``log``: a shard that is killed loses nothing; ``replica``: nor does one whose host is
    lost; ``snapshot``: what came after the version that was stored last is done again. ``half``: rows travel as
    bfloat16.
    """

    consistency: Consistency = field(default_factory=Async)
    _: KW_ONLY
    shards: int = 1
    durability: Durability = "log"
    half: bool = False
    round_steps: int = 32

    codec = None

    def __post_init__(self) -> None:
        check_shards(self.shards, self.durability)
        if isinstance(self.consistency, Sync) and self.durability == "snapshot":
            raise ConfigError("Sync() in shards alone needs durability='log': shards cannot go back to a version apart")
        if self.round_steps < 1:
            raise ConfigError(f"round_steps must be at least 1, not {self.round_steps}")

    def bind(self, model: nn.Module) -> Served:
        """The model's dense parameters as rows."""
        return Served(model)


@dataclass(frozen=True)
class _Block:
    """The parameters of a group as rows of a table, which holds what was added to what they began with."""

    spec: TableSpec
    parameters: Sequence[nn.Parameter]
    start: Tensor

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return np.arange(-(-len(self.start) // _ROW))

    def fill(self, rows: npt.NDArray[np.float32]) -> None:
        flat = torch.from_numpy(np.array(rows)).reshape(-1)[: len(self.start)] + self.start
        pieces = torch.split(flat, [p.numel() for p in self.parameters])
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.view(parameter.shape))

    def part(self) -> Part:
        """The gradients that are there, which are taken away."""
        flats = [
            torch.zeros(p.numel()) if p.grad is None else p.grad.detach().float().reshape(-1).cpu()
            for p in self.parameters
        ]
        for parameter in self.parameters:
            parameter.grad = None
        rows = np.zeros((len(self.ids), _ROW), np.float32)
        rows.reshape(-1)[: len(self.start)] = torch.cat(flats).numpy()
        return Part(self.spec.name, self.ids, rows)


class Served:
    """One worker's view of parameters that are in shards. It has nothing of its own that a version would hold."""

    def __init__(self, model: nn.Module) -> None:
        if any(buffer.dtype.is_floating_point for buffer in model.buffers()):
            raise ConfigError("ParameterServer keeps no buffers, such as BatchNorm's; use Hybrid, or another norm")
        self.times = Times()
        self.delay = 0
        self.memories = Memories([])
        self._blocks: list[_Block] = []

    def meet(self, optimizer: Optimizer) -> None:
        """Which rules the parameters are updated by: those of an optimizer that is never used itself."""
        for number, group in enumerate(optimizer.param_groups):
            parameters = [p for p in group["params"] if p.requires_grad]
            if parameters:
                rule = rule_of(optimizer, group)
                spec = TableSpec(name=f"dense-{number}", dim=_ROW, rule=rule, initial_scale=0.0)
                start = torch.cat([p.detach().float().reshape(-1).cpu() for p in parameters]).clone()
                self._blocks.append(_Block(spec, parameters, start))

    @property
    def specs(self) -> list[TableSpec]:
        """The tables that the parameters are in."""
        return [block.spec for block in self._blocks]

    def fetch(self, pull: Pull) -> None:
        """Have the model hold what the shards hold."""
        for block in self._blocks:
            block.fill(pull(block.spec.name, block.ids))

    def parts(self) -> list[Part]:
        """What backward has left in the dense parameters."""
        return [block.part() for block in self._blocks]

    # What a strategy's session is asked

    def remember(self, version: int) -> None:
        """Nothing: the shards do."""

    def apply(self, agreed: Agreed, update: Callable[[], None], rate_change: float = 1.0) -> None:
        """Nothing: it has been."""

    def reset(self) -> None:
        """Nothing."""

    def roll_back(self) -> None:
        """Give up gradients of a step that was interrupted."""
        for block in self._blocks:
            for parameter in block.parameters:
                parameter.grad = None

    @contextmanager
    def committed(self) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


def rule_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Rule:
    """The row-wise rule that does what a torch optimizer does. ``ConfigError`` if there is none."""
    kind = type(optimizer)
    extras = {
        name: group[name] for name in ("momentum", "weight_decay", "lr_decay", "amsgrad", "maximize") if group.get(name)
    }
    if kind in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam) and not extras:
        lr = float(group["lr"])
        if kind is torch.optim.SGD:
            return SGD(lr=lr)
        if kind is torch.optim.Adagrad:
            return Adagrad(lr=lr, eps=group["eps"], initial=group["initial_accumulator_value"])
        beta1, beta2 = group["betas"]
        return Adam(lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"])
    came = f"{kind.__name__} with {extras}" if extras else kind.__name__
    raise ConfigError(f"shards update dense parameters by torch's plain SGD, Adagrad or Adam, and not by {came}")
