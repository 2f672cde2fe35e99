"""Weights and configurations of Hugging Face transformers, in and out: mappings to mappings, no files, no torch.

>>> from transformer.interop import config_from
>>> config_from({"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 4, "vocab_size": 37}).position
'learned'
"""

from transformer.interop.configs import config_from
from transformer.interop.weights import from_hf, to_hf

__all__ = ["config_from", "from_hf", "to_hf"]
