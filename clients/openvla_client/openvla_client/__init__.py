"""A robot's side of a policy server: standard library and NumPy only, Python 3.9 or later.

policy = Client("http://127.0.0.1:8000")
action = policy.predict_action(image, "pick up the red cube")
"""

from openvla_client.actions import ActionQueue
from openvla_client.client import Client
from openvla_client.errors import ClientError, ServerError
from openvla_client.messages import Observation

__version__ = "0.1.0"
__all__ = ["ActionQueue", "Client", "ClientError", "Observation", "ServerError"]
