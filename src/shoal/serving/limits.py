"""What a request may be, before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shoal.errors import ConfigError, Fault

BACKLOG = 2048
"""Connections that may wait to be accepted."""


class TooLarge(ConfigError):
    """A request has more bytes or samples than one may have."""


class TooSlow(Fault):
    """A request's body did not come within its time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``max_body_bytes``, ``max_samples``: of one request. ``timeout_s``: how long one may take that does not say,
    and how long a body may."""

    max_body_bytes: int = 64 * 2**20
    max_samples: int = 65_536
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"{field.name} must be above 0, not {getattr(self, field.name)}")

    def check_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.max_body_bytes:
            raise TooLarge(f"a body may have {self.max_body_bytes} bytes, and {num_bytes} came: send fewer samples")

    def check_samples(self, num_samples: int) -> None:
        if num_samples > self.max_samples:
            raise TooLarge(f"a request may have {self.max_samples} samples, and {num_samples} came: send it in parts")
