"""The checker that the import hook of conftest.py puts on every annotated function."""

from beartype import BeartypeConf, beartype

# An int is a float, as type checkers have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
