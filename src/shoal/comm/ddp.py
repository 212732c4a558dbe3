"""The compressed all-reduce without the rest of Shoal: a communication hook for torch's DistributedDataParallel.

DistributedDataParallel hands its buckets to the hook while backward still runs (Li et al. 2020, "PyTorch Distributed",
arXiv:2006.15704, section 3.2.3). The hook encodes a bucket and starts its first stage; a thread beside backward does
the rest. On a GPU there is no thread: all of it is queued on a stream of its own.
"""

# No postponed annotations: register_comm_hook compares those of the hook with torch's types.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from shoal.codecs import Codec
from shoal.comm.backward import Backward
from shoal.comm.borrowed import Borrowed, borrow
from shoal.comm.parcel import Contents, Kept, Parcel
from shoal.errors import ConfigError, Fault
from shoal.lanes.hashing import key_of

__all__ = ["HookState", "ddp_hook", "exchange_bucket"]

_PASSES = "num_passes"


class HookState:
    """What the hook holds from one backward pass to the next. Made by ``ddp_hook``.

    Memory: with a codec that feeds back, two float32 vectors as long as the parameters; and a bucket's payloads.
    """

    def __init__(self, model: nn.Module, codec: Codec | None, process_group: Any | None) -> None:
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(f"ddp_hook needs a codec such as shoal.Int8(), not {codec!r}")
        if isinstance(model, DistributedDataParallel):
            process_group = model.process_group if process_group is None else process_group
            model = model.module
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._num_entries = sum(p.numel() for p in self._names)
        if not self._names:
            raise ConfigError("ddp_hook needs a model with a parameter that requires a gradient, and this one has none")
        self._codec, self._process_group = codec, process_group
        for dtype in {p.dtype for p in self._names}:
            self._check(dtype, self._num_entries)
        self._borrowed: Borrowed | None = None
        self._parcels: dict[int, Parcel] = {}
        self._kept: Kept = {}
        self._num_passes = 0
        self._under_way: Backward | None = None
        self._error: Exception | None = None
        self._stream: Any = None

    def _check(self, dtype: torch.dtype, num_entries: int) -> None:
        if self._codec is not None:
            self._codec.check(dtype, num_entries)

    # A backward pass

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What the hook does; see ``exchange_bucket``."""
        if self._error is not None:
            raise self._error
        try:
            return self._exchange(bucket)
        except Exception as error:
            self._error = error
            if self._under_way is not None:
                self._under_way.leave()
            raise

    def _exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        flat, number = bucket.buffer(), bucket.index()
        parcel = self._parcel(bucket)
        key = key_of(self._num_passes, number)
        flat.div_(self._group(flat.device).seat.world_size)  # before the sum, as torch does: half floats overflow
        future = self._queued(parcel, flat, key) if flat.is_cuda else self._begun(parcel, flat, key, number)
        if bucket.is_last():
            self._num_passes += 1
            if self._under_way is not None:
                # Here an error keeps its type; a future's would reach the loop as a cast that failed. Nothing is held
                # up: backward has come to its end.
                self._under_way.finish()
                self._under_way = None
        return future

    def _begun(self, parcel: Parcel, flat: Tensor, key: int, number: int) -> torch.futures.Future[Tensor]:
        if number == 0:
            if self._under_way is not None:
                raise Fault("a backward pass ended before its last bucket, so the ranks no longer agree: start anew")
            self._under_way = Backward()
        if self._under_way is None:
            raise ConfigError("a bucket came before the first one of its pass: one hook state serves one model")
        parcel.start(flat, key)
        promised = _Promised(parcel)
        self._under_way.add(promised)
        return promised.future

    def _queued(self, parcel: Parcel, flat: Tensor, key: int) -> torch.futures.Future[Tensor]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(flat.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(self._stream):
            parcel.start(flat, key)
            parcel.turn()
            future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[flat.device])
            future.set_result(parcel.end())  # who waits for it waits for what is queued here
        return future

    # Buckets

    def _parcel(self, bucket: GradBucket) -> Parcel:
        number, parameters = bucket.index(), bucket.parameters()
        parcel = self._parcels.get(number)
        if parcel is not None and parcel.contents.holds(parameters):
            return parcel
        # DistributedDataParallel has cut its buckets anew. Those before this one, which may be under way, are the same.
        for other in [n for n in self._parcels if n >= number]:
            self._kept |= self._parcels.pop(other).kept()
        strangers = [tuple(p.shape) for p in parameters if p not in self._names]
        if strangers:
            raise ConfigError(f"the model given to ddp_hook has no parameters of shapes {strangers}: give it this one")
        contents = Contents(tuple(self._names[p] for p in parameters), tuple(parameters))
        flat, codec = bucket.buffer(), self._codec
        if codec is not None:
            codec = codec.share(flat.numel(), self._num_entries)
            codec.check(flat.dtype, flat.numel())
        self._parcels[number] = Parcel(self._group(flat.device), codec, contents, self._kept)
        return self._parcels[number]

    def _group(self, device: torch.device) -> Borrowed:
        if self._borrowed is None:
            self._borrowed = borrow(self._process_group, device)
            _agree(self._borrowed, f"{self._codec!r}, {self._num_entries} entries, after {self._num_passes} passes")
        return self._borrowed

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs, tensors only: of this rank. Call it between backward passes.

        ``residual/NAME`` (n,) float32 is this rank's own, as the parameter's n entries lie in memory: each rank saves
        and loads its own. ``codec/NAME/0`` and ``num_passes`` are the same on all ranks.
        """
        found: Kept = {_PASSES: torch.tensor(self._num_passes)} | self._kept
        for parcel in self._parcels.values():
            found |= parcel.kept()
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there: on every rank or on none, before the first backward pass. ``ConfigError`` if a pass was
        made, or a tensor is not of this model. With another number of ranks, give a rank that has no state of its own
        another's without the residuals; the residuals that no rank loads are lost.
        """
        if self._parcels:
            raise ConfigError("load_state_dict must come before the first backward pass, and one was made")
        if _PASSES not in state:
            raise ConfigError(f"a state of ddp_hook has an entry {_PASSES!r}, and this has {sorted(state)[:5]}")
        sizes = {name: p.numel() for p, name in self._names.items()}
        for name, tensor in state.items():
            kind, _, of = name.partition("/")
            if kind == "residual" and tensor.numel() != sizes.get(of):
                raise ConfigError(
                    f"{name} has {tensor.numel()} entries, and the model's parameter {sizes.get(of, 'none')}"
                )
            if kind not in ("residual", "codec", _PASSES):
                raise ConfigError(f"{name} is nothing that a state of ddp_hook holds: is it another's?")
        self._num_passes = int(state[_PASSES])
        self._kept = {name: tensor.clone().detach() for name, tensor in state.items() if name != _PASSES}


class _Promised:
    """A parcel under way, and the future that its sum is promised by."""

    def __init__(self, parcel: Parcel) -> None:
        self.future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._parcel = parcel

    def turn(self) -> None:
        self._parcel.turn()

    def end(self) -> None:
        self.future.set_result(self._parcel.end())

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)  # type: ignore[arg-type]  # annotated wrongly there


def _agree(borrowed: Borrowed, text: str) -> None:
    group, _ = borrowed.group()
    said = [payload.decode() for payload in group.all_gather(text.encode())]
    for rank, other in enumerate(said):
        if other != said[0]:
            raise ConfigError(f"all ranks need the same: rank 0 has {said[0]}, and rank {rank} has {other}")


def exchange_bucket(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook: a future of the bucket's gradients, averaged over all ranks, the same bits on each.

    In the last bucket's call it returns when all are in. Raises ``ConfigError`` if the codec cannot take the gradients,
    ``Fault`` if a peer or a link failed: then, and whenever backward is left early, the processes have to start anew.
    """
    return state.exchange(bucket)


def ddp_hook(model: nn.Module, codec: Codec | None, process_group: Any | None = None) -> tuple[HookState, Any]:
    """Compress what DistributedDataParallel sends: ``model.register_comm_hook(*shoal.ddp_hook(model, codec))``.

    ``model`` is the wrapped one, or what is in it: it tells the parameters' names, and of how many entries ``TopK(k)``
    sends k. ``process_group`` is for those ranks only, as DistributedDataParallel's own. Returns the state, which is to
    be saved with a checkpoint, and ``exchange_bucket``. Nothing is started before the first backward pass.
    ``ConfigError`` if the codec cannot take the model. In a world of one nothing is sent, and nothing is lost.
    """
    return HookState(model, codec, process_group), exchange_bucket
