"""Acting with a trained policy: in Python, as a server, and as its client."""

import importlib.util
import sys
from pathlib import Path

# What crosses the network is `openvla_client`, which robots install without jax. A wheel of this package contains it;
# in a checkout that was not installed it is found here.
if importlib.util.find_spec("openvla_client") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "clients" / "openvla_client"))
