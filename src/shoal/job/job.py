"""A job: what to train, on what, how. A frozen value, checked once, printed and stored as it resolves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch.optim import Optimizer

from shoal.errors import ConfigError
from shoal.job.task import Task
from shoal.sources import Source
from shoal.strategies import AllReduce, Strategy


@dataclass(frozen=True, kw_only=True)
class Storing:
    """When a version is stored, and how many are kept. ``every_s`` and ``every_steps``: whichever comes first.

    Training never waits for the store: while that takes one version, only the newest of those that come due waits.
    """

    every_s: float | None = 30.0
    every_steps: int | None = None
    keep_last: int = 3
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"storing.keep_last must be at least 1, not {self.keep_last}")
        _positive("storing.every_s", self.every_s)
        _positive("storing.every_steps", self.every_steps)
        _positive("storing.keep_every_steps", self.keep_every_steps)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait before going on without. All in seconds.

    ``silent_s``: without a heartbeat, a worker counts as frozen. ``disconnected_s``: the same after its connection
    ended. ``collective_s``: a collective that makes no progress (a cut link between workers). ``stuck_s``: a worker
    that beats and does not get on with its step. ``gather_s``: at the start, for as many workers as wanted.
    """

    silent_s: float = 1.5
    disconnected_s: float = 0.25
    collective_s: float = 30.0
    stuck_s: float = 300.0
    gather_s: float = 60.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            _positive(f"patience.{entry.name}", getattr(self, entry.name))


@dataclass(frozen=True, kw_only=True)
class Balance:
    """When lanes move from slow workers to fast ones.

    ``least_gain``: the part of a step's time that a move must promise to save, between 0 and 1. ``settle_s``: for how
    long twice as much must be on offer; more moves sooner, less later. ``enabled=False``: lanes stay where they are.

    Whoever computes a lane, the samples of a step are the same: results are equal up to the order of float sums. When
    lanes move depends on measured time, though, so a run that is to repeat bit for bit needs ``enabled=False``.
    """

    enabled: bool = True
    least_gain: float = 0.1
    settle_s: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.least_gain < 1:
            raise ConfigError(f"balance.least_gain must be between 0 and 1, not {self.least_gain}")
        _positive("balance.settle_s", self.settle_s)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that training needs.

    ``optimizer`` is called once in each worker with the model's parameters (or the task's ``parameter_groups``).
    ``global_batch`` counts samples over all workers; ``micro_batch`` bounds how many a worker computes at once.
    Give ``epochs`` or ``steps``. ``schedule`` maps a step (0-based) to a factor on each group's learning rate.
    ``clip_norm`` bounds the global L2 norm of the averaged gradient. ``precision`` ``bf16`` computes losses under
    autocast. ``evaluate_every_steps`` measures on ``test`` during training too; the end of training always does.
    ``fingerprint_every_steps``: how often the workers compare what they hold. ``log_every_steps``: how often the loss
    goes to the event log. ``num_threads``: torch's, a worker.
    """

    task: Task
    train: Source
    optimizer: Callable[[Iterable[Any]], Optimizer]
    global_batch: int
    epochs: int | None = None
    steps: int | None = None
    test: Source | None = None
    strategy: Strategy = AllReduce()
    schedule: Callable[[int], float] | None = None
    clip_norm: float | None = None
    micro_batch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    num_lanes: int = 64
    evaluate_every_steps: int | None = None
    fingerprint_every_steps: int = 100
    log_every_steps: int = 50
    num_threads: int | None = None
    storing: Storing = field(default_factory=Storing)
    patience: Patience = field(default_factory=Patience)
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self) -> None:
        task: object = self.task
        if not isinstance(task, Task):
            missing = [m for m in ("model", "loss", "metrics") if not callable(getattr(task, m, None))]
            raise ConfigError(
                f"task must have the methods model, loss and metrics; {type(task).__name__} lacks {', '.join(missing)}"
            )
        if not callable(self.optimizer):
            raise ConfigError("optimizer must be a function from parameters to a torch optimizer, such as lambda p: …")
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("give either epochs or steps, and not both")
        if self.num_lanes < 1:
            raise ConfigError(f"num_lanes must be at least 1, not {self.num_lanes}")
        names = ("global_batch", "epochs", "steps", "micro_batch", "clip_norm", "evaluate_every_steps")
        for name in (*names, "fingerprint_every_steps", "log_every_steps", "num_threads"):
            _positive(name, getattr(self, name))
        _one_of("precision", self.precision, ("fp32", "bf16"))
        _one_of("device", self.device, ("cpu", "cuda"))


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} must be greater than 0, not {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
