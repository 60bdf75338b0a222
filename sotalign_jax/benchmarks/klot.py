"""KLOT's value and gradient against another implementation: time, marginal errors, agreement.

``python -m sotalign_jax.benchmarks.klot --n 4096 --reference PATH`` measures the PyTorch module of
the SOTAlign authors, or any file with a class ``KLOT(epsilon_student, epsilon_teacher, n_iter)``
whose call takes both affinities and returns the divergence. Without ``--reference`` the comparison
is a plain log-sum-exp Sinkhorn loop in JAX. Both sides see the same two matrices, in one process,
and take turns; the marginal errors are those of the plans themselves, summed up in float64.

``--memory dense,streamed --devices 1,2`` also measures the loss from embeddings on, in these forms
and spread over so many devices; ``--precision float32,bfloat16_3x`` does so for both kinds of
products. On a CPU, which has no units for bfloat16, three of them take longer than one of float32.
``--forms-only`` leaves the contenders and their matrices out, so that ``--n 32768 --d 256 --memory
streamed --repeats 1`` fits into little memory; the peak of the process is then printed.

Measure on an idle machine. On a busy one PyTorch's threads wait for each other and it can seem
twenty times slower than it is; the printed load average tells, and OMP_NUM_THREADS=1 avoids it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from sotalign_jax.benchmarks.programs import Memory, check_devices, compiled_klot, whole_numbers
from sotalign_jax.features.embedded import emoji_table, openclipart_table
from sotalign_jax.files import replace_text
from sotalign_jax.losses import klot_from_affinity
from sotalign_jax.numerics import MatmulPrecision, check_precision, unit_rows
from sotalign_jax.teachers import cca, moments_of
from sotalign_jax.transport import solve

__all__ = [
    "Contender",
    "affinities",
    "embeddings",
    "load_reference",
    "main",
    "ours",
    "plain_loop",
    "run",
]

EPSILON, TEACHER_EPSILON = 0.05, 0.01
# The paper's Sinkhorn iterations, which the other side does for each plan.
ITERATIONS = 100
DEFAULT_THRESHOLD = 1e-3
MAX_ITERATIONS = 2000
# Tried from the loosest on, for each plan, until ours is no worse than the other side's.
THRESHOLDS = (1e-3, 1e-4, 1e-5, 3e-6)
# Taken where the other side's plans are not known.
UNKNOWN_THRESHOLD = 1e-4
# Errors below this are float32 rounding of the potentials, and do not count as worse.
FLOAT32_FLOOR = 2e-6

# What `klot(memory=...)` may be asked for here.
FORMS = ("dense", "streamed")

Matrix = Float[np.ndarray, "n m"]


class Contender(NamedTuple):
    """One way to compute KLOT on two given affinities.

    Attributes:
        name: what the table calls it.
        call: the timed part: returns the value and its gradient with respect to the student's
            affinity, computed when it returns.
        plans: returns the student's and the teacher's plan, or ``None`` if they cannot be had.
    """

    name: str
    call: Callable[[], tuple[float, Any]]
    plans: Callable[[], tuple[Any, Any] | None]


def embeddings(n: int, seed: int = 0) -> tuple[Float[np.ndarray, "n d"], ...]:
    """A student's and a CCA teacher's embeddings of the features that ship with the package.

    The teacher is fitted on the emoji pairs; images and texts are then drawn independently from
    emoji and clip art. The student is the teacher with noise on its embeddings.

    Args:
        n: number of images and of texts. Beyond the 5,076 shipped, rows repeat with small noise.
        seed: of the draw and of the noise.

    Returns:
        Images and texts of the student, then those of the teacher; unit rows, float32.
    """
    draw = np.random.default_rng(seed)
    emoji = [emoji_table(view).array() for view in ("google", "label_tags")]
    clipart = [openclipart_table(view).array() for view in ("image", "text")]
    teacher = cca(moments_of([(emoji[0], emoji[1])]))
    sides = []
    for project, parts in zip(
        (teacher.project_image, teacher.project_text), zip(emoji, clipart, strict=True), strict=True
    ):
        rows = np.asarray(unit_rows(project(np.concatenate(parts))))
        more = n > len(rows)
        rows = rows[draw.choice(len(rows), n, replace=more)]
        if more:
            rows = _noisy(draw, rows, 0.05)
        sides.append((_noisy(draw, rows, 0.5), rows))
    (student_image, image), (student_text, text) = sides
    return student_image, student_text, image, text


def affinities(n: int, seed: int = 0) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n n"]]:
    """The affinities of `embeddings`: ``(student, teacher)``, both ``(n, n)`` float32 cosines."""
    student_image, student_text, image, text = embeddings(n, seed)
    return student_image @ student_text.T, image @ text.T


def _noisy(draw: np.random.Generator, rows: np.ndarray, amount: float) -> np.ndarray:
    """Unit rows with Gaussian noise of length ``amount`` on them."""
    noise = draw.normal(size=rows.shape).astype(np.float32) / np.sqrt(rows.shape[1], dtype="f")
    return np.asarray(unit_rows(rows + np.float32(amount) * noise))


def ours(student: Matrix, teacher: Matrix, threshold: tuple[float, float]) -> Contender:
    """:func:`sotalign_jax.losses.klot_from_affinity`, its value and gradient compiled as one.

    Args:
        student: ``(n, m)`` float32 affinity.
        teacher: ``(n, m)`` float32 affinity.
        threshold: L1 marginal errors at which the solves of student and teacher stop.
    """

    @jax.jit
    def value_and_gradient(student, teacher):
        return jax.value_and_grad(_klot, has_aux=True)(student, teacher)

    def _klot(student, teacher):
        return klot_from_affinity(
            student,
            teacher,
            epsilon=EPSILON,
            teacher_epsilon=TEACHER_EPSILON,
            threshold=threshold,
            max_iterations=MAX_ITERATIONS,
        )

    arguments = jnp.asarray(student), jnp.asarray(teacher)

    def call():
        (value, _), gradient = jax.block_until_ready(value_and_gradient(*arguments))
        return float(value), gradient

    def plans():
        (_, info), _ = value_and_gradient(*arguments)
        return _plan64(info.student, student), _plan64(info.teacher, teacher)

    limits = ", ".join(f"{limit:g}" for limit in threshold)
    return Contender(f"sotalign_jax, threshold {limits}", call, plans)


def _plan64(plan, affinity: np.ndarray) -> np.ndarray:
    f, g = (np.asarray(potential, np.float64) for potential in plan.potentials)
    return np.exp((f[:, None] + g[None, :] + affinity) / float(plan.epsilon))


def plain_loop(student: Matrix, teacher: Matrix) -> Contender:
    """Plain log-sum-exp Sinkhorn in JAX: a fixed 100 iterations for each plan, rows last.

    Args:
        student: ``(n, m)`` float32 affinity.
        teacher: ``(n, m)`` float32 affinity.
    """

    def log_plan(affinity, epsilon):
        scores = affinity / epsilon
        n, m = scores.shape

        def step(_, f):
            g = -jnp.log(m) - jax.nn.logsumexp(scores + f[:, None], axis=0)
            return -jnp.log(n) - jax.nn.logsumexp(scores + g[None, :], axis=1)

        f = jax.lax.fori_loop(0, ITERATIONS - 1, step, jnp.zeros(n))
        g = -jnp.log(m) - jax.nn.logsumexp(scores + f[:, None], axis=0)
        f = -jnp.log(n) - jax.nn.logsumexp(scores + g[None, :], axis=1)
        return scores + f[:, None] + g[None, :]

    @jax.jit
    def both(student, teacher):
        log_student, log_teacher = (
            log_plan(student, EPSILON),
            log_plan(teacher, TEACHER_EPSILON),
        )
        plan, target = jnp.exp(log_student), jnp.exp(log_teacher)
        value = jnp.sum(target * (log_teacher - log_student))
        return value, (plan - target) / EPSILON, (plan, target)

    arguments = jnp.asarray(student), jnp.asarray(teacher)

    def call():
        value, gradient, _ = jax.block_until_ready(both(*arguments))
        return float(value), gradient

    return Contender(f"plain loop, {ITERATIONS} iterations", call, lambda: both(*arguments)[2])


def load_reference(path: str | os.PathLike[str], student: Matrix, teacher: Matrix) -> Contender:
    """A user's PyTorch module with a class ``KLOT(epsilon_student, epsilon_teacher, n_iter)``.

    Its plans are known only if the file also has ``sinkhorn(cost, epsilon, max_iter)`` that returns
    the plan, alone or first of several results; that call is never part of the timing.

    Args:
        path: a Python file; it is executed.
        student: ``(n, m)`` float32 affinity.
        teacher: ``(n, m)`` float32 affinity.

    Raises:
        ValueError: if the file is missing or has no ``KLOT``, or PyTorch is not installed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"reference: there is no file {path}")
    if importlib.util.find_spec("torch") is None:
        raise ValueError("reference: a PyTorch module needs torch; install it, or leave it out")
    import torch  # pyright: ignore[reportMissingImports]

    spec = importlib.util.spec_from_file_location("klot_reference", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reference: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "KLOT"):
        raise ValueError(f"reference: {path} has no class KLOT")
    loss = module.KLOT(epsilon_student=EPSILON, epsilon_teacher=TEACHER_EPSILON, n_iter=ITERATIONS)
    # Copies: torch must not share memory with arrays that JAX may hold.
    target = torch.tensor(teacher)

    def call():
        affinity = torch.tensor(student, requires_grad=True)
        value = loss(affinity, target)
        value.backward()
        return float(value.detach()), affinity.grad

    def plans():
        if not hasattr(module, "sinkhorn"):
            return None

        def plan(affinity, epsilon):
            with torch.no_grad():
                found = module.sinkhorn(-torch.tensor(affinity), epsilon, ITERATIONS)
            return (found[0] if isinstance(found, tuple) else found).double().numpy()

        return plan(student, EPSILON), plan(teacher, TEACHER_EPSILON)

    return Contender(f"reference, {ITERATIONS} iterations", call, plans)


def run(
    n: int,
    *,
    reference: str | os.PathLike[str] | None = None,
    repeats: int = 5,
    seed: int = 0,
    memory: Sequence[str] = (),
    precision: Sequence[str] = ("float32",),
    devices: Sequence[int] = (1,),
    d: int | None = None,
    forms_only: bool = False,
) -> dict[str, Any]:
    """Measure everything, in one process.

    Args:
        n: images and texts in the batch.
        reference: PyTorch file to compare with; by default :func:`plain_loop`.
        repeats: timed calls of each contender, which take turns; the median counts. A form that is
            called only once is not warmed up before.
        seed: of the affinities.
        memory: forms of :func:`sotalign_jax.losses.klot` to measure too, from embeddings.
        precision: of the products of each of them.
        devices: numbers of devices to spread each of them over.
        d: columns of the embeddings of these forms; all by default.
        forms_only: leave the contenders out.

    Returns:
        A JSON-able dict; ``contenders`` lists, for each, its name, ``seconds`` of all calls,
        ``median_seconds``, ``ratio`` (the other side's median over its own), ``value``, and the
        float64 L1 ``errors`` of rows and columns of both plans (empty if not known). The first
        is the other side. The second is ours at the loosest thresholds whose plans are no worse
        than the other side's (down to what float32 can tell), the third ours at the default.
        ``forms`` lists, for each form, precision and number of devices, ``seconds``,
        ``median_seconds``, ``ratio`` (the first form's median over its own), ``temporary_bytes``
        (temporary arrays of one device, as compiled), ``value``, and differences to the first form.
        ``peak_bytes`` is the most memory that the process had, None where the system does not say.

    Raises:
        ValueError: if ``n`` or ``repeats`` is too small, or the reference cannot be used.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for form in memory:
        if form not in FORMS:
            raise ValueError(f"memory must be of {', '.join(FORMS)}, got {form!r}")
    for kind in precision:
        check_precision(kind)
    if forms_only and not memory:
        raise ValueError("memory must name a form where forms_only is set, got none")
    check_devices(devices, n)
    rows = embeddings(n, seed) if memory else ()
    if d is not None and rows and not 1 <= d <= rows[0].shape[1]:
        raise ValueError(f"d must be between 1 and {rows[0].shape[1]}, got {d}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    report: dict[str, Any] = {"contenders": [], "largest_gradient": None}
    if not forms_only:
        report |= _contenders(n, reference, repeats, seed)
    forms = []
    if rows:
        rows = tuple(side[:, :d] for side in rows)
        forms = _forms(rows, cast(Any, memory), cast(Any, precision), devices, repeats)
    return report | {
        "n": n,
        "seed": seed,
        "epsilon": EPSILON,
        "teacher_epsilon": TEACHER_EPSILON,
        "reference": None if reference is None else pathlib.Path(reference).name,
        "forms": forms,
        "peak_bytes": _peak_bytes(),
        "cpus": os.cpu_count(),
        "load_average": load,
        "device": jax.devices()[0].device_kind,
        "versions": _versions(),
    }


def _contenders(n: int, reference, repeats: int, seed: int) -> dict[str, Any]:
    """The other side and ours, on the same two matrices."""
    student, teacher = affinities(n, seed)
    if reference is None:
        other = plain_loop(student, teacher)
    else:
        other = load_reference(reference, student, teacher)
    other_errors = _errors(other.plans())
    matched = ours(student, teacher, _matched(student, teacher, other_errors))
    default = ours(student, teacher, (DEFAULT_THRESHOLD, DEFAULT_THRESHOLD))
    contenders = [other, matched, default]
    errors = [other_errors, _errors(matched.plans()), _errors(default.plans())]

    results = [contender.call() for contender in contenders]  # and compile
    seconds, _ = _take_turns([contender.call for contender in contenders], repeats)
    medians = [statistics.median(times) for times in seconds]
    gradients = [np.asarray(gradient, np.float64) for _, gradient in results]
    rows = [
        {
            "name": contender.name,
            "seconds": times,
            "median_seconds": median,
            "ratio": medians[0] / median,
            "value": result[0],
            "errors": error,
            "value_difference": abs(result[0] - results[0][0]),
            "gradient_difference": float(np.abs(gradient - gradients[0]).max()),
        }
        for contender, times, median, result, error, gradient in zip(
            contenders, seconds, medians, results, errors, gradients, strict=True
        )
    ]
    return {"largest_gradient": float(np.abs(gradients[0]).max()), "contenders": rows}


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _take_turns(
    calls: Sequence[Callable[[], Any]], repeats: int
) -> tuple[list[list[float]], list[Any]]:
    """Seconds of each call, ``repeats`` times, and what each returned at last."""
    seconds: list[list[float]] = [[] for _ in calls]
    results: list[Any] = [None for _ in calls]
    for _ in range(repeats):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            results[number] = call()
            seconds[number].append(time.perf_counter() - start)
    return seconds, results


def _forms(
    rows: tuple[np.ndarray, ...],
    memory: Sequence[Memory],
    precision: Sequence[MatmulPrecision],
    devices: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Each form of the loss on each number of devices, at its default thresholds."""
    n = len(rows[0])
    asked = list(itertools.product(memory, precision, devices))
    programs = [
        compiled_klot(n, rows[0].shape[1], count, form, kind) for form, kind, count in asked
    ]
    arguments = [
        [jax.device_put(row, to) for row, to in zip(rows, program.input_shardings[0], strict=True)]
        for program in programs
    ]

    def calling(program, given):
        return lambda: jax.block_until_ready(program(*given))

    calls = [calling(*both) for both in zip(programs, arguments, strict=True)]
    if repeats > 1:
        for call in calls:
            call()
    seconds, results = _take_turns(calls, repeats)
    medians = [statistics.median(times) for times in seconds]
    gradients = [[np.asarray(side) for side in gradient] for _, gradient in results]
    return [
        {
            "memory": form,
            "precision": kind,
            "devices": count,
            "seconds": times,
            "median_seconds": median,
            "ratio": medians[0] / median,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "value": float(result[0]),
            "value_difference": abs(float(result[0]) - float(results[0][0])),
            "gradient_difference": max(
                float(np.abs(side - first).max())
                for side, first in zip(gradient, gradients[0], strict=True)
            ),
        }
        for (form, kind, count), program, times, median, result, gradient in zip(
            asked, programs, seconds, medians, results, gradients, strict=True
        )
    ]


def _matched(student, teacher, target) -> tuple[float, float]:
    """The loosest thresholds at which neither plan of ours is worse than the other side's."""
    if not target:
        return UNKNOWN_THRESHOLD, UNKNOWN_THRESHOLD

    def loosest(affinity, epsilon, errors):
        for threshold in THRESHOLDS:
            plan = solve(affinity, epsilon, threshold=threshold, max_iterations=MAX_ITERATIONS)
            found = _marginal_errors(_plan64(plan, affinity))
            if max(found.values()) <= max(*errors.values(), FLOAT32_FLOOR):
                break
        return threshold

    return (
        loosest(student, EPSILON, target["student"]),
        loosest(teacher, TEACHER_EPSILON, target["teacher"]),
    )


def _errors(plans) -> dict[str, dict[str, float]]:
    """Marginal errors of both plans; nothing if they are not known."""
    if plans is None:
        return {}
    return dict(zip(("student", "teacher"), map(_marginal_errors, plans), strict=True))


def _marginal_errors(plan) -> dict[str, float]:
    """L1 errors of the row and of the column sums, at total mass 1, in float64."""
    plan = np.asarray(plan, np.float64)
    n, m = plan.shape
    rows, columns = np.abs(plan.sum(1) - 1 / n).sum(), np.abs(plan.sum(0) - 1 / m).sum()
    return {"rows": float(rows), "columns": float(columns)}


def _versions() -> dict[str, str]:
    names = ["jax", "jaxlib", "ott-jax", "numpy"] + (["torch"] if "torch" in sys.modules else [])
    return {"python": sys.version.split()[0]} | {
        name: importlib.metadata.version(name) for name in names
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"KLOT, value and gradient, n = {report['n']:,}",
        caption="L1 marginal errors at total mass 1, of the plans themselves, in float64. "
        f"Differences are to the first row; its largest gradient is "
        f"{report['largest_gradient']:.1e}. {report['cpus']} CPUs, load average "
        f"{report['load_average'] or 0:.1f} before the timing.",
    )
    table.add_column("")
    for heading in ("time", "ratio", "student rows", "columns", "teacher rows", "columns"):
        table.add_column(heading, justify="right")
    table.add_column("value", justify="right")
    table.add_column("value diff.", justify="right")
    table.add_column("max grad. diff.", justify="right")
    for row in report["contenders"]:
        errors = ["n/a"] * 4
        if row["errors"]:
            plans = (row["errors"]["student"], row["errors"]["teacher"])
            errors = [f"{plan[side]:.1e}" for plan in plans for side in ("rows", "columns")]
        table.add_row(
            row["name"],
            f"{row['median_seconds']:.3g} s",
            f"{row['ratio']:.1f}",
            *errors,
            f"{row['value']:.5f}",
            f"{row['value_difference']:.1e}",
            f"{row['gradient_difference']:.1e}",
        )
    return table


def _forms_table(report: dict[str, Any]) -> Table:
    peak = report["peak_bytes"]
    table = Table(
        title=f"KLOT from embeddings, n = {report['n']:,}, default thresholds",
        caption="Differences, of gradients with respect to embeddings, are to the first row."
        + (f" Peak memory of the process: {peak / 2**30:.2f} GiB." if peak else ""),
    )
    table.add_column("memory")
    table.add_column("products")
    for heading in ("devices", "time", "ratio", "temporary, a device", "value"):
        table.add_column(heading, justify="right")
    table.add_column("value diff.", justify="right")
    table.add_column("max grad. diff.", justify="right")
    for row in report["forms"]:
        table.add_row(
            row["memory"],
            row["precision"],
            str(row["devices"]),
            f"{row['median_seconds']:.3g} s",
            f"{row['ratio']:.2f}",
            f"{row['temporary_bytes'] / 2**20:.1f} MiB",
            f"{row['value']:.5f}",
            f"{row['value_difference']:.1e}",
            f"{row['gradient_difference']:.1e}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.klot",
        description="Time and accuracy of KLOT's value and gradient, against a reference.",
    )
    parser.add_argument("--n", type=int, default=4096, help="images and texts in the batch")
    parser.add_argument("--reference", help="PyTorch file with a class KLOT; executed")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument("--memory", help="also from embeddings: dense,streamed or one of them")
    parser.add_argument(
        "--precision", help="with --memory: products, float32,bfloat16_3x or one of them"
    )
    parser.add_argument("--devices", help="with --memory: numbers of devices, as in 1,2,4")
    parser.add_argument("--d", type=int, help="with --memory: columns of the embeddings")
    parser.add_argument(
        "--forms-only", action="store_true", help="with --memory: nothing else, and no matrices"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    if options.memory is None:
        if options.devices is not None:
            parser.error(
                "--devices: spreads the forms that --memory names; give --memory dense,streamed"
            )
        if options.precision is not None:
            parser.error(
                "--precision: is of the forms that --memory names; give --memory dense,streamed"
            )
        if options.d is not None or options.forms_only:
            parser.error(
                "--d, --forms-only: are of the forms that --memory names; give --memory streamed"
            )
    try:
        report = run(
            options.n,
            reference=options.reference,
            repeats=options.repeats,
            memory=options.memory.split(",") if options.memory else (),
            precision=(options.precision or "float32").split(","),
            devices=whole_numbers("devices", options.devices or "1"),
            d=options.d,
            forms_only=options.forms_only,
        )
    except ValueError as error:
        parser.error(str(error))
    if report["contenders"]:
        Console(width=max(160, Console().width)).print(_table(report))
    if report["forms"]:
        Console(width=max(160, Console().width)).print(_forms_table(report))
    if options.json is not None:
        replace_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
