import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.benchmarks.hlo import loops_of, op_names

# A while loop with an all-reduce of 6 floats and a scalar, inside it a fusion of no interest; a
# conditional whose branch gathers; an asynchronous gather, and a tuple in which two are reduced.
WRITTEN = """HloModule jit_f, entry_computation_layout={(f32[4,6]{1,0})->f32[6]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[6])) -> (s32[], f32[6]) {
  %state = (s32[], f32[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[6]{0} get-tuple-element(%state), index=1
  %psum.1 = f32[6]{0} all-reduce(%v), channel_id=1, to_apply=%add, metadata={op_name="f/while/psum"}
  ROOT %out = (s32[], f32[6]{0}) tuple(%i, %psum.1)
}

%cond (state.1: (s32[], f32[6])) -> pred[] {
  %state.1 = (s32[], f32[6]{0:T(128)}) parameter(0)
  %least = f32[] constant(0)
  %reduced = f32[] all-reduce(%least), to_apply=%add
  ROOT %more = pred[] compare(%reduced, %least), direction=LT
}

%branch (p: bf16[3]) -> bf16[3] {
  ROOT %p = bf16[3]{0} parameter(0)
}

%other (q: bf16[3]) -> bf16[3] {
  %q = bf16[3]{0} parameter(0)
  ROOT %moved = bf16[3]{0} collective-permute(%q), source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[4,6]) -> f32[6] {
  %a = f32[4,6]{1,0} parameter(0)
  %start = ((f32[4,6]{1,0}), f32[8,6]{1,0}) all-gather-start(%a), dimensions={0}
  %done = f32[8,6]{1,0} all-gather-done(%start)
  %small = s8[5]{0} constant({...})
  %two = (f32[4,6]{1,0}, s8[5]{0}) all-reduce(f32[4,6]{1,0} %a, s8[5]{0} %small), to_apply=%add
  %given = f32[6]{0} reduce-scatter(%done), dimensions={0}, to_apply=%add
  %choice = bf16[3]{0} conditional(%c, %h, %h), branch_computations={%branch, %other}
  %init = (s32[], /*index=1*/f32[6]{0}) tuple(%zero, %given)
  %loop = (s32[], f32[6]{0}) while(%init), condition=%cond, body=%body, metadata={op_name="f/while"}
  ROOT %result = f32[6]{0} get-tuple-element(%loop), index=1, metadata={op_name="f/take"}
}
"""


def test_a_program_by_hand():
    program = loops_of(WRITTEN)
    assert program.bytes() == {
        "all-gather": 8 * 6 * 4,
        "all-reduce": 4 * 6 * 4 + 5,
        "reduce-scatter": 8 * 6 * 4,  # what goes in
        "collective-permute": 3 * 2,
    }
    (loop,) = program.loops
    assert loop.op_name == "f/while" and loop.bytes() == {"all-reduce": 6 * 4 + 4}
    assert (program.height, loop.height) == (2, 1)
    assert {c.op_name for c in loop.collectives} == {"f/while/psum", ""}


def test_scopes_by_hand():
    names = op_names(WRITTEN)
    assert names["psum.1"] == "f/while/psum" and names["result"] == "f/take"
    assert names["given"] == ""


def test_what_is_not_hlo():
    with pytest.raises(ValueError, match="text: not the HLO of a compiled program"):
        loops_of("def f(x): return x")


def test_traffic_known_in_closed_form():
    """Per pass of the inner loop k floats, of the outer one a scalar more; once, a gather."""
    k, devices = 37, 4
    mesh = jax.make_mesh((devices,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def program(x):
        def inner(_, v):
            return jax.lax.psum(jnp.sin(v), "rows") / devices

        def outer(state):
            v, _ = state
            v = jax.lax.fori_loop(0, jnp.asarray(v[0], jnp.int32), inner, v)
            return v, jax.lax.pmax(jnp.max(v), "rows")

        v, _ = jax.lax.while_loop(lambda state: state[1] > 0.5, outer, (x[0], x[0, 0]))
        return jax.lax.all_gather(x, "rows"), v

    f = jax.shard_map(program, mesh=mesh, in_specs=P("rows"), out_specs=(P(), P()), check_vma=False)
    x = jax.ShapeDtypeStruct((devices, k), jnp.float32)
    found = loops_of(jax.jit(f).lower(x).compile().as_text())
    (outer,) = found.loops
    (inner,) = outer.loops
    assert inner.bytes() == {"all-reduce": 4 * k}
    assert outer.bytes() == {"all-reduce": 4}
    assert found.bytes() == {"all-gather": 4 * k * devices}
    assert [loop.height for loop in found.walk()] == [3, 2, 1]
