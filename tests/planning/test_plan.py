"""The planner: FLOPs by an independent count, bad input, and a tiny model compiled for real by the TPU compiler."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from openvla_jax.config import preset, tiny
from openvla_jax.models.heads import Inputs, make_head
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.stack import REMAT_POLICIES, remat_policy
from openvla_jax.planning import train as planner
from openvla_jax.planning.compile import scheduled_cycles
from openvla_jax.planning.train import model_flops
from openvla_jax.settings import Settings
from openvla_jax.types import ActionSpec


def test_the_7b_does_13_7_teraflop_an_example():
    assert model_flops(preset("openvla-7b"), 64) == pytest.approx(13.7e12, rel=0.005)


def test_flops_of_products_agree_with_the_jaxpr():
    """Independent count: every dot_general of the forward pass, three times, attention of the language model halved."""
    model, text = tiny(base_vocab_size=700), 16
    pixels = jnp.zeros((1, model.image_size, model.image_size, 3 * len(model.towers)))
    ids, targets = jnp.ones((1, text), jnp.int32), jnp.full((1, 8), 3)
    network = jax.eval_shape(lambda key: OpenVLA(model, key), jax.random.key(0))
    graph, params = nnx.split(network)

    def logits(params):
        model = nnx.merge(graph, params)
        return model.target_logits(model.hidden(pixels, ids), targets)

    jaxpr = jax.make_jaxpr(logits)(params)
    total, causal, picking = count(jaxpr.jaxpr, model.patches + text)
    assert model_flops(model, text) == pytest.approx(3 * (total - causal / 2 - picking), rel=1e-6)


def test_flops_of_a_chunk_agree_with_the_jaxpr():
    """Forward only: attention is not halved, and an MLP takes the place of the logits."""
    model, text = dataclasses.replace(tiny(base_vocab_size=700), head="l1", action_dim=7, cameras=2), 32
    head = make_head(model, ActionSpec(7, 3, head="l1"))
    images = jnp.zeros((1, 2, model.image_size, model.image_size, 3), jnp.uint8)
    ids, lengths = jnp.ones((1, text - 22), jnp.int32), jnp.full(1, text - 22)
    network = jax.eval_shape(lambda key: OpenVLA(model, key), jax.random.key(0))
    graph, params = nnx.split(network)
    predict = lambda params: head.predict(nnx.merge(graph, params), Inputs(images, ids, lengths), 7).actions
    total, _, picking = count(jax.make_jaxpr(predict)(params).jaxpr, 2 * model.patches + text)
    assert model_flops(model, text, None, targets=22) == pytest.approx(total - picking, rel=1e-6)


def count(jaxpr, positions, times=1):
    """(all, attention over `positions`, choice of target rows): FLOPs of products."""
    total = causal = picking = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), (batch, _) = equation.params["dimension_numbers"]
            left, right = (operand.aval.shape for operand in equation.invars)
            out = equation.outvars[0].aval.shape
            flops = 2 * times * int(np.prod(out)) * int(np.prod([left[i] for i in contract]))
            total += flops
            if len(batch) == 2 and positions in left + right:
                causal += flops
            elif len(batch) == 1 and positions in [left[i] for i in contract]:
                picking += flops
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                a, b, c = count(inner, positions, times * equation.params.get("length", 1))
                total, causal, picking = total + a, causal + b, picking + c
    return total, causal, picking


@pytest.mark.parametrize(
    ("capacity", "fastest", "planned"),
    [
        (100, ("save_dots", 1), len(planner.SEARCHED)),
        (35, ("q,k,v,attention", 1), len(planner.SEARCHED)),
        (9, ("full", 2), 1 + len(planner.SEARCHED)),  # at first not even the one that keeps nothing
        (0, ("full", 8), 4),
    ],
)
def test_a_search_proposes_the_fastest_that_fits(monkeypatch, tmp_path, capsys, capacity, fastest, planned):
    """Of plans that need 10 times their place in the list, halved by each accumulation, and are faster the more."""

    def estimate(config, topology, dump):
        place = planner.SEARCHED.index(config.train.remat)
        parts = config.train.accumulation
        need = 10 * (place + 1) / parts
        seconds = 1.0 - 0.1 * place + 0.01 * parts
        return {
            "topology": topology, "chips": 4, "per_chip_batch": 8, "accumulation": parts, "remat": config.train.remat,
            "hbm_peak_bytes": need, "hbm_capacity_bytes": capacity, "fits": need <= capacity, "mfu": 0.5,
            "step_seconds": seconds if need <= capacity else None, "exposed_comm_seconds": 0.0,
            "examples_per_second": 1.0, "days": 1.0, "compile_seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(planner, "plan_step", estimate)
    evaluation = {"eval_fits": True, "eval_hbm_peak_bytes": 1, "eval_temp_bytes": 1, "eval_compile_seconds": 1.0}
    monkeypatch.setattr(planner, "plan_evaluation", lambda *_: evaluation)
    found = planner.search(Settings(), "v5e:2x2", tmp_path)
    assert ((found[0]["remat"], found[0]["accumulation"]), len(found)) == (fastest, planned)
    assert len(capsys.readouterr().out.splitlines()) == planned


def test_a_plan_whose_evaluation_does_not_fit_does_not_fit():
    over = {"eval_fits": False, "eval_hbm_peak_bytes": 40 * 2**30, "eval_temp_bytes": None, "eval_compile_seconds": 1.0}
    step = {"topology": "v5e:2x2", "fits": True, "hbm_peak_bytes": 1, "hbm_capacity_bytes": 16 * 2**30}
    entry = planner.with_evaluation(step, over)
    assert entry["fits"] is False
    said = planner._misfit(entry, Settings(), tried=False)
    assert "the evaluation does not fit, by 24.0 GiB a chip" in said and "--config.train.eval_every=0" in said
    never = Settings.from_dict({"train": {"eval_every": 0}})
    assert planner.with_evaluation(step, planner.plan_evaluation(never, "v5e:2x2", ROOT))["fits"]


def test_what_a_search_tries_exists():
    assert all(remat_policy(name) is not None for name in planner.SEARCHED)


def plan(*arguments):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "train.py", "--config", "tests/integration/one_tower.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_run_is_planned_by_the_tpu_compiler(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    result = plan("--config.train.batch_size=32", "--plan", "v5e:4x4", "--plan_out", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    (entry,) = json.loads(out.read_text())["entries"]
    assert (entry["topology"], entry["chips"], entry["hosts"], entry["fits"]) == ("v5e:4x4", 16, 4, True)
    assert 0 < entry["hbm_peak_bytes"] < 2**30 < entry["hbm_capacity_bytes"]
    assert entry["args_bytes"] > 0 and 0 < entry["temp_bytes"] < entry["hbm_peak_bytes"]
    # The moments of Adam stay on the chip while the evaluation runs.
    assert entry["eval_fits"] and entry["eval_temp_bytes"] < entry["temp_bytes"]
    assert entry["args_bytes"] / 2 < entry["eval_hbm_peak_bytes"] < 2**30
    assert 0 < entry["mfu"] < 1 and entry["step_seconds"] >= entry["compute_seconds"] > 0
    assert entry["collectives"]["all-gather"]["bytes"] > 0
    assert "v5e:4x4" in result.stdout and "Estimates, not measurements" in result.stdout


DONATED = """
import os, re, sys
from pathlib import Path

from openvla_jax.parallel.tpu import parse_slice
from openvla_jax.planning.environment import planning_environment

dump = Path(sys.argv[1])
os.environ.update(planning_environment(os.environ, dump))
import jax
import jax.numpy as jnp

from openvla_jax.planning.compile import compile_for, topology_devices

tpu = parse_slice("v4:2x2x1")
place = jax.sharding.SingleDeviceSharding(topology_devices(tpu)[0])
weights = jax.ShapeDtypeStruct((64, 1024, 1024), jnp.float32, sharding=place)
x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=place)


def loss(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def train_step(weights, x):
    return weights - jax.grad(loss)(weights, x)


compiled = compile_for(jax.jit(train_step, donate_argnums=0).lower(weights, x), "train_step", tpu, dump)
report = next(dump.glob("*train_step*memory-usage-report.txt")).read_text()
print(compiled.peak_bytes, re.search(r"color=0.*\\nTotal bytes: (\\d+)", report)[1])
"""


@pytest.mark.tpu_aot
@pytest.mark.slow
def test_peak_of_a_donated_state_is_the_compilers_total(tmp_path):
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", DONATED, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    peak, total = map(int, result.stdout.split()[-2:])
    assert peak == pytest.approx(total, rel=0.02)


ATTENTION = """
import os, sys
from pathlib import Path

from openvla_jax.parallel.tpu import parse_slice
from openvla_jax.planning.environment import planning_environment

dump, topology = Path(sys.argv[1]), sys.argv[2]
environment = planning_environment(os.environ, dump)
profile = dump / "profile"
profile.mkdir()
environment["LIBTPU_INIT_ARGS"] += f" --xla_jf_dump_static_llo_profile_to={profile}"
os.environ.update(environment)
import re

import jax
import jax.numpy as jnp

from openvla_jax.models.attention import attention_kernel
from openvla_jax.parallel.execution import Execution
from openvla_jax.planning.compile import compile_for, topology_devices
from openvla_jax.parallel.sharding import make_mesh

tpu = parse_slice(topology)
mesh = make_mesh({"fsdp": 1}, topology_devices(tpu)[:1])
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
x = jax.ShapeDtypeStruct((64, 256, 512), jnp.bfloat16, sharding=place)


def mixed(q, k, v):
    return attention_kernel(q, 4, Execution(mesh, kernels=True), causal=True, theta=1e4)(q, k, v)


def backward(q, k, v, gradient):
    return jax.vjp(mixed, q, k, v)[1](gradient)


compiled = compile_for(jax.jit(backward).lower(x, x, x, x), "backward", tpu, dump)
cycles = [int(re.search(r"cycles: (\\d+)", p.read_text())[1]) for p in profile.glob("*flash_attention*")]
print(len(cycles), compiled.cost.kernel_seconds * tpu.facts.clock, sum(cycles))
"""


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", pytest.param("v5p:2x2x1", marks=pytest.mark.long)])
@pytest.mark.long
def test_kernels_cost_what_the_compiler_says_of_them_alone(tmp_path, topology):
    """It says so of small programs only: of a whole step that takes more memory than a laptop has."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", ATTENTION, str(tmp_path), topology]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels, ours, theirs = map(float, result.stdout.split()[-3:])
    assert kernels == 2, "forward for its sums, and backward"
    assert ours == pytest.approx(theirs, rel=0.05)


REMATERIALISED = """
import json, os, sys
from pathlib import Path

from openvla_jax.parallel.tpu import parse_slice
from openvla_jax.planning.environment import planning_environment

dump = Path(sys.argv[1])
os.environ.update(planning_environment(os.environ, dump))
import jax
import jax.numpy as jnp
from flax import nnx

from openvla_jax.config import LlamaConfig
from openvla_jax.models.llama import Llama
from openvla_jax.parallel.execution import Execution
from openvla_jax.planning.compile import compile_for, topology_devices
from openvla_jax.parallel.sharding import make_mesh

tpu = parse_slice("v5e:1x1")
mesh = make_mesh({"fsdp": 1}, topology_devices(tpu))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
on_chip = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place)
config = LlamaConfig(width=128, depth=2, heads=1, kv_heads=1, mlp_dim=128, vocab_size=64)
graph, params = nnx.split(jax.eval_shape(lambda key: Llama(key, config), jax.random.key(0)), nnx.Param)
params, x = jax.tree.map(on_chip, (params, jnp.zeros((4, 16, 128))))


def kernel_seconds(remat):
    def loss(params, x):
        return nnx.merge(graph, params)(x, Execution(mesh, True, remat)).astype(jnp.float32).sum()

    # Everything in HBM, as what a 7B keeps: the two runs of a layer's forward kernel are then the same code.
    compiled = compile_for(jax.jit(jax.grad(loss)).lower(params, x), "loss", tpu, dump, {"xla_msa_enable": "false"})
    return compiled.cost.kernel_seconds


print(json.dumps({remat: kernel_seconds(remat) for remat in sys.argv[2:]}))
"""


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.long
def test_plans_count_a_recomputed_kernel_under_every_remat_policy(tmp_path):
    pytest.importorskip("libtpu")
    policies = [*REMAT_POLICIES, *(name for name in planner.SEARCHED if name not in REMAT_POLICIES)]
    command = [sys.executable, "-c", REMATERIALISED, str(tmp_path), *policies]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    seconds = json.loads(result.stdout.splitlines()[-1])
    once = seconds["none"]
    twice = seconds["full"]
    assert 1.2 * once < twice < 2 * once, "the forward kernel runs again, the backward kernel does not"
    recomputing = {"full", "save_qkv"}  # the others keep the result of attention
    assert seconds == pytest.approx({name: twice if name in recomputing else once for name in policies})


CODE, OTHER = ("body", "bf16[8]{0}"), ("body", "bf16[8]{0:S(1)}")
SCHEDULE = "== CAPACTIY:\nMXU, XLU\n    4     3\n== UTILIZATION:\n0 1\n4 0\n1 1\n"
FILE = "17-{}-00-pre-delay_hlo-static-per-bundle-utilization.txt"


def test_schedules_are_found_by_code(tmp_path):
    (tmp_path / FILE.format("kernel.1")).write_text(SCHEDULE)
    (tmp_path / FILE.format("kernel.10")).write_text(SCHEDULE + "0 0\n")
    (tmp_path / FILE.format("fusion.1")).write_text("of no kernel: never read")
    kernels = {"kernel.1": CODE, "kernel.2": CODE, "kernel.10": OTHER}
    assert scheduled_cycles(kernels, tmp_path) == {CODE: 3, OTHER: 4}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (FILE.format("kernel.2"), SCHEDULE + "0 0\n", "kernel kernel.2: scheduled in 4 cycles"),
        (FILE.format("kernel.2"), SCHEDULE + "== MORE:\n0 0\n", "format"),
        (FILE.format("kernel.2"), "== UTILIZATION:\n", "format"),
        ("kernel.2-pre-delay_bundles.txt", SCHEDULE, "format"),
    ],
)
def test_schedules_of_an_unknown_form_are_refused(tmp_path, name, text, message):
    (tmp_path / FILE.format("kernel.1")).write_text(SCHEDULE)
    (tmp_path / name).write_text(text)
    with pytest.raises(planner.PlanError, match=message):
        scheduled_cycles({"kernel.1": CODE, "kernel.2": CODE}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "v5e:16x16,v9:4x4"], "unknown TPU 'v9'"),
        (["--plan", "v5e:4x4x4"], "give 2 sizes, as v5e:4x4"),
        ([], "give --workdir DIR, or --plan TOPOLOGY"),
    ],
)
def test_bad_plans_are_told_in_one_line(arguments, message):
    result = plan(*arguments)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


MERGED = """
import os
import sys
from pathlib import Path

from openvla_jax.parallel.tpu import parse_slice
from openvla_jax.planning.environment import planning_environment

os.environ.update(planning_environment(os.environ, Path(sys.argv[1])))
import jax
import jax.numpy as jnp

from openvla_jax.models.attention import attention_kernel
from openvla_jax.parallel.execution import Execution
from openvla_jax.planning.compile import topology_devices
from openvla_jax.parallel.sharding import make_mesh

mesh = make_mesh({"fsdp": 1}, topology_devices(parse_slice(sys.argv[2]))[:1])
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def mixed(qkv):
    kernel = attention_kernel(qkv[..., :1152], 16, Execution(mesh, kernels=True), causal=False)
    assert kernel.takes_merged
    return kernel(qkv)


qkv, gradient = (jax.ShapeDtypeStruct((8, 256, n * 1152), jnp.bfloat16, sharding=place) for n in (3, 1))
jax.jit(lambda qkv, gradient: jax.vjp(mixed, qkv)[1](gradient)).lower(qkv, gradient).compile()
"""


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", pytest.param("v5p:2x2x1", marks=pytest.mark.long)])
@pytest.mark.long
def test_tpus_compile_the_kernel_of_merged_projections(tmp_path, topology):
    """SigLIP's: its heads of 72 begin where no register does."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", MERGED, str(tmp_path), topology]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
