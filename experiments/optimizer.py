"""How parameters follow their gradients."""

from dataclasses import dataclass

import optax

from transformer.params import ParamTree, map_params
from transformer.sharding import MATRIX_DIMS


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth, gradients clipped by global norm."""

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 10_000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def make(self, table: ParamTree) -> optax.GradientTransformation:
        """The schedule reaches its peak after `warmup_steps`, and a tenth of it at `total_steps`.

        Matrices decay, norms and biases do not. Every matrix has the residual stream as one of its sides;
        the number of dims would not tell, as heads and stacked layers give vectors several.
        """
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, max(self.total_steps, self.warmup_steps + 1),
            end_value=self.learning_rate / 10,
        )  # fmt: skip
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay,
                mask=map_params(lambda p: not set(MATRIX_DIMS).isdisjoint(p.dims), table),
            ),
        )  # fmt: skip
