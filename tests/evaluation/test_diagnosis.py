import numpy as np
import pytest

from sotalign_jax.evaluation import Finding, describe, diagnose
from sotalign_jax.features import emoji, platonic_world

FAST = {"permutations": 100, "n_projections": 30, "repeats": 3}


def of_splits(splits, *, shuffled=False, held_out=True, **options):
    text = splits.pairs.text.array()
    if shuffled:
        text = text[np.random.default_rng(0).permutation(len(text))]
    test = splits.test.image.array(), splits.test.text.array()
    return diagnose(
        splits.pairs.image.array(),
        text,
        splits.unpaired_image.array(),
        splits.unpaired_text.array(),
        held_out={"test": test} if held_out else None,
        **FAST | options,
    )


def levels(diagnosis, words):
    """Levels of the findings that say so."""
    return [finding.level for finding in diagnosis["findings"] if words in finding.text]


def strangers(n=200, d=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def views(n=200, d=12, seed=0):
    """Two views of one latent, so that pairs are pairs."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 6))
    return [
        (z @ rng.normal(size=(6, d)) + 0.5 * rng.normal(size=(n, d))).astype(np.float32)
        for _ in range(2)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_emoji_are_worth_training_on(seed):
    found = of_splits(emoji(n_pairs=300, seed=seed))
    assert found["verdict"] == "worth training"
    assert found["numbers"]["pairs/mutual_knn/z"] > 10
    assert levels(found, "nearest neighbours") == ["good"]
    assert "stop" not in [finding.level for finding in found["findings"]]


@pytest.mark.parametrize("seed", [0, 1])
def test_emoji_with_shuffled_texts_are_not(seed):
    found = of_splits(emoji(n_pairs=300, seed=seed), shuffled=True, held_out=False)
    assert found["verdict"] == "not worth training"
    assert found["findings"][0].level == "stop"
    assert "row i of the texts does not belong" in found["findings"][0].text
    # What is of one side alone is as it was.
    whole = of_splits(emoji(n_pairs=300, seed=seed), held_out=False)
    for name in ("image/effective_rank", "text/mean_cosine", "shift_image/ratio"):
        assert found["numbers"][name] == pytest.approx(whole["numbers"][name])


def test_an_unpaired_source_from_elsewhere_lies_further_away():
    near, far = (of_splits(emoji(unpaired=pool)) for pool in ("emoji", "openclipart"))
    assert levels(far, "unpaired images lie") == ["warning"]
    assert levels(far, "unpaired texts lie") == ["note"]
    assert not levels(near, "another kind of data")
    for side in ("image", "text"):
        excess = [found["numbers"][f"shift_{side}/excess"] for found in (near, far)]
        assert excess[1] > 1.2 * excess[0]
    assert far["numbers"]["shift"] == pytest.approx(
        far["numbers"]["shift_image/shift"] + far["numbers"]["shift_text/shift"]
    )


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_platonic_world_is_worth_training_on_and_of_one_kind(noise):
    found = of_splits(platonic_world(noise=noise, n_unpaired=2000, n_test=300))
    assert found["verdict"] == "worth training"
    assert levels(found, "two halves") == ["good", "good"]
    assert not levels(found, "doubles")


def test_where_noise_hides_neighbours_cka_keeps_from_a_verdict():
    found = of_splits(platonic_world(noise=2.0, n_unpaired=300, n_test=20))
    assert found["verdict"] == "cannot tell"
    assert levels(found, "fit a CCA to see") == ["warning"]


def test_agreement_falls_with_noise():
    scores = [
        of_splits(platonic_world(noise=noise, n_unpaired=100, n_test=20))["numbers"][name]
        for name in ("pairs/mutual_knn/score", "pairs/cka/unbiased")
        for noise in (0.0, 1.0, 2.0, 4.0)
    ]
    assert scores[:4] == sorted(scores[:4], reverse=True)
    assert scores[4:] == sorted(scores[4:], reverse=True)


def test_too_few_pairs_for_a_verdict():
    image, text = strangers(30), strangers(30, seed=1)
    found = diagnose(image, text, **FAST)
    assert found["verdict"] == "cannot tell"
    assert levels(found, "too few to tell") == ["warning"]
    assert levels(found, "methods fail with so few") == ["warning"]
    same = diagnose(image, image, **FAST)
    assert same["verdict"] == "worth training"
    more = diagnose(strangers(60), strangers(60, seed=1), **FAST)
    assert more["verdict"] == "not worth training"


def test_pairs_that_are_all_doubles_are_no_pairs():
    image, text = views(8)
    found = diagnose(np.tile(image, (20, 1)), np.tile(text, (20, 1)), **FAST)
    assert found["numbers"]["doubles/image/same"] == pytest.approx(152 / 160)
    assert "pairs/mutual_knn/score" not in found["numbers"]
    assert found["verdict"] == "cannot tell"
    # Strangers do not become pairs by being there twice.
    image, text = strangers(100), strangers(100, seed=1)
    found = diagnose(np.tile(image, (2, 1)), np.tile(text, (2, 1)), **FAST)
    assert found["numbers"]["pairs/mutual_knn/n"] == 100
    assert found["verdict"] == "not worth training"


def test_held_out_rows_among_the_pairs_are_a_leak():
    image, text = views()
    fresh = strangers(100, seed=5), strangers(100, seed=6)
    leaky = fresh[0].copy()
    leaky[:3] = image[:3] * 2
    clean = diagnose(image, text, held_out={"val": fresh, "test": fresh}, **FAST)
    assert not levels(clean, "doubles")
    found = diagnose(
        image, text, fresh[0], fresh[1], held_out={"val": fresh, "test": (leaky, fresh[1])}, **FAST
    )
    assert levels(found, "3.0% of rows are doubles: test image in pairs") == ["warning"]
    assert not levels(found, "val image in pairs")
    assert levels(found, "100.0% of rows are doubles: val image in unpaired") == ["note"]
    assert found["numbers"]["doubles/test_image_in_pairs/same"] == pytest.approx(0.03)


def test_features_that_are_broken_are_named():
    image, text = views()
    image[:, 3] += 100
    image[:, 5] = 7
    image[:, 6] = 0
    text[4] = 0
    found = diagnose(image, text, **FAST)
    assert levels(found, "image: one column has") == ["warning"]
    assert levels(found, "image: two rows have a cosine") == ["note"]
    assert levels(found, "image: 2 of 12 columns never change (1 are zero)") == ["note"]
    assert levels(found, "text: 1 rows are zero") == ["warning"]
    assert levels(found, "text: lengths of rows go from 0") == ["note"]
    assert not levels(found, "text: one column") and not levels(found, "image: 1 rows")
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 12))
    assert levels(diagnose(flat, text, **FAST), "image: rows vary in some") == ["warning"]


def test_the_gravest_finding_comes_first_and_all_is_printed():
    found = of_splits(emoji(unpaired="openclipart"), shuffled=True)
    order = [("stop", "warning", "good", "note").index(f.level) for f in found["findings"]]
    assert order == sorted(order) and len(set(order)) > 2
    text = describe(found)
    assert text.startswith("verdict: not worth training\n")
    for finding in found["findings"]:
        assert isinstance(finding, Finding)
        assert f"{finding.level}:" in text
        assert finding.text in text and f"(rule: {finding.rule})" in text
    for name, value in found["numbers"].items():
        assert isinstance(value, float)
        assert f"{name} " in text and f"{value:.6g}" in text


def test_one_seed_one_diagnosis_and_no_more_rows_than_asked():
    image, text = views(300)
    sides = image, text, strangers(400, seed=2), strangers(400, seed=3)
    first, again, other = (diagnose(*sides, max_rows=100, seed=seed, **FAST) for seed in (0, 0, 1))
    assert first == again
    assert first["numbers"] != other["numbers"]
    assert first["numbers"]["pairs/rows"] == 300
    assert first["numbers"]["image/rows"] == first["numbers"]["pairs/looked_at"] == 100
    assert first["numbers"]["shift_text/rows"] == 50


def test_sources_without_rows_are_none():
    image, text = views()
    plain = diagnose(image, text, **FAST)
    nothing = diagnose(image, text, image[:0], 0 * text, **FAST)
    assert plain == nothing
    assert not any(name.startswith("shift") for name in plain["numbers"])


def test_bad_input_is_named():
    image, text = views(20)
    broken = text.copy()
    broken[2] = np.nan
    with pytest.raises(ValueError, match="text: row 2 holds NaN or infinity"):
        diagnose(image, broken)
    with pytest.raises(ValueError, match="text: 19 rows, but image has 20"):
        diagnose(image, text[1:])
    with pytest.raises(ValueError, match="image: 11 rows; at least 12 are needed"):
        diagnose(image[:11], text[:11])
    with pytest.raises(ValueError, match="unpaired_text: dimension 3, but text has 12"):
        diagnose(image, text, image, text[:, :3])
    with pytest.raises(ValueError, match="unpaired_text: row 2 holds NaN"):
        diagnose(image, text, image, broken)
    with pytest.raises(ValueError, match=r"held_out\['test'\] image: dimension 5, but image"):
        diagnose(image, text, held_out={"test": (image[:, :5], text)})
    with pytest.raises(ValueError, match="held_out: 'unpaired' is the name of other rows"):
        diagnose(image, text, held_out={"unpaired": (image, text)})
    with pytest.raises(ValueError, match=r"permutations=98: must be at least 99, for p to reach"):
        diagnose(image, text, permutations=98)
    with pytest.raises(ValueError, match="max_rows=11: must be at least 12"):
        diagnose(image, text, max_rows=11)


def test_zero_rows_beyond_those_looked_at_do_not_count():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 40, 6)).astype(np.float32)
    unpaired = np.zeros((3000, 6), np.float32)
    unpaired[:5] = rng.normal(size=(5, 6))
    found = diagnose(image, text, unpaired_image=unpaired, max_rows=50)
    assert not any(name.startswith("shift_image") for name in found["numbers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "repeats=0: must be at least 1"),
        ({"n_projections": 0}, "n_projections=0: must be at least 1"),
    ],
)
def test_bad_arguments_are_found_before_any_work(arguments, message):
    rows = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        diagnose(rows, rows, **arguments)


def test_near_doubles_are_told():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 100, 32))
    twice = [
        np.concatenate([rows, rows + 0.02 * rng.normal(size=rows.shape)]) for rows in (image, text)
    ]
    found = diagnose(*(rows.astype(np.float32) for rows in twice))
    assert any("all but doubles" in finding.text for finding in found["findings"])
