"""Makes the adapters of this folder: real PEFT on the language model of a tiny OpenVLA checkpoint.

usage: python make.py HF_FOLDER     (goldens/openvla_tiny; written with peft 0.21.2, transformers 4.57.6, torch 2.14.1)

Each folder holds `adapter_config.json` and `adapter_model.safetensors`, as `save_pretrained` writes them after a small
random step. `expected.npz`, of those that can be read, holds two kernels as PEFT itself merges them when the saved
adapter is loaded on a fresh base.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
KERNELS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight")
READ = ("gaussian", "plain", "orthogonal", "rslora", "pissa_converted")
KINDS = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "plain": {"init_lora_weights": True, "exclude_modules": ["lm_head"], "lora_dropout": 0.1},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa_converted": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "lora_bias": {"lora_bias": True},
    "norms_saved": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
}


class Base(torch.nn.Module):
    """Names the language model as OpenVLA does."""

    def __init__(self, tensors):
        super().__init__()
        vocabulary = tensors["lm_head.weight"].shape[0]
        self.language_model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=vocabulary)).float()
        self.language_model.load_state_dict(tensors)

    def forward(self, **inputs):
        return self.language_model(**inputs)


def make(kind, settings, tensors):
    folder, start = HERE / kind, HERE / "start"
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(Base(tensors), config)
    if kind == "pissa_converted":  # as PEFT's documentation says
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    convert = {"path_initial_model_for_weight_conversion": str(start)} if start.exists() else {}
    model.save_pretrained(folder, **convert)
    if kind in READ:
        merged = PeftModel.from_pretrained(Base(tensors), folder).merge_and_unload().language_model
        kernels = {name: merged.get_parameter(name).detach().numpy() for name in KERNELS}
        np.savez_compressed(folder / "expected.npz", **kernels)
    for path in [folder / "README.md", *start.glob("*")]:
        path.unlink(missing_ok=True)
    if start.exists():
        start.rmdir()


def main():
    tensors = {}
    for file in Path(sys.argv[1]).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.startswith("language_model."):
                tensors[name.removeprefix("language_model.")] = tensor.float()
    for kind, settings in KINDS.items():
        make(kind, settings, tensors)


if __name__ == "__main__":
    main()
