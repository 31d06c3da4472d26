"""The policy: what a robot calls. Everything but the image and the instruction comes from the checkpoint."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from openvla_jax.inference.decode import decode_actions
from openvla_jax.inference.load import load_weights
from openvla_jax.inference.preprocess import prepare_image
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.tokens import ActionTokenizer, choose_unnorm_key, prompt_ids, unnormalize_actions
from openvla_jax.training.checkpoint import Contract, load_contract, open_checkpoint

# Prompts are padded to the next of these, so that few programs are compiled.
TEXT_LENGTHS = (32, 64, 128, 256, 512)


class Policy:
    """Greedy action prediction with a checkpoint's own tokenizer, prompt, preprocessing and statistics.

    Attributes: `model`, `contract`, `outside_tokens` and `decoded_tokens` (how often the free argmax would have left
    the action tokens, of how many).
    """

    def __init__(self, model: OpenVLA, contract: Contract, constrained: bool = True):
        if contract.tokenizer is None:
            raise ValueError("the checkpoint carries no tokenizer: import it again with --tokenizer DIR")
        self.model, self.contract = model, contract
        self.action_tokenizer = ActionTokenizer(contract.model.base_vocab_size, contract.model.action_bins)
        self.outside_tokens = self.decoded_tokens = 0
        self._graph, self._params = nnx.split(model)

        def decode(params, images, input_ids, lengths, steps):
            return decode_actions(nnx.merge(self._graph, params), images, input_ids, lengths, steps, constrained)

        self._decode = jax.jit(decode, static_argnames="steps")

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, dtype: str | None = None, constrained: bool = True) -> "Policy":
        """Loads a training run's workdir (its latest step), one of its checkpoints, or an imported checkpoint.

        `dtype` defaults to bfloat16 on accelerators and to float32 on CPU, where XLA's bfloat16 products are slower.
        """
        path = open_checkpoint(path)
        contract = load_contract(path)
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return cls(load_weights(path, contract, dtype), contract, constrained)

    def predict_action(self, image: np.ndarray, instruction: str, unnorm_key: str | None = None) -> np.ndarray:
        """One action, float64 [action_dim], in the units of the dataset `unnorm_key`.

        `image` is uint8 RGB [height, width, 3] of any size; `unnorm_key` may be left out if the checkpoint knows one
        dataset. Raises ValueError for another dtype or shape, an empty or too long instruction, or an unknown key.
        """
        return self.predict_actions([image], [instruction], None if unnorm_key is None else [unnorm_key])[0]

    def predict_actions(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        instructions: Sequence[str],
        unnorm_keys: Sequence[str | None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """One action per row, equal to the single calls: float64 [B, action_dim]; a list if action sizes differ."""
        given = [None] * len(images) if unnorm_keys is None else list(unnorm_keys)
        if not len(images) == len(instructions) == len(given) or not len(images):
            raise ValueError(
                f"{len(images)} images, {len(instructions)} instructions, {len(given)} unnorm_keys: give as many of each"  # noqa: E501
            )
        keys = [choose_unnorm_key(self.contract.statistics, key) for key in given]
        statistics = [self.contract.statistics[key]["action"] for key in keys]
        dims = [len(stats["q01"]) for stats in statistics]
        tokens = self.predict_tokens(images, instructions, max(dims))
        kind = self.contract.preprocessing["action_normalization"]
        actions = [
            unnormalize_actions(self.action_tokenizer.decode(row[:dim]), stats, kind)
            for row, dim, stats in zip(tokens, dims, statistics, strict=True)
        ]
        return np.stack(actions) if len(set(dims)) == 1 else actions

    def predict_tokens(
        self, images: Sequence[np.ndarray] | np.ndarray, instructions: Sequence[str], steps: int
    ) -> np.ndarray:
        """Greedy action tokens int32 [B, steps]."""
        model = self.contract.model
        pixels = np.stack([prepare_image(image, model, self.contract.preprocessing) for image in images])
        prompts = [
            prompt_ids(self.contract.tokenizer, instruction, model.prompt_family) for instruction in instructions
        ]
        longest, limit = max(len(prompt) for prompt in prompts), self.contract.preprocessing["text_length"] - steps - 1
        if longest > limit:
            text = instructions[[len(prompt) for prompt in prompts].index(longest)]
            raise ValueError(
                f"instruction {text[:40]!r}... is {longest} tokens with its prompt, the model was trained with at most "
                f"{limit}; shorten it"
            )
        bucket = next((length for length in TEXT_LENGTHS if length >= longest), longest)
        input_ids = np.full((len(prompts), bucket), model.pad_token, np.int32)
        for row, prompt in zip(input_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        decoded = jax.device_get(self._decode(self._params, pixels, input_ids, lengths, steps))
        self.outside_tokens += int(decoded.outside.sum())
        self.decoded_tokens += decoded.outside.size
        return decoded.tokens
