"""Prompts and training rows as token ids.

One training sequence is `<s>` + prompt + lone space + action tokens + `</s>`. Ids are spliced: an action never passes
through a string, and training and inference share one function for the prompt (OpenVLA paper, section 3; token layout,
bins and normalisation are the PyTorch reference's).
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from openvla_jax.config import nearest
from openvla_jax.errors import InputError
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.templates import PROMPT_FAMILIES
from openvla_jax.tokens.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    import tokenizers


def prompt_text(instruction: str, family: str = "pure") -> str:
    """The prompt of one instruction, without `<s>` and without the space before the actions.

    As in the reference the instruction is lower-cased, `<image>` is taken out of it, and its whitespace and punctuation
    stay as they are. Raises InputError for an empty instruction or an unknown family.
    """
    if family not in PROMPT_FAMILIES:
        raise InputError(f"prompt family {family!r} is unknown; {nearest(family, PROMPT_FAMILIES)}")
    cleaned = instruction.lower().replace("<image>", "")
    if not cleaned.strip():
        raise InputError(f"instruction {instruction!r} is empty: say what the robot should do")
    if any("\ud800" <= character <= "\udfff" for character in cleaned):
        raise InputError(f"instruction {instruction!r} holds half a surrogate pair: send valid UTF-8")
    return PROMPT_FAMILIES[family].replace("{instruction}", cleaned)


def prompt_ids(tokenizer: Tokenizer, instruction: str, family: str = "pure") -> list[int]:
    """Token ids from `<s>` to the lone space (29871 in Llama-2) that precedes the first action token.

    The model is trained on that space, so inference must feed it too; it comes exactly once, for every family.
    Raises InputError for an empty instruction or an unknown family.
    """
    return [*_encode(tokenizer, prompt_text(instruction, family)).ids, tokenizer.convert_tokens_to_ids(SPACE)]


def fit_prompt_ids(
    tokenizer: Tokenizer,
    instruction: str,
    text_length: int,
    action_tokens: int,
    family: str = "pure",
) -> tuple[list[int], bool]:
    """Returns the prompt's ids, cut so that they, the action tokens and `</s>` fit, and whether they were cut.

    Training and serving both use this function, so that a policy sees a long instruction as it was trained on it. Only
    the end of the instruction is cut; the template around it stays whole. The caller reports the cut: training counts
    it and warns, since one long instruction of a public dataset must not end a run; a policy warns and acts.

    Args:
      tokenizer: of the language model.
      instruction: what to do, any text.
      text_length: tokens of a row: prompt, actions and `</s>` (`Preprocessing.text_length`).
      action_tokens: how many of them are action tokens (horizon x action dimension).
      family: the prompt template.

    Raises:
      InputError: as `prompt_ids`; or the template and one token of the instruction do not fit. The message names the
        smallest text_length that would do.
    """
    ids = prompt_ids(tokenizer, instruction, family)
    room = text_length - action_tokens - 1
    if len(ids) <= room:
        return ids, False
    head, tail = _template_ids(tokenizer, family)
    shortest = len(head) + 1 + len(tail)
    if room < shortest:
        raise InputError(
            f"text_length {text_length} cannot hold prompt {family!r} with {action_tokens} action tokens: "
            f"use at least {shortest + action_tokens + 1}"
        )
    return ids[: room - len(tail)] + tail, True


def encode_example(
    tokenizer: Tokenizer,
    action_tokenizer: "ActionTokenizer",
    instruction: str,
    actions: ArrayLike,
    text_length: int,
    family: str = "pure",
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Makes one training sequence: `<s>` prompt, lone space, action tokens, `</s>`, right-padded with `<PAD>`.

    Args:
      tokenizer, action_tokenizer: of the model; `action_tokenizer.bins` must be the model's.
      instruction: what to do.
      actions: normalised, [A] or a chunk [K, A], whose steps follow each other.
      text_length: tokens of the row.
      family: the prompt template.

    Returns:
      tokens int32 [text_length]; target_positions int32 [K * A + 1], the places in tokens that carry loss (action
      tokens and `</s>`); whether the instruction was cut (see `fit_prompt_ids`).

    Raises:
      InputError: as `fit_prompt_ids` and `ActionTokenizer.encode`; actions of another rank.
    """
    if np.ndim(actions) not in (1, 2):
        raise InputError(f"actions have shape {np.shape(actions)}: one example takes one action [A] or a chunk [K, A]")
    action_ids = action_tokenizer.encode(actions).reshape(-1)
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
