"""The parsers that read bytes from elsewhere, by name; each module of this folder lists those of one area."""

from tests.fuzz import serve
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = {}
TARGETS |= serve.TARGETS
