"""A distributed federated-learning testbed that measures label leakage from client updates."""

__version__ = "0.1.0"
