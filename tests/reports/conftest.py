"""A finished run on the embedded data, made once."""

import pytest
from report_runs import Finished, emoji_config, finish, snapshot, write_run

from sotalign_jax.reports import write_report


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("runs") / "emoji & co", emoji_config())
    results = finish(path, emoji_config())
    before = snapshot(path)
    return Finished(path, results, before, *write_report(path))
