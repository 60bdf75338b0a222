"""How processes find each other, and what SIGTERM does to a run."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import K8sCluster, cloud_tpu_cluster
from rich.console import Console
from tiny_runs import CONFIG_FILE, assert_same_outcome, records, results, tiny

from sotalign_jax import commands, sweeps, training
from sotalign_jax.training import distributed, loop, record
from sotalign_jax.training.distributed import Preempted, PreemptionWatch, Start, start
from sotalign_jax.training.metrics import MetricWriter

TESTS = Path(__file__).parents[1]
PYTHONPATH = f"{TESTS.parent}{os.pathsep}{TESTS}"
TIMEOUT = 180  # of a process, on a machine that does other things too

SETTINGS = {
    "SOTALIGN_COORDINATOR": "10.0.0.1:1234",
    "SOTALIGN_NUM_PROCESSES": "4",
    "SOTALIGN_PROCESS_ID": "0",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
GKE_TPU = {
    "TPU_WORKER_HOSTNAMES": "a,b,c,d",
    "TPU_WORKER_ID": "3",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}

DEFAULTS = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}


@pytest.fixture
def initialized(monkeypatch):
    """No cluster around; the arguments that jax.distributed.initialize would have got."""
    for name in list(os.environ):
        if name.startswith(("SOTALIGN_", "SLURM_", "KUBERNETES_", "JOB_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(distributed, "_check_port", lambda coordinator: None)
    monkeypatch.setattr(distributed, "_wait_for", lambda coordinator, timeout: None)
    monkeypatch.setattr(distributed, "_started", None)
    return calls


@pytest.fixture
def on_tpu(monkeypatch):
    """A Cloud TPU host, as far as jax can tell."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


def put(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


# ---- which way is taken


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        {"SOTALIGN_NUM_PROCESSES": "1"},
        SRUN | {"SOTALIGN_NUM_PROCESSES": "1"},
        SETTINGS | {"SOTALIGN_NUM_PROCESSES": "1"},
        SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # The shell of salloc: on the login node, and as a step of its own.
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
        # A batch script without srun.
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SRUN | {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},
        # A pod that belongs to no indexed Job.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=[
        "nothing",
        "torchrun",
        "turned off",
        "turned off in srun",
        "one process set",
        "srun of one task",
        "salloc",
        "interactive step",
        "sbatch",
        "batch step",
        "lone pod",
    ],
)
def test_one_process_starts_nothing(environment, initialized, monkeypatch):
    put(monkeypatch, environment)
    assert start() == Start("single", 0, 1)
    assert initialized == []


@pytest.mark.parametrize(
    ("environment", "expected", "method"),
    [
        (SETTINGS, Start("settings", 0, 4), "deactivate"),
        (SETTINGS | SRUN, Start("settings", 0, 4), "deactivate"),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": "3"}, Start("settings", 3, 4), "deactivate"),
        (SETTINGS | POD | {"SOTALIGN_PROCESS_ID": ""}, Start("settings", 2, 4), "deactivate"),
        (SRUN, Start("slurm", 5, 8), "slurm"),
        (SRUN | TORCHRUN, Start("slurm", 5, 8), "slurm"),
    ],
    ids=["settings", "settings in srun", "last", "settings in a pod", "srun", "srun and torchrun"],
)
def test_several_processes(environment, expected, method, initialized, monkeypatch):
    put(monkeypatch, environment)
    assert start() == expected
    (given,) = initialized
    assert given["cluster_detection_method"] == method
    assert given["initialization_timeout"] == 300
    if method == "deactivate":
        assert given["coordinator_address"] == "10.0.0.1:1234"
        assert (given["process_id"], given["num_processes"]) == expected[1:]


def test_arguments_go_before_the_environment(initialized, monkeypatch):
    put(monkeypatch, SETTINGS | {"SOTALIGN_START_TIMEOUT": "7"})
    assert start("[::1]:99", 3, 2) == Start("settings", 2, 3)
    assert start("host:99", timeout=11, heartbeat=13) == Start("settings", 0, 4)
    assert [call["coordinator_address"] for call in initialized] == ["[::1]:99", "host:99"]
    assert [call["initialization_timeout"] for call in initialized] == [7, 11]
    assert [call["heartbeat_timeout_seconds"] for call in initialized] == [100, 13]


def test_tpu_hosts_on_gke(initialized, on_tpu, monkeypatch):
    put(monkeypatch, GKE_TPU)
    assert start() == Start("tpu", 7, 8)
    assert initialized == [DEFAULTS | {"cluster_detection_method": "gketpu"}]
    put(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    put(monkeypatch, {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert start() == Start("single", 0, 1)


@pytest.mark.parametrize(
    ("hosts", "expected"), [(4, Start("tpu", 2, 4)), (1, Start("single", 0, 1))]
)
def test_tpu_vms(hosts, expected, initialized, on_tpu, monkeypatch):
    metadata = {
        "agent-worker-number": "2" if hosts > 1 else "0",
        "worker-network-endpoints": ",".join(f"uid:{i}:10.0.0.{i}" for i in range(hosts)),
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    assert start() == expected
    assert [call["cluster_detection_method"] for call in initialized] == ["gcetpu"] * (hosts > 1)


def test_tpu_hosts_asked_to_compute_on_cpu_are_alone(initialized, on_tpu, monkeypatch):
    put(monkeypatch, GKE_TPU)
    jax.config.update("jax_platforms", "cpu")
    assert start() == Start("single", 0, 1)


def unreachable(key):
    raise OSError("no route to host")


def test_a_tpu_without_metadata_says_how_to_go_on(initialized, on_tpu, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    with pytest.raises(ConnectionError, match=r"no route to host.*SOTALIGN_NUM_PROCESSES=1"):
        start()
    put(monkeypatch, {"SOTALIGN_NUM_PROCESSES": "1"})
    assert start() == Start("single", 0, 1)


def test_pods_of_an_indexed_job(initialized, monkeypatch):
    put(monkeypatch, POD)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(K8sCluster, "is_env_present", classmethod(lambda cls: True))
    monkeypatch.setattr(K8sCluster, "get_process_count", classmethod(lambda cls: 4))
    assert start() == Start("kubernetes", 2, 4)
    assert initialized == [DEFAULTS | {"cluster_detection_method": None}]

    def forbidden(cls):
        raise RuntimeError("Kubernetes API Error: 403")

    monkeypatch.setattr(K8sCluster, "get_process_count", classmethod(forbidden))
    with pytest.raises(ConnectionError, match=r"start \(kubernetes\): Kubernetes API Error: 403"):
        start()


# ---- what is refused


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SOTALIGN_COORDINATOR": "a:1"},
            r"num_processes \(SOTALIGN_NUM_PROCESSES\), process_id \(SOTALIGN_PROCESS_ID\): "
            "missing, while coordinator is given",
        ),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": ""}, r"process_id \(SOTALIGN_PROCESS_ID\): missing"),
        (SETTINGS | {"SOTALIGN_COORDINATOR": ""}, r"coordinator \(SOTALIGN_COORDINATOR\): missing"),
        ({"SOTALIGN_NUM_PROCESSES": "2"}, "coordinator .*, process_id .*: missing"),
        ({"SOTALIGN_PROCESS_ID": "0"}, "coordinator .*, num_processes .*: missing"),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": "4"}, r"must be less than num_processes \(4\), got 4"),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": "-1"}, "SOTALIGN_PROCESS_ID.*at least 0, got -1"),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": "x"}, "SOTALIGN_PROCESS_ID.*whole number, got 'x'"),
        ({"SOTALIGN_NUM_PROCESSES": "0"}, "SOTALIGN_NUM_PROCESSES.*at least 1, got 0"),
        (SETTINGS | {"SOTALIGN_COORDINATOR": "host"}, "must be host:port, got 'host'"),
        (SETTINGS | {"SOTALIGN_COORDINATOR": ":80"}, "must be host:port, got ':80'"),
        (SETTINGS | {"SOTALIGN_COORDINATOR": "a:99999"}, "must be host:port, got 'a:99999'"),
        (SETTINGS | {"SOTALIGN_START_TIMEOUT": "0"}, "SOTALIGN_START_TIMEOUT.*at least 1, got 0"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS: is set, and nothing says"),
        (POD, "JOB_COMPLETION_INDEX: is set, and nothing says.*SOTALIGN_COORDINATOR.*jax.k8s."),
    ],
)
def test_half_given_settings_are_refused(environment, message, initialized, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no kubernetes
    put(monkeypatch, environment)
    with pytest.raises(ValueError, match=message) as caught:
        start()
    assert "\n" not in str(caught.value)
    assert initialized == []


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_nobody_at_the_coordinators_address():
    port = free_port()
    with pytest.raises(TimeoutError, match=f"nobody answered at 127.0.0.1:{port} for 1 s"):
        start(f"127.0.0.1:{port}", 2, 1, timeout=1)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"process 0 cannot listen on port {port}.*in use"):
            start(f"127.0.0.1:{port}", 2, 0, timeout=1)


def test_a_start_after_computing_is_refused():
    jax.devices()
    with pytest.raises(ConnectionError, match=r"start \(settings\): .*must be called before"):
        start(f"127.0.0.1:{free_port()}", 2, 0, timeout=1)


# ---- two processes


def processes(command, count=2, **variables):
    """``count`` processes told of each other by the environment; outputs and exit statuses."""
    shared = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "JAX_PLATFORMS": "cpu",
        "SOTALIGN_COORDINATOR": f"127.0.0.1:{free_port()}",
        "SOTALIGN_NUM_PROCESSES": str(count),
        "SOTALIGN_START_TIMEOUT": str(TIMEOUT),
    }
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=shared | variables | {"SOTALIGN_PROCESS_ID": str(number)},
        )
        for number in range(count)
    ]
    try:
        finished = [(*process.communicate(timeout=TIMEOUT), process) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(output, errors, process.returncode) for output, errors, process in finished]


def test_two_processes_sum_and_agree_to_stop():
    program = """
        import os, signal
        import jax, numpy as np
        from jax.sharding import PartitionSpec as P
        from sotalign_jax.training.distributed import PreemptionWatch, from_first, start

        found = start()
        assert start() is found and jax.process_count() == found.process_count == 2
        assert jax.process_index() == found.process_index
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, P("data"))
        mine = np.array([found.process_index + 1.0], np.float32)
        rows = jax.make_array_from_process_local_data(sharding, mine)
        summed = jax.jit(jax.shard_map(
            lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        ))(rows)
        print("sum", float(summed[0]))
        print("first", from_first(lambda: {"index": found.process_index, "values": [0.1, None]}))
        for error in (OSError("a disk"), ValueError("a file")):
            def fails():
                raise error
            try:
                from_first(fails)
            except (OSError, ValueError) as caught:
                print("no", type(caught).__name__, caught)
        with PreemptionWatch() as watch:
            for step in range(10, 100, 10):
                if step == 30 and found.process_index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if watch.agreed(step):
                    print("stops at", step, watch.noticed)
                    break
            try:
                watch.agreed(step + found.process_index)
            except RuntimeError as error:
                print(error)
    """
    finished = processes([sys.executable, "-c", textwrap.dedent(program)])
    for number, (output, errors, status) in enumerate(finished):
        assert status == 0, errors
        assert "sum 3.0" in output
        assert "first {'index': 0, 'values': [0.1, None]}" in output
        for kind, message in (("OSError", "a disk"), ("ValueError", "a file")):
            here = f"no {kind} {message}" if number == 0 else f"no ValueError process 0: {message}"
            assert here in output
        assert f"stops at 30 {number == 1}" in output
        assert "processes are at different steps: [30, 31]" in output
        assert f"process {number} of 2 (settings): waiting for the others" in errors


def test_two_processes_fail_together_and_one_that_fails_alone_ends_the_other(tmp_path):
    """The last error would keep both for 300 s: one in jax's end, the other in a sum."""
    rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    rows[[3, 98], 1] = np.nan  # one in the half of each process
    np.save(tmp_path / "image.npy", rows)
    np.save(tmp_path / "text.npy", rows[:, :5])
    program = f"""
        import sys
        import jax, numpy as np
        from tiny_runs import tiny
        from sotalign_jax.config import validate
        from sotalign_jax.training import distributed, load_splits, train

        def main():
            found = distributed.start()
            me = found.process_index
            assert distributed.together(lambda: me) == me

            def fails_in_1():
                if me == 1:
                    raise OSError("no disk here")
            try:
                distributed.together(fails_in_1)
            except Exception as error:
                print(type(error).__name__, error)
            assert [int(x) for x in distributed.gather(np.int64(2**40 + me))] == [2**40, 2**40 + 1]

            fields = dict(data__name="files", data__n_pairs=100, mesh__devices=0)
            fields["data__n_unpaired"] = 0
            paths = {{f"data__files__{{s}}": rf"{tmp_path}/{{s}}.npy" for s in ("image", "text")}}
            try:
                load_splits(validate(tiny(objective="sail", **fields, **paths)))
            except ValueError as error:
                print("rows:", error)
            if me == 1:
                paths["data__files__text"] = "nowhere.npy"
            try:
                train(tiny(**fields, **paths), r"{tmp_path}/run", quiet=True)
            except ValueError as error:
                print("train:", error)
            sys.stdout.flush()
            if me == 1:
                raise FloatingPointError("loss is nan")
            for _ in range(100):
                distributed.gather(np.zeros(1))

        with distributed.quick_end():
            main()
    """
    first, second = processes([sys.executable, "-c", textwrap.dedent(program)])
    missing = "config.data.files.text: nowhere.npy: no such"
    alike = {line for line in first[0].splitlines() if line.startswith("rows: ")}
    assert alike == {line for line in second[0].splitlines() if line.startswith("rows: ")}
    assert re.search(
        r"image.npy .*: 2 of 100 rows hold NaN or Inf; the first is row \d", str(alike)
    )
    assert "ValueError process 1: no disk here" in first[0]
    assert "OSError no disk here" in second[0]
    assert f"train: process 1: {missing}" in first[0] and f"train: {missing}" in second[0]
    assert "loss is nan" not in first[1] and "FloatingPointError: loss is nan" in second[1]
    assert second[2] == 1 and first[2] not in (0, None)
    assert os.listdir(tmp_path / "run") == [".lock"]


def train_twice(tmp_path, patch, **variables):
    """``sotalign train`` in two processes, after ``patch`` in each; ends and outputs."""
    program = f"""
        import os, sys
        sys.argv = ["sotalign", "train", "--config={CONFIG_FILE}", "--workdir={tmp_path / "run"}",
                    "--config.objective=sail", "--config.mesh.devices=0", "--config.steps=3000"]
        from sotalign_jax.main import run
        from sotalign_jax.training import loop, record
        me = os.environ["SOTALIGN_PROCESS_ID"]
    """
    program = textwrap.dedent(program) + textwrap.dedent(patch) + "\nrun()\n"
    return processes([sys.executable, "-c", program], SOTALIGN_HEARTBEAT_TIMEOUT="15", **variables)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["0", "1"])
def test_an_error_of_one_in_training_ends_both(who, tmp_path):
    patch = f"""
    means = record.checked_means
    def failing(metrics, step):
        if me == "{who}" and step == 30:
            raise FloatingPointError("planted")
        return means(metrics, step)
    record.checked_means = failing
    """
    ends = train_twice(tmp_path, patch)
    failed, other = ends[int(who)], ends[1 - int(who)]
    assert failed[2] == 3, failed[1]
    assert "sotalign train: training stopped: planted" in failed[1].splitlines()
    assert other[2] not in (0, 3, None)
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_an_error_of_both_ends_each_with_its_own_line(tmp_path):
    patch = """
    def failing(config):
        raise ValueError("config.data: planted in " + me)
    loop.load_inputs = failing
    """
    for number, (_, errors, status) in enumerate(train_twice(tmp_path, patch)):
        assert status == 2
        assert errors.splitlines()[-1] == f"sotalign train: error: config.data: planted in {number}"


def test_a_single_process_ends_as_ever():
    for error in (SystemExit(2), SystemExit(0), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, distributed.quick_end():
            raise error
        assert caught.value is error
    with pytest.raises(OSError, match="mine"):
        distributed.together(lambda: (_ for _ in ()).throw(OSError("mine")))


def test_only_the_first_of_several_processes_prints(tmp_path, monkeypatch, capsys):
    results = {"test": {}, "teacher_test": {}, "selected_step": 1}
    monkeypatch.setattr(commands.training, "train", lambda *_, **__: results)
    for index in (1, 0):
        monkeypatch.setattr(distributed, "start", lambda index=index: Start("slurm", index, 2))
        table = []
        monkeypatch.setattr(commands, "add_scores", lambda *row, table=table: table.append(row))
        assert commands.train(tiny(), str(tmp_path / "run")) is results
        assert bool(table) == (index == 0)
        assert ("aligner saved in" in capsys.readouterr().out) == (index == 0)


def test_one_process_asks_itself():
    found = distributed.from_first(lambda: (1, 2))
    assert found == (1, 2)
    with pytest.raises(KeyError):
        distributed.from_first(lambda: {}["absent"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, None),
        (SETTINGS, None),
        (SETTINGS | {"SOTALIGN_PROCESS_ID": "3"}, Start("settings", 3, 4)),
        (SRUN, Start("slurm", 5, 8)),
        (SRUN | {"SLURM_PROCID": "0"}, None),
    ],
)
def test_process_0_does_alone_what_cannot_be_shared(
    environment, expected, initialized, monkeypatch
):
    put(monkeypatch, environment)
    assert distributed.left_to_first() == expected
    assert initialized == []  # beside a running training, nobody is called


def test_hosts_of_a_tpu_do_nothing_alone(initialized, on_tpu, monkeypatch):
    put(monkeypatch, GKE_TPU)
    with pytest.raises(ValueError, match=r"one of 8 hosts of a Cloud TPU.*JAX_PLATFORMS=cpu"):
        distributed.left_to_first()
    put(monkeypatch, SETTINGS)
    with pytest.raises(ValueError, match=r"one of 4 hosts of a Cloud TPU"):
        distributed.left_to_first()
    jax.config.update("jax_platforms", "cpu")
    assert distributed.left_to_first() is None


def test_a_host_of_a_tpu_by_itself(initialized, on_tpu, monkeypatch):
    own = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_HOST_BOUNDS": "1,1,1", "TPU_WORKER_ID": "0"}
    own |= {"TPU_WORKER_HOSTNAMES": "localhost"}
    gke = GKE_TPU | {"TPU_HOST_BOUNDS": "4,2,1", "TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}
    others = ("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_CHIPS_PER_HOST_BOUNDS", *own, *gke)

    def after(environment):
        with monkeypatch.context() as patch:
            for name in others:
                patch.delenv(name, raising=False)
            patch.setattr(os, "environ", environ := dict(environment))
            distributed.use_own_host()
        return environ

    assert after(gke) == own | {"TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1"}
    chips = {"TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1"}
    assert after(gke | chips) == own | chips | {"TPU_CHIPS_PER_PROCESS_BOUNDS": "2,4,1"}
    for kept in (
        gke | {"TPU_VISIBLE_CHIPS": "0"},
        gke | {"TPU_PROCESS_BOUNDS": "2,2,1"},
        gke | {"SOTALIGN_NUM_PROCESSES": "1"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"},
    ):
        assert after(kept) == kept
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    assert after({"A": "b"}) == {"A": "b"}
    jax.config.update("jax_platforms", "cpu")
    assert after(gke) == gke
    assert initialized == []


def test_half_given_settings_on_the_command_line(tmp_path, monkeypatch, initialized):
    put(monkeypatch, {"SOTALIGN_COORDINATOR": "a:1"})
    with pytest.raises(ValueError, match="missing, while coordinator is given"):
        commands.train(tiny(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the notice


def test_a_watch_notices_and_puts_the_earlier_handler_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("earlier"))
    try:
        with PreemptionWatch() as watch:
            assert not watch.noticed and not watch.agreed(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.noticed and watch.agreed(2) and not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["earlier"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_installed():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with PreemptionWatch() as watch:
            inside.append((signal.getsignal(signal.SIGTERM), watch.agreed(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
    assert signal.getsignal(signal.SIGTERM) is before


# ---- SIGTERM in a run


def quietly(config, workdir):
    return training.train(config, workdir, quiet=True)


def stop_at(monkeypatch, at, run):
    """SIGTERM while the record of step ``at`` is written; the step that the run stopped after."""
    write = MetricWriter.write

    def writing(self, step, metrics):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, step, metrics)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", writing)
        with pytest.raises(Preempted) as caught:
            run()
    assert signal.getsignal(signal.SIGTERM) is before
    return caught.value.step


def checkpoints(workdir):
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint_every": 20},
        {"checkpoint_every": 0, "eval_every": 0},
        {"checkpoint_every": 20, "select": "best"},
        {"checkpoint_every": 20, "data__resident": "never"},
    ],
    ids=["last", "no checkpoints", "best", "streamed"],
)
def test_a_run_stopped_by_sigterm_ends_as_an_uninterrupted_one(fields, tmp_path, monkeypatch):
    config = tiny(objective="sail", **fields)
    through, cut = tmp_path / "through", tmp_path / "cut"
    quietly(config, through)
    for step in (10, 30):
        assert stop_at(monkeypatch, step, lambda: quietly(config, cut)) == step
        assert max(checkpoints(cut)) == step
        assert not (cut / "results.json").exists()
        assert [line["step"] for line in records(cut)] == list(range(10, step + 1, 10))
    quietly(config, cut)
    assert_same_outcome(cut, through)
    # A checkpoint that was not due goes away, and with it the only trace.
    assert checkpoints(cut) == checkpoints(through)


def test_a_checkpoint_that_was_not_due_is_never_selected(tmp_path, monkeypatch):
    # Validated at every dispatch, and best where no checkpoint is due.
    real, scores = record.evaluate, {10: 0.9, 20: 0.3, 30: 0.8, 40: 0.2}
    steps = iter((10, 20, 30, 40, 40, 40))

    def evaluate(aligner, pairs):
        found = real(aligner, pairs)
        return found | {"mean_recall@1": scores[next(steps)]} if len(pairs) == 40 else found

    monkeypatch.setattr(record, "evaluate", evaluate)
    config = tiny(objective="sail", select="best", checkpoint_every=20, eval_every=10)
    for step in (10, 30):
        stop_at(monkeypatch, step, lambda: quietly(config, tmp_path))
    quietly(config, tmp_path)
    assert results(tmp_path)["selected_step"] == 20
    assert checkpoints(tmp_path) == {20, 40}


def test_sigterm_in_the_last_dispatch_lets_the_run_end(tmp_path, monkeypatch):
    save = record.Checkpoints.save

    def saving(self, state, value=None):
        if int(state.step) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, state, value)

    monkeypatch.setattr(record.Checkpoints, "save", saving)
    assert quietly(tiny(objective="sail"), tmp_path)["selected_step"] == 40
    assert (tmp_path / "results.json").exists()


def test_sigterm_before_the_first_step_stops_at_once(tmp_path, monkeypatch):
    load = loop.load_inputs

    def loading(config):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(config)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "load_inputs", loading)
        patch.setattr(loop, "run_resident", lambda *_: pytest.fail("trained"))
        with pytest.raises(Preempted, match="goes on from step 0"):
            quietly(tiny(objective="sail"), tmp_path)
    assert quietly(tiny(objective="sail"), tmp_path)["selected_step"] == 40


def test_sigterm_stops_a_comparison(tmp_path, monkeypatch):
    config = tiny(objective="sail", checkpoint_every=20)
    with config.unlocked():
        config.compare.methods.one = {"checkpoint_every": 20}
        config.compare.methods.two = {"checkpoint_every": 10}  # the same compiled step

    def compare(workdir):
        return sweeps.compare(config, workdir, console=Console(quiet=True))

    through = compare(tmp_path / "through")
    assert stop_at(monkeypatch, 30, lambda: compare(tmp_path / "cut")) == 30
    assert not list((tmp_path / "cut").glob("two/*/metrics.jsonl"))
    assert compare(tmp_path / "cut") == through


@pytest.mark.slow
def test_a_process_that_got_sigterm_exits_with_status_0_and_goes_on(tmp_path):
    fields = {"objective": "sail", "steps": 4_000, "log_every": 100, "select": "best",
              "checkpoint_every": 2_000, "eval_every": 0}  # fmt: skip
    through, cut = tmp_path / "through", tmp_path / "cut"

    def train():
        command = [sys.executable, "-m", "sotalign_jax", "train", f"--config={CONFIG_FILE}"]
        return subprocess.Popen(
            [*command, f"--workdir={cut}", *(f"--config.{k}={v}" for k, v in fields.items())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"},
        )

    def finish(process):
        output, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        return output

    process = train()
    deadline = time.monotonic() + TIMEOUT
    metrics = cut / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    output = finish(process)
    step = records(cut)[-1]["step"]
    assert 100 <= step < 4_000, "the run was over before it was told to stop"
    (line,) = [line for line in output.splitlines() if line.startswith("sotalign train:")]
    assert line.endswith(f"stopped by SIGTERM; the same command goes on from step {step}")
    assert max(checkpoints(cut)) == step and not (cut / "results.json").exists()
    assert f"resuming from step {step}" in finish(train())
    quietly(tiny(**fields), through)
    assert_same_outcome(cut, through)
