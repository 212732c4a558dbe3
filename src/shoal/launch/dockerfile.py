"""The text of an image's Dockerfile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PORT = 8080
USER = 10001
"""A number, so that Kubernetes can tell that it is not root's; nobody's in common base images."""

IGNORED = """\
# Only what the Dockerfile copies goes to the builder, whatever else comes to lie here.
*
!requirements.txt
!constraints.txt
!*.whl
!app
!model
**/__pycache__
"""

_HEALTH = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/v2/health/ready', timeout=4)"


def dockerfile(
    *, about: Mapping[str, Any], base: str, torch: str, torch_index: str, copied: Sequence[str], job_name: str
) -> str:
    """Of a model: ``about`` has its name, version and sha256. ``copied``: the files that the installation needs."""
    entry = ["shoal", "serve", "/model", "--job", f"/app/{job_name}", "--host", "0.0.0.0", "--port", str(PORT)]
    return f"""\
ARG BASE={base}

FROM ${{BASE}} AS build
# Where torch comes from; empty: from where all else does.
ARG TORCH_INDEX_URL={torch_index}
# pip's own settings, for mirrors. This stage is not part of the image, nor is what it is given.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/shoal && /opt/shoal/bin/pip uninstall --yes setuptools
RUN /opt/shoal/bin/pip install --no-deps ${{TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}} torch=={torch}
WORKDIR /build
COPY {json.dumps([*copied, "./"])}
RUN /opt/shoal/bin/pip install --requirement requirements.txt --constraint constraints.txt \\
    && /opt/shoal/bin/pip check \\
    && /opt/shoal/bin/pip uninstall --yes pip

FROM ${{BASE}}
LABEL org.opencontainers.image.title={_quoted(about["name"])} \\
      org.opencontainers.image.version={_quoted(about["version"])} \\
      shoal.package.sha256={_quoted(about["sha256"])}
COPY --from=build /opt/shoal /opt/shoal
COPY app /app
COPY model /model
ENV PATH=/opt/shoal/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 SHOAL_RUNS=/dev/shm/shoal
WORKDIR /app
USER {USER}:{USER}
# An image that does not answer as the model did at its export is not built.
RUN {json.dumps(["shoal", "verify", "/model", "--job", f"/app/{job_name}"])}
EXPOSE {PORT}
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \\
    CMD {json.dumps(["python3", "-I", "-c", _HEALTH])}
ENTRYPOINT {json.dumps(entry)}
"""


def _quoted(value: Any) -> str:
    """A label's value, in which nothing is expanded."""
    return json.dumps(str(value)).replace("$", "\\$")
