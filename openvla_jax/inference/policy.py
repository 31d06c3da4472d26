"""The policy: what a robot calls. Everything but the image and the instruction comes from the checkpoint."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.load import load_weights, tensor_mesh
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.inference.decode import Decoded, Sampling, decode_actions
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.quantize import EXCLUDE
from openvla_jax.tokens.actions import ActionTokenizer, choose_unnorm_key, unnormalize_actions
from openvla_jax.tokens.prompts import prompt_ids
from openvla_jax.vision.preprocess import check_preprocessing, prepare_image

# Prompts are padded to the next of these, so that few programs are compiled.
TEXT_LENGTHS = (32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Request:
    """One image and instruction, checked and prepared: whatever can be wrong with them has been found."""

    pixels: np.ndarray  # uint8 [S, S, 3]
    prompt: list[int]
    unnorm_key: str
    action_dim: int
    temperature: float = 0.0
    seed: int = 0


class Policy:
    """Action prediction with a checkpoint's own tokenizer, prompt, preprocessing and statistics.

    Attributes: `model`, `contract`, `outside_tokens` and `decoded_tokens` (how often the free argmax would have left
    the action tokens, of how many), `programs` (the shapes that were compiled: batch, text length, tokens, sampled).
    """

    def __init__(self, model: OpenVLA, contract: Contract, constrained: bool = True):
        if contract.tokenizer is None:
            raise ValueError("the checkpoint carries no tokenizer: import it again with --tokenizer DIR")
        check_preprocessing(contract.preprocessing)
        self.model, self.contract, self.constrained = model, contract, constrained
        self.action_tokenizer = ActionTokenizer(contract.model.base_vocab_size, contract.model.action_bins)
        self.outside_tokens = self.decoded_tokens = 0
        self.programs: set[tuple[int, int, int, bool]] = set()
        # Plain arrays cross into the compiled call: flattening a module costs milliseconds at every call.
        self._params, structure = jax.tree.flatten(model)

        def decode(params, images, input_ids, lengths, sampling, steps):
            model = jax.tree.unflatten(structure, params)
            return decode_actions(model, images, input_ids, lengths, steps, constrained, sampling)

        self._decode = jax.jit(decode, static_argnames="steps")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        dtype: str | None = None,
        quantize: str | None = None,
        *,
        exclude: Sequence[str] = EXCLUDE,
        constrained: bool = True,
        preprocessing: Mapping[str, Any] | None = None,
        check_images: bool = True,
        base: str | os.PathLike | None = None,
        tensor: int = 1,
    ) -> "Policy":
        """Loads a training run's workdir (its latest step), one of its checkpoints, or an imported checkpoint.

        `dtype` defaults to bfloat16 on accelerators and to float32 on CPU, where XLA's bfloat16 products are slower.
        `quantize` ("int8", "int4") and `exclude` are those of `load_model`. `preprocessing` replaces settings of the
        checkpoint (resize_kernel, center_crop, jpeg). `check_images` refuses a model that ignores its images. `base`
        is where an adapter's base lies now, if no longer where it was trained. `tensor` devices of this host share
        every layer, for a model that one does not hold, or to act sooner.
        """
        path = open_checkpoint(path)
        contract = load_contract(path)
        contract = dataclasses.replace(contract, preprocessing=contract.preprocessing | dict(preprocessing or {}))
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        devices = jax.local_devices()
        if not 1 <= tensor <= len(devices):
            raise ValueError(f"tensor {tensor}: from 1 to the {len(devices)} devices of this host")
        mesh = tensor_mesh(contract.model, devices[:tensor])
        model = load_weights(path, contract, dtype, quantize, exclude, base, mesh)
        if jax.default_backend() == "cpu" and tensor == 1:
            model.unstack()
        policy = cls(model, contract, constrained)
        if check_images:
            policy.check_images()
        return policy

    def check_images(self) -> None:
        """Raises CheckpointError if a black and a white image give the same logits.

        Damaged or wrongly assembled weights act on the instruction alone, and nothing else shows it. Compiles the
        program of a single request.
        """
        size, key = self.contract.model.image_size, next(iter(self.contract.statistics))
        logits = []
        for level in (0, 255):
            request = self.prepare(np.full((size, size, 3), level, np.uint8), "move", key)
            logits.append(np.asarray(self._run([request]).logits))
        if not np.isfinite(logits).all():
            raise CheckpointError("the logits of a black or a white image are not finite: the weights are damaged")
        if np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits).max():
            raise CheckpointError("black and white images give the same logits: the weights ignore the image")

    # -- One call -----------------------------------------------------------------------------------------------------

    def predict_action(
        self,
        image: np.ndarray,
        instruction: str,
        unnorm_key: str | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> np.ndarray:
        """One action, float64 [action_dim], in the units of the dataset `unnorm_key`.

        `image` is uint8 RGB [height, width, 3] of any size; `unnorm_key` may be left out if the checkpoint knows one
        dataset, or was fine-tuned on one. `temperature` 0 is greedy; above, `seed` decides. Raises ValueError for
        another dtype or shape, an empty or too long instruction, or an unknown key.
        """
        return self.act([self.prepare(image, instruction, unnorm_key, temperature, seed)])[0]

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
                f"{len(images)} images, {len(instructions)} instructions, {len(given)} unnorm_keys: as many of each"
            )
        requests = [self.prepare(*row) for row in zip(images, instructions, given, strict=True)]
        actions = self.act(requests)
        return np.stack(actions) if len({request.action_dim for request in requests}) == 1 else actions

    # -- Its parts, for those who batch requests themselves -----------------------------------------------------------

    def prepare(
        self,
        image: np.ndarray,
        instruction: str,
        unnorm_key: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Request:
        """Checks and preprocesses one request; the ValueErrors of `predict_action` come from here."""
        model = self.contract.model
        if not isinstance(instruction, str):
            raise ValueError(f"instruction is {type(instruction).__name__}: give text")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature {temperature}: 0 (greedy) or above")
        unnorm_key = self.contract.default_key if unnorm_key is None else unnorm_key
        key = choose_unnorm_key(self.contract.statistics, unnorm_key)
        action_dim = len(self.contract.statistics[key]["action"]["q01"])
        prompt = prompt_ids(self.contract.tokenizer, instruction, model.prompt_family)
        limit = self.contract.preprocessing["text_length"] - action_dim - 1
        if len(prompt) > limit:
            raise ValueError(
                f"instruction {instruction[:40]!r}... is {len(prompt)} tokens with its prompt, the model was trained "
                f"with at most {limit}; shorten it"
            )
        pixels = prepare_image(image, model, self.contract.preprocessing)
        return Request(pixels, prompt, key, action_dim, float(temperature), int(seed))

    def act(self, requests: Sequence[Request], batch_size: int | None = None) -> list[np.ndarray]:
        """The action of each request, float64 [action_dim], in physical units.

        Rows are repeated up to `batch_size`, if there is one, so that few programs serve batches of any size.
        """
        kind = self.contract.preprocessing["action_normalization"]
        tokens = self.decode(requests, batch_size)
        actions: list[Any] = [None] * len(requests)
        for key in {request.unnorm_key for request in requests}:
            rows = [row for row, request in enumerate(requests) if request.unnorm_key == key]
            normalized = self.action_tokenizer.decode(tokens[rows, : requests[rows[0]].action_dim])
            physical = unnormalize_actions(normalized, self.contract.statistics[key]["action"], kind)
            for row, action in zip(rows, physical, strict=True):
                actions[row] = action
        return actions

    def decode(self, requests: Sequence[Request], batch_size: int | None = None) -> np.ndarray:
        """Action tokens int32 [B, largest action_dim]."""
        decoded = self._run(requests, batch_size)
        tokens, outside = (x[: len(requests)] for x in jax.device_get((decoded.tokens, decoded.outside)))
        dims = np.asarray([request.action_dim for request in requests])
        self.outside_tokens += int((outside & (np.arange(outside.shape[1]) < dims[:, None])).sum())
        self.decoded_tokens += int(dims.sum())
        if self.constrained:
            return tokens
        eos = self.contract.tokenizer.eos_token_id
        tokens = np.array(tokens)
        for row, request in zip(tokens, requests, strict=True):
            row[: request.action_dim] = reference_tokens(request.prompt, row[: request.action_dim], eos)
        return tokens

    def _run(self, requests: Sequence[Request], batch_size: int | None = None) -> Decoded:
        rows = [*requests, *[requests[0]] * ((batch_size or 0) - len(requests))]
        lengths = np.asarray([len(request.prompt) for request in rows], np.int32)
        longest = int(lengths.max())
        bucket = next((length for length in TEXT_LENGTHS if length >= longest), longest)
        input_ids = np.full((len(rows), bucket), self.contract.model.pad_token, np.int32)
        for ids, request in zip(input_ids, rows, strict=True):
            ids[: len(request.prompt)] = request.prompt
        steps = max(request.action_dim for request in rows)
        sampling = None
        if any(request.temperature for request in rows):
            sampling = Sampling(
                jnp.asarray([request.temperature for request in rows], jnp.float32),
                jnp.asarray([request.seed & 0x7FFFFFFF for request in rows], jnp.int32),
            )
        self.programs.add((len(rows), bucket, steps, sampling is not None))
        pixels = np.stack([request.pixels for request in rows])
        return self._decode(self._params, pixels, input_ids, lengths, sampling, steps)


def reference_tokens(prompt: Sequence[int], tokens: np.ndarray, end: int) -> np.ndarray:
    """What the reference takes for action tokens: the last `len(tokens)` ids of the prompt and its generation.

    Its generation stops after an end token, so that an early one shifts ids of the prompt in from the left.
    """
    stops = np.flatnonzero(tokens == end)
    kept = tokens[: stops[0] + 1] if len(stops) else tokens
    return np.asarray([*prompt, *kept][-len(tokens) :], np.int32)
