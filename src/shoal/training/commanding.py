"""Speaking to a run that is under way: how it stands, how many workers, the end."""

from __future__ import annotations

import time
import uuid
from typing import Any

from shoal.comm import messages as msg
from shoal.comm.keys import JobKey
from shoal.comm.link import Link
from shoal.errors import ConfigError, LinkFault
from shoal.training.folder import RunFolder

_PATIENCE_S = 5.0


def ask(address: str, key: JobKey, message: object) -> msg.Answer:
    """The coordinator's answer to a command. ``LinkFault`` if none comes within 5 s."""
    link: Link[Any] = Link(address, key, f"command-{uuid.uuid4().hex[:8]}", msg.ToDriver)  # type: ignore[arg-type]
    try:
        link.send(message)
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            for answer in link.receive(0.1):
                if isinstance(answer, msg.Answer):
                    return answer
    finally:
        link.close()
    raise LinkFault(
        f"the coordinator at {address} did not answer within {_PATIENCE_S:g} s: is it there, is the key its?"
    )


def command(folder: RunFolder, message: object) -> msg.Answer:
    """Have a run's coordinator do something; ``ConfigError`` if the run is not under way or refuses."""
    if not folder.is_under_way:
        raise ConfigError(f"{folder.name} is not under way; `shoal train --resume {folder.name}` goes on with it")
    answer = ask(folder.read_control().address, JobKey.read(folder.key_path), message)
    if not answer.ok:
        raise ConfigError(answer.reason)
    return answer
