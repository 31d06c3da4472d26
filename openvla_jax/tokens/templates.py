"""Prompt templates of the language models."""

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
