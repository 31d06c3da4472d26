"""The JSON files beside exported weights, as the reference writes them, so that its own code loads the folder."""

from collections.abc import Mapping
from typing import Any

from openvla_jax.config import LANGUAGE_MODELS, PRESETS, VISION_BACKBONES, VLAConfig
from openvla_jax.convert.describe import TIMM_IDS, describe, named_hf, named_native
from openvla_jax.convert.names import ConversionError, source_shapes, table, tower_prefix
from openvla_jax.convert.oft_export import config_entries
from openvla_jax.convert.source import Source

HF_LLM_IDS = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
    "mistral-v0.1-7b-pure": "mistralai/Mistral-7B-v0.1",
    "mistral-v0.1-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
}
NOT_IN_HF = ("clip-vit-b", "siglip-vit-b16-224px", "siglip-vit-b16-256px", "siglip-vit-b16-384px")
OF_A_POLICY = ("head", "action_dim", "cameras", "state_dim", "film")  # fields of a model that its policy decides
# The classes are not part of a checkpoint; transformers fetches them from there when asked to trust remote code.
CODE = "openvla/openvla-7b--"


def hf_files(source: Source, dtype: str) -> dict[str, Any]:
    """config.json, generation_config.json, preprocessor_config.json and dataset_statistics.json by name."""
    model, towers = source.model, source.model.towers
    if model.projector.kind != ("fused-gelu-mlp" if len(towers) > 1 else "gelu-mlp"):
        raise ConversionError(
            f"the HF code has no {model.projector.kind!r} projector for {len(towers)} tower(s): --format prismatic"
        )
    vision, llm = _vision_id(source), _llm_id(source)
    if vision in NOT_IN_HF:
        raise ConversionError(f"the HF code does not know the vision backbone {vision}: export with --format prismatic")
    llama = model.llama
    text_config = {
        "model_type": "mistral" if llama.sliding_window else "llama",
        "hidden_size": llama.width,
        "intermediate_size": llama.mlp_dim,
        "num_hidden_layers": llama.depth,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "rms_norm_eps": llama.norm_eps,
        "rope_theta": llama.rope_theta,
        "max_position_embeddings": llama.max_length,
        "vocab_size": llama.vocab_size,
        "pad_token_id": model.pad_token,
        "torch_dtype": dtype,
    } | ({"sliding_window": llama.sliding_window} if llama.sliding_window else {})
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": f"{CODE}modeling_prismatic.OpenVLAForActionPrediction",
        },
        "model_type": "openvla",
        "vision_backbone_id": vision,
        "llm_backbone_id": llm,
        "arch_specifier": f"no-align+{model.projector.kind}",
        "use_fused_vision_backbone": len(towers) > 1,
        "timm_model_ids": list(TIMM_IDS[vision]),
        "timm_override_act_layers": [None if tower.activation == "gelu" else tower.activation for tower in towers],
        "image_sizes": [tower.image_size for tower in towers],
        "image_resize_strategy": model.resize,
        "hf_llm_id": HF_LLM_IDS[llm],
        "llm_max_length": llama.max_length,
        "pad_token_id": model.pad_token,
        # The HF code takes the number of the tokenizer's own entries to be vocab_size less this.
        "pad_to_multiple_of": llama.vocab_size - model.base_vocab_size,
        "text_config": text_config,
        "output_projector_states": False,
        "n_action_bins": source.action.bins,
        "norm_stats": dict(source.statistics),
        "torch_dtype": dtype,
        "transformers_version": "4.40.1",
    }
    config |= config_entries(source) if model.is_parallel else {}
    processor = _preprocessor(model)
    again = describe(
        named_hf(config, processor),
        source_shapes(table(model, "hf")),
        lambda index: tower_prefix(model, index, "hf"),
        "language_model.",
        text_config=text_config,
        padding_rows=llama.vocab_size - model.base_vocab_size,
        name=model.name,
    )
    return {
        "config.json": config | _left_unsaid(again.data, model),
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": model.pad_token,
            "transformers_version": "4.40.1",
        },
        "preprocessor_config.json": processor,
        "dataset_statistics.json": dict(source.statistics),
    }


def _preprocessor(model: VLAConfig) -> dict[str, Any]:
    towers = model.towers
    size = model.image_size
    letterbox = model.resize == "letterbox"
    return {
        "auto_map": {
            "AutoImageProcessor": f"{CODE}processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": f"{CODE}processing_prismatic.PrismaticProcessor",
        },
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": len(towers) > 1,
        "image_resize_strategy": model.resize,
        "input_sizes": [[3, size, size] for _ in towers],
        "interpolations": ["bicubic" for _ in towers],
        "means": [list(tower.mean) for tower in towers],
        "stds": [list(tower.std) for tower in towers],
        "tvf_resize_params": [
            {
                "size": [size, size] if model.resize == "resize-naive" else size,
                "interpolation": 3,
                "max_size": None,
                "antialias": True,
            }
            for _ in towers
        ],
        "tvf_crop_params": [{"output_size": [size, size]} for _ in towers],
        "tvf_normalize_params": [{"mean": list(t.mean), "std": list(t.std), "inplace": False} for t in towers],
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": [int(255 * value) for value in towers[-1].mean] if letterbox else None,
    }


def native_files(source: Source) -> tuple[dict[str, Any], str]:
    """config.json and dataset_statistics.json of a run directory, by name; and the name of its `.pt`."""
    model = source.model
    if source.origin.get("kind") == "native" and source.origin.get("config"):
        config, name = dict(source.origin["config"]), f"{source.origin['name']}.pt"
    else:
        spec = {
            "vision": _vision_id(source),
            "llm": _llm_id(source),
            "projector": model.projector.kind,
            "resize": model.resize,
        }
        vlms = [
            name for name, preset in PRESETS.items() if preset == spec and "+mx-" not in name and "openvla" not in name
        ]
        config = {"vla": {"vla_id": model.name, "base_vlm": vlms[0]}} if vlms else {"model": _vlm(model, spec)}
        name = "step-000000-epoch-00-loss=0.0000.pt"
    again = describe(
        named_native(config),
        source_shapes(table(model, "native")),
        lambda index: tower_prefix(model, index, "native"),
        "llm_backbone.llm.",
        name=model.name,
    )
    config = {key: value for key, value in config.items() if key != "model_config"}
    files = {
        "config.json": config | _left_unsaid(again.data, model),
        "dataset_statistics.json": dict(source.statistics),
    }
    return files, name


def _vlm(model: VLAConfig, spec: Mapping[str, str]) -> dict[str, Any]:
    return {
        "model_id": model.name,
        "vision_backbone_id": spec["vision"],
        "llm_backbone_id": spec["llm"],
        "arch_specifier": "linear" if model.projector.kind == "linear" else f"no-align+{model.projector.kind}",
        "image_resize_strategy": model.resize,
        "llm_max_length": model.llama.max_length,
    }


def _vision_id(source: Source) -> str:
    """The registered backbone with these towers: of this size, else (shrunken) of this image size, else of these
    names.
    """
    towers = source.model.towers
    named = source.origin.get("config", {}).get("vision_backbone_id")
    ids = [key for key, known in VISION_BACKBONES.items() if [t.name for t in known] == [t.name for t in towers]]
    if not ids:
        raise ConversionError(
            f"the reference has no vision backbone of towers {[tower.name for tower in towers]}: nothing could load it"
        )

    def fit(key: str) -> tuple[bool, ...]:
        known = VISION_BACKBONES[key][-1]
        return known.image_size == towers[-1].image_size, known.width == towers[-1].width, key == named

    return max(ids, key=fit)


def _llm_id(source: Source) -> str:
    """The registered language model with this prompt: the one that was imported, else the nearest in size."""
    llama, family = source.model.llama, source.model.prompt_family
    named = source.origin.get("config", {}).get("llm_backbone_id")
    ids = [key for key, (config, prompt) in LANGUAGE_MODELS.items() if prompt == family]

    def fit(key: str) -> tuple[bool, ...]:
        known = LANGUAGE_MODELS[key][0]
        return bool(known.sliding_window) == bool(llama.sliding_window), known.width == llama.width, key == named

    return max(ids, key=fit)


def _left_unsaid(said: Mapping[str, Any], model: VLAConfig) -> dict[str, Any]:
    """What the reference's files cannot say of the model, for importing it again: empty for the published sizes."""
    whole = model.to_dict()

    def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: b[key] for key in b if key not in ("towers", "llama", "projector", *OF_A_POLICY) and a[key] != b[key]
        }

    unsaid = difference(said, whole)
    unsaid |= {key: found for key in ("llama", "projector") if (found := difference(said[key], whole[key]))}
    pairs = zip(said["towers"], whole["towers"], strict=True)
    towers = {b["name"]: found for a, b in pairs if (found := difference(a, b))}
    unsaid |= {"towers": towers} if towers else {}
    return {"model_config": unsaid} if unsaid else {}
