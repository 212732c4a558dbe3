"""A signature is of all that is in a package: who trusts a key is served nothing else."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from shoal.errors import ConfigError, VersionFault
from shoal.serving.package import MANIFEST, SIGNATURE, read, write
from shoal.serving.signing import require_signature
from tests.serving.test_packages import package

PEM, NO_PASSWORD = serialization.Encoding.PEM, serialization.NoEncryption()


def pair(folder: Path, name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    """The files of a private and a public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, NO_PASSWORD))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return pair(tmp_path, "ours", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    write(package(), tmp_path / "signed", sign_with=keys[0])
    return tmp_path / "signed"


def test_what_was_signed_is_read(signed, keys):
    assert read(signed, signed_by=keys[1]).digest == read(signed).digest
    assert (signed / SIGNATURE).exists()


def test_a_copy_under_another_name_is_signed_still(signed, keys):
    assert read(signed.rename(signed.with_name("moved")), signed_by=keys[1]).description.name == "scaled"


def test_others_can_check_a_signature_without_shoal(signed, keys):
    words = ["verify", "key", signed, "--signature", signed / SIGNATURE, "--public_key", keys[1]]
    ran = subprocess.run([sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_package_without_a_signature_is_refused(tmp_path, keys):
    write(package(), tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"must be signed, and it has no model\.sig"):
        read(tmp_path / "plain", signed_by=keys[1])


def test_another_keys_signature_is_refused(signed, tmp_path):
    other = pair(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(VersionFault, match=r"is not what the owner of .*other\.pub\.pem has signed"):
        read(signed, signed_by=other[1])


def test_another_package_under_the_signature_is_refused(signed, keys, tmp_path):
    write(package(version=8), tmp_path / "forged")
    (signed / SIGNATURE).rename(tmp_path / "forged" / SIGNATURE)
    with pytest.raises(VersionFault, match=r"do not use it: .*Hash mismatch for 'MANIFEST\.json'"):
        read(tmp_path / "forged", signed_by=keys[1])


@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors"])
def test_a_changed_file_is_refused(signed, keys, name):
    data = (signed / name).read_bytes()
    (signed / name).write_bytes(data + b" ")
    with pytest.raises(VersionFault):
        read(signed, signed_by=keys[1])


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"verificationMaterial": {}}'])
def test_what_is_no_signature_is_refused(signed, keys, data):
    (signed / SIGNATURE).write_bytes(data)
    with pytest.raises(VersionFault, match="do not use it"):
        read(signed, signed_by=keys[1])


def test_a_signature_that_says_otherwise_within_is_refused(signed, keys):
    text = (signed / SIGNATURE).read_text()
    start = text.index('"payload":') + 40
    (signed / SIGNATURE).write_text(text[:start] + ("A" if text[start] != "A" else "B") + text[start + 1 :])
    with pytest.raises(VersionFault, match="do not use it"):
        read(signed, signed_by=keys[1])


def test_a_second_envelope_is_not_read(signed, keys):
    told = json.loads((signed / SIGNATURE).read_bytes())
    payload = json.loads(base64.b64decode(told["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "0" * 64
    forged = {**told["dsseEnvelope"], "payload": base64.b64encode(json.dumps(payload).encode()).decode()}
    data = json.dumps({**told, "dsseEnvelope": forged, "dsse_envelope": told["dsseEnvelope"]}).encode()
    with pytest.raises(VersionFault, match="do not use it"):
        require_signature(signed, data, {MANIFEST: "0" * 64}, keys[1])


def test_files_that_were_swapped_after_the_check_are_not_the_signed_ones(signed, keys):
    data = (signed / SIGNATURE).read_bytes()
    with pytest.raises(VersionFault, match=r"do not use it: model\.json"):
        require_signature(signed, data, {"model.json": "0" * 64}, keys[1])


def test_a_key_of_another_kind_is_refused(signed, tmp_path):
    private, public = pair(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    with pytest.raises(ConfigError, match="must be a PEM file with a private key on P-256"):
        write(package(), tmp_path / "new", sign_with=private)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="must be a PEM file with a public key on P-256"):
        read(signed, signed_by=public)


@pytest.mark.parametrize("what", ["private", "text", "missing"])
def test_what_is_no_public_key_is_refused(signed, keys, tmp_path, what):
    (tmp_path / "text").write_text("a key, I swear")
    with pytest.raises(ConfigError, match="must be a PEM file with a public key"):
        read(signed, signed_by=keys[0] if what == "private" else tmp_path / what)


def test_an_encrypted_key_is_refused(tmp_path):
    key, locked = ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match="not encrypted"):
        write(package(), tmp_path / "new", sign_with=tmp_path / "key")


def test_without_the_extra_it_says_what_to_install(signed, keys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[sign\]'"):
        read(signed, signed_by=keys[1])
