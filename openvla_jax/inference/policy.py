"""The policy: what a robot calls. Everything but the observation comes from the checkpoint."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.load import load_weights, tensor_mesh
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.config import nearest
from openvla_jax.errors import InputError, NonFiniteError
from openvla_jax.models.heads import Inputs, Prediction, Sampling, make_head
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.quantize import EXCLUDE
from openvla_jax.tokens.actions import choose_unnorm_key, normalize_actions, unnormalize_actions
from openvla_jax.tokens.prompts import fit_prompt_ids
from openvla_jax.types import Observation, Preprocessing
from openvla_jax.vision.preprocess import prepare_image

# Prompts are padded to the next of these, so that few programs are compiled.
TEXT_LENGTHS = (32, 64, 128, 256, 512)


class NonFiniteActionError(NonFiniteError):
    """An action that is not finite, and so must not reach a robot."""


class ObservationError(InputError):
    """An observation with other cameras or another state than the policy was trained with."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One observation, checked and prepared: whatever can be wrong with it has been found."""

    images: np.ndarray  # uint8 [C, S, S, 3], in the order of `ObservationSpec.cameras`
    state: np.ndarray | None  # float32 [columns], normalised; None if the policy sees no state
    prompt: list[int]
    unnorm_key: str
    action_dim: int
    temperature: float = 0.0
    seed: int = 0


class Policy:
    """Action prediction with a checkpoint's own tokenizer, prompt, preprocessing and statistics.

    Attributes: `model`, `contract`, `outside_tokens` and `decoded_tokens` (how often the free argmax would have left
    the action tokens, of how many), `cut_instructions` (how many were too long), `programs` (the shapes that were
    compiled: batch, text length, tokens, sampled).
    """

    def __init__(self, model: OpenVLA, contract: Contract, constrained: bool = True):
        """Raises CheckpointError if the contract is not one that this policy can act by."""
        contract.check_is_policy()
        if contract.tokenizer is None:
            raise CheckpointError("the checkpoint carries no tokenizer: import it again with --tokenizer DIR")
        self.model, self.contract, self.constrained = model, contract, constrained
        self.head = make_head(contract.model, contract.action)
        self.cut_instructions = 0
        self.reset_counters()
        self.programs: set[tuple[int, int, int, bool]] = set()
        # Plain arrays cross into the compiled call: flattening a module costs milliseconds at every call.
        self._params, structure = jax.tree.flatten(model)

        def predict(params, inputs, sampling, dim):
            return self.head.predict(jax.tree.unflatten(structure, params), inputs, dim, constrained, sampling)

        self._predict = jax.jit(predict, static_argnames="dim")

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
        verify: bool = False,
    ) -> "Policy":
        """Loads a training run's workdir (its latest step), one of its checkpoints, or an imported checkpoint.

        `dtype` defaults to bfloat16 on accelerators and to float32 on CPU, where XLA's bfloat16 products are slower.
        `quantize` ("int8", "int4") and `exclude` are those of `load_model`. `preprocessing` replaces settings of the
        checkpoint (resize_kernel, crop_area, jpeg). `check_images` refuses a model that ignores its images. `base`
        is where an adapter's base lies now, if no longer where it was trained. `tensor` devices of this host share
        every layer, for a model that one does not hold, or to act sooner. `verify` compares the checkpoint's files with
        their checksums first.

        Raises CheckpointError for a checkpoint that is no policy, ValueError for wrong settings.
        """
        path = open_checkpoint(path)
        contract = load_contract(path)
        contract.check_is_policy()  # before minutes are spent on reading its weights
        changed = dataclasses.asdict(contract.preprocessing) | dict(preprocessing or {})
        contract = dataclasses.replace(contract, preprocessing=Preprocessing.from_dict(changed))
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        devices = jax.local_devices()
        if not 1 <= tensor <= len(devices):
            raise InputError(f"tensor {tensor}: from 1 to the {len(devices)} devices of this host")
        mesh = tensor_mesh(contract.model, devices[:tensor])
        model = load_weights(path, contract, dtype, quantize, exclude, base, mesh, verify)
        if jax.default_backend() == "cpu" and tensor == 1:
            model.unstack()
        policy = cls(model, contract, constrained)
        if check_images:
            policy.check_images()
        return policy

    def check_images(self) -> None:
        """Raises CheckpointError if a black and a white image give the same logits or actions.

        Damaged or wrongly assembled weights act on the instruction alone, and nothing else shows it. Compiles the
        program of a single request.
        """
        found = [self.run_model([self.blank_request(level)]) for level in (0, 255)]
        what = "actions" if found[0].logits is None else "logits"
        scores = [np.asarray(getattr(prediction, what)) for prediction in found]
        if not np.isfinite(scores).all():
            raise CheckpointError(f"the {what} of a black or a white image are not finite: the weights are damaged")
        if np.abs(scores[0] - scores[1]).max() <= 1e-5 * np.abs(scores).max():
            raise CheckpointError(f"black and white images give the same {what}: the weights ignore the image")

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
        """Returns the first action of the chunk, float64 [action_dim], in the units of the dataset `unnorm_key`.

        `image` is uint8 RGB [height, width, 3] of any size, of the first camera; `unnorm_key` may be left out if the
        checkpoint knows one dataset, or was fine-tuned on one. `temperature` 0 is greedy; above, `seed` decides. An
        instruction that is too long is cut as in training. Raises ValueError as `prepare` does.
        """
        observation = self.observe(image, instruction, unnorm_key)
        return self.predict_chunk(observation, temperature=temperature, seed=seed)[0]

    def predict_actions(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        instructions: Sequence[str],
        unnorm_keys: Sequence[str | None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Returns the first action of each row, equal to the single calls: float64 [B, action_dim].

        It is a list if action sizes differ.
        """
        given = [None] * len(images) if unnorm_keys is None else list(unnorm_keys)
        if not len(images) == len(instructions) == len(given) or not len(images):
            raise InputError(
                f"{len(images)} images, {len(instructions)} instructions, {len(given)} unnorm_keys: as many of each"
            )
        rows = [self.observe(*row) for row in zip(images, instructions, given, strict=True)]
        return stacked([chunk[0] for chunk in self.predict_chunks(rows)])

    def predict_chunk(self, observation: Observation, *, temperature: float = 0.0, seed: int = 0) -> np.ndarray:
        """Returns the next `ActionSpec.horizon` actions, float64 [K, action_dim]. Raises ValueError as `prepare`."""
        return self.act([self.prepare(observation, temperature, seed)])[0]

    def predict_chunks(self, observations: Sequence[Observation]) -> np.ndarray | list[np.ndarray]:
        """Returns a chunk per observation, equal to the single calls: float64 [B, K, action_dim].

        It is a list if action sizes differ. Raises ValueError as `prepare` does.
        """
        return stacked(self.act([self.prepare(observation) for observation in observations]))

    # -- Its parts, for those who batch requests themselves -----------------------------------------------------------

    def observe(self, image: np.ndarray, instruction: str, unnorm_key: str | None = None) -> Observation:
        """Returns an observation of the first camera only."""
        return Observation({self.contract.observation.cameras[0]: image}, instruction, unnorm_key=unnorm_key)

    def prepare(self, observation: Observation, temperature: float = 0.0, seed: int = 0) -> Request:
        """Checks and preprocesses one observation.

        Raises ObservationError for a missing or unknown camera, an image of another dtype or shape, and a state of
        another length or with NaN; InputError for an empty instruction, an unknown unnorm_key or a negative
        temperature.
        """
        contract, text = self.contract, observation.instruction
        if not isinstance(text, str):
            raise InputError(f"instruction is {type(text).__name__}: give text")
        if not 0 <= temperature < float("inf"):
            raise InputError(f"temperature {temperature}: 0 (greedy) or above")
        key = contract.default_key if observation.unnorm_key is None else observation.unnorm_key
        key = choose_unnorm_key(contract.statistics, key)
        dim = contract.action_dim(key)
        length, family = contract.preprocessing.text_length, contract.model.prompt_family
        tokens = dim * contract.action.horizon
        prompt, cut = fit_prompt_ids(contract.tokenizer, text, length, tokens, family)
        if cut and not self.cut_instructions:
            logging.warning(
                "instruction %r... is too long and is cut, as in training (text_length %d)", text[:40], length
            )
        self.cut_instructions += cut
        return Request(
            self._prepare_images(observation), self._prepare_state(observation, key), prompt, key, dim,
            float(temperature), int(seed),
        )  # fmt: skip

    def _prepare_images(self, observation: Observation) -> np.ndarray:
        cameras, contract = self.contract.observation.cameras, self.contract
        for name in observation.images:
            if name not in cameras:
                raise ObservationError(f"unknown camera {name!r}; {nearest(name, cameras)}")
        prepared = []
        for name in cameras:
            if name not in observation.images:
                raise ObservationError(f"no image of camera {name!r}: the policy sees {', '.join(cameras)}")
            try:
                prepared.append(prepare_image(observation.images[name], contract.model, contract.preprocessing))
            except ValueError as error:
                raise ObservationError(str(error) if len(cameras) == 1 else f"camera {name!r}: {error}") from None
        return np.stack(prepared)

    def _prepare_state(self, observation: Observation, key: str) -> np.ndarray | None:
        names = self.contract.observation.state
        if not names:
            if observation.state is not None:
                raise ObservationError("state is given, but the policy was trained without one: leave it out")
            return None
        if observation.state is None:
            raise ObservationError(f"state is missing: give {', '.join(names)}")
        state = np.asarray(observation.state, np.float64)
        if state.shape != (len(names),):
            raise ObservationError(f"state has shape {state.shape}: give {len(names)} numbers, {', '.join(names)}")
        if not np.isfinite(state).all():
            name = names[int(np.flatnonzero(~np.isfinite(state))[0])]
            raise ObservationError(f"state column {name!r} is not finite: {state.tolist()}")
        rows = self.contract.state_statistics(key)
        normalized = normalize_actions(state, rows, self.contract.action.normalization)
        if np.abs(normalized).max() > np.finfo(np.float32).max:
            raise ObservationError(f"state {state.tolist()} is too large: give it in the units of dataset {key!r}")
        return normalized.astype(np.float32)

    def blank_request(self, level: int = 0, dataset: str | None = None) -> Request:
        """Returns a request with images of one grey level, for checks and for compiling ahead of requests."""
        size, spec = self.contract.model.image_size, self.contract.observation
        images = {name: np.full((size, size, 3), level, np.uint8) for name in spec.cameras}
        state = np.zeros(len(spec.state)) if spec.state else None
        return self.prepare(Observation(images, "a", state, dataset or next(iter(self.contract.statistics))))

    def act(self, requests: Sequence[Request], batch_size: int | None = None) -> list[np.ndarray]:
        """Returns the chunk of each request, float64 [K, action_dim], in physical units.

        Rows are repeated up to `batch_size`, if there is one, so that few programs serve batches of any size. Raises
        NonFiniteActionError if any chunk is not finite.
        """
        contract = self.contract
        predicted = self.predict_normalized(requests, batch_size)
        chunks: list[Any] = [None] * len(requests)
        for key in {request.unnorm_key for request in requests}:
            rows = [row for row, request in enumerate(requests) if request.unnorm_key == key]
            dim = requests[rows[0]].action_dim
            normalized = self.head.decode(predicted[rows], dim)
            physical = unnormalize_actions(
                normalized, contract.statistics[key]["action"], contract.action.normalization
            )
            check_finite(physical, key)
            for row, chunk in zip(rows, physical, strict=True):
                chunks[row] = chunk
        return chunks

    def predict_normalized(self, requests: Sequence[Request], batch_size: int | None = None) -> np.ndarray:
        """Returns what `ActionHead.decode` takes: tokens, int32 [B, K * largest action_dim], or actions, float32
        [B, K, A]. In a row with fewer dimensions the last tokens mean nothing.
        """
        decoded = self.run_model(requests, batch_size)
        if decoded.tokens is None:
            return np.asarray(decoded.actions)[: len(requests)]
        tokens, outside = (x[: len(requests)] for x in jax.device_get((decoded.tokens, decoded.outside)))
        counts = np.asarray([request.action_dim for request in requests]) * self.contract.action.horizon
        self.outside_tokens += int((outside & (np.arange(outside.shape[1]) < counts[:, None])).sum())
        self.decoded_tokens += int(counts.sum())
        if self.constrained or not self.head.sequential:
            return tokens
        eos = self.contract.tokenizer.eos_token_id
        tokens = np.array(tokens)
        for row, request, count in zip(tokens, requests, counts, strict=True):
            row[:count] = reference_tokens(request.prompt, row[:count], eos)
        return tokens

    def run_model(self, requests: Sequence[Request], batch_size: int | None = None) -> Prediction:
        """Runs the model on a batch: the one place that does. Returns device arrays, rows padded to `batch_size`."""
        rows = [*requests, *[requests[0]] * ((batch_size or 0) - len(requests))]
        lengths = np.asarray([len(request.prompt) for request in rows], np.int32)
        longest = int(lengths.max())
        bucket = next((length for length in TEXT_LENGTHS if length >= longest), longest)
        input_ids = np.full((len(rows), bucket), self.contract.model.pad_token, np.int32)
        for ids, request in zip(input_ids, rows, strict=True):
            ids[: len(request.prompt)] = request.prompt
        dim = max(request.action_dim for request in rows)
        sampling = None
        if any(request.temperature for request in rows):
            sampling = Sampling(
                jnp.asarray([request.temperature for request in rows], jnp.float32),
                jnp.asarray([request.seed & 0x7FFFFFFF for request in rows], jnp.int32),
            )
        self.programs.add((len(rows), bucket, self.contract.action.horizon * dim, sampling is not None))
        images = np.stack([request.images for request in rows])
        states = [request.state for request in rows if request.state is not None]
        inputs = Inputs(images, input_ids, lengths, np.stack(states) if states else None)
        return self._predict(self._params, inputs, sampling, dim)

    def reset_counters(self) -> None:
        """Forgets the tokens that were decoded so far."""
        self.outside_tokens = self.decoded_tokens = 0


def check_finite(actions: np.ndarray, dataset: str) -> None:
    """Raises NonFiniteActionError, naming the dataset and the first dimension that is not finite, of [B, K, A]."""
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        value, dimension = actions[tuple(bad[0])], bad[0][-1]
        raise NonFiniteActionError(
            f"dimension {dimension} of the action is {value}: dataset {dataset!r}; the checkpoint's weights or "
            "statistics are damaged, import or train it again"
        )


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Returns rows of equal shape as one array, others as a list."""
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else list(rows)


def reference_tokens(prompt: Sequence[int], tokens: np.ndarray, end: int) -> np.ndarray:
    """What the reference takes for action tokens: the last `len(tokens)` ids of the prompt and its generation.

    Its generation stops after an end token, so that an early one shifts ids of the prompt in from the left.
    """
    stops = np.flatnonzero(tokens == end)
    kept = tokens[: stops[0] + 1] if len(stops) else tokens
    return np.asarray([*prompt, *kept][-len(tokens) :], np.int32)
