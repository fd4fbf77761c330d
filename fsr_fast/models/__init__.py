"""The network of the method and its weights."""

from fsr_fast.models.build import build_network, load_network
from fsr_fast.models.network import Network, NetworkOutput

__all__ = ["Network", "NetworkOutput", "build_network", "load_network"]
