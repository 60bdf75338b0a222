"""Which points are run, when, by whom, and what becomes of those that fail."""

import contextlib
import io
import json
import os
import signal

import pytest
import tiny_sweep
from rich.console import Console

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps import load_sweep
from sotalign_jax.sweeps import run as module
from sotalign_jax.sweeps.points import SweepDir
from sotalign_jax.sweeps.run import SweepStopped, groups_of, run_sweep
from sotalign_jax.training.distributed import Preempted
from sotalign_jax.training.workdir import InUse, Workdir, lock, write_json

FILE = tiny_sweep.__file__


SCORES = {"mean_recall@1": 0.125, "mean_recall@10": 0.5}


class Planted:
    """A sweep whose training is planted."""

    def __init__(self, directory):
        self.home = SweepDir(directory / "home")
        self.sweep = load_sweep(FILE)
        self.calls = []  # keys of each call
        self.errors = {}  # by key: of one run
        self.refusals = {}  # by key: of the whole call
        self.during = lambda key: None
        self.printed = io.StringIO()

    def run(self, **options):
        console = Console(file=self.printed, width=140)
        return run_sweep(self.sweep, self.home.path, console=console, **options)

    def key(self, number):
        return self.sweep.points[number - 1].key

    def finish(self, number):
        directory = self.home.run(self.key(number))
        directory.mkdir(parents=True, exist_ok=True)
        results = {"val": SCORES, "test": SCORES, "seconds": 2.0}
        write_json(directory / "results.json", results)
        return results


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """`train_many` that trains nothing: what it was called with, and what it is to raise or do."""
    here = Planted(tmp_path)
    numbers = {point.key: point.number for point in here.sweep.points}

    def train_many(configs, workdirs, *, inputs, watch, on_done, quiet):
        keys = [path.name for path in workdirs]
        assert quiet and len(keys) == len(configs) == len(inputs)
        here.calls.append(keys)
        for key in keys:
            if key in here.refusals:
                raise here.refusals[key]
        for number, key in enumerate(keys):
            here.during(key)
            if watch.noticed:
                raise Preempted(5)
            error = here.errors.get(key)
            on_done(number, error if error is not None else here.finish(numbers[key]))

    monkeypatch.setattr(module, "train_many", train_many)
    monkeypatch.setattr(module.InputCache, "get", lambda self, config: None)
    monkeypatch.setattr(module, "_PATIENCE", (0.01, 0.02))
    monkeypatch.setattr(module, "_GRACE", 0.05)
    return here


def flat(calls):
    return sorted(key for keys in calls for key in keys)


def test_every_point_is_run_once_and_never_again(planted):
    outcome = planted.run()
    keys = [point.key for point in planted.sweep.points]
    assert flat(planted.calls) == sorted(keys)
    assert outcome == (keys, {}, [])
    lines = planted.printed.getvalue().splitlines()
    assert lines[0] == "6 runs" and len(lines) == 7
    assert lines[-1].startswith("6 of 6  ")
    assert all("val R@1  12.5 R@10  50.0  test R@1  12.5 R@10  50.0  (2 s)" in x for x in lines[1:])
    assert any("method=fast steps=" not in x and "method=fast" in x for x in lines)
    planted.calls.clear()
    assert planted.run() == outcome and planted.calls == []
    assert planted.printed.getvalue().splitlines()[-1] == "6 runs, 6 of them finished before"


def test_only_what_is_missing_is_run(planted):
    planted.home.start(planted.sweep)
    planted.finish(2)
    planted.run()
    assert flat(planted.calls) == sorted(planted.key(n) for n in (1, 3, 4, 5, 6))


def test_chosen_points_are_run(planted):
    outcome = planted.run(points=["5", planted.key(2)])
    assert flat(planted.calls) == sorted([planted.key(5), planted.key(2)])
    assert outcome.finished == [planted.key(2), planted.key(5)]


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_share_the_groups_whatever_is_finished(planted, size, shards):
    for i in range(shards):
        if i:
            planted.finish(1)  # by others, between the starts of two shards
        planted.run(shard=(i + 1, shards), size=size)
    assert flat(planted.calls) == sorted(point.key for point in planted.sweep.points)
    assert all(len(keys) <= size for keys in planted.calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": (0, 2)}, "shard: must be i/n with 1 <= i <= n, got 0/2"),
        ({"shard": (3, 2)}, "shard: must be i/n with 1 <= i <= n, got 3/2"),
        ({"size": 0}, "together: must be at least 1, got 0"),
        ({"points": ["9"]}, "point: '9' is no point of tiny_sweep"),
    ],
)
def test_wrong_options_are_refused_before_the_directory_is_made(planted, options, message):
    with pytest.raises(ConfigError, match=message):
        planted.run(**options)
    assert not planted.home.path.exists() and planted.calls == []


def test_groups_hold_points_that_may_run_together(planted):
    points = list(planted.sweep.points)
    for group in groups_of(points, 8):
        assert len({module.together_key(point.config) for point in group}) == 1
    # Rates 1e-3 and 1e-2 of one seed have the same rows.
    assert [[p.number for p in g] for g in groups_of(points, 2)] == [[1, 2], [3, 5], [4, 6]]


# ---- failures


def test_a_point_that_fails_is_kept_the_others_go_on_and_it_is_tried_again(planted):
    planted.errors[planted.key(3)] = FloatingPointError("loss is nan\nat step 3")
    outcome = planted.run()
    assert outcome.failed == {planted.key(3): "loss is nan at step 3"}
    assert len(outcome.finished) == 5 and outcome.left == []
    record = json.loads(planted.home.failure(planted.key(3)).read_text())
    assert record["error"] == "FloatingPointError" and record["message"] == "loss is nan at step 3"
    assert "method=fast" in record["point"] and record["traceback"]
    assert "failed  method=fast" in planted.printed.getvalue()
    planted.calls.clear()
    planted.errors.clear()
    outcome = planted.run()
    assert planted.calls == [[planted.key(3)]] and outcome.failed == {}
    assert not planted.home.failure(planted.key(3)).exists()


@pytest.mark.parametrize("error", [ValueError("bad rows"), OSError("no space")])
def test_a_group_that_fails_as_a_whole_is_run_one_by_one(planted, error):
    planted.refusals[planted.key(3)] = error
    outcome = planted.run()
    assert outcome.failed == {planted.key(3): str(error)} and len(outcome.finished) == 5
    assert [planted.key(3)] in planted.calls


def test_data_that_cannot_be_read_fail_the_points_that_need_them(planted, monkeypatch):
    def get(cache, config):
        if config.seed == 1:
            raise ValueError("no such\nfile")
        return None

    monkeypatch.setattr(module.InputCache, "get", get)
    outcome = planted.run()
    assert outcome.failed == {planted.key(n): "no such file" for n in (2, 4, 6)}
    assert outcome.finished == [planted.key(n) for n in (1, 3, 5)]


def test_a_defect_of_the_program_ends_the_sweep(planted):
    planted.refusals[planted.key(1)] = KeyError("x")
    with pytest.raises(KeyError):
        planted.run()


def test_sigterm_stops_the_sweep_which_then_goes_on(planted):
    def during(key):
        if len(flat(planted.calls)) and key == planted.key(4):
            os.kill(os.getpid(), signal.SIGTERM)

    planted.during = during
    with pytest.raises(
        SweepStopped, match=r"SIGTERM with \d of 6 runs done; the same command goes"
    ):
        planted.run(size=1)
    assert not planted.home.finished(planted.key(4))
    planted.during = lambda key: None
    assert len(planted.run(size=1).finished) == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- beside others


def test_points_of_others_are_left_until_all_else_is_done_and_then_waited_for(planted):
    theirs = planted.key(1)
    with contextlib.ExitStack() as other:
        planted.home.start(planted.sweep)
        assert other.enter_context(lock(planted.home.lock(theirs)))
        looked = []

        def during(key):
            assert key != theirs
            looked.append(key)
            if len(looked) == 5:
                planted.finish(1)

        planted.during = during
        outcome = planted.run(size=1)
    assert len(looked) == 5 and len(outcome.finished) == 6


def test_points_of_a_process_that_ended_are_taken_over(planted):
    theirs = planted.key(1)
    planted.home.start(planted.sweep)
    other = contextlib.ExitStack()
    assert other.enter_context(lock(planted.home.lock(theirs)))
    planted.during = lambda key: other.close() if key == planted.key(6) else None
    assert len(planted.run(size=1).finished) == 6
    assert planted.calls[-1] == [theirs]


def test_without_waiting_points_of_others_are_left(planted):
    planted.home.start(planted.sweep)
    with lock(planted.home.lock(planted.key(1))):
        outcome = planted.run(wait=False)
    assert outcome.left == [planted.key(1)] and len(outcome.finished) == 5


def test_a_look_at_a_point_does_not_keep_it_from_being_run(planted):
    planted.home.start(planted.sweep)
    with contextlib.ExitStack() as look:
        look.enter_context(lock(planted.home.lock(planted.key(1)), shared=True))
        planted.during = lambda key: look.close() if key == planted.key(6) else None
        outcome = planted.run(wait=False, size=1)
    assert outcome.left == [] and len(outcome.finished) == 6


def test_an_old_failure_of_a_point_that_runs_elsewhere_is_none_of_this_run(planted):
    planted.home.start(planted.sweep)
    write_json(planted.home.failure(planted.key(1)), {"message": "yesterday"})
    with lock(planted.home.lock(planted.key(1))):
        outcome = planted.run(wait=False)
    assert outcome.failed == {} and outcome.left == [planted.key(1)]


def test_what_failed_for_others_meanwhile_is_not_tried_again(planted):
    def during(key):
        if key == planted.key(1):
            write_json(planted.home.failure(planted.key(2)), {"message": "theirs"})

    planted.during = during
    outcome = planted.run(size=1)
    assert outcome.failed == {planted.key(2): "theirs"}
    assert [planted.key(2)] not in planted.calls
    planted.during = lambda key: None
    assert planted.run().failed == {}  # but at the next start it is


def test_what_others_finish_between_a_look_and_the_lock_is_not_run_again(planted, monkeypatch):
    real = module.lock

    @contextlib.contextmanager
    def slow(path):
        planted.finish(4)
        with real(path) as held:
            yield held

    monkeypatch.setattr(module, "lock", slow)
    planted.run(size=1)
    assert [planted.key(4)] not in planted.calls


def test_a_training_in_the_very_directory_is_waited_for(planted):
    planted.refusals[planted.key(2)] = InUse("another process is at work")
    original = planted.during

    def during(key):
        if key == planted.key(6):
            planted.refusals.clear()
        return original(key)

    planted.during = during
    outcome = planted.run(size=1)
    assert len(outcome.finished) == 6 and planted.calls.count([planted.key(2)]) == 2


def test_a_run_directory_in_use_says_so(planted):
    config = planted.sweep.points[0].config
    home = Workdir(planted.home.path / "run", config)
    with home.locked(), pytest.raises(InUse), home.locked():
        pass
