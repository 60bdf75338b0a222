"""``sotalign evaluate --protocol`` and ``sotalign data``: what they print, write and refuse."""

import dataclasses
import json
import types

import numpy as np
import pytest

from sotalign_jax import features, fitted
from sotalign_jax.captions import CAPTIONS
from sotalign_jax.models import Aligner
from sotalign_jax.protocols import PROTOCOLS, prompts
from sotalign_jax.recipes import RECIPES


@pytest.fixture
def here(here, monkeypatch):
    """The command in this process, its tables in full."""
    monkeypatch.setenv("COLUMNS", "200")
    return here


def views(n, seed):
    rng = np.random.default_rng(seed)
    maps = np.random.default_rng(9).normal(size=(4, 11))
    rows = rng.normal(size=(n, 4)) @ maps + 0.4 * rng.normal(size=(n, 11))
    return rows[:, :6].astype(np.float32), rows[:, 6:].astype(np.float32)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Aligners of each kind as commands leave them."""
    root = tmp_path_factory.mktemp("aligners")
    image, text = views(60, 0)
    cross = np.linalg.svd((image - image.mean(axis=0)).T @ (text - text.mean(axis=0)))
    teacher = types.SimpleNamespace(
        image_weight=cross[0][:, :4],
        text_weight=cross[2][:4].T,
        image_mean=np.full(6, 0.1),
        text_mean=np.zeros(5),
    )
    Aligner.from_teacher(teacher).save(root / "teacher" / "aligner")
    fitted.fit("csa", image, text).save(root / "csa" / "aligner")
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Six images with two or three texts each, and the 8 prompts of each of three classes."""
    root = tmp_path_factory.mktemp("features")
    image, text = views(24, 1)
    ids = [f"{['cat', 'dog', 'fox'][row % 3]}/{row}" for row in range(6)]
    features.write_store(root / "image", image[:6], ids=ids)
    features.write_store(root / "text", text[:13], ids=[*ids, *ids, ids[0]])
    keys = [key for key, _ in prompts("dtd", ["cat", "dog", "fox"])]
    features.write_store(root / "prompts", text, ids=keys)
    return root


@pytest.fixture
def small(monkeypatch):
    """Protocols of the size of these features, under their own names."""
    coco = dataclasses.replace(
        PROTOCOLS["coco_val2017"], images=6, texts=12, captions=2, members=()
    )
    monkeypatch.setitem(PROTOCOLS, "coco_val2017", coco)
    dtd = dataclasses.replace(PROTOCOLS["dtd"], images=6, classes=3)
    monkeypatch.setitem(PROTOCOLS, "dtd", dtd)


@pytest.mark.parametrize("kind", ["teacher", "csa"])
def test_evaluate_prints_published_figures_and_writes_json(
    kind, workdirs, stores, small, tmp_path, here
):
    out = tmp_path / "new" / "results.json"
    tables = [f"--{side}={stores / side}" for side in ("image", "text")]
    workdir = f"--workdir={workdirs / kind}"
    given = ["evaluate", workdir, "--protocol=coco_val2017", *tables, f"--out={out}"]
    status, printed, err = here(*given)
    assert (status, err) == (0, "")
    shown = " ".join(printed.split())
    assert "COCO val2017: COCO val2017, the first five captions of each image" in shown
    assert "│ SOTAlign [1] │ 26.5 │ 49.8 │ │ 34.1 │ 59.4 │ │ │" in shown
    assert "[1] SOTAlign, arXiv 2602.23353" in shown and "in percent; recall@k: " in shown
    assert "note: 1 texts beyond the first 2 of an image are left out, of 1 images" in printed
    result = json.loads(out.read_text())
    metrics = result["metrics"]
    assert metrics["n_texts"] == 12 and result["protocol"] == "coco_val2017"
    assert result["workdir"] == str(workdirs / kind) and result["text"] == str(stores / "text")
    ours = [f"{100 * metrics[name]:.1f}" for name in ("t2i/recall@1", "t2i/recall@5")]
    assert f"│ this aligner │ {ours[0]} │ {ours[1]} │" in shown
    status, _, err = here(*given)
    assert status == 2 and f"out: {out} exists" in err


def test_evaluate_classifies_by_folders_or_by_a_file(workdirs, stores, small, tmp_path, here):
    given = ["evaluate", f"--workdir={workdirs / 'teacher'}", "--protocol=dtd",
             f"--image={stores / 'image'}", f"--text={stores / 'prompts'}"]  # fmt: skip
    status, printed, err = here(*given, f"--out={tmp_path / 'folders.json'}")
    assert (status, err) == (0, "") and "top-1" in printed and "mean per class" in printed
    labels = tmp_path / "labels.csv"
    turned = [f"{['cat', 'dog', 'fox'][row % 3]}/{row},{(row + 1) % 3}\n" for row in range(6)]
    labels.write_text("id,label\n" + "".join(turned))
    assert here(*given, f"--labels={labels}", f"--out={tmp_path / 'file.json'}")[0] == 0
    by_folder, by_file = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        for name in ("folders", "file")
    )
    assert by_folder["n_images"] == 6 and by_folder["top@1"] != by_file["top@1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol=coco"], "protocol: no 'coco'; there are coco_val2017, coco_karpathy, flickr"),
        (["--protocol=sue400"], "--image, --text: protocol sue400 needs both: 400 images and 400 "
         "texts (the first 400 rows of a data set, one caption an image)"),
        (["--protocol=sue400", "--image=a"], "--image, --text: protocol sue400 needs both"),
        (["--protocol=sue400", "--image=a", "--text=b", "--labels=c"],
         "--labels: protocol sue400 is no classification and has none"),
        (["--labels=c"], "--labels: needs --protocol"),
        (["--protocol=sue400", "--image={stores}/image", "--text={stores}/text"],
         "of text ids in {stores}/text occur more than once; each must be there once"),
        (["--protocol=flickr30k", "--image={stores}/image", "--text={stores}/text"],
         "flickr30k: expected 1,000 images and 5,000 texts (Karpathy's test split of Flickr30k), "
         "found 6 images in {stores}/image"),
        (["--protocol=flickr30k", "--image={stores}/text", "--text={stores}/text"],
         "image: {stores}/text has 5 columns, but the aligner takes 6"),
        (["--protocol=dtd", "--image={stores}/image", "--text={stores}/prompts", "--labels=none"],
         "labels: none: no such file"),
    ],
)  # fmt: skip
def test_evaluate_refuses_in_one_line(arguments, message, workdirs, stores, here):
    places = {"stores": stores}
    status, out, err = here(
        "evaluate", f"--workdir={workdirs / 'teacher'}", *(a.format(**places) for a in arguments)
    )
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("sotalign evaluate: error: ") and message.format(**places) in err


# ---- data


def test_list_and_describe_show_every_recipe(here):
    status, out, _ = here("data", "list")
    assert status == 0 and all(name in out for name in [*RECIPES, *CAPTIONS])
    for name, recipe in RECIPES.items():
        status, out, _ = here("data", "describe", name)
        assert status == 0, name
        shown = " ".join(out.split())
        assert all(command in out for command in recipe.commands)
        assert all(split.name in shown for split in recipe.splits)
        for number in (split.images for split in recipe.splits if split.images is not None):
            assert f"{number:,}" in shown
        assert recipe.licence.split(",")[0] in shown
        assert all(protocol in shown for protocol in recipe.protocols or ["none: data to train"])
        assert ("unverified" in shown) == bool(recipe.unverified)


def test_json_is_what_the_objects_hold(here):
    status, out, _ = here("data", "list", "--json")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps([r.to_dict() for r in RECIPES.values()]))
    status, out, _ = here("data", "describe", "coco", "--json")
    assert json.loads(out) == json.loads(json.dumps(RECIPES["coco"].to_dict()))


def test_captions_are_written_by_the_command(tmp_path, monkeypatch, here):
    monkeypatch.setitem(
        CAPTIONS, "cc3m_val", dataclasses.replace(CAPTIONS["cc3m_val"], records=2, captions=2)
    )
    (tmp_path / "val.tsv").write_text("one\thttp://1\ntwo\thttp://2\n")
    given = ["data", "captions", "cc3m_val", f"--annotations={tmp_path / 'val.tsv'}"]
    status, out, _ = here(*given, f"--out={tmp_path / 'val.jsonl'}")
    assert status == 0 and out == f"2 records with 2 captions: {tmp_path / 'val.jsonl'}\n"
    lines = (tmp_path / "val.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"id": "000000001", "url": "http://2", "caption": "two"}
    assert "--out: this command needs it" in here(*given)[2]
    assert "--annotations: this command needs it" in here("data", "captions", "cc3m_val")[2]


def test_prompts_are_written_by_the_command(tmp_path, here):
    out = tmp_path / "new" / "prompts.jsonl"
    status, printed, _ = here("data", "prompts", "cifar10", f"--out={out}")
    assert status == 0
    assert printed == (f"180 prompts, 18 of each of 10 classes (names from sotalign_jax): {out}\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0] == {"id": "0-airplane/0", "caption": "a photo of a airplane."}
    assert lines[-1] == {"id": "9-truck/17", "caption": "a photo of the big truck."}
    status, _, err = here("data", "prompts", "cifar10", f"--out={out}")
    assert status == 2 and "exists; give another file" in err
    names = tmp_path / "variants.txt"
    names.write_text("\n".join(f"A{number}" for number in range(100)))
    given = ["data", "prompts", "aircraft", f"--out={tmp_path / 'aircraft.jsonl'}"]
    assert here(*given, f"--classnames={names}")[0] == 0
    assert len((tmp_path / "aircraft.jsonl").read_text().splitlines()) == 200


@pytest.mark.parametrize(
    "words", [(), ("list", "coco"), ("describe",), ("show", "coco"), ("prompts", "a", "b")]
)
def test_other_words_are_answered_with_how_to_write_it(words, here):
    status, out, err = here("data", *words)
    assert status == 2 and out == ""
    assert err.startswith("sotalign data: error: write sotalign data list | describe NAME | ")


def test_unknown_names_are_answered_with_those_there_are(tmp_path, here):
    out = f"--out={tmp_path / 'a'}"
    assert "data: no 'coc'; there are cc3m," in here("data", "describe", "coc")[2]
    assert "prompts: no data set 'x'; there are" in here("data", "prompts", "x", out)[2]
    assert "captions: no 'x'; there" in here("data", "captions", "x", "--annotations=a", out)[2]
