"""Prompts and training rows as token ids.

One training sequence is `<s>` + prompt + lone space + action tokens + `</s>`. Ids are spliced: an action never passes
through a string, and training and inference share one function for the prompt (OpenVLA paper, section 3; token layout,
bins and normalisation are those of the PyTorch reference).
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from openvla_jax.config import nearest
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.templates import PROMPT_FAMILIES
from openvla_jax.tokens.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    import tokenizers


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

    Training and the policy both call this, so that they cut alike: tokens leave from the end of the instruction, the
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
