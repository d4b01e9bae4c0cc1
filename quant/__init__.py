"""FP4 training arithmetic for JAX: block-scaled formats and their quantizers on any device.

>>> import jax.numpy as jnp, quant
>>> w = jnp.linspace(-1.0, 1.0, 1024).reshape(32, 32)
>>> q = quant.quantize(w, quant.NVFP4, axis=0, block_2d=True)
>>> q.nbytes  # 512 of codes, 4 block scales, 4 for the tensor scale; 4096 in float32
520
>>> bool((quant.fake_quant(w, quant.NVFP4, axis=0, block_2d=True) == quant.dequantize(q)).all())
True
"""

from quant.diagnostics import NAMES as NAMES
from quant.diagnostics import measure as measure
from quant.dot_general import DotGeneral as DotGeneral
from quant.dot_general import dot_general as dot_general
from quant.dot_general import init_state as init_state
from quant.formats import E2M1 as E2M1
from quant.formats import E4M3 as E4M3
from quant.formats import E5M2 as E5M2
from quant.formats import FP8 as FP8
from quant.formats import MXFP4 as MXFP4
from quant.formats import MXFP8 as MXFP8
from quant.formats import NVFP4 as NVFP4
from quant.formats import NVFP4_ADAPTIVE as NVFP4_ADAPTIVE
from quant.formats import Element as Element
from quant.formats import Format as Format
from quant.grouped import Grouped as Grouped
from quant.grouped import grouped_matmul as grouped_matmul
from quant.grouped import row_multiple as row_multiple
from quant.hadamard import TE_SIGNS as TE_SIGNS
from quant.hadamard import hadamard as hadamard
from quant.hadamard import inverse_hadamard as inverse_hadamard
from quant.hadamard import random_signs as random_signs
from quant.linear import Bases as Bases
from quant.qarray import QArray as QArray
from quant.quantize import dequantize as dequantize
from quant.quantize import fake_quant as fake_quant
from quant.quantize import quantize as quantize
from quant.quantize import quantize_values as quantize_values
from quant.recipe import LowRank as LowRank
from quant.recipe import Mean as Mean
from quant.recipe import Operand as Operand
from quant.recipe import Recipe as Recipe
from quant.recipes import RECIPES as RECIPES
from quant.recipes import get_recipe as get_recipe
from quant.rounding import Seed as Seed
from quant.rounding import fold_key as fold_key
from quant.rounding import fold_seed as fold_seed
from quant.rules import NVIDIA as NVIDIA
from quant.rules import Rules as Rules
from quant.split_weights import SplitWeight as SplitWeight
from quant.split_weights import merge_weights as merge_weights
from quant.split_weights import split_weights as split_weights
