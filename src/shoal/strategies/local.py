"""Local computation: many steps without a word, then one exchange of what they came to.

``LocalSGD``: after H local steps the parameters become their mean (Stich 2019, "Local SGD converges fast and
communicates little", arXiv:1805.09767, Algorithm 1). ``DiLoCo``: the mean movement is the gradient of an outer
optimizer (Douillard et al. 2023, arXiv:2311.08105, Algorithm 1), and its fragments may travel one after another while
the next round is computed (Douillard et al. 2025, "Streaming DiLoCo", arXiv:2501.18512, section 2).

Deviations: means are weighted by the samples that each worker took, so that shares may be unequal. All fragments of a
round are of the same moment, and are taken into the version together: then a sample is committed in one version as a
whole, and not fragment by fragment. The inner optimizers' states stay with the workers, as in the papers; when a
version is stored or a member leaves they are averaged, so that the stored version has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.codecs import Codec
from shoal.errors import ConfigError
from shoal.optim import Nesterov, Outer, Plain
from shoal.strategies.buckets import Packing
from shoal.strategies.rounds import Rounds

_BUCKET_BYTES = 4 << 20
_NESTEROV = Nesterov()


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """``sync_every_steps`` local steps, then the mean of all parameters.

    Wire: as a step of ``AllReduce``, once a round. ``codec``, ``uncompressed``, ``bucket_bytes``: as there.
    """

    sync_every_steps: int
    codec: Codec | None = None
    uncompressed: tuple[str, ...] = ()
    bucket_bytes: int = _BUCKET_BYTES

    def __post_init__(self) -> None:
        _check_steps(self.sync_every_steps)
        self._packing()

    def _packing(self) -> Packing:
        return Packing(self.bucket_bytes, self.codec, self.uncompressed)

    def bind(self, model: nn.Module) -> Rounds:
        """The exchange for this model's parameters and buffers, to be used by one worker."""
        return Rounds(self._packing().lay_out(model), model, Plain(), self.sync_every_steps, 0)


@dataclass(frozen=True, kw_only=True)
class DiLoCo:
    """``sync_every_steps`` local steps, then a step of the ``outer`` optimizer on the mean movement.

    Wire: as a step of ``AllReduce``, once a round. The parameters travel in ``fragments``, one after another.
    ``overlap_steps``: so many steps of the next round are computed meanwhile, and what the round came to is merged into
    the parameters after them; 0 waits for it.
    """

    sync_every_steps: int
    outer: Outer = _NESTEROV
    codec: Codec | None = None
    fragments: int = 1
    overlap_steps: int = 0
    uncompressed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_steps(self.sync_every_steps)
        if not isinstance(self.outer, Outer):
            raise ConfigError(f"outer must be an outer optimizer such as shoal.Nesterov(), not {self.outer!r}")
        if self.fragments < 1:
            raise ConfigError(f"fragments must be at least 1, not {self.fragments}")
        if not 0 <= self.overlap_steps < self.sync_every_steps:
            came = f"overlap_steps={self.overlap_steps} with sync_every_steps={self.sync_every_steps}"
            raise ConfigError(f"overlap_steps must be at least 0 and less than sync_every_steps; it is {came}")
        Packing(_BUCKET_BYTES, self.codec, self.uncompressed)

    def bind(self, model: nn.Module) -> Rounds:
        """The exchange for this model's parameters and buffers, to be used by one worker."""
        num_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        fragment_bytes = max(1024, -(-num_bytes // self.fragments))
        packing = Packing(fragment_bytes, self.codec, self.uncompressed)
        return Rounds(packing.lay_out(model), model, self.outer, self.sync_every_steps, self.overlap_steps)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"sync_every_steps must be at least 1, not {steps}")
