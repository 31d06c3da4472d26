"""Every setting of a training run with its default; the other configs start from here. Plain data and arithmetic
only.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    config = ConfigDict()
    config.seed = 7
    config.init_from = ""  # a checkpoint whose weights, model and tokenizer to start from
    # A directory with tokenizer.json or tokenizer.model, or "tiny"; with init_from the checkpoint's.
    config.tokenizer = ""
    config.model = ConfigDict({"preset": "openvla-7b"})  # and overrides, see openvla_jax.config.model_config

    config.action = ConfigDict({"bins": placeholder(int)})  # values of a token; default: the checkpoint's, else 256

    config.statistics = "replace"  # action statistics of the checkpoint: the data's instead, or "join" both

    # What is trained: patterns of parameter paths, separated by commas (openvla_jax.models.tuning); the rest is frozen.
    config.trainable = "*"
    config.frozen_dtype = "bfloat16"
    config.quantize = ""  # "int8" or "int4": frozen kernels of the projector and the language model as integers
    config.lora = lora = ConfigDict()
    lora.rank = 0  # of adapters beside the layers in `targets`; 0: none
    lora.alpha = placeholder(float)  # adapters are scaled by alpha / rank; default min(rank, 16)
    lora.dropout = 0.0
    lora.targets = "all"  # all, reference (PEFT's all-linear), or path patterns separated by commas

    config.data = data = ConfigDict()
    data.dataset = ""  # a dataset or a mixture by name
    data.data_dir = ""  # folder with one directory per dataset; gs:// works
    data.module = ""  # a Python file with datasets and mixtures of your own, see docs/data.md
    data.schedule = ()  # (mixture, last step) pairs that come before data.dataset
    data.text_length = 64  # tokens of text; a longer instruction is cut and counted
    data.shuffle_buffer = 256_000  # encoded frames
    data.num_parallel_reads = 8
    data.max_host_ram_gb = 64.0  # of one host's data pipeline; the shuffle buffer is cut to fit
    data.skip_unlabeled = True
    data.max_action = placeholder(float)  # drops episodes with a larger |normalised action|
    data.max_proprio = placeholder(float)  # the same of the state
    data.bad_images = "stop"  # at an image that cannot be decoded; or skip, log and count it
    data.statistics = placeholder(str)  # a dataset_statistics.json to use instead of computing; "base": init_from's
    data.statistics_dir = placeholder(str)  # where computed statistics are cached; default: beside the data
    data.resume = "auto"  # exact (the stream's state is saved), reseed, or auto: exact where that is small

    config.augment = augment = ConfigDict()
    augment.enabled = False  # the five augmentations of the reference, on the accelerator
    augment.crop_scale = (0.9, 0.9)  # area
    augment.crop_ratio = (1.0, 1.0)
    augment.diagonal_crop = True  # the reference's crop slides along the diagonal only
    augment.brightness = 0.2
    augment.contrast = (0.8, 1.2)
    augment.saturation = (0.8, 1.2)
    augment.hue = 0.05

    config.mesh = ConfigDict({"data": 0, "fsdp": -1, "tensor": 1})  # data 0: one per slice; -1: what is left

    config.train = train = ConfigDict()
    train.steps = 300_000
    train.batch_size = 2048  # global
    train.accumulation = 1  # parts in which a step's batch is processed
    train.dtype = "bfloat16"  # of activations and products; parameters and optimiser are float32
    train.remat = "full"  # or save_qkv, save_qkvo, save_dots, none, or what to keep: "q,k,v,o" (models/linear.py)
    train.compiler_options = "tuned"  # of TPUs, see openvla_jax.training.tpu; or "default"
    train.kernels = True  # on TPUs attention as a kernel (kernels/flash_attention.py); False: made by the compiler
    train.log_every = 10
    train.eval_every = 1000  # 0: never
    train.eval_batches = 8
    train.stop_at_action_accuracy = placeholder(float)  # ends the run there, on average over log_every steps
    train.checkpoint_every = 2500
    train.keep_last = 2
    train.keep_every = placeholder(int)  # every N-th step is kept for good
    train.max_skipped = 5  # steps of the last 100 that may be skipped because loss or gradient is no finite number
    train.hang_timeout = (
        600.0  # seconds without progress after which a host that the others wait for is named; 0: never
    )
    train.profile_at = 0  # the first step to profile, into WORKDIR/profile; 0: none
    train.profile_steps = 3
    train.compilation_cache = "~/.cache/openvla_jax/xla"  # compiled programs, kept between starts; "" for none

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 2e-5
    optimizer.schedule = "constant"  # or "cosine"
    optimizer.warmup_steps = 0
    optimizer.final_fraction = 0.0  # of the peak, at the end of the cosine
    optimizer.weight_decay = 0.0
    optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8
    optimizer.clip_norm = 1.0

    config.wandb = ConfigDict({"project": "", "entity": "", "group": ""})  # off without a project
    return config


def finetune(trainable: str) -> ConfigDict:
    """The reference's settings of fine-tuning: batch 16, image augmentation, 100,000 frames shuffled."""
    config = base()
    config.trainable = trainable
    config.model.preset = ""  # the checkpoint's
    config.data.shuffle_buffer = 100_000
    config.augment.enabled = True
    config.train.batch_size = 16
    config.train.steps = 20_000
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    return config


# What a run of batch 2048 needs on a slice, as `configs/openvla_7b.py:v5p-128`: the names are Google's types of slices,
# in which v4 and v5p count two cores a chip. Other slices: --plan_search, and the settings that it proposes.
# `mesh.data` where gradients become real reduce-scatters over 32 chips, but not over more.
SLICES: dict[str, dict[str, Any]] = {
    "v4-128": {"topology": "v4:4x4x4", "train.remat": "attention,gate,up", "mesh.data": 2},
    "v5p-128": {"topology": "v5p:4x4x4", "train.remat": "save_dots"},
    "v5p-256": {"topology": "v5p:4x4x8", "train.remat": "save_dots"},
    "v5e-64": {"topology": "v5e:8x8", "train.remat": "attention", "mesh.data": 2},
    "v5e-256": {
        "topology": "v5e:16x16",
        "train.remat": "q,k,v,attention,o,gate,up,activation",
        "mesh.data": 8,
    },
    "v6e-64": {"topology": "v6e:8x8", "train.remat": "attention,gate,up", "mesh.data": 2},
}


def on_slice(config: ConfigDict, name: str) -> ConfigDict:
    """`config` with the settings of `SLICES[name]`; without a name as it is."""
    if name:
        if name not in SLICES:
            raise ValueError(f"unknown slice {name!r}: one of {', '.join(SLICES)}")
        settings = {key: value for key, value in SLICES[name].items() if key != "topology"}
        config.update_from_flattened_dict(settings)
    return config
