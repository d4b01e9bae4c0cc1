import dataclasses
import doctest
import importlib

import ml_dtypes
import numpy as np
import pytest

import quant


@pytest.mark.parametrize("module", ["", ".formats", ".rounding", ".quantize", ".hadamard"])
def test_doctests(module):
    # By name: quant.quantize and quant.hadamard are functions, in modules of the same names.
    result = doctest.testmod(importlib.import_module("quant" + module))
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("element", [quant.E2M1, quant.E4M3, quant.E5M2])
def test_elements_agree_with_ml_dtypes(element):
    info = ml_dtypes.finfo(element.dtype)
    assert element.max == float(info.max)
    assert element.mantissa == info.nmant
    assert 2.0**element.min_exponent == float(info.smallest_normal)
    assert 2.0**element.max_exponent <= element.max < 2.0 ** (element.max_exponent + 1)
    assert element.bits == info.bits


def test_formats_are_frozen_and_hashable():
    copy = dataclasses.replace(quant.NVFP4)
    assert copy == quant.NVFP4 and hash(copy) == hash(quant.NVFP4)
    assert dataclasses.replace(quant.MXFP4, rule="floor") != quant.MXFP4
    with pytest.raises(dataclasses.FrozenInstanceError):
        quant.NVFP4.block = 32


def test_bits_per_value():
    formats = (quant.NVFP4, quant.MXFP4, quant.MXFP8, quant.FP8)
    assert [f.bits_per_value for f in formats] == [4.5, 4.25, 8.25, 8.0]


@pytest.mark.parametrize(
    "base,change,message",
    [
        (quant.NVFP4, {"block": None}, "give both, or neither"),
        (quant.NVFP4, {"scale": None}, "give both, or neither"),
        (quant.NVFP4, {"block": 0}, "at least 1, not 0"),
        (quant.NVFP4, {"scale": "e5m3"}, "unknown scale 'e5m3'"),
        (quant.NVFP4, {"rule": "ceil"}, "rule 'ceil' is not for e4m3"),
        (quant.MXFP4, {"rule": "nearest"}, "rule 'nearest' is not for e8m0"),
        (quant.MXFP4, {"tensor_scale": True}, "set tensor_scale=False"),
        (quant.NVFP4, {"underflow": "one!"}, "unknown underflow 'one!'"),
        (quant.FP8, {"tensor_scale": False}, "has no scale"),
    ],
)
def test_impossible_formats_say_why(base, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, **change)


def test_scale_types():
    assert quant.NVFP4.scale_dtype == np.dtype(ml_dtypes.float8_e4m3fn)
    assert quant.MXFP4.scale_dtype == np.dtype(ml_dtypes.float8_e8m0fnu)
    assert quant.FP8.scale_dtype is None
