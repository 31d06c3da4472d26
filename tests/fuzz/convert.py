"""Files that conversion and checkpoints read: safetensors, `.pt`, adapter and model configs, contracts, checksums."""

import functools
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.contract import CONFIG_FILE, STATISTICS_FILE, Contract
from openvla_jax.config import tiny
from openvla_jax.convert.components import read_components
from openvla_jax.convert.describe import read_json
from openvla_jax.convert.names import ConversionError, source_shapes, table
from openvla_jax.convert.peft import CONFIG, read_settings
from openvla_jax.convert.sources import describe_hf
from openvla_jax.convert.torch_io import read_pt, read_safetensors
from openvla_jax.convert.torch_write import PtWriter, fill, lay_out_safetensors
from openvla_jax.errors import reading
from tests.convert.fabricate import STATISTICS, hf_config, shrunken
from tests.fuzz.harness import Target

ADAPTERS = Path(__file__).parents[1] / "data" / "peft_adapters"
TOWERS = "vision_backbone--1_checkpoint.pt"
SPECS = {
    "a.weight": (np.dtype(np.float32), (3, 4)),
    "b": (np.dtype(ml_dtypes.bfloat16), (2,)),
    "c": (np.dtype(np.int8), ()),
}
JSON = (
    b"null",
    b"true",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b"0.5",
    b",",
    b":",
)


def through(name: str, read: Callable[[Path], object], **beside: bytes) -> Callable[[bytes], object]:
    """Returns a parser of bytes: it writes them to a file `name` of a folder, beside others, and reads that."""

    @functools.cache
    def folder() -> tempfile.TemporaryDirectory:
        place = tempfile.TemporaryDirectory(prefix="fuzz")
        for other, content in beside.items():
            (Path(place.name) / other.replace("__", ".")).write_bytes(content)
        return place

    def parse(data: bytes) -> object:
        path = Path(folder().name) / name
        path.write_bytes(data)
        return read(path)

    return parse


def safetensors() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for tensor in lay_out_safetensors(Path(folder), SPECS).values():
            fill(tensor, 0, np.ones(tensor.shape, tensor.dtype))
        return [(Path(folder) / "model.safetensors").read_bytes()]


def archives() -> Sequence[bytes]:
    """One of this package's writer; one with what PyTorch saves beside tensors, and storages without a type."""
    with tempfile.TemporaryDirectory() as folder:
        writer = PtWriter(Path(folder) / "x.pt", {"model": {"projector": dict(SPECS)}})
        writer.finish()
        own = (Path(folder) / "x.pt").read_bytes()
    storage = b"(X\7\0\0\0storagectorch.storage\nUntypedStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ"
    typed = (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + b"K\0K\2K\2\x86K\2K\1\x86\x89ccollections\nOrderedDict\n)R"
    )
    typed += b"ctorch\nfloat8_e4m3fn\ntR"
    pickled = b"\x80\2}q\0(X\1\0\0\0a" + typed + b"X\1\0\0\0bctorch\nbfloat16\nX\1\0\0\0cctorch\nSize\n(K\1K\2t\x85Ru."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", b"little")
        archive.writestr("x/data/0", bytes(4))
    return [own, buffer.getvalue()]


def towers() -> Sequence[bytes]:
    """OpenVLA-OFT's file of towers with FiLM: two layers with adapters, one block."""
    wide, narrow = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
    patches, layer = "featurizer.patch_embed.proj", "featurizer.blocks.0.block.mlp.fc1"
    specs = {
        f"{patches}.base_layer.weight": (narrow, (4, 3, 2, 2)),
        f"{patches}.lora_A.default.weight": (narrow, (2, 3, 2, 2)),
        f"{patches}.lora_B.default.weight": (narrow, (4, 2, 1, 1)),
        "featurizer.blocks.0.block.norm1.bias": (narrow, (4,)),
        f"{layer}.base_layer.weight": (narrow, (8, 4)),
        f"{layer}.lora_A.default.weight": (narrow, (2, 4)),
        f"{layer}.lora_B.default.weight": (narrow, (8, 2)),
        "featurizer.blocks.0.scale.weight": (wide, (4, 6)),
    }
    with tempfile.TemporaryDirectory() as folder:
        writer = PtWriter(Path(folder) / TOWERS, {f"vision_backbone.{name}": spec for name, spec in specs.items()})
        for tensor in writer.tensors.values():
            fill(tensor, 0, np.ones(tensor.shape, tensor.dtype))
        writer.finish()
        return [(Path(folder) / TOWERS).read_bytes()]


def adapters() -> Sequence[bytes]:
    return [(ADAPTERS / kind / CONFIG).read_bytes() for kind in ("gaussian", "rslora", "pissa_converted")]


def contracts() -> Sequence[bytes]:
    return [json.dumps(Contract(tiny(), None, STATISTICS).to_dict(), indent=1).encode()]


def noted() -> Sequence[bytes]:
    return [json.dumps({"processes": 1, "files": {CONFIG_FILE: checksums.entry(b"x")}}).encode()]


def configs() -> Sequence[bytes]:
    for variant in ("dinosiglip", "dino-mistral"):
        shapes(variant)  # takes seconds, once
    return [json.dumps(hf_config(shrunken(name), name, "float32")).encode() for name in ("dinosiglip", "dino-mistral")]


@functools.cache
def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    return source_shapes(table(shrunken(variant), "hf"))


def read_config(path: Path) -> object:
    config = read_json(path)
    variant = "dino-mistral" if "mistral" in str(config.get("llm_backbone_id")) else "dinosiglip"
    with reading(path, kind=ConversionError):
        return describe_hf(config, {}, shapes(variant), "fuzz").model(config.get("model_config") or {})


load = lambda path: Contract.load(path.parent)
STATISTICS_BYTES = json.dumps(STATISTICS).encode()
TARGETS = {
    target.name: target
    for target in (
        Target(
            "safetensors",
            safetensors,
            through("x.safetensors", read_safetensors),
            tokens=(*JSON, b'"F8_E4M3"', b'"C64"', b'"dtype"', b'"shape"', b'"data_offsets"', struct.pack("<Q", 2**40)),
        ),
        Target(
            "pt",
            archives,
            through("x.pt", read_pt),
            tokens=(
                b"PK\3\4",
                b"PK\1\2",
                b"PK\5\6",
                b"r\xff\xff\xff\x7f",
                b"\x8e\0\0\0\0\1\0\0\0",
                b"cos\nsystem\n",
                b"R",
                b"h\0",
                b"b",
                b"Q",
                b"2",
                b"tR",
                b"ctorch\nfloat8_e5m2\n",
            ),
        ),
        Target(
            "oft_towers",
            towers,
            through(TOWERS, lambda path: read_components(path.parent, {})),
            tokens=(
                b"PK\3\4",
                b"PK\1\2",
                b"R",
                b"h\0",
                b"Q",
                b"K\0",
                b"tR",
                b"BFloat16Storage",
                b"lora_B",
                b"base_layer",
            ),
        ),
        Target("adapter_config", adapters, through(CONFIG, read_settings), tokens=(*JSON, b'"r"', b'"lora_alpha"')),
        Target(
            "contract",
            contracts,
            through(CONFIG_FILE, load, dataset_statistics__json=STATISTICS_BYTES),
            tokens=(*JSON, b'"format"', b'"adapter"', b'"towers"'),
        ),
        Target(
            "statistics",
            lambda: [STATISTICS_BYTES],
            through(STATISTICS_FILE, load, config__json=contracts()[0]),
            tokens=(*JSON, b'"mask"', b'"proprio"'),
        ),
        Target(
            "checksums",
            noted,
            through(checksums.FILE, lambda path: checksums.stored(epath.Path(path.parent))),
            tokens=JSON,
        ),
        Target(
            "hf_config", configs, through("config.json", read_config), tokens=(*JSON, b'"llama"', b'"heads"', b"4.5")
        ),
    )
}
