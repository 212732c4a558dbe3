"""The slow and obvious twin of ``shoal.tables``: a dictionary, and NumPy by the row. The same bits, by other code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.lanes.hashing import mix
from shoal.tables import FTRL, SGD, Adagrad, Adam, TableSpec

Floats = npt.NDArray[np.float32]
ONE = np.float32(1)


@dataclass
class PlainRow:
    """An id's. ``weights`` is None as long as it has no row."""

    count: int = 0
    seen_at: int = 0
    touched: int = 0
    weights: Floats | None = None
    slots: Floats | None = None


class PlainTable:
    """What ``Table`` does, one id after another."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.clock = 0
        self.rows: dict[int, PlainRow] = {}

    def pull(self, ids: npt.NDArray[np.int64]) -> Floats:
        return np.stack([self._weights(int(i)) for i in ids]) if len(ids) else np.empty((0, self.spec.dim), np.float32)

    def push(self, ids: npt.NDArray[np.int64], gradients: Floats, now_s: int = 0) -> None:
        self.clock += 1
        for i, gradient in zip(ids, gradients, strict=True):
            row = self.rows.setdefault(int(i), PlainRow())
            row.count, row.seen_at, row.touched = row.count + 1, now_s, self.clock
            if row.slots is None and row.count >= self.spec.admit_after:
                row.weights, row.slots = self._first(int(i)), self._first_slots()
                if self.spec.rule.has_weights:
                    row.weights = self._kept(row.weights, _word(self.spec.key) ^ _mixed(int(i)))
            if row.slots is not None:
                before = self._weights(int(i))
                after, row.slots = updated(self.spec.rule, before, row.slots, gradient)
                noise = int(mix(_word(self.spec.key) ^ _word(int(i)))[0]) + (self.clock << 32)
                row.weights = self._kept(after, _word(noise))

    def expire(self, now_s: int) -> npt.NDArray[np.int64]:
        self.clock += 1
        assert self.spec.expire_after_s is not None
        gone = [i for i, row in self.rows.items() if row.seen_at < now_s - self.spec.expire_after_s]
        for i in gone:
            del self.rows[i]
        return np.array(sorted(gone), np.int64)

    def _weights(self, i: int) -> Floats:
        row = self.rows.get(i)
        if isinstance(rule := self.spec.rule, FTRL):
            return derived(rule, row.slots) if row and row.slots is not None else np.zeros(self.spec.dim, np.float32)
        return row.weights.copy() if row is not None and row.weights is not None else self._first(i)

    def _first(self, i: int) -> Floats:
        word = mix(_word(self.spec.key) ^ mix(_word(i)))
        words = mix((word + np.arange(self.spec.dim, dtype=np.uint64)).astype(np.uint64))
        unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - ONE
        return (unit * np.float32(self.spec.initial_scale)).astype(np.float32)

    def _first_slots(self) -> Floats:
        slots = np.full(self.spec.rule.num_slots(self.spec.dim), self.spec.rule.slot_start, np.float32)
        if isinstance(self.spec.rule, Adam):
            slots[-2:] = 1
        return slots

    def _kept(self, weights: Floats, noise: Any) -> Floats:
        """As it is read again from where it is stored."""
        if self.spec.dtype == "float32":
            return weights
        random = mix((noise + np.arange(self.spec.dim, dtype=np.uint64)).astype(np.uint64)) & np.uint64(0xFFFF)
        words = (weights.view(np.uint32).astype(np.uint64) + random) & np.uint64(0xFFFF0000)
        return words.astype(np.uint32).view(np.float32)


def derived(rule: FTRL, slots: Floats) -> Floats:
    """FTRL's weights."""
    alpha, beta, l1, l2 = (np.float32(number) for number in rule.numbers)
    z, n = np.split(slots, 2)
    weights = -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2)
    return np.where(np.abs(z) <= l1, np.float32(0), weights).astype(np.float32)


def updated(rule: Any, weights: Floats, slots: Floats, gradient: Floats) -> tuple[Floats, Floats]:
    """Weights and slots after a gradient."""
    numbers: list[Any] = [np.float32(number) for number in rule.numbers]
    match rule:
        case SGD():
            return weights - numbers[0] * gradient, slots
        case Adagrad():
            slots = slots + gradient * gradient
            return weights - numbers[0] * gradient / (np.sqrt(slots) + numbers[1]), slots
        case Adam():
            dim = len(weights)
            lr, beta1, beta2, eps = numbers
            power1, power2 = slots[-2] * beta1, slots[-1] * beta2
            first = beta1 * slots[:dim] + (ONE - beta1) * gradient
            second = beta2 * slots[dim : 2 * dim] + (ONE - beta2) * (gradient * gradient)
            root = np.sqrt(ONE - power2)
            rate = np.float32(lr * root / (ONE - power1))
            weights = weights - rate * first / (np.sqrt(second) + np.float32(eps * root))
            return weights, np.concatenate([first, second, np.array([power1, power2], np.float32)])
    z, n = np.split(slots, 2)
    squared = n + gradient * gradient
    sigma = (np.sqrt(squared) - np.sqrt(n)) / numbers[0]
    return weights, np.concatenate([z + (gradient - sigma * weights), squared])


def _word(number: int) -> Any:
    return np.array([number & ((1 << 64) - 1)], np.uint64)


def _mixed(i: int) -> Any:
    return mix(_word(i))
