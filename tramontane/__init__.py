"""Tramontane serves Mistral- and Mixtral-style language models from a cluster of Ray actors.

This folder only gives the top-level folders their import names: `tramontane.client` is `client/`, and so on.
"""

__version__ = "0.1.0"
