"""Hides the packages in $OPENVLA_HIDDEN from a Python that has this folder on its path, except in wheels.

`benchmarks/gpu.py --hide-missing` uses it, to run on a full installation as on one that lacks packages.
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


# A bound method, like the original: pytest stores it as an attribute of one of its classes.
importlib.machinery.PathFinder.find_spec = types.MethodType(find_spec, importlib.machinery.PathFinder)
