"""The operators: a module for each, with its wrapper, fake kernel and autograd formula.

A module is named after its function, which would hide it here without the underscore. Schemas are in csrc/ops.cpp,
argument checks in csrc/checks.h, the same operators in plain torch in reference.py.
"""

from ._color_steps import color_steps
from ._enqueue import enqueue_
from ._expected_key import ExpectedKey, expected_candidates, expected_key
from ._info_nce import info_nce
from ._l2_normalize import l2_normalize, row_norms
from ._momentum_update import momentum_update_
from ._nearest_keys import NearestKeys, nearest_keys, nearest_keys_in_pieces

__all__ = [
    "ExpectedKey",
    "NearestKeys",
    "color_steps",
    "enqueue_",
    "expected_candidates",
    "expected_key",
    "info_nce",
    "l2_normalize",
    "momentum_update_",
    "nearest_keys",
    "nearest_keys_in_pieces",
    "row_norms",
]
