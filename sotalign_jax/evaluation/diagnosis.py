"""Whether an encoder pair, its pairs and its unpaired rows look worth training on.

`diagnose` measures, and says what the numbers mean by rules that stand here as constants. The
thresholds were set on the data that the package brings (emoji, emoji with shuffled texts, clip art
as another source, the platonic world); they are there to catch what is clearly wrong, and do not
replace training.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.evaluation.duplicates import find_duplicates
from sotalign_jax.evaluation.health import feature_health
from sotalign_jax.evaluation.rows import CHUNK, checked_rows, checked_sides, drawn_rows
from sotalign_jax.evaluation.shift import distribution_shift
from sotalign_jax.evaluation.similarity import linear_cka, mutual_knn

__all__ = ["Finding", "describe", "diagnose"]

# Published scores are of so many rows and neighbours, and only equal ones compare.
KNN_ROWS, KNN_K = 1024, 10
# Below this, shuffles hardly differ from pairs that a teacher could use: no verdict.
LEAST_PAIRS = 50
# One shuffle of a hundred may look as good as the pairs.
P_VALUE = 0.01
# Both SAIL and SOTAlign fail with so many pairs of CC3M in the paper.
FEW_PAIRS = 100
# Rows of a source without which there are no two halves to compare it with.
LEAST_SHIFT = 4
# Deviations of shuffles above chance: 100 emoji have 8, and shuffled ones have had 2.2.
LEAST_Z = 4.0
# Unbiased CKA of so many pairs, where neighbours see nothing: shuffled emoji stay below 0.01, the
# platonic world at noise 2, where a CCA works, has 0.04.
SIGN_OF_CKA, CKA_PAIRS = 0.02, 300
# Overlap beyond chance, of what lies beyond it: emoji have 0.10 to 0.17, the paper's encoders about
# 0.13 to 0.18.
WEAK_OVERLAP = 0.05
# Excess of the distance over halves of one source, in turns: up to 0.01 in the platonic world, 0.03
# from emoji to those of another vendor too, 0.04 (texts) and 0.07 (images) from emoji to clip art.
APART, FAR = 0.02, 0.05
# Shares of rows that are worth a word: leaks move test scores by about as much, doubles only waste.
LEAK, DOUBLES = 0.01, 0.05
# One column of hundreds with a quarter of all squared length decides every cosine.
LARGE_COLUMN = 0.25
# Strangers so alike leave little of the range of cosines to tell matches by.
ANISOTROPIC = 0.5
# So few directions cannot hold apart the thousands of rows of a gallery.
FEW_DIRECTIONS = 10
# Lengths, which the method drops, so far apart that they may have carried something.
LENGTHS = 100.0


class Finding(NamedTuple):
    """One thing that the numbers say.

    Attributes:
        level: "good", "note" (nothing to do), "warning" (look at it before training) or "stop".
        text: what was found, in plain words.
        rule: when this is said, with the threshold.
    """

    level: str
    text: str
    rule: str


def diagnose(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    unpaired_image: Float[ArrayLike, "i a"] | None = None,
    unpaired_text: Float[ArrayLike, "t b"] | None = None,
    *,
    held_out: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    max_rows: int = 10_000,
    permutations: int = 200,
    n_projections: int = 200,
    repeats: int = 5,
    near: float = 0.99,
    seed: int = 0,
) -> dict[str, Any]:
    """Looks at what a run would be given, before any training.

    Args:
        image: ``(n, d)`` paired image features, n >= 12.
        text: ``(n, e)`` paired text features; row i belongs to image row i.
        unpaired_image: images without a known text, or None; fewer than 4 that are not zero count
            as none.
        unpaired_text: texts without a known image, likewise.
        held_out: pairs that must be new to the run, as ``{"test": (image, text)}``; an image may
            have several texts.
        max_rows: rows of each set that are looked at, drawn where there are more (default 10,000).
            Doubles beyond them are not seen. Memory is that of some float64 copies of so many rows.
        permutations: shuffles of the texts, at least 99 (default 200).
        n_projections: planes of the distances (default 200).
        repeats: draws for the distances (default 5).
        near: cosine from which on rows count as nearly the same (default 0.99).
        seed: of all draws (default 0).

    Returns:
        ``numbers``, a flat dict of floats grouped by ``/``: those of `mutual_knn` and `linear_cka`
        (``pairs/...``), of `feature_health` (``image/...``, ``text/...``, of the pairs), of
        `distribution_shift` (``shift_image/...``, ``shift_text/...``, and ``shift``, the paper's
        sum), and shares of rows that are doubles (``doubles/...``); ``findings``, a list of
        `Finding`, the gravest first; ``verdict``, "worth training", "not worth training" or "cannot
        tell", from the pairs alone.

    Raises:
        ValueError: features are no matrices, hold NaN or infinity, do not fit each other, or an
            argument is out of range.

    References:
        SOTAlign, arXiv 2602.23353: mutual neighbours of the encoders and the distance to the
        unpaired source go with retrieval after training.
    """
    if max_rows < KNN_K + 2:
        raise ValueError(f"max_rows={max_rows}: must be at least {KNN_K + 2}")
    if 1 / (permutations + 1) > P_VALUE:
        raise ValueError(
            f"permutations={permutations}: must be at least {round(1 / P_VALUE) - 1}, for p to "
            f"reach {P_VALUE:g}"
        )
    for name, value in (("n_projections", n_projections), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for part, pair in (held_out or {}).items():
        if len(pair) != 2:
            raise ValueError(
                f"held_out[{part!r}]: must be an image and a text array, got {len(pair)} things"
            )
    if "unpaired" in (held_out or {}):
        raise ValueError("held_out: 'unpaired' is the name of other rows; call the pairs otherwise")
    sides = {
        "image": checked_rows(image, "image", KNN_K + 2),
        "text": checked_rows(text, "text", KNN_K + 2),
    }
    n = len(sides["image"])
    if len(sides["text"]) != n:
        raise ValueError(
            f"text: {len(sides['text'])} rows, but image has {n}; row i of one must belong to row "
            "i of the other"
        )
    unpaired = {}
    for side, rows in (("image", unpaired_image), ("text", unpaired_text)):
        if rows is None:
            continue
        unpaired[side] = checked_sides(sides[side], rows, (side, f"unpaired_{side}"), least=0)[1]
    new = {
        (part, side): checked_sides(sides[side], rows, (side, f"held_out[{part!r}] {side}"))[1]
        for part, pair in (held_out or {}).items()
        for side, rows in zip(("image", "text"), pair, strict=True)
    }

    rng = np.random.default_rng(seed)
    at = drawn_rows(np.arange(n), max_rows, rng)
    sides = {side: rows[at] for side, rows in sides.items()}
    unpaired = {side: drawn_rows(rows, max_rows, rng) for side, rows in unpaired.items()}
    unpaired = {
        side: rows
        for side, rows in unpaired.items()
        if min(_directions(rows), _directions(sides[side])) >= LEAST_SHIFT
    }
    new = {key: drawn_rows(rows, max_rows, rng) for key, rows in new.items()}

    numbers: dict[str, float] = {"pairs/rows": float(n), "pairs/looked_at": float(len(at))}
    doubles = {side: find_duplicates(rows, near=near) for side, rows in sides.items()}
    for side, found in doubles.items():
        _add_doubles(numbers, f"doubles/{side}", found, len(at))
    # Doubles are each other's neighbours in both spaces, which says nothing of the encoders.
    single = np.ones(len(at), bool)
    for rows in sides.values():
        single &= rows.any(axis=1)
    for found in doubles.values():
        single[found.same] = False
    single = np.flatnonzero(single)
    numbers |= _similarity(sides, single, permutations, rng)
    for side, rows in sides.items():
        numbers |= {f"{side}/{name}": v for name, v in feature_health(rows).items()}
    for side, rows in unpaired.items():
        shift = distribution_shift(
            sides[side], rows, n_projections=n_projections, repeats=repeats, seed=seed
        )
        numbers |= {f"shift_{side}/{name}": v for name, v in shift.items()}
        found = find_duplicates(rows, near=near)
        _add_doubles(numbers, f"doubles/unpaired_{side}", found, len(rows))
        found = find_duplicates(rows, sides[side], near=near)
        _add_doubles(numbers, f"doubles/unpaired_{side}_in_pairs", found, len(rows))
    if len(unpaired) == 2:
        numbers["shift"] = numbers["shift_image/shift"] + numbers["shift_text/shift"]
    for (part, side), rows in new.items():
        for name, others in (("pairs", sides), ("unpaired", unpaired)):
            if side in others:
                found = find_duplicates(rows, others[side], near=near)
                _add_doubles(numbers, f"doubles/{part}_{side}_in_{name}", found, len(rows))

    findings, verdict = _pair_findings(numbers)
    findings += [f for side in sides for f in _health_findings(numbers, side)]
    findings += [f for side in unpaired for f in _shift_findings(numbers, side)]
    findings += _double_findings(numbers, {part for part, _ in new})
    levels = ("stop", "warning", "good", "note")
    findings.sort(key=lambda finding: levels.index(finding.level))
    return {"numbers": numbers, "findings": findings, "verdict": verdict}


def describe(diagnosis: Mapping[str, Any]) -> str:
    """What `diagnose` returned as text to print: verdict, findings with their rules, numbers.

    Args:
        diagnosis: what `diagnose` returned.

    Returns:
        Several lines, without a line break at the end.
    """
    lines = [f"verdict: {diagnosis['verdict']}", ""]
    for finding in diagnosis["findings"]:
        lines += [f"{finding.level + ':':9}{finding.text}", f"{'':9}(rule: {finding.rule})"]
    width = max(len(name) for name in diagnosis["numbers"])
    lines += ["", *(f"{name:{width}}  {v:.6g}" for name, v in diagnosis["numbers"].items())]
    return "\n".join(lines)


def _directions(rows: np.ndarray) -> int:
    """Rows that have a direction; up to a few, for more are not asked for."""
    count = 0
    for start in range(0, len(rows), CHUNK):
        count += int(np.sum(rows[start : start + CHUNK].any(axis=1)))
        if count >= LEAST_SHIFT:
            break
    return count


def _add_doubles(numbers: dict[str, float], name: str, found, count: int) -> None:
    numbers[f"{name}/same"] = len(found.same) / count
    numbers[f"{name}/near"] = len(found.near) / count


def _similarity(
    sides: dict[str, np.ndarray], single: np.ndarray, permutations: int, rng: np.random.Generator
) -> dict[str, float]:
    """Numbers of the pairs that are no doubles; none where those are too few."""
    if len(single) < KNN_K + 2:
        return {}
    at = drawn_rows(single, KNN_ROWS, rng)
    image, text = sides["image"][at], sides["text"][at]
    seed = int(rng.integers(2**32))
    numbers = mutual_knn(image, text, k=KNN_K, permutations=permutations, seed=seed)
    found = {f"pairs/mutual_knn/{name}": value for name, value in numbers.items()}
    return found | {f"pairs/cka/{name}": v for name, v in linear_cka(image, text).items()}


def _pair_findings(numbers: dict[str, float]) -> tuple[list[Finding], str]:
    findings = []
    if numbers["pairs/rows"] < FEW_PAIRS:
        findings.append(
            Finding(
                "warning",
                f"{numbers['pairs/rows']:.0f} pairs: in the paper methods fail with so few",
                f"fewer than {FEW_PAIRS} pairs",
            )
        )
    score, chance, p, z = (
        numbers.get(f"pairs/mutual_knn/{name}", 0.0) for name in ("score", "chance", "p", "z")
    )
    single = numbers.get("pairs/mutual_knn/n", 0.0)
    shared = f"image and text of a pair share {score:.1%} of their {KNN_K} nearest neighbours"
    rule = f"p at most {P_VALUE:g} and z at least {LEAST_Z:g} against shuffled texts"
    if single and p <= P_VALUE and z >= LEAST_Z:
        findings.append(Finding("good", f"{shared}, by chance {chance:.1%}", rule))
        if score - chance < WEAK_OVERLAP * (1 - chance):
            findings.append(
                Finding(
                    "warning",
                    "the two encoders agree a little only: expect a weak teacher",
                    f"overlap beyond chance below {WEAK_OVERLAP:g} of what lies beyond it",
                )
            )
        return findings, "worth training"
    if single < LEAST_PAIRS:
        findings.append(
            Finding(
                "warning",
                f"{single:.0f} pairs that are not doubles are too few to tell pairs from shuffles",
                f"fewer than {LEAST_PAIRS} such pairs, and not {rule}",
            )
        )
        return findings, "cannot tell"
    cka = numbers.get("pairs/cka/unbiased", 0.0)
    if single >= CKA_PAIRS and cka > SIGN_OF_CKA:
        findings.append(
            Finding(
                "warning",
                f"{shared}, about as by chance ({chance:.1%}), but an unbiased CKA of {cka:.3f} "
                "says that they have something in common: fit a CCA to see",
                f"not {rule}, and unbiased CKA above {SIGN_OF_CKA:g} of {CKA_PAIRS} pairs or more",
            )
        )
        return findings, "cannot tell"
    findings.append(
        Finding(
            "stop",
            f"{shared}, as after shuffling the texts ({chance:.1%}): either row i of the texts "
            "does not belong to row i of the images, or these encoders have nothing in common here",
            f"not {rule}",
        )
    )
    return findings, "not worth training"


def _health_findings(numbers: dict[str, float], side: str) -> list[Finding]:
    health = {
        name.removeprefix(f"{side}/"): value
        for name, value in numbers.items()
        if name.startswith(f"{side}/")
    }
    findings = []

    def say(level: str, text: str, rule: str) -> None:
        findings.append(Finding(level, f"{side}: {text}", rule))

    if health["zero_rows"]:
        say("warning", f"{health['zero_rows']:.0f} rows are zero", "any row of zeros")
    if health["effective_rank"] < FEW_DIRECTIONS:
        say(
            "warning",
            f"rows vary in some {health['effective_rank']:.1f} directions only",
            f"effective rank below {FEW_DIRECTIONS}",
        )
    if health["largest_column"] > LARGE_COLUMN:
        say(
            "warning",
            f"one column has {health['largest_column']:.0%} of the squared length, so cosines see "
            "little else; standardise the columns",
            f"largest column above {LARGE_COLUMN:.0%}",
        )
    if health["mean_cosine"] > ANISOTROPIC:
        say(
            "note",
            f"two rows have a cosine of {health['mean_cosine']:.2f} on average; the teacher's "
            "centring takes that away, a cosine of raw rows does not",
            f"mean cosine above {ANISOTROPIC:g}",
        )
    if health["constant_columns"]:
        say(
            "note",
            f"{health['constant_columns']:.0f} of {health['dim']:.0f} columns never change "
            f"({health['dead_columns']:.0f} are zero)",
            "any such column",
        )
    if health["norm_max"] > LENGTHS * max(health["norm_min"], np.finfo(np.float32).tiny):
        say(
            "note",
            f"lengths of rows go from {health['norm_min']:.3g} to {health['norm_max']:.3g}",
            f"a ratio above {LENGTHS:g}",
        )
    return findings


def _shift_findings(numbers: dict[str, float], side: str) -> list[Finding]:
    shift, spread, null, excess, rows = (
        numbers[f"shift_{side}/{name}"] for name in ("shift", "shift_sd", "null", "excess", "rows")
    )
    text = (
        f"unpaired {side}s lie {shift:.3f} turns from the paired ones, two halves of one source "
        f"{null:.3f} (sets of {rows:.0f} rows)"
    )
    rule = "excess over halves of one source"
    if shift <= null + 2 * spread or excess <= APART:
        return [Finding("good", text, f"{rule} at most {APART:g} turns, or 2 sd of the draws")]
    if excess <= FAR:
        words = "data of a related kind"
        return [Finding("note", f"{text}: {words}", f"{rule} above {APART:g} turns")]
    return [Finding("warning", f"{text}: another kind of data", f"{rule} above {FAR:g} turns")]


def _double_findings(numbers: dict[str, float], held_out: set[str]) -> list[Finding]:
    findings = []
    for name, share in numbers.items():
        if not name.startswith("doubles/"):
            continue
        where, _, kind = name.removeprefix("doubles/").rpartition("/")
        if kind == "near" and numbers[f"doubles/{where}/same"] > 0.5 * share:
            continue  # said of the same rows already, or of most of them
        leaks = any(where.startswith(f"{part}_") for part in held_out)
        bound = LEAK if leaks else DOUBLES
        if share <= bound:
            continue
        words = where.replace("_", " ")
        level = "warning" if leaks and where.endswith("_in_pairs") and kind == "same" else "note"
        nearly = "" if kind == "same" else "all but "
        height = "of 1" if kind == "same" else "next to 1"
        inside = "" if "_in_" in where else " repeat an earlier one"
        findings.append(
            Finding(
                level,
                f"{share:.1%} of rows are {nearly}doubles: {words}{inside}",
                f"more than {bound:.0%} at a cosine {height}",
            )
        )
    return findings
