"""Hides packages from a Python that has this folder on its path: those in $OPENVLA_HIDDEN, unless a wheel brings them.

For `benchmarks/gpu.py --hide-missing`: it shows on a machine that has all packages that the script runs without some.
"""

import importlib.machinery
import os
import sys
import types

HIDDEN = frozenset(os.environ.get("OPENVLA_HIDDEN", "").split(","))
_find_spec = importlib.machinery.PathFinder.find_spec


def find_spec(_, name, path=None, target=None):
    if name in HIDDEN:
        path = [entry for entry in sys.path if entry.endswith(".whl")]
    return _find_spec(name, path, target)


# A bound method, as it was: pytest keeps it as an attribute of a class of its own.
importlib.machinery.PathFinder.find_spec = types.MethodType(find_spec, importlib.machinery.PathFinder)
