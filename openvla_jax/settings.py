"""Every setting of a training run: its default, what it means and what it may be, in one place.

Config files and flags are `ml_collections`: `configs/common.py: base()` is the `ConfigDict` of these defaults, and a
run turns its `ConfigDict` back into `Settings` once, at its start.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from openvla_jax.config import LoRAConfig, nearest
from openvla_jax.errors import InputError


def _choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}: one of {', '.join(map(str, choices))}")


def _at_least(name: str, value: Any, least: float) -> None:
    if value is not None and not value >= least:
        raise InputError(f"{name} is {value!r}: at least {least}")


@dataclasses.dataclass(frozen=True)
class ObservationSettings:
    """None takes what the checkpoint to start from has, or the default of `types.ObservationSpec`."""

    cameras: tuple[str, ...] | None = None  # in the order in which the model sees them
    state: tuple[str, ...] | None = None  # names of the state's columns


@dataclasses.dataclass(frozen=True)
class ActionSettings:
    """None takes what the checkpoint to start from has, or the default of `types.ActionSpec`."""

    horizon: int | None = None  # actions that are predicted at once
    executed: int | None = None  # how many of them are executed before the next prediction
    head: str | None = None  # tokens, parallel_tokens, l1 or diffusion (models/heads)
    dim: int | None = None  # numbers of an action, for the heads l1 and diffusion
    bins: int | None = None  # values of an action token
    normalization: str | None = None  # bounds_q99, bounds or normal
    denoising_steps: int | None = None  # of the head diffusion, when it acts


@dataclasses.dataclass(frozen=True)
class DataSettings:
    dataset: Any = ""  # a dataset or a mixture by name, or pairs (name, weight)
    data_dir: str = ""  # folder with one directory per dataset; gs:// works
    module: str = ""  # a Python file with datasets and mixtures of your own, see docs/data.md
    schedule: tuple = ()  # pairs (mixture, last step) that come before `dataset`
    text_length: int = 64  # tokens of text; a longer instruction is cut and counted
    shuffle_buffer: int = 256_000  # encoded frames
    num_parallel_reads: int = 8
    max_host_ram_gb: float | None = 64.0  # of one host's data pipeline; the shuffle buffer is cut to fit
    skip_unlabeled: bool = True
    max_action: float | None = None  # drops episodes with a larger |normalised action|
    max_proprio: float | None = None  # the same for the state
    bad_images: str = "stop"  # if an image cannot be decoded; or skip, log and count it
    statistics: str | None = None  # a dataset_statistics.json to use instead of computing; "base": init_from's
    statistics_dir: str | None = None  # where computed statistics are cached; default: beside the data
    resume: str = "auto"  # exact (the stream's state is saved), reseed, or auto: exact if that state is small

    def __post_init__(self) -> None:
        _choice("data.bad_images", self.bad_images, ("stop", "skip"))
        _choice("data.resume", self.resume, ("auto", "exact", "reseed"))
        for name in ("text_length", "shuffle_buffer", "num_parallel_reads"):
            _at_least(f"data.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The reference's five augmentations, on the accelerator; the strengths are OpenVLA's."""

    crop_scale: tuple[float, float] = (0.9, 0.9)  # range of the crop's share of the area
    crop_ratio: tuple[float, float] = (1.0, 1.0)  # range of width / height, relative to the image's
    diagonal_crop: bool = True  # the reference's crop slides along the diagonal only; False: anywhere
    brightness: float = 0.2  # largest shift either way
    contrast: tuple[float, float] = (0.8, 1.2)  # range of the factor
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05  # largest shift either way, in turns
    enabled: bool = False

    def __post_init__(self) -> None:
        limits = {"crop_scale": (1e-3, 1.0), "crop_ratio": (1e-3, 1e3), "contrast": (0, 10), "saturation": (0, 10)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise InputError(f"augment.{name} is {(low, high)}: give (low, high) within [{least}, {most}]")
        for name, most in {"brightness": 1.0, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"augment.{name} is {getattr(self, name)}: give a number within [0, {most}]")

    @property
    def policy_crop_area(self) -> float | None:
        """The share of the area that a policy is shown: the mean of the training crops; None if training has none."""
        area = sum(self.crop_scale) / 2
        return area if self.enabled and area < 1 else None


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh's axes; one of them may be -1: what the others leave of the devices."""

    data: int = 0  # 0: one per slice
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    steps: int = 300_000
    batch_size: int = 2048  # global
    accumulation: int = 1  # parts in which a step's batch is processed
    dtype: str = "bfloat16"  # of activations and products; parameters and optimiser are float32
    remat: str = "full"  # or save_qkv, save_qkvo, save_dots, none, or what to keep: "q,k,v,o" (models/stack.py)
    compiler_options: str = "tuned"  # for TPUs, see parallel/tpu.py; or "default"
    kernels: bool = True  # attention as a Pallas kernel on TPUs (kernels/flash_attention.py); False: XLA's
    log_every: int = 10
    eval_every: int = 1000  # 0: never
    eval_batches: int = 8
    stop_at_action_accuracy: float | None = None  # ends the run there, on average over log_every steps
    checkpoint_every: int = 2500
    keep_last: int = 2
    keep_every: int | None = None  # every N-th step is kept for good
    max_skipped: int = 5  # steps of the last 100 that may be skipped because loss or gradient is not finite
    hang_timeout: float = 600.0  # seconds without progress after which a host that others wait for is named; 0: never
    profile_at: int = 0  # the first step to profile, into WORKDIR/profile; 0: none
    profile_steps: int = 3
    compilation_cache: str = "~/.cache/openvla_jax/xla"  # compiled programs, kept between starts; "": none

    def __post_init__(self) -> None:
        _choice("train.compiler_options", self.compiler_options, ("tuned", "default"))
        _choice("train.dtype", self.dtype, ("bfloat16", "float32"))
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_last"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("eval_every", "eval_batches", "max_skipped", "hang_timeout", "profile_at"):
            _at_least(f"train.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float = 2e-5
    schedule: str = "constant"  # or "cosine", "step"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak, at the end of the cosine
    decay_at: int = 100_000  # updates at the peak, after which the schedule "step" takes a tenth of it
    weight_decay: float = 0.0
    decay_all: bool = False  # weight decay on norms and biases too, as PyTorch's AdamW without parameter groups
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient; 0: no clipping
    ema: float | None = None  # decay of a moving average of the trained weights, which then is what acts; None: none

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"optimizer.ema is {self.ema!r}: give a decay above 0 and below 1, as 0.999, or None")
        _choice("optimizer.schedule", self.schedule, ("constant", "cosine", "step"))
        for name in ("learning_rate", "warmup_steps", "decay_at", "weight_decay", "clip_norm"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class WandbSettings:
    project: str = ""  # off without a project
    entity: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 7
    init_from: str = ""  # a checkpoint whose weights, model and tokenizer to start from
    tokenizer: str = ""  # a folder with tokenizer.json or tokenizer.model, or "tiny"; with init_from the checkpoint's
    # A preset and overrides, see `config.model_config`.
    model: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"preset": "openvla-7b"})
    statistics: str = "replace"  # the checkpoint's action statistics by the data's, or "join" both
    # What is trained: patterns of parameter paths, separated by commas (models/tuning.py); the rest is frozen.
    trainable: str = "*"
    film: bool | None = None  # the towers see the instruction (FiLM); None: as in the checkpoint to start from
    frozen_dtype: str = "bfloat16"
    quantize: str = ""  # "int8" or "int4": frozen kernels of the projector and the language model as integers
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    observation: ObservationSettings = ObservationSettings()
    action: ActionSettings = ActionSettings()
    data: DataSettings = DataSettings()
    augment: AugmentConfig = AugmentConfig()
    mesh: MeshSettings = MeshSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    wandb: WandbSettings = WandbSettings()

    def __post_init__(self) -> None:
        _choice("statistics", self.statistics, ("replace", "join"))
        _choice("quantize", self.quantize, ("", "int8", "int4"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Settings":
        """Reads settings from nested mappings, as a `ConfigDict` or a saved run's config.

        A setting that is left out has its default. Raises InputError that names an unknown setting, or one of another
        type or range.
        """
        return _read(cls, data, "config")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _read(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        if name not in hints:
            raise InputError(f"unknown setting {where}.{name}; {nearest(name, hints)}")
        values[name] = _value(hints[name], value, f"{where}.{name}")
    try:
        return cls(**values)
    except ValueError as error:  # the checks name the setting within its section's config
        raise InputError(f"config.{error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as `hint` says: nested settings, lists as tuples, whole numbers as float."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}: it is a section with settings of its own")
        return _read(hint, value, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, list):
        value = tuple(tuple(part) if isinstance(part, list) else part for part in value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if Any in kinds:
        return value
    if isinstance(value, Mapping) and hint == Mapping[str, Any]:
        return {key: _plain(part) for key, part in value.items()}
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return _wrong(where, value, hint)
    return value


def _plain(value: Any) -> Any:
    """Nested mappings as dicts."""
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def _wrong(where: str, value: Any, hint: Any) -> Any:
    named = hint.__name__ if isinstance(hint, type) else str(hint)
    raise InputError(f"{where} is {value!r}: its type is {named}")
