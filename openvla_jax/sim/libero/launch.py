"""Runs the simulator inside its own environment: PYTHON -P launch.py; requests come on stdin, answers go to stdout.

That environment has neither jax nor this package. A package without its `__init__` is put in place of it, so that
modules are found by their names and nothing of the main environment gets onto the path.
"""

import os
import sys
import types
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")  # software rendering: the same pixels on every machine
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
package = types.ModuleType("openvla_jax")
package.__path__ = [str(Path(__file__).resolve().parents[2])]
sys.modules["openvla_jax"] = package

from openvla_jax.sim.libero.serving import serve, take_output  # noqa: E402

if __name__ == "__main__":
    answers = take_output()
    from openvla_jax.sim.libero.simulator import LiberoSimulator

    serve(LiberoSimulator(), sys.stdin.buffer, answers)
