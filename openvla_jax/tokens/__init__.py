"""Text and actions as token ids."""

from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.prompts import prompt_ids
from openvla_jax.tokens.tokenizer import load_tokenizer

__all__ = ["ActionTokenizer", "load_tokenizer", "prompt_ids"]
