"""Which linear layers are quantized, and which stay in high precision."""

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rules:
    """The layers that stay in high precision; all others are quantized.

    Attributes:
      high: shell patterns of names, such as "head" or "*router*".
      first: so many of the first blocks.
      last: so many of the last blocks; below 1 a share of all blocks, rounded up.
    """

    high: tuple[str, ...] = ("head", "*router*")
    first: int = 0
    last: float = 0

    def __post_init__(self):
        if self.first < 0 or self.last < 0 or (self.last > 1 and self.last != int(self.last)):
            raise ValueError(
                "Rules: first and last are numbers of blocks, or last a share below 1; got "
                f"{self.first} and {self.last}"
            )

    def quantized(
        self, name: str, layer: jax.Array | int | None = None, blocks: int = 0
    ) -> jax.Array | bool:
        """Whether to quantize a product: for `quant.dot_general(enabled=)`.

        Args:
          name: of the product, to match with `high`.
          layer: index of its block, traced under a scan; None outside of blocks.
          blocks: how many there are.

        Examples:
          >>> [NVIDIA.quantized("mlp.up", layer, 62) for layer in (1, 2, 53, 54)]
          [False, True, True, False]
        """
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.high):
            return False
        if layer is None:
            return True
        # 0.07 * 100 is a little above 7.
        last = math.ceil(round(self.last * blocks, 6)) if self.last < 1 else int(self.last)
        low, high = self.first, blocks - last
        if isinstance(layer, int):
            return low <= layer < high
        if low == 0 and high == blocks:
            return True
        layer = jnp.asarray(layer)
        return (layer >= low) & (layer < high)


NVIDIA = Rules(first=2, last=8)
"""The NVFP4 pre-training recipe's 12B model: the first 2 and the last 8 of 62 blocks (arXiv
2509.25149, section 4.1 and appendix A). For another depth `Rules(last=0.15)` keeps the share."""
