import importlib.util
import json

import numpy as np
import pytest
import reference

from sotalign_jax.benchmarks import klot as benchmark

# Independent of any published module, and of ours: u and v updated as in any textbook.
TORCH_MODULE = """
import math
import torch

def plan_of(affinity, epsilon, count):
    scores = affinity / epsilon
    n, m = scores.shape
    left = torch.zeros(n)
    for _ in range(count):
        right = -math.log(m) - torch.logsumexp(scores + left[:, None], 0)
        left = -math.log(n) - torch.logsumexp(scores + right[None], 1)
    return torch.exp(scores + left[:, None] + right[None])

class KLOT(torch.nn.Module):
    def __init__(self, epsilon_student, epsilon_teacher, n_iter):
        super().__init__()
        self.settings = epsilon_student, epsilon_teacher, n_iter

    def forward(self, student, teacher):
        epsilon, teacher_epsilon, count = self.settings
        with torch.no_grad():
            plan = plan_of(student, epsilon, count)
            target = plan_of(teacher, teacher_epsilon, count)
            value = torch.sum(target * torch.log(target / plan))
        slope = torch.sum((plan - target) * student) / epsilon
        return value + slope - slope.detach()
"""
SINKHORN = """
def sinkhorn(cost, epsilon, max_iter):
    return plan_of(-cost, epsilon, max_iter), "a log"
"""


def test_affinities_are_cosines_of_real_features():
    student, teacher = benchmark.affinities(200)
    again = benchmark.affinities(200)
    for matrix, same in zip((student, teacher), again, strict=True):
        assert matrix.shape == (200, 200) and matrix.dtype == np.float32
        assert np.abs(matrix).max() <= 1 + 1e-6 and matrix.std() > 0.05
        np.testing.assert_array_equal(matrix, same)
    correlation = np.corrcoef(student.ravel(), teacher.ravel())[0, 1]
    assert 0.3 < correlation < 0.99
    assert not np.array_equal(benchmark.affinities(200, seed=1)[1], teacher)


def test_each_side_computes_klot():
    student, teacher = benchmark.affinities(60)
    value, gradient = reference.klot(student, teacher, 0.05, 0.01)
    ours = benchmark.ours(student, teacher, (1e-5, 1e-5))
    plain = benchmark.plain_loop(student, teacher)
    target = reference.sinkhorn(teacher, 0.01, iterations=100)
    plan = reference.sinkhorn(student, 0.05, iterations=100)
    found, slope = ours.call()
    np.testing.assert_allclose(found, value, rtol=1e-4)
    np.testing.assert_allclose(slope, gradient, atol=1e-3 * np.abs(gradient).max())
    found, slope = plain.call()
    np.testing.assert_allclose(found, np.sum(target * np.log(target / plan)), rtol=1e-4)
    np.testing.assert_allclose(slope, (plan - target) / 0.05, atol=1e-3 * np.abs(gradient).max())
    assert np.abs(plain.plans()[1] - target).sum() < 1e-4
    assert np.abs(ours.plans()[1] - reference.sinkhorn(teacher, 0.01)).sum() < 1e-3


def test_report_without_a_reference(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    path.write_text("before")
    benchmark.main(["--n", "64", "--repeats", "2", "--json", str(path)])
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    other, matched, default = report["contenders"]
    assert report["n"] == 64 and report["reference"] is None and report["cpus"] >= 1
    assert {"jax", "ott-jax", "numpy", "python"} <= set(report["versions"])
    assert "plain loop" in other["name"] and "plain loop" in printed
    for row in report["contenders"]:
        assert len(row["seconds"]) == 2
        np.testing.assert_allclose(row["median_seconds"], np.median(row["seconds"]))
        np.testing.assert_allclose(row["ratio"], other["median_seconds"] / row["median_seconds"])
    for plan in ("student", "teacher"):
        worst = max(*other["errors"][plan].values(), 2e-6)
        assert max(matched["errors"][plan].values()) <= worst
        assert max(default["errors"][plan].values()) < 1.1e-3
    assert [child.name for child in tmp_path.iterdir()] == ["numbers.json"]


def test_errors_are_those_of_the_plans():
    rows = np.array([[0.5, 0.1], [0.1, 0.3]])
    errors = benchmark._errors((rows, np.full((2, 2), 0.25)))
    np.testing.assert_allclose(errors["student"]["rows"], 0.2)
    np.testing.assert_allclose(errors["student"]["columns"], 0.2)
    assert errors["teacher"] == {"rows": 0.0, "columns": 0.0}


@pytest.mark.parametrize("with_sinkhorn", [True, False])
def test_a_torch_reference(tmp_path, with_sinkhorn):
    pytest.importorskip("torch")
    path = tmp_path / "module.py"
    path.write_text(TORCH_MODULE + (SINKHORN if with_sinkhorn else ""))
    report = benchmark.run(64, reference=path, repeats=1)
    other, matched, _ = report["contenders"]
    assert report["reference"] == "module.py" and "torch" in report["versions"]
    assert bool(other["errors"]) == with_sinkhorn
    student, teacher = benchmark.affinities(64)
    target = reference.sinkhorn(teacher, 0.01, iterations=100)
    plan = reference.sinkhorn(student, 0.05, iterations=100)
    np.testing.assert_allclose(other["value"], np.sum(target * np.log(target / plan)), rtol=1e-4)
    assert matched["value_difference"] < 0.02 * other["value"]
    assert matched["gradient_difference"] < 0.1 * report["largest_gradient"]
    if with_sinkhorn:
        columns = np.abs(target.sum(0) - 1 / 64).sum()
        np.testing.assert_allclose(other["errors"]["teacher"]["columns"], columns, rtol=0.05)


@pytest.mark.slow
def test_forms(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    arguments = ["--n", "48", "--repeats", "2", "--json", str(path)]
    products = ["float32", "bfloat16_3x"]
    more = ["--memory", "dense,streamed", "--precision", ",".join(products), "--devices", "2"]
    benchmark.main([*arguments, *more])
    printed = capsys.readouterr().out
    assert "temporary, a device" in printed and "bfloat16_3x" in printed
    forms = json.loads(path.read_text())["forms"]
    assert [form["memory"] for form in forms] == ["dense", "dense", "streamed", "streamed"]
    assert [form["precision"] for form in forms] == 2 * products
    value, _ = reference.klot(*benchmark.affinities(48), 0.05, 0.01)
    for form in forms:
        np.testing.assert_allclose(form["value"], value, rtol=1e-2)
        assert form["value_difference"] < 1e-3 and form["gradient_difference"] < 1e-3
        assert len(form["seconds"]) == form["devices"] == 2 and form["temporary_bytes"] > 0
        np.testing.assert_allclose(
            form["ratio"], forms[0]["median_seconds"] / form["median_seconds"]
        )


@pytest.mark.slow
def test_forms_only(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    more = ["--memory", "streamed", "--d", "40", "--forms-only", "--repeats", "1"]
    benchmark.main(["--n", "48", *more, "--json", str(path)])
    assert capsys.readouterr().out.count("┏") == 1
    report = json.loads(path.read_text())
    assert report["contenders"] == [] and report["peak_bytes"] > 50 * 2**20
    (form,) = report["forms"]
    image, text, teacher_image, teacher_text = (row[:, :40] for row in benchmark.embeddings(48))
    given = reference.cosines(teacher_image, teacher_text)
    value, _ = reference.klot(reference.cosines(image, text), given, 0.05, 0.01)
    np.testing.assert_allclose(form["value"], value, rtol=1e-2)
    assert len(form["seconds"]) == 1


class TestErrors:
    def test_a_missing_file(self, capsys):
        with pytest.raises(SystemExit):
            benchmark.main(["--n", "16", "--reference", "no/such/file.py"])
        assert "reference: there is no file" in capsys.readouterr().err

    def test_a_file_without_the_class(self, tmp_path):
        pytest.importorskip("torch")
        path = tmp_path / "empty.py"
        path.write_text("x = 1\n")
        with pytest.raises(ValueError, match=r"reference.*no class KLOT"):
            benchmark.run(16, reference=path)

    def test_torch_is_not_installed(self, tmp_path, monkeypatch):
        path = tmp_path / "module.py"
        path.write_text(TORCH_MODULE)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"reference.*needs torch"):
            benchmark.run(16, reference=path)

    @pytest.mark.parametrize("option,value", [("n", 1), ("repeats", 0)])
    def test_too_small(self, option, value):
        with pytest.raises(ValueError, match=f"{option} must be at least"):
            benchmark.run(**{"n": 16, option: value})

    def test_no_directory_for_the_numbers(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            benchmark.main(["--n", "16", "--json", str(tmp_path / "absent" / "numbers.json")])
        assert "--json: there is no directory" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--memory", "sparse"], "memory must be of dense, streamed, got 'sparse'"),
            (["--precision", "float32"], "--precision: is of the forms that --memory names"),
            (["--memory", "dense", "--precision", "half"], "precision must be 'float32' or"),
            (["--forms-only"], "--d, --forms-only: are of the forms that --memory names"),
            (["--memory", "dense", "--d", "0"], "d must be between 1 and 381, got 0"),
            (["--devices", "2"], "--devices: spreads the forms that --memory names"),
            (["--memory", "dense", "--devices", "x"], "devices: must be positive whole numbers"),
            (["--memory", "dense", "--devices", "3"], "n must be a multiple of devices, got 16"),
            (["--memory", "dense", "--devices", "16"], "devices: 16 asked, but there are 8"),
        ],
    )
    def test_forms_that_cannot_be(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            benchmark.main(["--n", "16", *arguments])
        assert message in capsys.readouterr().err
