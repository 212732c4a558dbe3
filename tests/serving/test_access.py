"""Who may ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.serving.access import Denied, Key

SECRET = "a-key-of-24-characters-ab"


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer " + SECRET.encode()), (b"x-api-key", SECRET.encode())])
def test_who_has_the_key_may_ask(header):
    Key(SECRET).check([(b"host", b"x"), header])


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "a key is needed"),
        ([(b"authorization", b"Basic abc")], "a key is needed"),
        ([(b"authorization", b"Bearer " + SECRET[:-1].encode())], "the key is wrong"),
        ([(b"x-api-key", b"\xff\x00")], "the key is wrong"),
    ],
)
def test_who_has_not_may_not(headers, reason):
    with pytest.raises(Denied, match=reason):
        Key(SECRET).check(headers)


def test_a_key_comes_from_a_file_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "key"
    path.write_text(SECRET + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others: chmod 600"):
        Key.read(path)
    path.chmod(0o600)
    monkeypatch.setenv("SOME_KEY", "x" * 20)
    for key, secret in ((Key.found(path, "SOME_KEY"), SECRET), (Key.found(None, "SOME_KEY"), "x" * 20)):
        assert key is not None
        key.check([(b"x-api-key", secret.encode())])
    assert Key.found(None, "NO_SUCH_KEY") is None


@pytest.mark.parametrize("secret", ["", "short", "ä" * 30])
def test_a_key_that_is_none_is_refused(secret):
    with pytest.raises(ConfigError, match="16 ASCII characters at least"):
        Key(secret)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Key.read(tmp_path / "none")


def test_a_key_is_in_no_message():
    assert SECRET not in repr(vars(Key(SECRET)))
