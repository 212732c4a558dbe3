"""Parameters laid side by side in a few flat tensors, so that one collective carries many of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from shoal.codecs import Codec
from shoal.errors import ConfigError

Named = tuple[str, nn.Parameter]

_FEWEST = 8
"""A bucket of less than this part of what it may hold is not worth an exchange of its own."""


@dataclass(frozen=True)
class Layout:
    """Parameters of one dtype and device that travel together, with or without a codec."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    codec: Codec | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(p.shape) for p in self.parameters)

    @property
    def num_entries(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a flat tensor, in its shape."""
        pieces = torch.split(flat[: self.num_entries], [p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]


@dataclass
class Bucket:
    """A layout, and one flat tensor for its gradients.

    ``used`` has one entry a parameter that says whether this worker's backward reached it: summed over the workers, 0
    means that no one used it, and its gradient is None as in a plain loop. Without a codec it is the end of ``flat``.
    """

    layout: Layout
    flat: Tensor
    used: Tensor
    views: list[Tensor]
    reached: set[int] = field(default_factory=set)
    """Parameters that a backward of this step has reached."""
    final: set[int] = field(default_factory=set)
    """Those whose gradients are whole, and here: the step's last backward has reached them."""

    @staticmethod
    def of(layout: Layout) -> Bucket:
        first, size, count = layout.parameters[0], layout.num_entries, len(layout.parameters)
        together = torch.zeros(size + count, dtype=first.dtype, device=first.device)
        if layout.codec is None:
            return Bucket(layout, together, together[size:], layout.views(together))
        return Bucket(layout, together[:size], torch.zeros(count, device=first.device), layout.views(together))

    @property
    def full(self) -> bool:
        """Whether every gradient is whole."""
        return len(self.final) == len(self.views)

    def clear(self) -> None:
        """Begin anew: backward finds no gradients, so that it need not add to any."""
        self.used.zero_()
        self.reached.clear()
        self.final.clear()
        for parameter in self.layout.parameters:
            parameter.grad = None

    def take(self, index: int) -> None:
        """A parameter's gradient is whole: it moves in here."""
        parameter, view = self.layout.parameters[index], self.views[index]
        gradient = parameter.grad
        assert gradient is not None
        view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        parameter.grad = view
        self.final.add(index)

    def seal(self) -> None:
        """Take what the last backward did not reach, and note what any did, just before the flat tensor is sent."""
        for index in set(range(len(self.views))) - self.final:
            if index in self.reached:
                self.take(index)
            else:
                self.views[index].zero_()
        if len(self.reached) == len(self.views):
            self.used.fill_(1)
        else:
            self.used[list(self.reached)] = 1

    def hand_over(self) -> None:
        """Make what the members agreed on the parameters' gradients."""
        for parameter, view, count in zip(self.layout.parameters, self.views, self.used.tolist(), strict=True):
            parameter.grad = view if count else None


@dataclass(frozen=True)
class Packing:
    """How parameters are laid into buckets: ``bucket_bytes`` each, but that a parameter is never cut, and small ones go
    with a large one; and with ``codec`` unless their name fits one of the patterns ``uncompressed``, such as
    ``*.bias``."""

    bucket_bytes: int
    codec: Codec | None = None
    uncompressed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1024:
            raise ConfigError(f"bucket_bytes must be at least 1024, not {self.bucket_bytes}")
        if self.codec is not None and not isinstance(self.codec, Codec):
            raise ConfigError(f"codec must be one such as shoal.Int8(), not {self.codec!r}")
        given: object = self.uncompressed
        if not isinstance(given, tuple):
            raise ConfigError(f"uncompressed takes a tuple of patterns such as ('*.bias',), not {given!r}")

    def lay_out(self, model: nn.Module) -> list[Layout]:
        """The layouts of the model's parameters in reverse order, which is about that in which backward finishes.

        ``ConfigError`` if there is none to train, a pattern fits none, or the codec cannot take one.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError("the task's model has no parameter that requires a gradient; there is nothing to train")
        if self.codec is None:
            return [_layout(group, None) for group in _cut(named, self.bucket_bytes)]
        self._check_patterns(name for name, _ in named)
        plain = [(name, p) for name, p in named if self._is_plain(name)]
        packed = [(name, p) for name, p in named if not self._is_plain(name)]
        total = sum(p.numel() for _, p in packed)
        if packed:
            for dtype in dict.fromkeys(p.dtype for _, p in packed):
                self.codec.check(dtype, total)
        shared = [
            _layout(group, self.codec.share(sum(p.numel() for _, p in group), total))
            for group in _cut(packed, self.bucket_bytes)
        ]
        return [*shared, *(_layout(group, None) for group in _cut(plain, self.bucket_bytes))]

    def _check_patterns(self, names: Iterable[str]) -> None:
        known = list(names)
        for pattern in self.uncompressed:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(
                    f"uncompressed names {pattern!r}, and no parameter does: there are {', '.join(known)}"
                )

    def _is_plain(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.uncompressed)


def _layout(group: Sequence[Named], codec: Codec | None) -> Layout:
    return Layout(tuple(name for name, _ in group), tuple(p for _, p in group), codec)


def _cut(named: Sequence[Named], bucket_bytes: int) -> Iterator[list[Named]]:
    group: list[Named] = []
    size = 0
    for name, parameter in reversed(named):
        alike = not group or (parameter.dtype == group[0][1].dtype and parameter.device == group[0][1].device)
        is_full = size + parameter.nbytes > bucket_bytes and size * _FEWEST >= bucket_bytes
        if group and (not alike or is_full):
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += parameter.nbytes
    if group:
        yield group
