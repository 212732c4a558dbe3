"""TLS 1.3 without an authority: who holds a job's key has its certificate, and trusts that one alone.

The certificate follows from the key: the same bits wherever it is made, signed with Ed25519, which adds nothing random.
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

_PURPOSE = b"shoal: the TLS certificate of a job"
_PEM = serialization.Encoding.PEM
_NEAR = "shoal-near"


@lru_cache(maxsize=32)
def context_for(secret: str, *, serves: bool, near: bool = False) -> ssl.SSLContext:
    """Connections to and from those who hold ``secret`` too. Each shows that it does, and says if it is ``near``."""
    seed = HKDF(hashes.SHA256(), 32, salt=None, info=_PURPOSE).derive(secret.encode())
    key = Ed25519PrivateKey.from_private_bytes(seed)
    certificate = _certificate(key).public_bytes(_PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # whoever holds the key may be anywhere
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode())
    if near:
        context.set_alpn_protocols([_NEAR])
    if serves:
        context.num_tickets = 0
    password = secrets.token_hex(32).encode()
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # ssl takes it from a file only
        locked = serialization.BestAvailableEncryption(password)
        file.write(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, locked) + certificate)
        file.flush()
        context.load_cert_chain(file.name, password=password)
    return context


def _certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a Shoal job")])
    always = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, *always)
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, None)
