"""The process environment in which libtpu compiles without a TPU."""

from collections.abc import Mapping
from pathlib import Path


def schedules(dump: Path) -> Path:
    """The folder in `dump` of what the compiler schedules for each instruction of a program."""
    return dump / "schedules"


def planning_environment(environment: Mapping[str, str], dump: Path) -> dict[str, str]:
    """What must be set before jax is imported to compile for TPUs on a machine without one; the compiler writes its
    text into `dump`, and into `schedules(dump)` what it schedules, a line for each cycle.
    """
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=nothing"
    of_tpus = (
        f"--xla_jf_dump_to={schedules(dump)} --xla_jf_dump_category_filter=utilization "
        "--xla_jf_dump_llo_pass_label_regex=pre-delay"
    )
    return {
        "LIBTPU_INIT_ARGS": f"{environment.get('LIBTPU_INIT_ARGS', '')} {of_tpus}".strip(),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks the cloud's metadata server about this machine
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once: none of them takes a TPU
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology is what counts, but without one libtpu warns
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flags}".strip(),
    }
