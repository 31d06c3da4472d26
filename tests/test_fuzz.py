"""A small fixed set of damaged inputs for each parser of foreign bytes; `python -m tests.fuzz` tries many more."""

import pytest

from tests.fuzz.harness import fuzz
from tests.fuzz.targets import TARGETS

INPUTS = 100


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_parser_ends_well_for_damaged_input(name):
    tried, accepted = fuzz(TARGETS[name], INPUTS)
    assert tried >= INPUTS and accepted < tried  # damage is noticed
