"""Text and action tokens: prompts, tokenizers, action discretisation, (un)normalisation of actions.

One training sequence is `<s>` + prompt + lone space + action tokens + `</s>`. Ids are spliced: an action never passes
through a string, and training and inference share one function for the prompt (OpenVLA paper, section 3; token layout,
bins and normalisation are those of the PyTorch reference).
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from openvla_jax.config import nearest

if TYPE_CHECKING:
    import tokenizers
    import transformers

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerFast"  # imported when first needed: it takes seconds
SPACE = "\u2581"  # sentencepiece's stand-in for a space; alone it is the last token of every prompt (29871 in Llama-2)
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<PAD>"

# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------

_ASK = "What action should the robot take to {instruction}?"
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# The text between <s> and the lone space. The tag <<SYS> is malformed in the reference; models were trained with it.
PROMPT_FAMILIES = {
    "pure": f"In: {_ASK}\nOut:",
    "vicuna_v15": f"{_VICUNA_SYSTEM} USER: {_ASK} ASSISTANT:",
    "llama2_chat": f"[INST] <<SYS>\n{_LLAMA2_SYSTEM}\n<</SYS>>\n\n{_ASK} [/INST]",
    "mistral_instruct": f"[INST] {_ASK} [/INST]",
}


def prompt_text(instruction: str, family: str = "pure") -> str:
    """The prompt of one instruction, without `<s>` and without the space before the actions.

    As in the reference the instruction is lower-cased, `<image>` is taken out of it, and its whitespace and punctuation
    stay as they are. Raises ValueError for an empty instruction or an unknown family.
    """
    if family not in PROMPT_FAMILIES:
        raise ValueError(f"prompt family {family!r} is unknown; {nearest(family, PROMPT_FAMILIES)}")
    cleaned = instruction.lower().replace("<image>", "")
    if not cleaned.strip():
        raise ValueError(f"instruction {instruction!r} is empty: say what the robot should do")
    if any("\ud800" <= character <= "\udfff" for character in cleaned):
        raise ValueError(f"instruction {instruction!r} holds half a surrogate pair: send valid UTF-8")
    return PROMPT_FAMILIES[family].replace("{instruction}", cleaned)


def prompt_ids(tokenizer: Tokenizer, instruction: str, family: str = "pure") -> list[int]:
    """Token ids from `<s>` to the lone space (29871 in Llama-2) that precedes the first action token.

    The model is trained on that space, so inference must feed it too; it comes exactly once, for every family.
    Raises ValueError for an empty instruction or an unknown family.
    """
    return [*_encode(tokenizer, prompt_text(instruction, family)).ids, tokenizer.convert_tokens_to_ids(SPACE)]


def fit_prompt_ids(
    tokenizer: Tokenizer,
    instruction: str,
    text_length: int,
    action_dim: int,
    family: str = "pure",
) -> tuple[list[int], bool]:
    """`prompt_ids` shortened so that the prompt, `action_dim` action tokens and `</s>` fit in `text_length` tokens.

    Training and inference both call this, so that they cut alike: tokens leave from the end of the instruction, the
    template around it stays whole. Returns (ids, whether it was cut). Raises ValueError, with the smallest possible
    text_length, where the template and one token of the instruction do not fit.
    """
    ids = prompt_ids(tokenizer, instruction, family)
    room = text_length - action_dim - 1
    if len(ids) <= room:
        return ids, False
    head, tail = _template_ids(tokenizer, family)
    shortest = len(head) + 1 + len(tail)
    if room < shortest:
        raise ValueError(
            f"text_length {text_length} cannot hold prompt {family!r} with {action_dim} action tokens: "
            f"use at least {shortest + action_dim + 1}"
        )
    return ids[: room - len(tail)] + tail, True


def encode_example(
    tokenizer: Tokenizer,
    action_tokenizer: "ActionTokenizer",
    instruction: str,
    action: ArrayLike,
    text_length: int,
    family: str = "pure",
) -> tuple[np.ndarray, np.ndarray, bool]:
    """One training sequence: `<s>` prompt, lone space, action tokens, `</s>`, right-padded with `<PAD>`.

    action: normalised, [A]. Returns tokens int32 [text_length]; target_positions int32 [A + 1], the places in tokens
    that carry loss (action tokens and `</s>`); truncated, whether the instruction was cut (see `fit_prompt_ids`).
    Raises ValueError as `prompt_text`, `fit_prompt_ids` and `ActionTokenizer.encode` do.
    """
    if np.ndim(action) != 1:
        raise ValueError(f"action has shape {np.shape(action)}: one example takes one action [A]")
    action_ids = action_tokenizer.encode(action)
    prompt, truncated = fit_prompt_ids(tokenizer, instruction, text_length, len(action_ids), family)
    end = len(prompt) + len(action_ids) + 1
    tokens = np.full(text_length, tokenizer.pad_token_id, np.int32)
    tokens[:end] = [*prompt, *action_ids, tokenizer.eos_token_id]
    return tokens, np.arange(len(prompt), end, dtype=np.int32), truncated


def _encode(tokenizer: Tokenizer, text: str) -> "tokenizers.Encoding":
    # The backend itself: a call of the wrapper sets truncation on a shared object, which data threads must not do.
    return tokenizer.backend_tokenizer.encode(text)


def _template_ids(tokenizer: Tokenizer, family: str) -> tuple[list[int], list[int]]:
    """Ids of the template before and after the instruction, the latter with the lone space."""
    text = prompt_text("go", family)
    before, after = (len(part) for part in PROMPT_FAMILIES[family].split("{instruction}"))
    encoding = _encode(tokenizer, text)
    spans = list(zip(encoding.ids, encoding.offsets, strict=True))
    head = [token for token, (_, stop) in spans if stop <= before]
    tail = [token for token, (start, _) in spans if start >= len(text) - after]
    return head, [*tail, tokenizer.convert_tokens_to_ids(SPACE)]


# ---------------------------------------------------------------------------------------------------------------------
# Action tokens
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ActionTokenizer:
    """Actions in [-1, 1] <-> the last `bins` ids of the vocabulary; -1 is the highest id (OpenVLA paper, section 3.2).

    `bins` edges make `bins - 1` intervals, and an action of exactly 1.0 has an id of its own: `first_token` (1.0) and
    `first_token + 1` decode alike. Pretrained weights depend on it.
    vocab_size: the tokenizer's own (32000 in Llama-2), without added tokens and padding.
    """

    vocab_size: int = 32000
    bins: int = 256

    @property
    def first_token(self) -> int:
        """The lowest action id (31744 in Llama-2)."""
        return self.vocab_size - self.bins

    @property
    def last_token(self) -> int:
        """The highest action id (31999 in Llama-2), inclusive."""
        return self.vocab_size - 1

    @functools.cached_property
    def bin_edges(self) -> np.ndarray:
        """float64 [bins], from -1 to 1."""
        return np.linspace(-1.0, 1.0, self.bins)

    @functools.cached_property
    def bin_centers(self) -> np.ndarray:
        """float64 [bins - 1], ascending; `bin_centers[clip(last_token - ids, 0, bins - 2)]` decodes on a device too."""
        return (self.bin_edges[:-1] + self.bin_edges[1:]) / 2.0

    def encode(self, actions: ArrayLike) -> np.ndarray:
        """Normalised actions [..., A] -> int32 ids [..., A]. Beyond [-1, 1] is clipped; NaN raises ValueError."""
        actions = np.asarray(actions, np.float64)  # float32 edges compare as the reference compares them
        if np.isnan(actions).any():
            where = tuple(int(i) for i in np.argwhere(np.isnan(actions))[0])
            raise ValueError(f"action has NaN at index {where}: mend the data or its statistics")
        return (self.vocab_size - np.digitize(np.clip(actions, -1.0, 1.0), self.bin_edges)).astype(np.int32)

    def decode(self, ids: ArrayLike) -> np.ndarray:
        """Integer ids [..., A] -> float64 bin centres; as in the reference an id outside the range gets the nearest."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"action ids are {ids.dtype}, not integers: decode takes token ids")
        return self.bin_centers[np.clip(self.last_token - ids.astype(np.int64), 0, self.bins - 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------------

NORMALIZATIONS = {"normal": ("mean", "std"), "bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}


def normalize_actions(actions: ArrayLike, stats: Mapping[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Physical actions [..., A] -> normalised, float64 [..., A].

    stats: `statistics[dataset]["action"]` (or "proprio"), rows of length A. "normal" standardises; "bounds" and
    "bounds_q99" map [min, max] or [q01, q99] onto [-1, 1] and clip. Dims where the mask is False pass unchanged; but
    under both bounds a dim with min == max becomes 0 whatever its mask, as in the reference (a constant gripper reads
    0).     Raises ValueError for an unknown kind, or where dims differ.
    """
    actions, mask, first, second = _aligned(actions, stats, kind)
    if kind == "normal":
        return np.where(mask, (actions - first) / (second + 1e-8), actions)
    scaled = np.clip(2 * (actions - first) / (second - first + 1e-8) - 1, -1.0, 1.0)
    _, _, least, most = _aligned(actions, stats, "bounds")
    return np.where(least == most, 0.0, np.where(mask, scaled, actions))


def unnormalize_actions(actions: ArrayLike, stats: Mapping[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Normalised actions [..., A] -> physical, float64 [..., A]; arguments and errors as in `normalize_actions`.

    As in the reference without the 1e-8 of `normalize_actions`; dims where the mask is False pass unchanged.
    """
    actions, mask, first, second = _aligned(actions, stats, kind)
    if kind == "normal":
        return np.where(mask, actions * second + first, actions)
    return np.where(mask, 0.5 * (actions + 1) * (second - first) + first, actions)


def choose_unnorm_key(statistics: Mapping[str, Any], key: str | None = None) -> str:
    """The dataset whose statistics unnormalise: `key`, or where it is None the only one there is. Raises ValueError."""
    if key is None:
        if len(statistics) == 1:
            return next(iter(statistics))
        raise ValueError(f"unnorm_key is None and there are {len(statistics)} datasets; {nearest('', statistics)}")
    if key not in statistics:
        raise ValueError(f"unnorm_key {key!r} has no statistics; {nearest(key, statistics)}")
    return key


def _aligned(actions: ArrayLike, stats: Mapping[str, Any], kind: str) -> tuple[np.ndarray, ...]:
    """actions, mask and the two rows of statistics that `kind` needs, of one size A."""
    if kind not in NORMALIZATIONS:
        raise ValueError(f"normalisation {kind!r} is unknown; {nearest(kind, NORMALIZATIONS)}")
    missing = [name for name in NORMALIZATIONS[kind] if name not in stats]
    if missing:
        raise ValueError(f"statistics have {sorted(stats)} but no {missing[0]!r}: pass statistics[dataset]['action']")
    actions = np.asarray(actions, np.float64)
    first, second = (np.asarray(stats[name], np.float64) for name in NORMALIZATIONS[kind])
    mask = np.asarray(stats.get("mask", np.ones_like(first)), bool)
    if not actions.shape[-1:] == mask.shape == first.shape == second.shape:
        raise ValueError(
            f"actions of shape {actions.shape} do not fit statistics of {first.size} dims with a mask of {mask.size}: "
            "use the statistics of the same dataset"
        )
    return actions, mask, first, second


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The Llama-style tokenizer of a directory, from `tokenizer.json` or else `tokenizer.model`; "tiny" is built in.

    Encodes as transformers 4.40.1's Llama-2 fast tokenizer (later ones split double spaces otherwise), begins with
    `<s>`, and has the pad token `<PAD>` (id 32000 in Llama-2). Files are read as data; no code in the folder ever runs.
    Raises FileNotFoundError where neither file exists, ValueError where it is not such a tokenizer.
    """
    import tokenizers

    if directory == "tiny":
        return _finish(_llama_backend(_tiny_pieces()))
    json_file, model_file = (epath.Path(directory) / name for name in ("tokenizer.json", "tokenizer.model"))
    if not json_file.exists() and not model_file.exists():
        raise FileNotFoundError(f"{directory} has no tokenizer.json and no tokenizer.model: name a tokenizer's folder")
    model = model_file.read_bytes() if model_file.exists() else b""
    source = json_file if json_file.exists() else model_file
    try:
        if source is json_file:
            backend = tokenizers.Tokenizer.from_buffer(json_file.read_bytes())
        else:
            backend = _llama_backend(_sentencepiece_pieces(model))
        return _finish(backend, model)
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{source} is not a Llama-style tokenizer ({error}): get it again from its source") from error


def save_tokenizer(tokenizer: Tokenizer, directory: epath.PathLike) -> None:
    """Writes what `load_tokenizer(directory)` reads back identically, and the reference (transformers 4.40) too.

    Files: tokenizer.json, tokenizer_config.json, special_tokens_map.json, and tokenizer.model if one was loaded.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Merges as "left right", the form that every version of the tokenizers library reads; pieces hold no spaces.
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    special = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {"tokenizer.json": state, "tokenizer_config.json": config, "special_tokens_map.json": special}
    for name, content in files.items():
        (directory / name).write_bytes((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    if model := getattr(tokenizer, "sentencepiece_model", b""):
        (directory / "tokenizer.model").write_bytes(model)


def _finish(backend: "tokenizers.Tokenizer", sentencepiece_model: bytes = b"") -> Tokenizer:
    """What all share: `<s>` in front, `<PAD>`, and the wrapper. The sentencepiece model travels to `save_tokenizer`."""
    import tokenizers

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # tokenizers need no PyTorch: no word about it
    import transformers

    missing = [token for token in (UNK, BOS, EOS, SPACE) if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"tokens {missing} are missing")
    backend.add_special_tokens([tokenizers.AddedToken(PAD, normalized=False, special=True)])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    backend.no_truncation()
    backend.no_padding()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.sentencepiece_model = sentencepiece_model
    return tokenizer


def _llama_backend(pieces: Sequence[tuple[str, float]]) -> "tokenizers.Tokenizer":
    """Byte-fallback BPE from (piece, score) in id order, whose first three are the special tokens."""
    import tokenizers
    from tokenizers import decoders, normalizers

    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, _merges(pieces), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)]
    )
    return backend


def _merges(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others: by score, best first, then by the ids of piece and parts."""
    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = ((a, b) for a, b in splits if a in vocab and b in vocab)
        merges += [(score, pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return [pair for _, pair in sorted(merges, key=lambda merge: -merge[0])]


def _sentencepiece_pieces(model: bytes) -> list[tuple[str, float]]:
    """(piece, score) in id order of a sentencepiece BPE model, whose scores are the negative ranks of the merges."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(model)
    pieces = [(library.id_to_piece(index), library.get_score(index)) for index in range(library.get_piece_size())]
    if not all(score.is_integer() for _, score in pieces):
        raise ValueError("its scores are probabilities: a unigram model, not BPE")
    return pieces


_TINY_WORDS = """
pick up the red green blue yellow purple orange pink brown cyan white black gray cube block ball cylinder object box
disc bowl plate cup drawer table put place push pull move lift grasp reach touch drop stack open close turn slide in on
into onto to from of left right front back next near between and it a robot arm gripper
"""


def _tiny_pieces() -> list[tuple[str, float]]:
    """A small vocabulary in Llama-2's order: 3 specials, 256 bytes, merged pieces, characters, 256 rare ones last."""
    text = " ".join([*PROMPT_FAMILIES.values(), *_TINY_WORDS.split()]).replace("{instruction}", "")
    words = {word.replace(" ", SPACE) for word in re.findall(" ?[A-Za-z]+", " " + text)}
    merged = {word[:stop] for word in words for stop in range(2, len(word) + 1)}
    characters = [SPACE, *map(chr, range(0x21, 0x7F))]
    rare = [chr(0xA000 + index) for index in range(256)]  # Yi syllables: no instruction is likely to hold them
    specials = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    names = [*specials, *sorted(merged, key=lambda piece: (len(piece), piece)), *characters, *rare]
    return [(name, -float(index)) for index, name in enumerate(names)]
