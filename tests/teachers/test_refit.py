import inspect
import sys

import numpy as np
import pytest
import reference

from sotalign_jax.teachers import (
    cca,
    column_moments_of,
    columns_of,
    moments_of,
    procrustes,
    recentered,
    refit,
)

# The package exports a function of the same name.
module = sys.modules["sotalign_jax.teachers.refit"]


def _world(n_pairs=40, n=70, m=60, dx=12, dy=8, seed=0):
    """Pairs, and unpaired rows of the same two views of a latent."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(5, dx)), rng.normal(size=(5, dy))

    def views(z):
        image = z @ left + 0.3 * rng.normal(size=(len(z), dx)) + 0.5
        return image, z @ right + 0.3 * rng.normal(size=(len(z), dy)) - 0.5

    pairs = views(rng.normal(size=(n_pairs, 5)))
    z = rng.normal(size=(max(n, m), 5))
    image, text = views(z)
    return pairs, image[:n], text[:m][::-1]


def _blend(rows, columns, teacher, moments, weight, epsilon):
    """The blended covariances from their definition, with a dense plan in float64."""
    image, text = (reference.unit(r) for r in rows)
    if columns is not None:
        image = reference.unit((image - columns.mean) / columns.scale)
    wx, wy, mx, my, _ = (np.asarray(array, np.float64) for array in teacher[:5])
    plan = reference.sinkhorn(reference.cosines((image - mx) @ wx, (text - my) @ wy), epsilon)
    image, text = image - image.mean(axis=0), text - text.mean(axis=0)
    own = image.T @ image / len(image), text.T @ text / len(text), image.T @ plan @ text
    return [
        (1 - weight) * scatter / (moments.count - 1) + weight * covariance
        for scatter, covariance in zip(moments[3:], own, strict=True)
    ]


def _assert_is_cca_of(teacher, covariances, ridge, weighted=False, atol=2e-4):
    """The identities that define a ridge CCA, for as many directions as the teacher has."""
    wx, wy, _, _, rho = (np.asarray(array, np.float64) for array in teacher[:5])
    sxx, syy, sxy = covariances
    if weighted:
        wx, wy = wx / np.sqrt(rho), wy / np.sqrt(rho)
    eye = np.eye(len(rho))
    np.testing.assert_allclose(wx.T @ (sxx + ridge * np.eye(len(sxx))) @ wx, eye, atol=atol)
    np.testing.assert_allclose(wy.T @ (syy + ridge * np.eye(len(syy))) @ wy, eye, atol=atol)
    np.testing.assert_allclose(wx.T @ sxy @ wy, np.diag(rho), atol=atol)
    # These are the leading ones.
    roots = []
    for matrix in (sxx, syy):
        values, vectors = np.linalg.eigh(matrix + ridge * np.eye(len(matrix)))
        roots.append(vectors / np.sqrt(values))
    values = np.linalg.svd(roots[0].T @ sxy @ roots[1], compute_uv=False)
    np.testing.assert_allclose(rho, values[: len(rho)], atol=atol)
    assert rho.max() <= 1


TIGHT = {"threshold": 1e-5, "max_iterations": 5_000}


@pytest.mark.parametrize("memory_gib", [4.0, 1e-9], ids=["dense", "streamed"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_it_is_the_cca_of_the_blended_covariances(memory_gib, weighted, power):
    (image, text), more_image, more_text = _world()
    columns = power and columns_of(column_moments_of([image, more_image]), power=power)
    columns = columns or None
    moments = moments_of([(image, text)], image_columns=columns)
    first = cca(moments, ridge=0.01, dim=6, weighted=weighted)._replace(image_columns=columns)
    teacher = refit(
        first,
        moments,
        more_image,
        more_text,
        weight=0.4,
        epsilon=0.1,
        ridge=0.01,
        weighted=weighted,
        memory_gib=memory_gib,
        **TIGHT,
    )
    truth = _blend((more_image, more_text), columns, first, moments, 0.4, 0.1)
    assert teacher.image_weight.shape == (12, 6) and teacher.text_weight.shape == (8, 6)
    _assert_is_cca_of(teacher, truth, 0.01, weighted)
    np.testing.assert_array_equal(teacher.image_mean, first.image_mean)
    np.testing.assert_array_equal(teacher.text_mean, first.text_mean)
    assert teacher.image_columns is columns and teacher.text_columns is None


def test_streamed_is_dense(monkeypatch):
    (image, text), more_image, more_text = _world(n=300, m=290)
    moments = moments_of([(image, text)])
    first = cca(moments, ridge=0.01, dim=6)
    # Chunks and blocks that do not divide the rows.
    monkeypatch.setattr(module, "_CHUNK", 64)
    solved, solve = [], module.solve
    monkeypatch.setattr(
        module,
        "solve",
        lambda affinity, *a, **k: (solved.append(affinity), solve(affinity, *a, **k))[1],
    )
    fit = lambda gib: refit(  # noqa: E731
        first, moments, more_image, more_text, ridge=0.01, memory_gib=gib, epsilon=0.1, **TIGHT
    )
    dense, streamed = fit(4.0), fit(1e-9)
    assert solved[0].shape == (300, 290) and not hasattr(solved[0], "block")
    assert solved[1].block == 8
    np.testing.assert_allclose(
        streamed.affinity(more_image, more_text), dense.affinity(more_image, more_text), atol=2e-4
    )


def test_a_second_round_takes_the_plan_of_the_first():
    (image, text), more_image, more_text = _world()
    moments = moments_of([(image, text)])
    first = cca(moments, ridge=0.01, dim=5)
    options = {"weight": 0.5, "epsilon": 0.1, "ridge": 0.01, **TIGHT}
    one = refit(first, moments, more_image, more_text, **options)
    two = refit(first, moments, more_image, more_text, rounds=2, **options)
    _assert_is_cca_of(two, _blend((more_image, more_text), None, one, moments, 0.5, 0.1), 0.01)
    again = refit(one, moments, more_image, more_text, **options)
    for found, expected in zip(two[:5], again[:5], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert np.abs(np.asarray(two.correlations - one.correlations)).max() > 1e-4


def test_a_scatter_ridge_is_that_of_the_pairs():
    (image, text), more_image, more_text = _world()
    moments = moments_of([(image, text)])
    first = cca(moments, ridge=0.39, ridge_on="scatter")
    by_scatter = refit(first, moments, more_image, more_text, ridge=0.39, ridge_on="scatter")
    by_covariance = refit(first, moments, more_image, more_text, ridge=0.01)
    np.testing.assert_allclose(
        by_scatter.affinity(image, text), by_covariance.affinity(image, text), atol=1e-5
    )


def test_other_centres_stay():
    (image, text), more_image, more_text = _world()
    centres = [reference.unit(rows).mean(axis=0) for rows in (more_image, more_text)]
    moments = recentered(moments_of([(image, text)]), *centres)
    first = cca(moments, ridge=0.01, dim=5)
    teacher = refit(
        first, moments, more_image, more_text, weight=0.4, epsilon=0.1, ridge=0.01, **TIGHT
    )
    truth = _blend((more_image, more_text), None, first, moments, 0.4, 0.1)
    _assert_is_cca_of(teacher, truth, 0.01)
    np.testing.assert_allclose(teacher.image_mean, centres[0], atol=1e-6)


def test_weight_zero_is_the_teacher_itself():
    (image, text), more_image, more_text = _world()
    moments = moments_of([(image, text)])
    first = cca(moments)
    assert refit(first, moments, more_image, more_text, weight=0.0) is first
    little = refit(first, moments, more_image, more_text, weight=1e-7)
    np.testing.assert_allclose(little.correlations, first.correlations, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rows_whose_partner_is_hidden_find_it_more_often(seed):
    # Measured: 0.72, 0.45, 0.68 and 0.71 before, 0.78, 0.67, 0.77 and 0.81 after.
    (image, text), more_image, more_text = _world(12, 400, 400, 40, 30, seed)
    moments = moments_of([(image, text)])
    first = cca(moments, ridge=0.01)
    teacher = refit(first, moments, more_image, more_text, weight=0.5, epsilon=0.1, ridge=0.01)

    def hits(teacher):
        # Rows of both sides correspond in reverse order.
        affinity = np.asarray(teacher.affinity(more_image, more_text[::-1]))
        return np.mean(affinity.argmax(axis=1) == np.arange(len(affinity)))

    assert hits(teacher) > hits(first) + 0.04


def test_a_plan_that_does_not_converge_is_an_error():
    (image, text), more_image, more_text = _world()
    moments = moments_of([(image, text)])
    first = cca(moments, ridge=1e-3)
    with pytest.raises(ValueError, match=r"epsilon=0.005: .* 70 x 60 .* after 1 iterations") as e:
        refit(first, moments, more_image, more_text, epsilon=0.005, max_iterations=1)
    assert "raise epsilon or max_iterations" in str(e.value)


def test_bad_input_is_named():
    (image, text), more_image, more_text = _world()
    moments = moments_of([(image, text)])
    first = cca(moments)

    def call(**changes):
        arguments = {"teacher": first, "moments": moments, "image": more_image, "text": more_text}
        return inspect.unwrap(refit)(**arguments | changes)

    nan = more_text.copy()
    nan[3, 2] = np.nan
    columns = columns_of(column_moments_of([image]), power=0.5)
    for changes, message in (
        ({"weight": 1.0}, r"weight=1.0: must lie in \[0, 1\)"),
        ({"weight": -0.1}, r"weight=-0.1: must lie in"),
        ({"weight": float("nan")}, r"weight=nan: must lie in"),
        ({"epsilon": 0.0}, "epsilon=0.0: must be positive"),
        ({"epsilon": float("inf")}, "epsilon=inf: must be positive and finite"),
        ({"threshold": 0.0}, "threshold=0.0: must be positive"),
        ({"memory_gib": 0.0}, "memory_gib=0.0: must be positive"),
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"max_iterations": 0}, "max_iterations=0: must be at least 1"),
        ({"ridge_on": "trace"}, "ridge_on='trace': unknown"),
        ({"ridge": -1.0}, "ridge=-1.0: must be finite"),
        ({"image": more_image[:0]}, "image: 0 unpaired rows; a refit needs at least 2"),
        ({"text": more_text[:1]}, "text: 1 unpaired rows"),
        ({"text": nan}, "text: holds NaN or infinity"),
        ({"image": more_text}, r"image: shape \(60, 8\); the teacher takes \(n, 12\)"),
        ({"moments": moments_of([(text, image)])}, "moments: their image_mean is not the teacher"),
        (
            {"moments": moments_of([(image, text)], image_columns=columns)},
            "moments: their image_mean is not the teacher's; .* preprocessed alike",
        ),
        (
            {
                "moments": recentered(moments_of([(image[:1], text[:1])]), image[1], text[1]),
                "teacher": procrustes(
                    recentered(moments_of([(image[:1], text[:1])]), image[1], text[1])
                ),
            },
            "moments: of 1 pairs; a CCA needs at least 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
