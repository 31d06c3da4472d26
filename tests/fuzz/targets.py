"""The parsers that read bytes from elsewhere, by name; each module of this folder lists those of one area."""

from tests.fuzz import convert, data, evaluation, lerobot, serve
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = convert.TARGETS | data.TARGETS | lerobot.TARGETS | serve.TARGETS
TARGETS |= evaluation.TARGETS
