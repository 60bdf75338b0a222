import json

import numpy as np
import pytest
from tiny_runs import CONFIG_FILE, from_teacher, tiny

from sotalign_jax.benchmarks import thresholds as benchmark
from sotalign_jax.config import ConfigError, validate

# At the teacher's usual epsilon a plan of so few rows is all but a permutation, and its potentials
# depend on the batch.
SMALL = {
    "steps": 20,
    "log_every": 5,
    "checkpoint_every": 0,
    "eval_every": 0,
    "loss__teacher_epsilon": 0.05,
}


@pytest.mark.slow
def test_table(tmp_path, capsys):
    config = tmp_path / "small.py"
    config.write_text(
        "import tiny_runs\n"
        f"def get_config(arg=None):\n    return tiny_runs.from_teacher(**{SMALL})\n"
    )
    path, runs = tmp_path / "numbers.json", tmp_path / "runs"
    arguments = ["--config", str(config), "--thresholds", "0.1,0.001", "--seeds", "2"]
    benchmark.main([*arguments, "--workdir", str(runs), "--json", str(path)])
    assert capsys.readouterr().out.count("┏") == 1
    rows = json.loads(path.read_text())["rows"]
    assert [(row["threshold"], row["start"]) for row in rows] == [
        (0.001, "cold"),
        (0.001, "warm"),
        (0.1, "cold"),
        (0.1, "warm"),
    ]
    tight, loose = rows[0], rows[2]
    assert set(tight["difference"].values()) == {0.0}
    for plan in ("student", "teacher"):
        assert tight["error"][plan] < 1e-3 < loose["error"][plan] < 0.1
        assert tight["iterations"][plan] > loose["iterations"][plan] >= 1
        # Started from potentials of the epoch before.
        assert rows[1]["iterations"][plan] < tight["iterations"][plan]
    for row in rows:
        assert row["seconds"] > 0 and set(row["scores"]) == {"0", "1"}
        for seed, score in row["scores"].items():
            home = runs / f"threshold_{row['threshold']:g}" / row["start"] / f"seed_{seed}"
            results = json.loads((home / "results.json").read_text())
            assert results["val"]["mean_recall@1"] == score
            np.testing.assert_allclose(
                row["difference"][seed], score - tight["scores"][seed], atol=1e-12
            )
    # Runs that are done are not repeated.
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}
    benchmark.main([*arguments, "--workdir", str(runs)])
    assert before == {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "sail"}, "config.objective: only 'sotalign'"),
        ({"loss__alpha": 0.0}, "config.objective: only 'sotalign'"),
        ({"loss__divergence": "cka"}, "config.objective: only 'sotalign'"),
        ({"loss__iterations": 7}, "config.loss.iterations: 7 is a fixed number"),
        ({"steps": 5}, r"config.steps: must be more than log_every \(5\)"),
        ({"loss__warm_student": 0.0, "loss__warm_teacher": 0.0}, "config.loss.warm_student"),
        ({"data__platonic__n_val": 0}, "config.data: has no validation pairs"),
    ],
)
def test_configs_with_nothing_to_measure(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        benchmark.run(validate(from_teacher(**(SMALL | fields))), [0.1], workdir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": []}, "thresholds: must be positive"),
        ({"thresholds": [0.1, -1.0]}, "thresholds: must be positive"),
        ({"starts": ["hot"]}, "starts: must be of cold, warm"),
        ({"starts": ["cold", "cold"]}, "starts: must be of cold, warm, each once"),
        ({"seeds": [1, 1]}, "seeds: must be distinct"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark.run(
            validate(tiny(**SMALL)), **({"thresholds": [0.1]} | arguments), workdir=tmp_path
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", "0.1,x"], "--thresholds: must be numbers"),
        (["--seeds", "0"], "--seeds: must be positive whole numbers"),
        (["--json", "no/such/file.json"], "--json: there is no directory"),
    ],
)
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--config", str(CONFIG_FILE), *arguments])
    assert message in capsys.readouterr().err
