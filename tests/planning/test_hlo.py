"""The reading of compiled programs, on text in the compiler's own form with known numbers."""

import pytest

from openvla_jax.planning.hlo import Program, group_size

GATHER = "replica_groups=mesh['data'=2,'fsdp'=32] {'fsdp'}"
TEXT = """
%cond (p: s32[]) -> pred[] {
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%p, %bound), direction=LT
}

%body (p: s32[]) -> s32[] {
  %ag = bf16[64,128]{1,0} all-gather(%p), GROUP, dimensions={0}
  %work = f32[8]{0} fusion(%ag), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"500"}
  ROOT %next = s32[] fusion(%work), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"500"}
}

%f (p: s32[]) -> s32[] {
  ROOT %inner = s32[] add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %first = s32[] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1000"}
  %loop = (s32[], /*index=1*/bf16[3,64]{1,0}) while(%first), condition=%cond, body=%body
  %start = (bf16[32]{0}, bf16[1024]{0}) all-gather-start(%loop), GROUP, dimensions={0}
  %hide = s32[] fusion(%loop), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"HIDE"}
  %done = bf16[1024]{0} all-gather-done(%start)
  ROOT %reduce = f32[100]{0} all-reduce(%done), replica_groups={{0,1},{2,3}}, to_apply=%f
}
""".replace("GROUP", GATHER)


@pytest.mark.parametrize(("hidden", "exposed"), [(100_000, 0.0), (0, 2048 * 31 / 32)])
def test_cycles_loops_and_collectives(hidden, exposed):
    program = Program(TEXT.replace("HIDE", str(hidden)))
    cost = program.cost(clock=1000.0, seconds=lambda kind, size, group: size)  # a byte a second
    assert cost.compute_seconds == pytest.approx(1 + 3 * 1 + hidden / 1000)
    in_loop = 64 * 128 * 2 * 31 / 32
    reduced = 2 * 400 / 2
    assert dict(cost.collectives) == pytest.approx({"all-gather": 3 * in_loop + 2048 * 31 / 32, "all-reduce": reduced})
    assert dict(cost.counts) == {"all-gather": 4, "all-reduce": 1}
    hiding = min(hidden / 1000, 2048 * 31 / 32)
    assert cost.exposed_seconds == pytest.approx(3 * in_loop + 2048 * 31 / 32 - hiding + reduced)
    assert cost.comm_seconds == pytest.approx(3 * in_loop + 2048 * 31 / 32 + reduced)


def test_groups():
    assert group_size("replica_groups=[4,16]<=[64]") == 16
    assert group_size("replica_groups={{0,1,2},{3,4,5}}") == 3
    assert group_size(GATHER) == 32
    assert group_size("replica_groups=mesh['a'=2,'b'=4,'c'=8] {'a','c'}, x={}") == 16
    assert group_size("replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}, x={}") == 8
    with pytest.raises(ValueError, match="no replica groups"):
        group_size("dimensions={0}")


def test_text_of_another_form_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("HloModule m\n")
    with pytest.raises(ValueError, match="trip count of loop loop"):
        Program(TEXT.replace("constant(3)", "parameter(0)")).cost(1.0, lambda *_: 0.0)


OFFLOADED = """
%gathers (p: bf16[32]) -> bf16[1024] {
  ROOT %g = bf16[1024]{0} all-gather(%p), GROUP, dimensions={0}
}

%async (p: bf16[32]) -> bf16[1024] {
  ROOT %c = bf16[1024]{0} custom-call(%p), custom_call_target="sparse", called_computations={%gathers}
}

%f (p: s32[]) -> s32[] {
  ROOT %inner = s32[] add(%p, %p)
}

ENTRY %main (p: s32[]) -> s32[] {
  %ag.call-start = ((), (), (s32[8192]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %before = s32[] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"700000"}
  %ag.call-update = ((bf16[32]{0}), bf16[1024]{0}, (s32[8192]{0})) async-update(%ag.call-start, %before), x={}
  %hide = s32[] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"500000"}
  ROOT %ag.call-done = bf16[1024]{0} async-done(%ag.call-update), x={}
}
""".replace("GROUP", GATHER)


CALLS = 'custom-call(%p), custom_call_target="sparse", called_computations={%gathers}', "call(%p), to_apply=%gathers"


@pytest.mark.parametrize("text", [OFFLOADED, OFFLOADED.replace(*CALLS)])
def test_a_collective_on_a_sparse_core_runs_from_its_operand_to_its_end(text):
    cost = Program(text).cost(clock=1000.0, seconds=lambda kind, size, group: size)
    received = 2048 * 31 / 32
    assert (dict(cost.collectives), dict(cost.counts)) == ({"all-gather": received}, {"all-gather": 1})
    assert cost.compute_seconds == 1200
    assert cost.exposed_seconds == pytest.approx(received - 500)  # what came before the operand hides nothing


CARRIED = """
%begins (p: bf16[32]) -> (bf16[32], bf16[1024]) {
  %g1 = bf16[1024]{0} all-gather(%p), channel_id=7, GROUP, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[32]{0}, bf16[1024]{0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%carries (p: bf16[32]) -> (f32[8], bf16[32], bf16[1024]) {
  %product = f32[8]{0} convolution(%p, %p), dim_labels=bf_io->bf
  %g2 = bf16[1024]{0} all-gather(%p), channel_id=7, GROUP, frontend_attributes={chain_id="0"}
  ROOT %t = STATE tuple(%product, %p, %g2)
}

%ends (p: bf16[32]) -> bf16[1024] {
  %g3 = bf16[1024]{0} all-gather(%p), channel_id=7, GROUP, frontend_attributes={chain_id="0"}
  ROOT %c = bf16[1024]{0} custom-call(%g3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[32]) -> bf16[1024] {
  %begin = (bf16[32]{0}, bf16[1024]{0}) fusion(%p), kind=kCustom, calls=%begins
  %part = bf16[32]{0} get-tuple-element(%begin), index=0
  %work.1 = STATE fusion(%part), kind=kOutput, calls=%carries, backend_config={"estimated_cycles":"500000"}
  %part.1 = bf16[32]{0} get-tuple-element(%work.1), index=1
  %work.2 = STATE fusion(%part.1), kind=kOutput, calls=%carries, backend_config={"estimated_cycles":"700000"}
  %part.2 = bf16[32]{0} get-tuple-element(%work.2), index=1
  ROOT %end = bf16[1024]{0} fusion(%part.2), kind=kCustom, calls=%ends
}
""".replace("GROUP", GATHER).replace("STATE", "(f32[8]{0}, bf16[32]{0}, bf16[1024]{0})")


def test_a_collective_that_products_carry_along_counts_once():
    cost = Program(CARRIED).cost(clock=1000.0, seconds=lambda kind, size, group: size)
    received = 2048 * 31 / 32
    assert (dict(cost.collectives), dict(cost.counts)) == ({"all-gather": received}, {"all-gather": 1})
    assert cost.compute_seconds == 1200
    assert cost.exposed_seconds == pytest.approx(received - 1200)


SCATTERED = """
%all-reduce-scatter.1 (p: bf16[1024,8]) -> bf16[32,8] {
  %r = bf16[1024,8]{1,0} all-reduce(%p), channel_id=7, GROUP, to_apply=%add
  ROOT %s = bf16[32,8]{1,0} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={32,8}
}

ENTRY %main (p: bf16[1024,8]) -> bf16[32,8] {
  ROOT %f = bf16[32,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={EMITTER}
}
""".replace("GROUP", GATHER)


@pytest.mark.parametrize("emitter", ["AllReduceScatterFusion", "SingleInputAllReduceScatterFusion"])
def test_a_slice_of_an_all_reduce_that_is_run_as_a_reduce_scatter_is_one(emitter):
    config = f'"collective_algorithm_config":{{"emitter":"{emitter}"}}'
    cost = Program(SCATTERED.replace("EMITTER", config)).cost(clock=1000.0, seconds=lambda kind, size, group: size)
    assert dict(cost.collectives) == {"reduce-scatter": 32 * 8 * 2 * 31}
    assert cost.exposed_seconds == 32 * 8 * 2 * 31
    other = Program(SCATTERED.replace("EMITTER", "")).cost(clock=1000.0, seconds=lambda kind, size, group: size)
    assert dict(other.collectives) == {"all-reduce": pytest.approx(2 * 1024 * 8 * 2 * 31 / 32)}


KERNEL = """
%f (p: s32[]) -> s32[] {
  ROOT %inner = s32[] add(%p, %p)
}

ENTRY %main (p: s32[]) -> s32[] {
  %first = s32[] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1000"}
  %kernel.3 = (bf16[2,8,128]{2,1,0:T(8,128)(2,1)}, f32[2,8]{1,0}) custom-call(%first, %p), TARGET, LAYOUTS={
"programs":"48"
}}, metadata={op_name="attention"}, backend_config={"flag_configs":[]}
  ROOT %part = f32[2,8]{1,0} get-tuple-element(%kernel.3), index=1, frontend_attributes={kernel_metadata={
"programs":"48"
}}
}
""".replace("TARGET", 'custom_call_target="tpu_custom_call"').replace(
    "LAYOUTS",
    "operand_layout_constraints={bf16[2,8,128]{2,1,0}, f32[100]{0}}, frontend_attributes={kernel_metadata=",
)


def test_kernels_take_what_they_are_said_to():
    program = Program(KERNEL)
    (kernel,) = [i for i in program.computations["main"] if i.is_kernel]
    assert (kernel.name, kernel.programs, kernel.cycles) == ("kernel.3", 48, 0)
    assert kernel.kernel_bytes == 2 * (2 * 8 * 128 * 2) + 2 * 8 * 4 + 100 * 4
    cost = program.cost(clock=1000.0, seconds=lambda *_: 0.0, kernel_seconds=lambda kernel: kernel.programs / 4)
    assert (cost.compute_seconds, cost.kernel_seconds) == (13.0, 12.0)
    with pytest.raises(ValueError, match=r"kernel\.3: nothing tells how long"):
        program.cost(clock=1000.0, seconds=lambda *_: 0.0)


CALL = (
    'custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="OP"}, '
    'backend_config={"custom_call_config":{"body":"TUzv","debug_locations":"OP","colors":[{"index":0}]},"retry_config":{"retry_count":"0"}}'
)
KERNELS = f"""
%body (p: bf16[8]) -> bf16[8] {{
  %p = bf16[8]{{0}} parameter(0)
  ROOT %again = bf16[8]{{0}} {CALL.replace("OP", "rematted")}
}}

ENTRY %main (p: bf16[8]) -> bf16[8] {{
  %p = bf16[8]{{0}} parameter(0)
  %first = bf16[8]{{0}} {CALL}
  %near = bf16[8]{{0:S(1)}} {CALL}
  %q = bf16[8]{{0:S(1)}} copy(%p)
  %from_near = bf16[8]{{0}} {CALL.replace("%p", "%q")}
  %pair = (s32[]{{:T(128)}}, /*index=1*/bf16[8]{{0}}, bf16[8]{{0:T(8,128)(2,1)S(1)}}) copy(%p)
  %element = bf16[8]{{0}} {CALL.replace("%p", "%pair#1")}
  %other = bf16[8]{{0}} {CALL.replace("TUzv", "TUzw")}
}}
"""


def test_kernels_share_code_if_body_types_and_memory_spaces_agree():
    kernels = Program(KERNELS).kernels()
    assert kernels["first"] == kernels["again"] == kernels["element"]
    assert len(set(kernels.values())) == len(kernels) - 2 == 4


@pytest.mark.parametrize(("old", "new"), [('"body":"TUzv",', ""), ("backend_config=", "config=")])
def test_kernels_without_a_body_share_no_code(old, new):
    kernels = Program(KERNELS.replace(old, new)).kernels()
    assert len(set(kernels.values())) == len(kernels)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("custom-call(%p)", "custom-call(%gone)", "operand gone: its type"),
        ("%pair#1", "%pair#3", "operand pair#3: its type"),
        ("%pair#1", "%p#0", "operand p#0: its type"),
    ],
)
def test_kernels_of_an_unknown_form_are_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        Program(KERNELS.replace(old, new)).kernels()
