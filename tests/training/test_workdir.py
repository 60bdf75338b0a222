"""The locks of run directories."""

import errno
import fcntl
import os

import pytest

from sotalign_jax import files
from sotalign_jax.training import workdir


def refusing(number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("shared", [False, True])
def test_the_file_of_a_lock_is_open_for_reading_and_writing(shared, monkeypatch, tmp_path):
    modes = []

    def flock(file, how):
        modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir.lock(tmp_path / "lock", shared=shared) as free:
        assert free and modes == [os.O_RDWR]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of_once(number, monkeypatch, tmp_path):
    files._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with (
        pytest.warns(UserWarning, match="its disk has no file locks; .* by --shard"),
        workdir.lock(tmp_path / "lock") as free,
    ):
        assert free
    with workdir.lock(tmp_path / "lock") as free:  # a second warning would be an error
        assert free


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES, errno.EIO])
def test_a_lock_that_fails_is_not_taken_for_a_free_one(number, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with (
        pytest.raises(OSError, match=r"cannot be locked: .*lock") as caught,
        workdir.lock(tmp_path / "lock"),
    ):
        pass
    assert caught.value.errno == number
