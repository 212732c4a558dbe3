"""Groups on a process group that someone else made: torchrun's, Lightning's, Accelerate's, Ray Train's.

An exchange's two stages may be started from two threads. A process group matches collectives by the order in which they
are started, which two threads do not have. So on a CPU the second stage goes over a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.comm.collectives import Group, Seat
from shoal.errors import ConfigError, Fault

dist: Any = torch.distributed


@dataclass
class Switch:
    """Takes a ``Group``'s collectives to the process group that is ``current``."""

    current: Any

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> Any:
        return self.current.allreduce(tensors, options)

    def alltoall_base(self, *arguments: Any) -> Any:
        return self.current.alltoall_base(*arguments)

    def _allgather_base(self, *arguments: Any) -> Any:
        return self.current._allgather_base(*arguments)


@dataclass(frozen=True)
class Borrowed:
    """The process groups for the two stages of an exchange: the same one on a GPU, where one thread starts all."""

    seat: Seat
    first: Any
    second: Any

    def group(self) -> tuple[Group, Switch]:
        """A group over them, and what switches it from the first to the second. In a world of one it sends nothing.

        Its ``abort`` ends nothing: who made the process groups ends them.
        """
        switch = Switch(self.first)
        return Group(self.seat, switch if self.seat.world_size > 1 else None, frozenset()), switch


def borrow(process_group: Any | None, device: torch.device) -> Borrowed:
    """For exchanges of tensors on ``device`` among a process group's members, torch's default ones if it is None.

    A collective call: on a CPU it makes one more group of them, with the same time-out. ``ConfigError`` if
    torch.distributed was not initialised, or the process group cannot carry what lies on such a device; ``Fault`` if
    the members do not meet.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("a process group is needed: call torch.distributed.init_process_group first")
    first = dist.group.WORLD if process_group is None else process_group
    backends = dist.get_backend_config(first)
    backend = _backend_for(first, device, backends)
    timeout = backend.options._timeout
    rank, size = dist.get_rank(first), dist.get_world_size(first)
    seat = Seat(0, rank, size, device=_name(device), timeout_s=timeout.total_seconds())
    if device.type != "cpu" or size == 1:
        return Borrowed(seat, first, first)
    ranks = dist.get_process_group_ranks(first)
    try:
        second = dist.new_group(ranks, timeout, backends, use_local_synchronization=True, group_desc="shoal")
    except RuntimeError as error:
        raise Fault(f"the second group of {size} members was not formed: {error}", rank=rank) from error
    return Borrowed(seat, first, second)


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(device)


def _backend_for(process_group: Any, device: torch.device, backends: str) -> Any:
    try:
        backend = process_group._get_backend(device)
    except RuntimeError:
        backend = None
    needed = {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
    if backend is None or needed is None or f"{device.type}:{needed}" not in backends:
        raise ConfigError(
            f"gradients on {device} need a process group with {needed or 'cpu:gloo or cuda:nccl'} for that device, not "
            f"{backends}: call init_process_group('cpu:gloo,cuda:nccl')"
        )
    return backend
