"""A model's and an optimizer's whole state as flat, named tensors: taken, put back, and told apart by a fingerprint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.errors import Bug, ConfigError, VersionFault
from shoal.versions.tensor_file import bytes_of

_OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Snapshot:
    """The state after ``step``, detached from what training changes.

    ``model`` holds the state dict's tensors, those that share memory (tied parameters) once, under their first name.
    ``optimizer`` holds its state's tensors as ``parameter.slot``, such as ``fc.weight.exp_avg``, and a group's own as
    ``groups.0.lr``. ``meta`` is JSON: what the caller gave (cursors, fingerprint, random state), and under
    ``"optimizer"`` the groups' options and the scalars of the state. ``strategy`` holds what a strategy and its codec
    remember, by names of their own.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    strategy: Mapping[str, Tensor] = field(default_factory=dict)


def capture(model: nn.Module, optimizer: Optimizer, step: int, meta: Mapping[str, Any]) -> Snapshot:
    """Copy the state to CPU memory: one pass, no more than its size. Later training does not change the copy.

    ``ConfigError`` names a state that is neither a tensor nor a JSON scalar.
    """
    if _OPTIMIZER in meta:
        raise Bug(f"a snapshot's meta must leave {_OPTIMIZER!r} to the optimizer's options; use another key")
    state = _State.of(model, optimizer)
    copies = [{name: _copy(tensor) for name, tensor in part.items()} for part in (state.model, state.optimizer)]
    return Snapshot(step, copies[0], copies[1], {**meta, _OPTIMIZER: state.scalars})


def fingerprint(
    model: nn.Module, optimizer: Optimizer | None, extra: bytes = b"", strategy: Mapping[str, Tensor] | None = None
) -> str:
    """16 hex digits (XXH3, 64 bits) of all that ``capture`` would take, and of ``extra`` and ``strategy``.

    Without an optimizer, of the model: where each worker's optimizer has a state of its own.

    Equal for equal names, dtypes, shapes, bits and options, whatever the memory layout or the order in which the
    optimizer made its state. One pass over the state, at the memory's speed; contiguous CPU tensors are not copied.
    """
    state = _State.of(model, optimizer) if optimizer is not None else _State(_model_tensors(model)[0], {}, {})
    digest = xxhash.xxh3_64()
    for part in (state.model, state.optimizer, strategy or {}):
        for name, tensor in part.items():
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            if tensor.numel():
                digest.update(bytes_of(tensor))
    digest.update(json.dumps(state.scalars, sort_keys=True).encode())
    digest.update(len(extra).to_bytes(8, "little") + extra)
    return digest.hexdigest()


def restore(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer) -> None:
    """Give ``model`` and ``optimizer`` exactly the snapshot's state, bit for bit.

    Tensors that exist are written in place; optimizer state that does not exist yet is made; what the snapshot lacks
    is removed. ``VersionFault`` names the first tensor or group that does not fit, and nothing has changed then.
    """
    saved = snapshot.meta.get(_OPTIMIZER)
    if not isinstance(saved, Mapping):
        raise VersionFault(f"the snapshot of step {snapshot.step} lacks the optimizer's options; it is incomplete")
    live, canonical = _model_tensors(model)
    _check_model(snapshot, live)
    parameters = _names(model, optimizer)
    _check_groups(saved, optimizer, parameters)
    slots = _slots(snapshot, saved, set(parameters.values()))
    model.load_state_dict({name: snapshot.model[first] for name, first in canonical.items()})
    for index, (group, options) in enumerate(zip(optimizer.param_groups, saved["groups"], strict=True)):
        _restore_options(group, options["options"], snapshot.optimizer, index)
        for parameter in group["params"]:
            _restore_slots(optimizer, group, parameter, slots.get(parameters[parameter], {}))


def with_ties(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors, those that share memory in the model under each of their names."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(tensor.data_ptr(), name) for name, tensor in model.state_dict().items()}
    ties = {name: stored[origin] for name, origin in names.items() if name not in stored and origin in stored}
    return {**stored, **ties}


@dataclass(frozen=True)
class _State:
    """The live tensors in a fixed order, and the scalars, of a model and its optimizer."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scalars: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> _State:
        state = cls(_model_tensors(model)[0], {}, {"state": {}, "groups": []})
        parameters = _names(model, optimizer)
        for index, group in enumerate(optimizer.param_groups):
            options: dict[str, Any] = {}
            for key in sorted(group.keys() - {"params"}):
                state._take(f"groups.{index}.{key}", group[key], options, key)
            names = [parameters[parameter] for parameter in group["params"]]
            state.scalars["groups"].append({"params": names, "options": options})
            for parameter, name in zip(group["params"], names, strict=True):
                slots = optimizer.state.get(parameter, {})
                for slot in sorted(slots):
                    state._take(f"{name}.{slot}", slots[slot], state.scalars["state"], f"{name}.{slot}")
        return state

    def _take(self, name: str, value: Any, scalars: dict[str, Any], key: str) -> None:
        if isinstance(value, Tensor):
            self.optimizer[name] = value.detach()
        else:
            scalars[key] = _json(name, value)


def _json(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(name, item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    shown = " ".join(repr(value).split())
    raise ConfigError(
        f"the optimizer's {name} holds a {type(value).__name__}, {shown:.60}; only tensors, finite numbers, strings and"
        " lists of them can be stored in a version; choose another optimizer, or keep it outside of its state"
    )


def _model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with shared memory once, and for each of its names the one under which its tensor is there."""
    tensors: dict[str, Tensor] = {}
    canonical: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"the model's {name} is a {type(value).__name__}; a version holds only tensors")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        canonical[name] = seen.setdefault(place, name) if value.numel() else name
        if canonical[name] == name:
            tensors[name] = value
    return tensors, canonical


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    known: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in known:
                raise ConfigError(
                    f"the optimizer's group {index} holds a parameter of shape {tuple(parameter.shape)} that is not the"
                    " model's; a version can hold only the model's, so register it there"
                )
    return known


def _copy(tensor: Tensor) -> Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    return out.copy_(tensor.detach())


def _check_model(snapshot: Snapshot, live: Mapping[str, Tensor]) -> None:
    for name in (*live, *snapshot.model):
        wanted, came = _kind(live.get(name)), _kind(snapshot.model.get(name))
        if wanted != came:
            raise VersionFault(
                f"the version of step {snapshot.step} does not fit the model: {name} is {came} there and {wanted} here;"
                " use the job that the run was started with"
            )


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_groups(saved: Mapping[str, Any], optimizer: Optimizer, parameters: Mapping[Tensor, str]) -> None:
    here = [[parameters[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    there = [group["params"] for group in saved["groups"]]
    if len(here) != len(there):
        raise VersionFault(f"the version's optimizer has {len(there)} parameter groups, and the job's {len(here)}")
    for index, (ours, theirs) in enumerate(zip(here, there, strict=True)):
        differing = [name for name in (*ours, *theirs) if (name in ours) != (name in theirs)]
        if ours != theirs:
            what = f"{differing[0]} is only in one" if differing else "the order differs"
            raise VersionFault(f"group {index} of the version's optimizer is not that of the job's: {what} of the two")


def _slots(snapshot: Snapshot, saved: Mapping[str, Any], known: set[str]) -> dict[str, dict[str, Any]]:
    """The saved state by parameter and slot."""
    out: dict[str, dict[str, Any]] = {}
    for name, value in (*snapshot.optimizer.items(), *saved["state"].items()):
        parameter, _, slot = name.rpartition(".")
        if parameter in known:
            out.setdefault(parameter, {})[slot] = value
        elif not name.startswith("groups."):
            raise VersionFault(f"the version's optimizer state {name} belongs to no parameter of the model")
    return out


def _restore_options(
    group: dict[str, Any], options: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int
) -> None:
    prefix = f"groups.{index}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for key in group.keys() - {"params"} - options.keys() - own.keys():
        del group[key]
    for key, value in options.items():
        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for key, tensor in own.items():
        group[key] = _written(group.get(key), tensor, tensor.device)


def _restore_slots(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, slots: Mapping[str, Any]) -> None:
    if not slots:
        optimizer.state.pop(parameter, None)
        return
    state = optimizer.state[parameter]
    for slot in [slot for slot in state if slot not in slots]:
        del state[slot]
    for slot, value in slots.items():
        if not isinstance(value, Tensor):
            state[slot] = value
            continue
        on_host = slot == "step" and not (group.get("capturable") or group.get("fused"))
        like = parameter if value.shape == parameter.shape and not on_host else None
        state[slot] = _written(state.get(slot), value, torch.device("cpu") if on_host else parameter.device, like)


def _written(live: Any, saved: Tensor, device: torch.device, like: Tensor | None = None) -> Tensor:
    """``saved`` in the live tensor if it fits, else in a new one, laid out as ``like`` if given."""
    if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
        out = live
    elif like is not None:
        out = torch.empty_like(like, dtype=saved.dtype, requires_grad=False)
    else:
        out = torch.empty(saved.shape, dtype=saved.dtype, device=device)
    with torch.no_grad():
        out.copy_(saved)
    return out
