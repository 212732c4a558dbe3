from __future__ import annotations

import stat

import pytest

from shoal.comm.keys import JobKey
from shoal.errors import ConfigError


def test_a_key_survives_its_file_and_only_its_owner_can_read_it(tmp_path):
    key = JobKey.make()
    key.write(tmp_path / "key")
    assert JobKey.read(tmp_path / "key") == key
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_is_never_written_over_another(tmp_path):
    JobKey.make().write(tmp_path / "key")
    with pytest.raises(FileExistsError):
        JobKey.make().write(tmp_path / "key")


def test_the_secret_half_never_shows():
    key = JobKey.make()
    assert key.secret not in f"{key!r} {key}" and key.public in repr(key)


def test_every_job_has_a_key_of_its_own():
    assert JobKey.make() != JobKey.make()


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"public": 1, "secret": 2}'])
def test_a_file_that_holds_no_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        JobKey.read(tmp_path / "key")


def test_a_missing_key_says_where_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match="copy it from RUN/key"):
        JobKey.read(tmp_path / "key")
