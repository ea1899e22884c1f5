"""What nobody can act on is not shown; the rest is."""

import logging
import warnings

import pytest

from pipeline.base.quiet import silence_libraries


def test_some_warnings_of_libraries_are_left_out_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = list(kernels.filters)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            silence_libraries()
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            tied = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but"
            warnings.warn(tied, UserWarning, stacklevel=1)
            warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
            kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.")
            kernels.warning("the library was built for another CPU")
    finally:
        kernels.filters[:] = before
    assert [str(warning.message) for warning in seen] == ["`something_else` is deprecated"]
    assert caplog.messages == ["the library was built for another CPU"]
