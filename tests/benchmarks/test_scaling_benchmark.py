import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from tiny_runs import CONFIG_FILE, tiny

from sotalign_jax.benchmarks import programs, scaling
from sotalign_jax.config import ConfigError, validate

ROOT = Path(__file__).parents[2]
N, D = 64, 8


@pytest.mark.parametrize("memory", ["dense", "streamed"])
def test_klot_sends_column_vectors_and_the_gradient_of_the_texts(memory):
    compiled = programs.compiled_klot(N, D, 4, memory)
    traffic = scaling.traffic_of(compiled.as_text())
    # Streamed, the column sums at the plain row scalings come along.
    columns = 4 * N * (2 if memory == "streamed" else 1)
    assert traffic["iteration"] == {"all-reduce": columns}
    # How far the scalings have moved, twice; and, in a pass of its own if dense, the column sums.
    assert traffic["look"] == {"all-reduce": 8 if memory == "streamed" else 8 + 4 * N}
    assert set(traffic["once"]) == {"all-reduce"}
    assert 4 * N * D <= traffic["once"]["all-reduce"] < 4 * N * D + 100 * N
    held = programs.memory_of(compiled)
    assert held["arguments"] == 2 * 4 * (N // 4 * D + N * D)
    assert held["outputs"] >= 4 * (N // 4 * D + N * D)
    assert held["total"] == held["arguments"] + held["outputs"] + held["temporary"]


def test_one_device_sends_nothing():
    traffic = scaling.traffic_of(programs.compiled_klot(N, D, 1, "dense").as_text())
    assert traffic == {"iteration": {}, "look": {}, "absorption": {}, "once": {}}


def test_report(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    arguments = ["--devices", "2", "--n", str(N), "--d", str(D), "--config", str(CONFIG_FILE)]
    scaling.main([*arguments, "--memory", "dense", "--json", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("┏") == 1 and "a Sinkhorn iteration" in printed
    report = json.loads(path.read_text())
    rows = {(row["program"], row["devices"]): row for row in report["programs"]}
    assert set(rows) == {("KLOT", 2), ("step", 2)}
    # The tiny run has 64 unpaired texts a step.
    assert rows["step", 2]["traffic"]["iteration"] == {"all-reduce": 4 * 64}
    assert {"all-gather", "reduce-scatter"} <= set(rows["step", 2]["traffic"]["once"])


@pytest.mark.parametrize("resident", [pytest.param("always", marks=pytest.mark.slow), "never"])
def test_ahead_of_time_without_data(resident):
    config = tiny(data__name="files", data__resident=resident, data__n_unpaired=512)
    config.data.files.image = config.data.files.text = "no/such/file"
    report = scaling.run_aot(validate(config), [4], image_dim=24, text_dim=40)
    rows = {row["program"]: row for row in report["programs"]}
    assert set(rows) == ({"prepare", "step"} if resident == "always" else {"step"})
    pairs, unpaired = (64, 512) if resident == "always" else (48, 64)
    # By hand: a quarter of the rows; on every device all parameters (LayerNorm and layer of each
    # side, scale and bias), each with a momentum, and some counters.
    values = (pairs + unpaired) * (24 + 40) // 4
    values += 2 * (2 * (24 + 40) + (24 + 40) * 16 + 2 * 16 + 2)
    values += 2 * 512 // 4  # row potentials of both plans
    if resident == "always":
        values += 2 * unpaired * 8 // 4  # the teacher's view, which raw rows have not
    else:
        values += (24 + 40) * 8 + 2 * (24 + 40)  # the teacher's weights, and means for both
        values += 64  # which images these are
    found = rows["step"]["memory"]["arguments"]
    assert 0 <= found - 4 * values < 100


@pytest.mark.slow
def test_neighbours_are_compiled_for_and_not_searched():
    config = tiny(data__name="files", data__resident="always", data__n_unpaired=512)
    config.objective = "nnclr"
    config.data.files.image = config.data.files.text = "no/such/file"
    report = scaling.run_aot(validate(config), [4], image_dim=24, text_dim=40)
    (step,) = [row for row in report["programs"] if row["program"] == "step"]
    # By hand, as above: a quarter of the pairs and of five neighbours each; and on every device
    # who neighbours whom, on either side.
    values = (64 + 5 * 64) * (24 + 40) // 4 + 2 * 64 * 5
    values += 2 * (2 * (24 + 40) + (24 + 40) * 16 + 2 * 16 + 2)
    assert 0 <= step["memory"]["arguments"] - 4 * values < 100


@pytest.mark.slow
def test_fake_devices_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "sotalign_jax.benchmarks.scaling", "--n", "32", "--d", "4"]
    command += ["--devices", "2", "--config", str(CONFIG_FILE), "--json", str(path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert "KLOT" in done.stdout
    report = json.loads(path.read_text())
    assert [row["devices"] for row in report["programs"]] == [2, 2]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--devices", "0"], "devices: must be positive whole numbers"),
            (["--devices", "1,x"], "devices: must be positive whole numbers"),
            (["--n", "1"], "n must be at least 2"),
            (["--n", "9", "--devices", "2"], "n must be a multiple of devices, got 9 for 2"),
            (["--config", "no/such.py"], "config: there is no config file no/such.py"),
            (["--json", "no/such/file.json"], "--json: there is no directory"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            scaling.main(["--config", str(CONFIG_FILE), *arguments])
        assert message in capsys.readouterr().err

    def test_more_devices_than_a_process_has(self):
        with pytest.raises(ValueError, match=r"devices: 9 asked, but there are 8; .*XLA_FLAGS"):
            programs.check_devices([1, 9])

    def test_how_many_unpaired_rows(self):
        config = validate(ConfigDict({"data": {"name": "files"}}))
        with pytest.raises(ConfigError, match=r"config.data.n_unpaired: 0 takes all rows"):
            scaling.run_aot(config, [2])
        config.data.n_unpaired = 10
        with pytest.raises(ValueError, match="image_dim: must be at least 1, got 0"):
            scaling.run_aot(config, [2], image_dim=0)

    def test_a_config_file_that_fails(self, tmp_path):
        path = tmp_path / "mine.py"
        path.write_text("def get_config(arg=None):\n    return unknown\n")
        with pytest.raises(
            ConfigError, match=r"config: .*mine.py:2: name 'unknown' is not defined"
        ):
            programs.read_config(str(path))
        path.write_text("x = 1\n")
        with pytest.raises(ConfigError, match=r"config: .*no attribute 'get_config'"):
            programs.read_config(str(path))
