"""What can go wrong; each message is one line."""

from __future__ import annotations


class ClientError(ValueError):
    """Something that the caller can fix: a URL, a token, an observation, a setting."""


class ServerError(ClientError):
    """The server refused, failed or could not be reached.

    `status` is its HTTP code, or None without an answer. The message holds the reason that the server gave.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def reason(error: BaseException) -> str:
    """Returns the cause of an exception of any library, in one short line."""
    text, name = " ".join(str(error).split())[:300], type(error).__name__
    if isinstance(error, ClientError):
        return text
    if isinstance(error, (TypeError, AttributeError, LookupError)):  # their texts speak of Python
        return f"does not have the expected form ({name}: {text})"
    return f"{text} ({name})" if text else name
