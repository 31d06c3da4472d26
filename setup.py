"""Packaging of openvla_jax: `pip install -e ".[data]" -c constraints.txt` installs the versions that were tested."""

from setuptools import find_packages, setup

LINUX_X86 = 'sys_platform == "linux" and platform_machine == "x86_64"'

# Flax up to 0.12.8 does not import on jax 0.11.1 and later, and later Flax needs both that jax and Python 3.12:
# each Python has its own pair of ranges, so that no resolver can mix them.
JAX = [
    'jax>=0.10.1,<0.11; python_version < "3.12"',
    'flax>=0.12.8,<0.12.9; python_version < "3.12"',
    'jax>=0.11.2,<0.13; python_version >= "3.12"',
    'flax>=0.12.9,<0.13; python_version >= "3.12"',
]

BASE = [
    *JAX,
    "absl-py>=2.1",
    "einops>=0.8",
    "etils[epath,epy]>=1.9",
    "huggingface_hub>=1.0",
    "jaxtyping>=0.3",
    "ml_dtypes>=0.5",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12.8,<0.13",  # the v1 API is young: a new minor version needs a look
    "pillow>=10.0",
    "pyyaml>=6.0",
    "rich>=13.7",
    "scipy>=1.13",
    "sentencepiece>=0.2",
    "simplejpeg>=1.8",  # decodes with the fast transform, as TensorFlow does; Pillow cannot
    "tensorboardX>=2.6",
    "tensorstore>=0.1.70",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0,<6",  # tokenizers only; version 5 splits some text differently from version 4
]

# RLDS reading. tensorflow-cpu is the same library without the CUDA libraries, which it must never use here.
DATA = [
    f"tensorflow-cpu>=2.20; {LINUX_X86}",
    'tensorflow>=2.20; sys_platform != "linux" or platform_machine != "x86_64"',
    "tensorflow-datasets>=4.9.9",
]
PLOTS = ["matplotlib>=3.8"]  # figures of evaluations
LEROBOT = ["av>=14.0", "pyarrow>=16.0"]  # LeRobot's video and parquet files, to convert them
SERVE = ["fastapi>=0.115", "httptools>=0.6", "prometheus-client>=0.20", "starlette>=0.40", "uvicorn>=0.30"]
WANDB = ["wandb>=0.18"]  # for --config.wandb.project
TPU = ["jax[tpu]"]  # also what plans a pod run on any x86-64 Linux machine: the TPU compiler is libtpu
DEV = [
    *DATA,
    *PLOTS,
    *LEROBOT,
    *SERVE,
    f"{TPU[0]}; {LINUX_X86}",
    "beartype>=0.20",
    "httpx2>=2.0",  # fastapi's test client
    "hypothesis>=6.100",
    "json-numpy>=2.0",  # the encoding of OpenVLA's clients
    "mypy>=1.15",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "safetensors>=0.5",
    "torch>=2.6",  # the reference's own computations, in tests and benchmarks
]

# The configs lie inside the package: site-packages gets no package named `configs`.
CONFIGS = [f"openvla_jax._{name}" for name in find_packages(include=["configs*"])]

setup(
    name="openvla_jax",
    version="0.1.0",
    description="OpenVLA in JAX: training on TPU pods, weights both ways between PyTorch and Orbax, serving",
    author="The openvla_jax authors",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["openvla_jax*"]), *CONFIGS, "openvla_client"],
    package_dir={"openvla_jax._configs": "configs", "openvla_client": "clients/openvla_client/openvla_client"},
    package_data={"openvla_jax.sim.libero": ["requirements.txt", "fingerprints/*"]},
    entry_points={"console_scripts": ["openvla = openvla_jax.__main__:main"]},
    install_requires=BASE,
    extras_require={
        "data": DATA,
        "plots": PLOTS,
        "lerobot": [*DATA, *LEROBOT],
        "serve": SERVE,
        "wandb": WANDB,
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": TPU,
        "dev": DEV,
    },
)
