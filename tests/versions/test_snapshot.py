from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from shoal.errors import Bug, ConfigError, VersionFault
from shoal.versions import Snapshot, Versions, capture, fingerprint, restore
from shoal.versions.store import Store
from tests.versions.small import small_model, train

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam with a tensor for its rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.fixture(params=OPTIMIZERS, name="make")
def _make(request: pytest.FixtureRequest) -> Callable[[Any], Optimizer]:
    return OPTIMIZERS[request.param]


def pair(make: Callable[[Any], Optimizer], seed: int = 0) -> tuple[nn.Module, Optimizer]:
    model = small_model(seed)
    return model, make(model.parameters())


def test_resumed_training_is_training_that_never_stopped(make, tmp_path):
    model, optimizer = pair(make)
    train(model, optimizer, range(5))
    versions = Versions(Store(str(tmp_path)))
    versions.write(capture(model, optimizer, 5, {"fingerprint": fingerprint(model, optimizer)}))
    twin, twin_optimizer = pair(make, seed=1)
    restore(versions.read(5), twin, twin_optimizer)
    assert fingerprint(twin, twin_optimizer) == fingerprint(model, optimizer)
    for part in (range(5, 6), range(6, 20)):
        train(model, optimizer, part)
        train(twin, twin_optimizer, part)
        assert fingerprint(twin, twin_optimizer) == fingerprint(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_trained_optimizer_goes_back_in_place_to_where_it_was(make):
    model, optimizer = pair(make)
    train(model, optimizer, range(3))
    snapshot, before = capture(model, optimizer, 3, {}), fingerprint(model, optimizer)
    places = [t.data_ptr() for t in model.state_dict().values()]
    train(model, optimizer, range(3, 7))
    assert fingerprint(model, optimizer) != before
    restore(snapshot, model, optimizer)
    assert fingerprint(model, optimizer) == before
    assert [t.data_ptr() for t in model.state_dict().values()] == places


def test_state_that_the_snapshot_lacks_is_removed():
    model, optimizer = pair(OPTIMIZERS["momentum"])
    snapshot, before = capture(model, optimizer, 0, {}), fingerprint(model, optimizer)
    train(model, optimizer, range(2))
    restore(snapshot, model, optimizer)
    assert not optimizer.state and fingerprint(model, optimizer) == before


def test_groups_get_their_own_options_back():
    def build() -> tuple[nn.Module, Optimizer]:
        model = small_model()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "betas": (0.5, 0.6)}]
        return model, torch.optim.AdamW(groups, lr=0.01)

    model, optimizer = build()
    optimizer.param_groups[0].update(lr=0.123, initial_lr=0.1)
    twin, twin_optimizer = build()
    twin_optimizer.param_groups[1]["stray"] = 1
    restore(capture(model, optimizer, 0, {}), twin, twin_optimizer)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert [{k: v for k, v in g.items() if k != "params"} for g in twin_optimizer.param_groups] == options


def test_a_snapshot_is_not_changed_by_what_training_does_next():
    model, optimizer = pair(OPTIMIZERS["adam"])
    train(model, optimizer, range(1))
    snapshot = capture(model, optimizer, 1, {})
    kept = {name: tensor.clone() for name, tensor in {**snapshot.model, **snapshot.optimizer}.items()}
    train(model, optimizer, range(1, 3))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in {**snapshot.model, **snapshot.optimizer}.items())


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(0, 3))


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    versions = Versions(Store(str(tmp_path)))
    versions.write(capture(model, optimizer, 1, {"fingerprint": fingerprint(model, optimizer)}))
    snapshot = versions.read()
    assert set(snapshot.model) == {"embed.weight", "mask", "scale", "nothing"}
    twin = Tied()
    restore(snapshot, twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert twin.head.weight is twin.embed.weight and torch.equal(twin.head.weight, model.head.weight)
    assert twin.mask.tolist() == [True, False] and twin.scale.dtype == torch.bfloat16


def test_bfloat16_parameters_keep_float32_state_as_it_is():
    model = nn.Linear(3, 3).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = torch.tensor(1 / 3, dtype=torch.float32).expand(3, 3)
    optimizer.state[model.weight]["master"] = exact.clone()
    twin = nn.Linear(3, 3).bfloat16()
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    restore(capture(model, optimizer, 0, {}), twin, twin_optimizer)
    assert torch.equal(twin_optimizer.state[twin.weight]["master"], exact)


def test_the_memory_layout_is_no_part_of_the_fingerprint_and_new_state_takes_the_parameters():
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    twin = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin_optimizer = torch.optim.Adam(twin.parameters())
    restore(capture(model, optimizer, 1, {}), twin, twin_optimizer)
    assert fingerprint(twin, twin_optimizer) == fingerprint(model, optimizer)
    assert twin_optimizer.state[twin.weight]["exp_avg"].stride() == twin.weight.stride() != model.weight.stride()


def test_a_fingerprint_tells_one_bit_a_name_a_dtype_an_option_and_the_extra_apart():
    def of(model: nn.Module, lr: float = 0.1, extra: bytes = b"") -> str:
        return fingerprint(model, torch.optim.SGD(model.parameters(), lr=lr), extra)

    model = small_model()
    seen = [of(model), of(model, lr=0.2), of(model, extra=b"x"), of(small_model().double())]
    seen.append(of(nn.Sequential(small_model())))
    model[0].weight.data.view(torch.int32)[0, 0] ^= 1
    seen.append(of(model))
    assert len(set(seen)) == len(seen) and all(len(bytes.fromhex(f)) == 8 for f in seen)


def broken(part: str, change: Callable[[dict[str, Any]], object]) -> Snapshot:
    model, optimizer = pair(OPTIMIZERS["momentum"])
    train(model, optimizer, range(1))
    taken = capture(model, optimizer, 1, {})
    parts = {"model": dict(taken.model), "optimizer": dict(taken.optimizer), "meta": dict(taken.meta)}
    change(parts[part])
    return Snapshot(step=1, **parts)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model", lambda m: m.pop("3.weight"), r"3\.weight is absent there and float32\[2, 8\] here"),
        ("model", lambda m: m.update(extra=torch.zeros(1)), r"extra is float32\[1\] there and absent here"),
        ("model", lambda m: m.update({"0.bias": torch.zeros(9)}), r"0\.bias is float32\[9\] there"),
        ("model", lambda m: m.update({"0.bias": torch.zeros(8).double()}), r"0\.bias is float64\[8\] there"),
        ("optimizer", lambda o: o.update({"9.weight.momentum_buffer": torch.zeros(1)}), r"9\.weight\.momentum_buffer"),
        ("meta", lambda m: m.pop("optimizer"), "incomplete"),
        ("meta", lambda m: m.update(optimizer={"state": {}, "groups": []}), "0 parameter groups, and the job's 1"),
        ("meta", lambda m: m["optimizer"]["groups"][0].update(params=["x"]), r"0\.weight is only in one"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_by_name_and_changes_nothing(part, change, says):
    model, optimizer = pair(OPTIMIZERS["momentum"], seed=2)
    before = fingerprint(model, optimizer)
    with pytest.raises(VersionFault, match=says):
        restore(broken(part, change), model, optimizer)
    assert fingerprint(model, optimizer) == before


def test_state_that_no_version_can_hold_is_named():
    model, optimizer = pair(OPTIMIZERS["sgd"])
    optimizer.state[model[0].weight]["history"] = [torch.zeros(8, 4)]  # as LBFGS keeps it
    with pytest.raises(ConfigError, match=r"0\.weight\.history holds a Tensor"):
        capture(model, optimizer, 1, {})


def test_options_that_no_version_can_hold_are_named():
    model, optimizer = pair(OPTIMIZERS["sgd"])
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ConfigError, match=r"groups\.0\.lr holds a float, nan"):
        capture(model, optimizer, 1, {})
    optimizer.param_groups[0]["lr"] = print
    with pytest.raises(ConfigError, match=r"groups\.0\.lr"):
        fingerprint(model, optimizer)


def test_a_parameter_that_is_not_the_models_is_refused():
    model = small_model()
    stranger = nn.Parameter(torch.zeros(7))
    with pytest.raises(ConfigError, match=r"group 0 holds a parameter of shape \(7,\)"):
        capture(model, torch.optim.SGD([*model.parameters(), stranger], lr=0.1), 0, {})


def test_the_meta_leaves_a_key_to_the_optimizer():
    model, optimizer = pair(OPTIMIZERS["sgd"])
    with pytest.raises(Bug, match="optimizer"):
        capture(model, optimizer, 0, {"optimizer": 1})
