"""The command line: what it prints, what it refuses, and its exit status."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tiny_runs import CONFIG_FILE, tiny

import sotalign_jax
from sotalign_jax import commands, features
from sotalign_jax.features import platonic_world
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.training import embed_rows
from sotalign_jax.training.evaluate import CHUNK

# What ml_collections loads config files with.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(sotalign_jax.__file__).parents[1]


def run(*arguments):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sotalign_jax", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    commands.train(tiny(objective="sail"), str(workdir), Console(quiet=True))
    return workdir


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Test features of the world that `trained` saw, as files."""
    root = tmp_path_factory.mktemp("files")
    test = platonic_world(seed=0, n_pairs=64, n_unpaired=256, n_val=40, n_test=50).test
    assert test is not None
    for side, table in (("image", test.image), ("text", test.text)):
        np.save(root / f"{side}.npy", table.array())
    return root


# ---- processes


def test_a_whole_run_and_a_wrong_one(tmp_path):
    done = run(
        "train",
        f"--config={CONFIG_FILE}",
        f"--workdir={tmp_path / 'run'}",
        "--config.objective=sail",
        "--config.steps=20",
    )
    assert done.returncode == 0, done.stderr
    assert "Retrieval on the test pairs" in done.stdout and "teacher (cca)" in done.stdout
    assert f"aligner saved in {tmp_path / 'run' / 'aligner'}" in done.stdout
    assert "orbax" not in done.stderr and "checkpoint" not in done.stderr
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["objective"] == "sail" and recorded["steps"] == 20
    wrong = run(
        "train",
        f"--config={CONFIG_FILE}",
        f"--workdir={tmp_path / 'run'}",
        "--config.objective=sail",
    )
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    (line,) = [line for line in wrong.stderr.splitlines() if line.startswith("sotalign")]
    assert "another configuration (steps: 20 -> 40)" in line


def test_an_unknown_field_on_the_command_line():
    wrong = run("train", f"--config={CONFIG_FILE}", "--workdir=/nowhere", "--config.loss.alhpa=1")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "sotalign train: error: --config.loss.alhpa: no such field; did you mean loss.alpha?\n"
    )


# ---- flags and config files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config={config}"], "--workdir: this command needs it"),
        (["--workdir={tmp}/run"], "--config: this command needs it"),
        (["--config={tmp}/none.py", "--workdir={tmp}/run"], "No such file or directory"),
        (["--config={config}", "--workdir={tmp}/run", "--config.zzz=1"], "config.zzz: no such"),
        (["--config={config}", "--workdir={tmp}/run", "--config.loss=1"], "--config.loss=1: "),
        (["--config={config}", "--workdir={tmp}/run", "--config.steps=x"], "--config.steps=x: "),
        (["--config={config}", "--wrkdir={tmp}/run"], "'wrkdir'. Did you mean: workdir"),
        (["--config={config}", "--workdir={tmp}/run", "steps=3"], "steps=3: unexpected"),
        (["--config={tmp}/bad.py", "--workdir={tmp}/run"], "bad.py:4: no such field 'alhpa'"),
        (["--config={tmp}/type.py", "--workdir={tmp}/run"], "type.py:4: TypeError: "),
        (["--config={config}", "--workdir={tmp}/bad.py"], "workdir: {tmp}/bad.py is a file"),
        (["--config={config}", "--workdir={tmp}"], "workdir: {tmp} is not empty"),
        (
            ["--config={config}", "--workdir={tmp}/run", "--config.data.n_pairs=900",
             "--config.data.name=emoji"],
            "n_pairs: 900 asked",
        ),
        (
            ["--config={config}", "--workdir={tmp}/run", "--config.select=best",
             "--config.data.platonic.n_val=0"],
            "config.select: 'best' needs validation pairs",
        ),
        (
            ["--config={config}", "--workdir={tmp}/run", "--config.select_metric=mean_recall@3"],
            "config.select_metric: got 'mean_recall@3'",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_status_2(arguments, message, tmp_path, here):
    for name, body in (("bad", "config.loss.alhpa = 3"), ("type", "config.loss.alpha = 'a'")):
        (tmp_path / f"{name}.py").write_text(
            "from sotalign_jax.config import default_config\n"
            f"def get_config(arg=None):\n    config = default_config()\n    {body}\n"
        )
    places = {"config": CONFIG_FILE, "tmp": tmp_path}
    status, out, err = here("train", *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("sotalign train: error: ")
    assert message.format(**places) in err


def test_a_rate_that_blows_up_gives_status_3(tmp_path, here):
    status, _, err = here(
        "train", f"--config={CONFIG_FILE}", f"--workdir={tmp_path / 'run'}",
        "--config.objective=sail", "--config.optimizer.learning_rate=1e30",
    )  # fmt: skip
    assert status == 3
    assert err.count("\n") == 1
    assert err.startswith("sotalign train: training stopped: train/") and " at step " in err


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--help"], 0), (["trian"], 2)])
def test_usage(arguments, status, here):
    found, out, _ = here(*arguments)
    assert found == status
    for command in ("train", "compare", "evaluate", "embed", "fit-teacher", "report", "inspect"):
        assert f"sotalign {command} " in out


# ---- commands on a run


def test_evaluate_on_the_runs_own_test_pairs_and_on_files(trained, files, tmp_path, here):
    results = json.loads((trained / "results.json").read_text())
    own, other = tmp_path / "new" / "own.json", tmp_path / "files.json"
    status, out, _ = here("evaluate", f"--workdir={trained}", f"--out={own}")
    assert status == 0 and "50 images, 50 texts" in out
    given = [f"--image={files / 'image.npy'}", f"--text={files / 'text.npy'}"]
    assert here("evaluate", f"--workdir={trained}", f"--out={other}", *given)[0] == 0
    for path in (own, other):
        assert json.loads(path.read_text()) == pytest.approx(results["test"], abs=1e-6)
    status, _, err = here("evaluate", f"--workdir={trained}", given[0])
    assert status == 2 and "--image, --text: give both" in err
    status, _, err = here("evaluate", f"--workdir={trained}", f"--out={other}")
    assert status == 2 and "out: " in err and "exists" in err
    status, _, err = here("evaluate", f"--workdir={tmp_path}")
    assert status == 2 and "holds no aligner" in err


def test_embed_writes_stores_of_unit_rows_in_order(trained, files, tmp_path, here):
    status, out, _ = here("embed", f"--workdir={trained}", f"--out={tmp_path / 'own'}")
    assert status == 0 and "50 image rows, 16 columns" in out
    aligner = Aligner.load(trained / "aligner")
    for side in ("image", "text"):
        table = features.open_features(tmp_path / "own" / side)
        raw = np.load(files / f"{side}.npy")
        expected = getattr(aligner, f"embed_{side}")(raw)
        np.testing.assert_allclose(table.array(), expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(table.array(), axis=1), 1, atol=1e-5)
    one = ["embed", f"--workdir={trained}", f"--out={tmp_path / 'one'}"]
    assert here(*one, f"--text={files / 'text.npy'}")[0] == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["text"]
    # Nothing is written over, nor is half of what was asked written.
    both = [f"--image={files / 'image.npy'}", f"--text={files / 'text.npy'}"]
    status, _, err = here(*one, *both)
    assert status == 2 and "out: " in err and "exists" in err
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["text"]
    status, _, err = here(
        "embed", f"--workdir={trained}", f"--out={tmp_path / 'two'}",
        f"--image={files / 'image.npy'}", f"--text={files / 'image.npy'}",
    )  # fmt: skip
    assert status == 2 and "has 256 columns, but the aligner takes 192" in err
    assert not (tmp_path / "two").exists()


@pytest.fixture
def wide(tmp_path):
    """An aligner whose embeddings are much larger than the features, to tell the two apart."""
    aligner = Aligner(4, 3, 512, layer=LayerConfig("linear"), rngs=nnx.Rngs(0))
    aligner.save(tmp_path / "wide")
    return tmp_path / "wide", aligner


def random_rows(path, rows, dim=4):
    np.save(path, np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32))
    return str(path)


def embedding_peak(workdir, image, out):
    """Bytes that `embed` holds at once, beside what JAX holds."""
    tracemalloc.start()
    commands.embed(str(workdir), image=image, out=str(out), console=Console(quiet=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_embedding_more_rows_takes_no_more_memory(wide, tmp_path):
    workdir, _ = wide
    few = random_rows(tmp_path / "few.npy", 2 * CHUNK)
    many = random_rows(tmp_path / "many.npy", 6 * CHUNK)
    embedding_peak(workdir, few, tmp_path / "compiled")
    peak = embedding_peak(workdir, few, tmp_path / "few")
    # Four more chunks of embeddings are 64 MiB.
    assert embedding_peak(workdir, many, tmp_path / "many") < peak + 2**22


def test_chunks_change_no_byte_of_a_store(wide, tmp_path):
    workdir, aligner = wide
    path = random_rows(tmp_path / "image.npy", 9 * CHUNK + 5)
    commands.embed(str(workdir), image=path, out=str(tmp_path), console=Console(quiet=True))
    table = features.open_features(path)
    features.write_store(
        tmp_path / "whole",
        embed_rows(aligner, "image", table),
        encoder=f"aligner of {workdir}",
        normalized=True,
        source=table.name,
        dtype="float32",
    )
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == ["features-00000.npy", "features-00001.npy", "manifest.json"]
    for name in names:
        whole, chunked = (tmp_path / kind / name for kind in ("whole", "image"))
        assert chunked.read_bytes() == whole.read_bytes()


def test_an_embedding_that_stops_leaves_nothing(wide, tmp_path, monkeypatch):
    workdir, _ = wide
    path = random_rows(tmp_path / "image.npy", 3 * CHUNK)
    module = sys.modules["sotalign_jax.training.evaluate"]  # its name is also a function's
    real, seen = module._embed, []

    def embed(*arguments):
        if len(seen) == 2:
            (partial,) = (tmp_path / "out").iterdir()
            seen.append(sum(file.stat().st_size for file in partial.iterdir()))
            raise KeyboardInterrupt
        seen.append(None)
        return real(*arguments)

    monkeypatch.setattr(module, "_embed", embed)
    with pytest.raises(KeyboardInterrupt):
        commands.embed(
            str(workdir), image=path, out=str(tmp_path / "out"), console=Console(quiet=True)
        )
    assert seen[2] >= 4 * 512 * CHUNK  # rows were written as they came
    assert not list((tmp_path / "out").iterdir())


def test_embedding_shows_how_far_it_is(wide, tmp_path):
    workdir, _ = wide
    path = random_rows(tmp_path / "image.npy", 2 * CHUNK + 1)
    log = Console(file=io.StringIO(), width=140)
    commands.embed(str(workdir), image=path, out=str(tmp_path), console=log)
    assert log.file.getvalue().splitlines()[:3] == [
        f"image rows {rows}/{2 * CHUNK + 1}" for rows in (CHUNK, 2 * CHUNK, 2 * CHUNK + 1)
    ]
    screen = Console(file=io.StringIO(), width=140, force_terminal=True)
    texts = random_rows(tmp_path / "text.npy", 50, 3)
    commands.embed(str(workdir), text=texts, out=str(tmp_path), console=screen)
    assert "text rows" in screen.file.getvalue() and "50/50" in screen.file.getvalue()


def test_evaluation_shows_how_far_it_is_and_checks_both_sides_first(wide, tmp_path):
    workdir, _ = wide
    image = random_rows(tmp_path / "image.npy", CHUNK // 2 + 1)
    text = random_rows(tmp_path / "text.npy", CHUNK // 2 + 1, 3)
    log = Console(file=io.StringIO(), width=140)
    commands.evaluate(str(workdir), image, text, console=log)
    assert log.file.getvalue().splitlines()[:2] == [
        f"rows {rows}/{CHUNK + 2}" for rows in (CHUNK // 2 + 1, CHUNK + 2)
    ]
    log = Console(file=io.StringIO(), width=140)
    with pytest.raises(ValueError, match=r"text: .* has 4 columns, but the aligner takes 3"):
        commands.evaluate(str(workdir), image, image, console=log)
    assert log.file.getvalue() == ""


def test_fit_teacher_saves_an_aligner_that_evaluates_like_the_runs_teacher(trained, tmp_path, here):
    arguments = ["fit-teacher", f"--config={CONFIG_FILE}", f"--out={tmp_path / 'teacher'}"]
    status, out, _ = here(*arguments)
    assert status == 0 and "Retrieval of the cca teacher" in out
    status, _, _ = here(
        "evaluate", f"--workdir={tmp_path / 'teacher'}", f"--out={tmp_path / 'scores.json'}"
    )
    assert status == 0
    expected = json.loads((trained / "results.json").read_text())["teacher_test"]
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(expected, abs=1e-6)
    # A trained run is not to be replaced by its teacher.
    before = (trained / "aligner" / "aligner.safetensors").read_bytes()
    status, _, err = here("fit-teacher", f"--config={CONFIG_FILE}", f"--out={trained}")
    assert status == 2 and "out: " in err and "exists" in err
    assert (trained / "aligner" / "aligner.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "embed", "fit-teacher"])
def test_of_several_processes_the_first_alone_writes(command, trained, tmp_path, here, monkeypatch):
    out = tmp_path / "out"
    source = f"--config={CONFIG_FILE}" if command == "fit-teacher" else f"--workdir={trained}"
    monkeypatch.setenv("SOTALIGN_COORDINATOR", "127.0.0.1:1")  # nobody is there, nobody is called
    monkeypatch.setenv("SOTALIGN_NUM_PROCESSES", "2")
    monkeypatch.setenv("SOTALIGN_PROCESS_ID", "1")
    status, printed, errors = here(command, source, f"--out={out}")
    assert (status, errors) == (0, "") and not out.exists()
    assert printed == f"sotalign {command}: left to process 0 of 2 (settings)\n"
    monkeypatch.setenv("SOTALIGN_PROCESS_ID", "0")
    assert here(command, source, f"--out={out}")[0] == 0 and out.exists()
    monkeypatch.setenv("SOTALIGN_PROCESS_ID", "2")
    status, _, errors = here(command, source, f"--out={out}")
    assert status == 2 and "process_id (SOTALIGN_PROCESS_ID): must be less than" in errors


def test_inspect_describes_features_aligners_and_runs(trained, files, tmp_path, here):
    rows = np.load(files / "image.npy")
    rows[3] = np.nan
    rows[4:6] = 0
    rows[:, 7] = 2.5
    np.save(tmp_path / "odd.npy", rows)
    status, out, _ = here("inspect", tmp_path / "odd.npy", trained, trained / "aligner")
    assert status == 0
    shown = " ".join(out.split())
    for part in (
        "50 x 256",
        "rows with NaN or Inf │ 1",
        "sail from a random start",
        "platonic, 64 pairs",
        "40 of 40",
        "image_dim │ 256",
    ):
        assert part in shown, out
    status, _, err = here("inspect")
    assert status == 2 and "give one or more paths" in err
    status, _, err = here("inspect", tmp_path / "none.npy")
    assert status == 2 and "none.npy" in err and err.count("\n") == 1


def test_report_writes_a_page_and_nothing_over_what_is_no_page(trained, tmp_path, here):
    pytest.importorskip("matplotlib")
    page = tmp_path / "new" / "page.html"
    status, out, _ = here("report", trained, f"--out={page}")
    assert status == 0 and out == f"report: {page}\n"
    text = page.read_text()
    assert "Best and worst retrievals" in text and "row 7" in text and "<svg" in text
    assert here("report", trained, f"--out={page}")[0] == 0 and page.read_text() == text
    page.write_text("mine")
    status, _, err = here("report", trained, f"--out={page}")
    assert status == 2 and "exists and is no report" in err and page.read_text() == "mine"
    status, _, err = here("report")
    assert status == 2 and "report: give one directory of a run or a sweep, got 0" in err
    status, _, err = here("report", tmp_path / "none")
    assert status == 2 and "none is not a directory" in err and err.count("\n") == 1


def test_version_is_a_version():
    assert sotalign_jax.__version__.count(".") == 2


def test_diagnose_says_what_it_found_and_writes_it(here, tmp_path):
    out = tmp_path / "new" / "diagnosis.json"
    config = ROOT / "configs" / "emoji.py"
    status, printed, _ = here("diagnose", f"--config={config}", f"--out={out}")
    assert status == 0
    assert "data: " in printed and "verdict: worth training" in printed
    found = json.loads(out.read_text())
    assert found["verdict"] == "worth training" and found["numbers"]["pairs/rows"] == 300
    assert all(finding["text"] in printed for finding in found["findings"])
    assert found["numbers"]["pairs/mutual_knn/z"] > 4
    status, _, err = here("diagnose", f"--config={config}", f"--out={out}")
    assert status == 2 and f"out: {out} exists" in err


def test_diagnose_needs_a_config(here):
    status, _, err = here("diagnose")
    assert status == 2 and "--config: this command needs it" in err


def test_export(here, trained, tmp_path):
    status, out, _ = here("export", f"--workdir={trained}", f"--out={tmp_path / 'heads'}")
    assert status == 0 and "heads of" in out
    assert (tmp_path / "heads" / "model.safetensors").exists()
    status, out, _ = here(
        "export",
        f"--workdir={trained}",
        f"--out={tmp_path / 'index'}",
        "--format=clip-retrieval",
    )
    assert status == 0 and "1 shards" in out
    assert (tmp_path / "index" / "img_emb" / "img_emb_0.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "--workdir: this command needs it"),
        (["export", "--workdir=nowhere", "--out=somewhere"], "nowhere holds no aligner"),
        (["export", "more", "--workdir=a", "--out=b"], "more: unexpected"),
        (["export", "--workdir=a", "--out=b", "--image=c"], "they belong to"),
        (["export", "--workdir=a", "--out=b", "--format=onnx"], "--format"),
        (["import-sail", "--out=b"], "import-sail: give one checkpoint, got 0"),
        (["import-sail", "nowhere.pt"], "--out: this command needs it"),
        (["import-sail", "nowhere.pt", "--out=b"], "nowhere.pt: no such file"),
    ],
)
def test_what_export_and_import_refuse(arguments, message, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = here(*arguments)
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
