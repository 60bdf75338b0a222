"""Several runs in one compiled program: one batch of models, trained side by side.

Runs can be together that differ in nothing but numbers a program takes as arguments: the seed,
alpha, the epsilons, learning rate and weight decay, the start of scale and bias, fields of the
teacher, and what the options of an objective declare so. Each has its own directory, and leaves
there what `train` would leave; either can go on where the other stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from sotalign_jax.config import Config, flatten, validate
from sotalign_jax.features.batches import Batch
from sotalign_jax.objectives import switch_fields, traced_fields
from sotalign_jax.training.build import (
    InputCache,
    Inputs,
    build,
    check_splits,
    fits,
    resident_bytes,
    sources,
)
from sotalign_jax.training.devices import place_tables
from sotalign_jax.training.distributed import Preempted, PreemptionWatch, together
from sotalign_jax.training.loop import train, train_in
from sotalign_jax.training.metrics import ProgressBar, make_console
from sotalign_jax.training.neighbours import NeighbourCache
from sotalign_jax.training.record import Record, evaluate_teacher
from sotalign_jax.training.step import Setup, TrainState, prepare, run_steps
from sotalign_jax.training.workdir import Workdir, read_json

__all__ = ["together_key", "train_many"]

_RUNS = "runs"
# Fields whose values are arguments of the compiled step, or change nothing but arrays.
_FREE = {
    "seed",
    "loss.alpha",
    "loss.epsilon",
    "loss.teacher_epsilon",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "model.scale",
    "model.bias",
}
# Fields of which only this counts: whether they are zero, which takes another program.
_SWITCHES = ("loss.alpha", "loss.teacher_epsilon", "fusemix.alpha")
_FREE_TABLES = ("teacher.", "compare.", "metrics.", "mesh.")

Results = dict[str, Any]


def together_key(config: Config) -> str:
    """What two runs must have in common to be trained together.

    Args:
        config: a configuration.

    Returns:
        A string, equal for runs that `train_many` trains in one program if the shapes of their rows
        and teachers agree.

    Raises:
        ConfigError: as `validate`.
    """
    flat = flatten(validate(config))
    free = _FREE | traced_fields()
    kept = {
        name: value
        for name, value in flat.items()
        if name not in free and not name.startswith(_FREE_TABLES)
    }
    switches = switch_fields().union(_SWITCHES)
    return repr(sorted((kept | {name: flat[name] == 0 for name in switches}).items()))


def train_many(
    configs: Sequence[Config],
    workdirs: Sequence[str | os.PathLike],
    *,
    console: Console | None = None,
    quiet: bool = False,
    inputs: Sequence[Inputs] | None = None,
    watch: PreemptionWatch | None = None,
    on_done: Callable[[int, Results | FloatingPointError], None] | None = None,
) -> list[Results | FloatingPointError]:
    """Runs side by side, each as `train` would do it, those in one program that can be.

    Numbers differ from those of separate runs by the rounding of products that are formed in
    another order. Where there are several devices, runs are spread over them, and each run is
    computed by one. Runs whose rows are streamed from the host, and runs of several processes, are
    trained one after another. Runs that are all on the same ``inputs`` (one object) share the rows
    in memory; of others each has its own, as many at a time as ``data.resident_gib`` takes.

    Args:
        configs: of the runs.
        workdirs: their directories, all different.
        console: where to report; standard output by default.
        quiet: report nothing.
        inputs: rows and teacher of each run, where the caller has them already.
        watch: who looks out for SIGTERM; by default this call itself.
        on_done: told the number of a run and what came of it as soon as it is done.

    Returns:
        For each run what its ``results.json`` holds, or the error that says at which step its loss
        was no longer finite; the other runs go on without it.

    Raises:
        ValueError: as `train`, before any training; or the arguments do not fit each other.
        OSError: as `train`.
        Preempted: stopped by SIGTERM, all saved; the same call goes on.
    """
    if len(configs) != len(workdirs) or (inputs is not None and len(inputs) != len(configs)):
        raise ValueError(
            f"configs, workdirs, inputs: one of each a run, got {len(configs)}, {len(workdirs)}"
            + ("" if inputs is None else f" and {len(inputs)}")
        )
    if len({os.path.realpath(path) for path in workdirs}) < len(workdirs):
        raise ValueError("workdirs: two runs have the same directory; give each its own")
    console = console or make_console()
    configs = [together(lambda c=config: validate(c)) for config in configs]
    outcome: dict[int, Results | FloatingPointError] = {}

    def done(number: int, found: Results | FloatingPointError) -> None:
        outcome[number] = found
        if on_done is not None:
            on_done(number, found)

    with contextlib.ExitStack() as stack:
        watch = watch or stack.enter_context(PreemptionWatch())
        if jax.process_count() > 1:
            for number, (config, path) in enumerate(zip(configs, workdirs, strict=True)):
                given = None if inputs is None else inputs[number]
                alone = functools.partial(
                    train, config, path, console=console, quiet=quiet, inputs=given, watch=watch
                )
                done(number, _or_error(alone))
        else:
            runs = []
            for number, (config, path) in enumerate(zip(configs, workdirs, strict=True)):
                home = Workdir(path, config)
                if home.results.exists():
                    done(number, read_json(home.results))
                else:
                    stack.enter_context(home.locked())
                    runs.append((number, config, home))
            cache, near = InputCache(), NeighbourCache()
            said = None if quiet else console
            opened, fitted = [], []
            for n, config, home in runs:
                given = cache.get(config) if inputs is None else inputs[n]
                if config.aligner == "layers":
                    opened.append(_Run(n, config, home, given, said, near))
                    stack.callback(opened[-1].record.close)
                else:
                    fitted.append((n, config, home, given))
            for n, config, home, given in fitted:  # no steps to take together
                if watch.agreed(0):
                    raise Preempted(0)
                began = time.perf_counter()
                alone = functools.partial(
                    train_in, config, home, console, quiet, given, watch, began
                )
                done(n, _or_error(alone))
            for group in _groups(opened):
                _train_group(group, console, quiet, watch, done)
    return [outcome[number] for number in range(len(configs))]


def _or_error(run: Callable[[], Results]) -> Results | FloatingPointError:
    try:
        return run()
    except FloatingPointError as error:
        return error


class _Run:
    """A run before its first step, without a mesh: one device has all of its rows."""

    def __init__(
        self,
        number: int,
        config: Config,
        home: Workdir,
        inputs: Inputs,
        console: Console | None,
        near: NeighbourCache,
    ):
        self.number, self.config, self.home, self.inputs = number, config, home, inputs
        self.near = near
        on_one: Config = config.copy_and_resolve_references()
        on_one.mesh.devices = 1
        self.setup, self.state, self.rest = build(on_one, *inputs)
        check_splits(config, inputs.splits, self.setup.loss.reads)
        self.tables = sources(
            config, inputs.splits, self.setup, self.state, self.rest, console=console, cache=near
        )
        self.record = Record(config, home, inputs, self.setup, self.rest)
        # On the host until its turn comes.
        self.state = jax.device_get(self.state)

    @property
    def kind(self) -> Any:
        """Equal for runs that one program can train."""
        arrays, tree = jax.tree.flatten((self.setup, self.state, self.rest, self.inputs.teacher))
        shapes = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in arrays)
        config = self.config
        rhythm = (config.steps, config.log_every, self.record.start)
        rows = tuple(None if table is None else len(table) for table in self.tables)
        return tree, shapes, rows, rhythm, config.data.resident, config.data.resident_gib

    @property
    def bytes(self) -> int:
        """What its rows take on a device, raw and prepared."""
        return resident_bytes(self.tables, self.inputs.teacher)


def _groups(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs that can be trained by one program, and whose rows fit on a device together."""
    alike: dict[Any, list[_Run]] = {}
    for run in runs:
        # A run whose rows come from the host stays alone.
        resident = fits(run.config, run.tables, run.inputs.teacher)
        alike.setdefault(run.kind if resident else run.number, []).append(run)
    groups = []
    for group in alike.values():
        data = group[0].config.data
        most = data.resident_gib * 2**30 / max(run.bytes for run in group)
        limit = len(group) if data.resident == "always" else max(int(most), 1)
        by_rows: dict[int, list[_Run]] = {}
        for run in group:
            by_rows.setdefault(id(run.inputs), []).append(run)
        # Rows stand once for runs that are all on the same, else once for each run.
        packed: list[list[_Run]] = []
        for source in by_rows.values():
            if packed and len(packed[-1]) + len(source) <= limit:
                packed[-1] = packed[-1] + source
            else:
                packed.append(source)
        groups += packed
    return groups


def _train_group(
    runs: list[_Run],
    console: Console,
    quiet: bool,
    watch: PreemptionWatch,
    done: Callable[[int, Results | FloatingPointError], None],
) -> None:
    """One group from its start, or from where it was left, to the results of each run."""
    began = time.perf_counter()
    if len(runs) == 1:
        (run,) = runs
        run.record.close()
        alone = functools.partial(
            train_in, run.config, run.home, console, quiet, run.inputs, watch, began, run.near
        )
        done(run.number, _or_error(alone))
        return
    start, steps = runs[0].record.start, runs[0].config.steps
    failed: set[int] = set()
    bar = ProgressBar(console, steps, start, unit=f"{len(runs)} runs, step", quiet=quiet)
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.callback(run.record.close)
            run.home.start(run.config, together=len(runs))
            run.record.open(console, quiet=True)
        stack.callback(bar.close)
        group = _Group(runs)
        if start < steps and watch.agreed(start):
            raise Preempted(start)
        for step in range(start, steps, runs[0].config.log_every):
            length = min(runs[0].config.log_every, steps - step)
            metrics, step = group.advance(length), step + length
            for i, run in enumerate(runs):
                if i in failed:
                    continue
                mine = {name: values[i] for name, values in metrics.items()}
                try:
                    run.record.take(functools.partial(group.state, i), step, mine)
                except FloatingPointError as error:
                    failed.add(i)
                    done(run.number, error)
            if len(failed) == len(runs):
                return
            bar.update(step, _mean(metrics, failed))
            if step < steps and watch.agreed(step):
                for i, run in enumerate(runs):
                    if i not in failed:
                        run.record.save(group.state(i))
                raise Preempted(step)
    teachers = {id(run.inputs): run.inputs for run in runs}
    scores = {key: evaluate_teacher(inputs) for key, inputs in teachers.items()}
    for i, run in enumerate(runs):
        if i not in failed:
            results = run.record.finish(
                group.state(i), scores[id(run.inputs)], began, together=len(runs)
            )
            done(run.number, results)


def _mean(metrics: dict[str, np.ndarray], failed: set[int]) -> dict[str, float]:
    return {
        name: float(np.mean(np.delete(values, list(failed), axis=0)))
        for name, values in metrics.items()
    }


class _Group:
    """The state of several runs, and the program that advances it.

    What is equal for all runs stands once in memory, and what follows from nothing else (the rows
    of a batch, the teacher's plan) is then computed once a step.
    """

    def __init__(self, runs: list[_Run]):
        self._runs = len(runs)
        devices = min(len(runs), jax.local_device_count())
        # Runs are shared out evenly: the last is repeated where their number is no multiple.
        each = -(-len(runs) // devices)
        runs = runs + [runs[-1]] * (each * devices - len(runs))
        keys: dict[int, Any] = {}
        for run in runs:
            seed = run.config.seed
            keys.setdefault(seed, jax.random.fold_in(jax.random.key(seed), 1))
        constants = [
            (_lean(run.setup, each), rest, tables, keys[run.config.seed])
            for run, (rest, tables) in zip(runs, _prepared(runs), strict=True)
        ]
        flat = [jax.tree.leaves(constant) for constant in constants]
        self._tree = jax.tree.structure(constants[0])
        axes, leaves = zip(*(_stacked(column) for column in zip(*flat, strict=True)), strict=True)
        self._axes: tuple[int | None, ...] = axes
        states = [run.record.restore(jax.tree.map(jnp.asarray, run.state)) for run in runs]
        stacked = jax.tree.map(lambda *column: jnp.stack(column), *states)
        state = stacked._replace(step=states[0].step)
        self._mesh = None
        if devices > 1:
            local = jax.local_devices()[:devices]
            self._mesh = Mesh(np.array(local), (_RUNS,), axis_types=(AxisType.Auto,))
            spread, same = NamedSharding(self._mesh, _SPREAD), NamedSharding(self._mesh, _SAME)
            leaves = [
                jax.device_put(leaf, same if axis is None else spread)
                for axis, leaf in zip(axes, leaves, strict=True)
            ]
            step = jax.device_put(state.step, same)
            state = jax.device_put(state._replace(step=_ALL), spread)._replace(step=step)
        self._leaves, self._state = list(leaves), state

    def advance(self, length: int) -> dict[str, np.ndarray]:
        """So many steps of every run; their metrics, ``(runs, length)`` each."""
        self._state, metrics = _run_together(
            length, self._tree, self._axes, self._mesh, self._state, self._leaves
        )
        return {name: np.asarray(values)[: self._runs] for name, values in metrics.items()}

    def state(self, i: int) -> TrainState:
        """That of one run, on one device."""
        state = _taken(self._state._replace(step=_ALL), i)
        whole = state._replace(step=self._state.step)
        return jax.device_put(whole, jax.local_devices()[0])


_SPREAD: Any = PartitionSpec(_RUNS)
_SAME: Any = PartitionSpec()
_STATE_SPECS: Any = TrainState(_SPREAD, _SPREAD, _SAME, _SPREAD)
_EACH: Any = 0
_ALL: Any = None
_STATE_AXES: Any = TrainState(_EACH, _EACH, _ALL, _EACH)


@functools.partial(
    jax.jit, static_argnames=("length", "tree", "axes", "mesh"), donate_argnames=("state",)
)
def _run_together(length: int, tree, axes, mesh: Mesh | None, state: TrainState, leaves):
    """``length`` steps of all runs. The step is one number for all, so epochs begin together."""

    def one(state, leaves):
        setup, rest, tables, key = jax.tree.unflatten(tree, leaves)
        return run_steps(length, setup, state, rest, tables, key)

    together = jax.vmap(one, in_axes=(_STATE_AXES, list(axes)), out_axes=(_STATE_AXES, 0))
    if mesh is not None:
        specs = [_SAME if axis is None else _SPREAD for axis in axes]
        together = jax.shard_map(
            together,
            mesh=mesh,
            in_specs=(_STATE_SPECS, specs),
            out_specs=(_STATE_SPECS, _SPREAD),
            check_vma=False,  # devices have nothing in common, and exchange nothing
        )
    return together(state, leaves)


@jax.jit
def _taken(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _lean(setup: Setup, runs: int) -> Setup:
    """A setup whose matrices share with those of other runs what one run may take of a device."""
    loss = dataclasses.replace(setup.loss, memory_gib=setup.loss.memory_gib / runs)
    return dataclasses.replace(setup, loss=loss)


def _prepared(runs: list[_Run]) -> list[tuple[Any, Batch]]:
    """Untrained variables and prepared rows of each run; of runs that have the same, one object."""
    program = jax.jit(prepare)
    known: list[tuple[Inputs, tuple[Any, Batch]]] = []
    found = []
    for run in runs:
        for inputs, one in known:
            if inputs is run.inputs and _equal(one[0], run.rest):
                break
        else:
            raw = place_tables(run.tables, None)
            tables = program(run.setup, run.state.params, run.rest, run.inputs.teacher, raw)
            one = (run.rest, tables)
            known.append((run.inputs, one))
        found.append(one)
    return found


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _stacked(values: Sequence[Any]) -> tuple[int | None, Any]:
    """The axis of the runs, and a leaf of all of them; None where they all have the same."""
    first = values[0]
    if all(value is first for value in values):
        return None, first
    if isinstance(first, int | float):
        if all(value == first for value in values):
            return None, first
        return 0, jnp.asarray(values, jnp.float32)
    return 0, jnp.stack(values)
