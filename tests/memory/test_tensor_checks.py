"""Values of tensors are checked in every floating dtype, wherever they stand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory import tensor_checks
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.tensor_checks import FLOAT_DTYPES, check_values

dtypes = st.sampled_from(FLOAT_DTYPES)


@given(st.lists(st.floats(), max_size=20), dtypes, dtypes | st.none())
def test_what_is_accepted_is_finite_as_it_is_and_as_it_is_served(values, dtype, served):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    finite = bool(tensor.isfinite().all()) and (served is None or bool(tensor.to(served).isfinite().all()))
    try:
        check_values("key", tensor, served)
    except AdapterFileError:
        assert not finite
    else:
        assert finite


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_bad_value_is_found_in_any_block(dtype, bad, place, monkeypatch):
    monkeypatch.setattr(tensor_checks, "_BLOCK", 300)
    tensor = torch.randn(1000).to(dtype)
    check_values("key", tensor, None)
    tensor[place] = bad
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        check_values("key", tensor.view(10, 100).T, None)


def test_the_error_tells_the_largest_magnitude():
    with pytest.raises(AdapterFileError, match=r"values up to 1e\+05 do not fit .*float16.* 6.55e\+04"):
        check_values("key", torch.tensor([3.0, -1e5, 7.0]), torch.float16)
