import json

import numpy as np
import pytest
from tiny_runs import CONFIG_FILE, tiny

from sotalign_jax.benchmarks import step as benchmark
from sotalign_jax.config import ConfigError, validate


def test_report(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    config = tmp_path / "one_device.py"
    config.write_text(
        "import tiny_runs\n"
        "def get_config(arg=None):\n"
        "    return tiny_runs.tiny(mesh__devices=1, log_every=5)\n"
    )
    benchmark.main(["--config", str(config), "--repeats", "3", "--json", str(path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("┏") == 1 and "The three largest costs with a name" in printed
    report = json.loads(path.read_text())
    assert report["steps_a_dispatch"] == 5 and report["rows_a_step"] == [48, 64, 64]
    assert len(report["seconds"]) == 3
    np.testing.assert_allclose(report["steps_per_second"], 5 / np.median(report["seconds"]))
    np.testing.assert_allclose(report["rows_per_second"], 176 * report["steps_per_second"])
    assert 1 <= report["metrics"]["train/student_iterations"] <= 500
    assert report["memory"]["temporary"] > 48 * 48 * 4
    parts = {part["name"]: part for part in report["parts"]}
    # Every part of a SOTAlign step with batches drawn from larger tables is seen.
    others = ("info_nce", "structure")  # scopes of other objectives
    known = {name for name, scope in benchmark.PARTS if scope not in others}
    assert set(parts) == known | {benchmark.OTHER}
    np.testing.assert_allclose(sum(part["share"] for part in parts.values()), 1.0)
    shares = [part["share"] for part in report["parts"]]
    assert shares == sorted(shares, reverse=True) and min(shares) > 0
    # Whatever was not recognised must not hide what the step spends its time on.
    assert parts[benchmark.OTHER]["share"] < 0.5


def test_what_ran_inside_an_op_is_not_its_own():
    events = [
        (0.0, 100.0, "while"),
        (10.0, 50.0, None),  # the runtime, which itself ran two ops
        (15.0, 20.0, "dot"),
        (35.0, 20.0, "add"),
        (70.0, 10.0, "dot"),
        (100.0, 7.0, "dot"),
    ]
    times = benchmark.self_times(reversed(events))
    assert times == {"while": 40.0, "dot": 37.0, "add": 20.0}


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(run)/while/body/jvp(divergence)/student_plan/jit(_solve_balanced)/exp", "student"),
        ("jit(run)/while/body/jvp(divergence)/teacher_plan/while/body/dot", "teacher"),
        ("transpose(jvp(divergence))/project/transpose", "projections"),
        ("jvp(siglip)/project/dot_general", "projections"),
        ("jvp(divergence)/jit(_contrast)/mul", "KLOT value and gradient"),
        ("jvp(divergence)/dot_general", "affinities"),
        ("transpose(jvp(siglip))/checkpoint/dot_general", "SigLIP"),
        ("transpose(jvp(info_nce))/dot_general", "InfoNCE"),
        ("jvp(structure)/jit(softmax)/exp", "similarities"),
        ("jit(run)/while/body/reduce_sum", "other"),
    ],
)
def test_part_of(op_name, part):
    assert benchmark.part_of(op_name).startswith(part)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--repeats", "0"], "repeats must be at least 1, got 0"),
            (["--config", "no/such.py"], "config: there is no config file no/such.py"),
            (["--json", "no/such/file.json"], "--json: there is no directory"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            benchmark.main(["--config", str(CONFIG_FILE), *arguments])
        assert message in capsys.readouterr().err

    def test_rows_that_are_not_held_on_the_device(self):
        config = validate(tiny(data__resident="never", mesh__devices=1))
        with pytest.raises(ConfigError, match=r"config.data.resident: .*'never' keeps them off"):
            benchmark.run(config)

    def test_a_profile_without_ops(self):
        with pytest.raises(RuntimeError, match="names no ops of jit_absent"):
            benchmark._profile(lambda: None, "jit_absent")
