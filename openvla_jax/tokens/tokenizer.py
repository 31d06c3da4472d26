"""TODO"""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from etils import epath

from openvla_jax.errors import InputError
from openvla_jax.tokens.templates import PROMPT_FAMILIES

if TYPE_CHECKING:
    import tokenizers
    import transformers

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerFast"  # imported when first needed: it takes seconds


SPACE = "\u2581"  # sentencepiece's stand-in for a space; alone it is the last token of every prompt (29871 in Llama-2)


UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<PAD>"


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The Llama-style tokenizer of a directory, from `tokenizer.json` or else `tokenizer.model`; "tiny" is built in.

    Encodes as transformers 4.40.1's Llama-2 fast tokenizer (later ones split double spaces otherwise), begins with
    `<s>`, and has the pad token `<PAD>` (id 32000 in Llama-2). Files are read as data; no code in the folder ever runs.
    Raises FileNotFoundError if neither file exists, InputError if it is no such tokenizer.
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
        raise InputError(f"{source} is not a Llama-style tokenizer ({error}): get it again from its source") from error


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
        raise InputError(f"tokens {missing} are missing")
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
        raise InputError("its scores are probabilities: a unigram model, not BPE")
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
