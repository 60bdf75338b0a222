"""``sotalign sweep``: the commands, kills, several processes at once, and jobs."""

import csv
import json
import os
import pickle
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_sweep
from forks import Forks
from local_processes import finish, start

from sotalign_jax import sweep_commands
from sotalign_jax.sweeps import load_sweep, run, submit
from sotalign_jax.sweeps.points import SweepDir
from sotalign_jax.training.distributed import PreemptionWatch
from sotalign_jax.training.workdir import lock

# What ml_collections loads config files with.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FILE = tiny_sweep.__file__
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def through(forks, tmp_path_factory):
    """The tiny sweep, run without interruption."""
    home = tmp_path_factory.mktemp("sweep") / "through"
    process = forks.start(*command(home))
    output = process.finish()
    assert process.status == 0, output
    return home, output


def command(home):
    """The tiny sweep in groups of two, for which all processes have one compiled program."""
    return "sweep", "run", FILE, f"--workdir={home}", "--together=2"


def starts(home):
    """How often each point of the tiny sweep was begun."""
    keys = load_sweep(FILE).runs()
    files = [home / "points" / key / "provenance.jsonl" for key in keys]
    return [len(file.read_text().splitlines()) for file in files]


def test_a_sweep_runs_its_points_and_ends_with_the_table(through):
    home, output = through
    lines = output.splitlines()
    assert lines[0] == "6 runs"
    assert sum("test R@1" in line for line in lines) == 6 and "6 of 6  method=" in output
    assert lines[-1] == "written: " + ", ".join(f"{home}/table.{k}" for k in ("md", "tex", "csv"))
    assert starts(home) == [1] * 6
    with open(home / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label.method"] for row in rows[::2]] == ["teacher", "slow", "fast"]
    assert {row["metric"] for row in rows} == {"test/t2i/recall@1", "test/mean_recall@1"}
    # The same by hand, from the runs' own files.
    sweep = load_sweep(FILE)
    runs = {
        p.number: json.loads((home / "points" / p.key / "results.json").read_text())
        for p in sweep.points
    }
    rates = {n: np.mean([runs[m]["val"]["mean_recall@1"] for m in (n, n + 1)]) for n in (3, 5)}
    best = max(rates, key=lambda n: rates[n])
    values = [runs[n]["test"]["mean_recall@1"] for n in (best, best + 1)]
    assert float(rows[-1]["mean"]) == pytest.approx(np.mean(values))
    assert float(rows[-1]["sd"]) == pytest.approx(np.std(values, ddof=1))
    assert json.loads(rows[-1]["chosen"]) == {"optimizer.learning_rate": {3: 1e-3, 5: 1e-2}[best]}
    teacher = [runs[n]["teacher_test"]["mean_recall@1"] for n in (3, 4)]
    assert float(rows[1]["mean"]) == pytest.approx(np.mean(teacher))


def test_killed_twice_it_ends_with_the_same_table(forks, through, tmp_path):
    home = tmp_path / "cut"
    rng = np.random.default_rng(7)
    killed = []
    for _ in range(2):
        process = forks.start(*command(home))
        seen = len(list(home.glob("points/*/provenance.jsonl")))
        while process.running() and len(list(home.glob("points/*/provenance.jsonl"))) == seen:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.send(signal.SIGKILL)
        process.finish()
        killed.append(process.status == -signal.SIGKILL)
    assert any(killed), "it was over before it was killed"
    last = forks.start(*command(home))
    output = last.finish()
    assert last.status == 0, output
    assert (home / "table.csv").read_bytes() == (through[0] / "table.csv").read_bytes()


def test_two_processes_at_once_never_run_a_point_twice(forks, through, tmp_path):
    home = tmp_path / "both"
    both = [forks.start(*command(home)) for _ in range(2)]
    outputs = [process.finish() for process in both]
    assert [process.status for process in both] == [0, 0], outputs
    assert starts(home) == [1] * 6
    assert sum("test R@1" in line for output in outputs for line in output.splitlines()) == 6
    assert (home / "table.csv").read_bytes() == (through[0] / "table.csv").read_bytes()


@pytest.mark.slow
def test_points_that_diverge_give_status_1_and_a_list(forks, tmp_path):
    home = tmp_path / "home"
    process = forks.start("sweep", "run", f"{FILE}:fails", f"--workdir={home}")
    output = process.finish()
    assert process.status == 1, output
    sweep = load_sweep(f"{FILE}:fails")
    keys = [sweep.points[n - 1].key for n in (5, 6)]
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert line.startswith(f"failed: point 5, 6 ({', '.join(keys)}): train/")
    assert "Traceback" not in output and not (home / "table.csv").exists()
    assert [SweepDir(home).state(key) for key in sweep.runs()] == ["finished"] * 4 + ["failed"] * 2
    assert "at step" in json.loads(SweepDir(home).failure(keys[0]).read_text())["message"]


@pytest.mark.slow
def test_sigterm_stops_a_sweep_and_the_same_command_goes_on(forks, through, tmp_path):
    home = tmp_path / "home"
    process = forks.start(*command(home))
    while process.running() and not list(home.glob("points/*/results.json")):
        time.sleep(0.002)
    process.send(signal.SIGTERM)
    output = process.finish()
    assert process.status == 0, output
    assert "sotalign sweep: stopped by SIGTERM with " in output
    assert "the same command goes on" in output.splitlines()[-1]
    assert not (home / "table.csv").exists()
    again = forks.start(*command(home))
    output = again.finish()
    assert again.status == 0, output
    assert (home / "table.csv").read_bytes() == (through[0] / "table.csv").read_bytes()


def test_points_that_fail_give_status_1_and_are_named_by_their_messages(
    tmp_path, here, monkeypatch
):
    def get(cache, config):
        raise ValueError("no rows" if config.seed else "no file")

    monkeypatch.setattr(run.InputCache, "get", get)
    status, out, err = here("sweep", "run", FILE, f"--workdir={tmp_path / 'home'}")
    assert status == 1 and err == ""
    keys = list(load_sweep(FILE).runs())
    assert out.splitlines()[-2:] == [
        f"failed: point 1, 3, 5 ({', '.join(keys[::2])}): no file",
        f"failed: point 2, 4, 6 ({', '.join(keys[1::2])}): no rows",
    ]
    assert not (tmp_path / "home" / "table.csv").exists()


# ---- the other commands


def test_status_says_how_far_each_point_is(through, tmp_path, here):
    home, _ = through
    status, out, _ = here("sweep", "status", FILE, f"--workdir={home}")
    assert status == 0 and "6 runs: 6 finished" in out
    for point in load_sweep(FILE).points:
        assert point.key in out
    assert out.count("10/10") == 2 and out.count("20/20") == 4
    status, _, err = here("sweep", "status", FILE, f"--workdir={tmp_path}")
    assert status == 2 and "holds no sweep" in err


def test_status_of_failures_and_of_points_that_are_gone(tmp_path, here):
    home = SweepDir(tmp_path / "home")
    home.start(load_sweep(FILE))
    keys = list(load_sweep(FILE).runs())
    home.failure(keys[0]).write_text('{"message": "loss is nan"}')
    status, out, _ = here("sweep", "status", FILE, f"--workdir={home.path}")
    assert status == 0 and "6 runs: 1 failed, 5 waiting" in out
    assert f"failed: {keys[0]}: loss is nan" in out
    record = json.loads(home.record.read_text())
    record["earlier"] = [{"key": "0" * 12}]
    home.record.write_text(json.dumps(record))
    _, out, _ = here("sweep", "status", FILE, f"--workdir={home.path}")
    assert "1 earlier points are not in the file any more" in out


def test_table_writes_three_files_and_shows_the_papers_figures_when_asked(through, here):
    home, _ = through
    before = (home / "table.csv").read_bytes()
    for name in ("md", "tex", "csv"):
        (home / f"table.{name}").unlink()
    status, out, _ = here("sweep", "table", FILE, f"--workdir={home}")
    assert status == 0 and "A tiny sweep" in out and "30.3" not in out
    assert "Chosen on validation (mean R@1): fast: learning rate" in out
    assert (home / "table.csv").read_bytes() == before
    assert "\\begin{tabular}{lrr}" in (home / "table.tex").read_text()
    assert "30.3" not in (home / "table.md").read_text()
    status, out, _ = here("sweep", "table", FILE, f"--workdir={home}", "--paper")
    assert status == 0 and "30.3" in out and "30.3" in (home / "table.md").read_text()
    assert "0.303" in (home / "table.csv").read_text()
    assert here("sweep", "table", FILE, f"--workdir={home}")[0] == 0
    assert (home / "table.csv").read_bytes() == before


def test_plot_draws_the_sweep(through, here):
    home, _ = through
    status, out, _ = here("sweep", "plot", FILE, f"--workdir={home}")
    assert (
        status == 0
        and out
        == "written: " + ", ".join(f"{home}/plot.{kind}" for kind in ("pdf", "png", "svg")) + "\n"
    )
    svg = (home / "plot.svg").read_text()
    for text in (">teacher<", ">slow<", ">fast<", ">learning rate<", "mean R@1 (%)"):
        assert text in svg


def test_the_directory_remembers_what_was_set_beside_the_file(tmp_path, here):
    home = SweepDir(tmp_path / "home")
    sweep = load_sweep(FILE, {"model.scale": 15.0})
    home.start(sweep)
    directory = home.run(sweep.points[0].key)
    directory.mkdir()
    metrics = {"mean_recall@1": 0.5, "t2i/recall@1": 0.5}
    (directory / "results.json").write_text(json.dumps({"test": metrics, "val": metrics}))
    place = f"--workdir={home.path}"
    assert "1 finished, 5 waiting" in here("sweep", "status", FILE, place)[1]
    other = "--config.model.scale=16"
    message = f"{home.path} holds this sweep with --config.model.scale=15.0, not with {other}"
    for verb in ("run", "status", "table", "plot"):
        status, out, err = here("sweep", verb, FILE, place, other)
        assert status == 2 and out == "" and message in err
    status, _, err = here("sweep", "run", FILE, place)
    assert status == 2 and "scale=15.0, not with nothing set beside the file; give the same" in err
    # What changes nothing of a run may differ.
    same = ("--config.model.scale=15", "--config.metrics.tensorboard=True")
    assert "1 finished, 5 waiting" in here("sweep", "status", FILE, place, *same)[1]


# ---- schedulers


def test_print_shows_a_command_for_every_point_that_is_not_finished(tmp_path, here):
    home = SweepDir(tmp_path / "my home")
    arguments = ("sweep", "run", FILE, f"--workdir={home.path}", "--config.model.scale=15.0")
    status, out, _ = here(*arguments, "--print")
    assert status == 0 and not home.path.exists()
    sweep = load_sweep(FILE, {"model.scale": 15.0})
    there = f"cd {shlex.quote(os.getcwd())} && "  # for relative paths of data
    assert all(line.startswith(there) for line in out.splitlines())
    commands = [shlex.split(line.removeprefix(there)) for line in out.splitlines()]
    assert commands == [["sotalign", *arguments, f"--point={key}"] for key in sweep.runs()]
    home.start(sweep)
    key = sweep.points[0].key
    home.run(key).mkdir()
    (home.run(key) / "results.json").write_text("{}")
    out = here(*arguments, "--print")[1]
    assert len(out.splitlines()) == 5 and key not in out
    # The commands are those of single points.
    status, out, _ = here(*commands[1][1:], "--print")
    assert status == 0 and out.splitlines() == [there + shlex.join(commands[1])]


def test_jobs_run_the_points_of_a_sweep(tmp_path, here, forks):
    home = tmp_path / "home"
    options = "--slurm_options=cluster=local,timeout_min=5"
    jobs = ("sweep", "run", f"{FILE}:one", f"--workdir={home}", "--slurm", options)
    process = forks.start(*jobs)
    output = process.finish()
    assert process.status == 0, output
    (line,) = output.splitlines()
    assert line.startswith("submitted: job ")
    key = load_sweep(f"{FILE}:one").points[0].key
    deadline = time.monotonic() + 120
    while not (home / "table.csv").exists():
        assert time.monotonic() < deadline, [f.read_text() for f in (home / "slurm").glob("*.err")]
        time.sleep(0.05)
    assert SweepDir(home).finished(key)
    (out,) = (home / "slurm").glob("*_log.out")
    assert "1 of 1" in out.read_text()
    status, out, _ = here(*jobs)
    assert status == 0 and out == "nothing to submit, all runs are finished\n"


@pytest.fixture
def in_a_job(monkeypatch):
    """As inside a job of submitit: what its handler was called with."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "1")
    monkeypatch.setattr(submit.distributed, "start", lambda: None)
    calls = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, frame: calls.append("queued"))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_that_is_preempted_saves_and_is_then_queued_again(
    number, in_a_job, tmp_path, monkeypatch
):
    def run_sweep(*_, **__):
        with PreemptionWatch() as watch:
            os.kill(os.getpid(), number)
            assert watch.noticed
            in_a_job.append("saved")
            raise run.SweepStopped(0, 1)

    monkeypatch.setattr(submit, "run_sweep", run_sweep)
    key = load_sweep(FILE).points[0].key
    assert submit._Job(FILE, {}, str(tmp_path / "home"), 4)([key]) == []
    assert in_a_job == ["saved", "queued"]
    os.kill(os.getpid(), number)  # while nothing is run, at once
    assert in_a_job == ["saved", "queued", "queued"]


def test_a_job_leaves_out_points_that_the_file_has_no_more(in_a_job, monkeypatch, capsys):
    def run_sweep(sweep, workdir, *, points, size):
        return run.Outcome(points, {}, [])

    monkeypatch.setattr(submit, "run_sweep", run_sweep)
    job = submit._Job(FILE, {}, "/none", 4)
    key = load_sweep(FILE).points[0].key
    assert job(["0" * 12, key]) == [key]
    assert "the file has them no more: 000000000000" in capsys.readouterr().out
    assert job(["0" * 12]) == []


def test_what_sbatch_refuses_is_an_error_of_one_line(tmp_path, here, monkeypatch):
    submitit = submit._submitit()

    def map_array(*_):
        raise submitit.core.utils.FailedJobError("sbatch: error:\nInvalid partition")

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)
    place = f"--workdir={tmp_path / 'home'}"
    options = "--slurm_options=cluster=local,timeout_min=5"
    status, _, err = here("sweep", "run", FILE, place, "--slurm", options)
    assert status == 2
    assert err == "sotalign sweep: error: --slurm: sbatch: error: Invalid partition\n"


@pytest.mark.parametrize(("more", "times"), [({}, 1_000), ({"local_max_num_timeout": 7}, 7)])
def test_a_job_may_run_out_of_time_often(more, times, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        submit._submitit().AutoExecutor,
        "map_array",
        lambda self, job, groups: found.append(self) or [],
    )
    options = {"cluster": "local", "timeout_min": 5} | more
    submit.submit(load_sweep(FILE), tmp_path / "home", options=options)
    (executor,) = found
    assert executor._executor.max_num_timeout == times
    assert executor.parameters["timeout_min"] == 5


def test_points_left_to_others_give_status_75(tmp_path, here, monkeypatch):
    monkeypatch.setattr(run, "_GRACE", 0.0)
    home = SweepDir(tmp_path / "home")
    sweep = load_sweep(FILE)
    home.start(sweep)
    key = sweep.points[0].key
    with lock(home.lock(key)):
        status, out, _ = here("sweep", "run", FILE, f"--workdir={home.path}", "--point=1")
    assert status == 75 and out.splitlines()[-1] == f"left to other processes: {key}"


def test_a_job_that_is_out_of_time_is_queued_again_as_it_was():
    job = pickle.loads(pickle.dumps(submit._Job(FILE, {"steps": 3}, "/home", 4)))
    again = job.checkpoint(["key"])
    assert again.function is job and again.args == (["key"],)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("timeout_min", "--slurm_options: 'timeout_min': must be NAME=VALUE"),
        ("slurm_partition=gpu", "--slurm_options: timeout_min: must be the longest time of a job"),
        ("cluster=local,slurm_time=9", "--slurm_options: timeout_min: must be the longest"),
        ("slurm_time=9:00:00", "(what is not finished by then is queued again), got '9:00:00'"),
        ("cluster=local,timeout_min=long", "is queued again), got 'long'"),
        ("cluster=local,timeout_min=3,nonsense=1", "--slurm: Parameter 'nonsense' need to be"),
        ("cluster=local,timeout_min=3,mem_gb=x", '--slurm: Parameter "mem_gb" expected type'),
        ("cluster=elsewhere,timeout_min=3", "--slurm: AutoExecutor doesn't know any executor nam"),
        ("timeout_min=5", '--slurm: Could not detect "srun", are you indeed on a slurm cluster'),
    ],
)
def test_options_that_submitit_does_not_take_are_errors(option, message, tmp_path, here):
    status, out, err = here(
        "sweep",
        "run",
        FILE,
        f"--workdir={tmp_path / 'home'}",
        "--slurm",
        f"--slurm_options={option}",
    )
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("module", "command", "message"),
    [
        ("submitit", ("run", "--slurm"), "--slurm: install the extra, sotalign-jax[slurm]"),
        ("matplotlib", ("plot",), "plot: install the extra, sotalign-jax[plots]"),
    ],
)
def test_a_missing_extra_is_named(module, command, message, through, here, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    verb, *more = command
    status, _, err = here("sweep", verb, FILE, f"--workdir={through[0]}", *more)
    assert status == 2 and err == f"sotalign sweep: error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "write sotalign sweep run|status|table|plot FILE.py --workdir=DIR"),
        (("rnu", FILE, "--workdir={tmp}/x"), "write sotalign sweep run|status|table|plot"),
        (("run",), "give the sweep's file, as in sotalign sweep run FILE.py"),
        (("run", FILE), "--workdir: this command needs it"),
        (("run", "{tmp}/none.py", "--workdir={tmp}/x"), "none.py"),
        (("run", FILE, FILE, "--workdir={tmp}/x"), "write sotalign sweep"),
        (("run", FILE, "--workdir={tmp}/x", "--shard=2"), "--shard: must be i/n, as in 1/4, got"),
        (("run", FILE, "--workdir={tmp}/x", "--point=77"), "point: '77' is no point of tiny_sweep"),
        (("run", FILE, "--workdir={tmp}/x", "--config.seed=3"), "--config.seed: the points"),
        (("run", FILE, "--workdir={tmp}/x", "--config.stesp=3"), "--config.stesp: no such field"),
        (("table", FILE, "--workdir={tmp}/x"), "holds no sweep"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_status_2(arguments, message, tmp_path, here):
    status, out, err = here("sweep", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("sotalign sweep: error: ") and message in err
    assert not (tmp_path / "x").exists()


def test_the_file_may_be_given_as_a_config(through, here):
    status, out, _ = here("sweep", "status", f"--config={FILE}", f"--workdir={through[0]}")
    assert status == 0 and "6 finished" in out
    argv = ["sotalign", "train", "run", "x.py"]
    assert sweep_commands.with_config_flag(argv) == argv


@pytest.mark.slow
def test_several_processes_may_be_needed_for_every_point(through, tmp_path):
    home = tmp_path / "home"
    arguments = ("sweep", "run", FILE, f"--workdir={home}", "--config.mesh.devices=0")
    first, second = finish(start(*arguments, processes=2))
    assert "6 of 6" in first and "written: " in first and "of 6" not in second
    assert starts(home) == [1] * 6
    with open(home / "table.csv") as found, open(through[0] / "table.csv") as expected:
        for one, other in zip(csv.DictReader(found), csv.DictReader(expected), strict=True):
            # One of the 50 test pairs may change places.
            assert float(one["mean"]) == pytest.approx(float(other["mean"]), abs=0.021)
    wrong = finish(start(*arguments, "--shard=3/2", processes=2), statuses=(2,))
    assert all("shard: must be i/n" in output for output in wrong)
