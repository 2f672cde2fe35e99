"""How sources count FLOPs: the most common cause of wrong comparisons."""

import re

from transformer.accounting import model_flops_per_token, n_params
from transformer.config import ModelConfig


def flops_per_token(config: ModelConfig, length: int, said: str) -> float:
    """FLOPs of one trained token by the convention that `flops_count` names.

    Default: every query with every key, nothing recomputed, the head multiplied. `hardware`: layers 4/3 of that, for
    they are run forward twice (Narayanan et al. 2021, eq. 3). `causal`: half of the attention. `6N`, `8N`: parameters.
    """
    text = said.lower()
    if found := re.search(r"\b([68])\s*\*?\s*n\b(?=.*(no attention|only))", text):
        return float(found.group(1)) * n_params(config)
    halved = re.search(r"causal", text) and not re.search(r"not (causal|stated)|full", text)
    model = model_flops_per_token(config, length, "causal" if halved else "full")
    if re.search(r"hardware|recompute", text) and not re.search(r"no recompute|excludes", text):
        head = 6.0 * config.d_model * config.vocab_size
        return (model - head) * 4 / 3 + head
    return model
