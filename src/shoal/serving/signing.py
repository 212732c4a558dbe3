"""A package's signature: an OpenSSF model signature (OMS 1.0) by an elliptic-curve key, made and checked offline."""

from __future__ import annotations

import base64
import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm

from shoal.errors import ConfigError, VersionFault
from shoal.serving.extra import extra

if TYPE_CHECKING:
    from model_signing import signing, verifying


def sign(folder: Path, signature: str, key: Path) -> None:
    """Sign all that is in a folder, and put the signature beside it, in a file of that name.

    ``key``: a PEM file with a private key on P-256, P-384 or P-521, not encrypted; ``ConfigError`` if it is none, or
    the extra ``shoal[sign]`` is missing.
    """
    signer = _signer_of(key)
    with extra("sign", "a signature"):
        from model_signing import hashing
    everything = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
    signer.set_hashing_config(everything).sign(folder, folder / signature)


def _signer_of(key: Path) -> signing.Config:
    with extra("sign", "a signature"):
        from model_signing import signing
    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except _NO_KEY as error:
        raise ConfigError(
            f"{key} must be a PEM file with a private key on P-256, P-384 or P-521, not encrypted: {error}"
        ) from error


def require_signature(folder: Path, data: bytes, files: Mapping[str, str], key: Path) -> None:
    """Have a folder's files signed. ``data``: the signature's own; ``files``: the sha256 of each file by its name, and
    all of them must be the signed ones; ``key``: a PEM file with the public key.

    What is on the disk is read and compared, too, at a later time than what ``files`` was made from; so ``files`` is
    what counts. ``ConfigError`` for a key that is none, ``VersionFault`` for another's signature or other files.
    """
    verifier = _verifier_of(key)
    try:
        bundle, payload = _read(data)
        with tempfile.NamedTemporaryFile() as copy, contextlib.redirect_stdout(sys.stderr):
            copy.write(bundle)
            copy.flush()
            verifier.verify(folder, Path(copy.name))
        signed = {entry["name"]: entry["digest"] for entry in payload["predicate"]["resources"]}
    except Exception as error:  # a signature may be anything, and the library says what it is not in many ways
        said = str(error) or type(error).__name__
        raise VersionFault(f"{folder} is not what the owner of {key} has signed; do not use it: {said}") from error
    if changed := sorted(name for name, sha256 in files.items() if signed.get(name) != sha256):
        raise VersionFault(f"{folder} is not what the owner of {key} has signed; do not use it: {', '.join(changed)}")


def _verifier_of(key: Path) -> verifying.Config:
    with extra("sign", "a signature"):
        from model_signing import verifying
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except _NO_KEY as error:
        raise ConfigError(f"{key} must be a PEM file with a public key on P-256, P-384 or P-521: {error}") from error


# AttributeError: of a key of another kind, which has no curve. TypeError: of a key that is encrypted.
_NO_KEY = (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm)


def _read(data: bytes) -> tuple[bytes, Any]:
    """A signature written anew, with nothing in it that could be read in two ways, and what it signs."""
    told: Any = msgspec.json.decode(data)
    envelope = told["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    bundle = {
        "mediaType": told["mediaType"],
        "verificationMaterial": told["verificationMaterial"],
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": envelope["payloadType"],
            "signatures": envelope["signatures"],
        },
    }
    return msgspec.json.encode(bundle), msgspec.json.decode(payload)
