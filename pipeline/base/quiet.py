"""Silence the warnings of libraries that a user can do nothing about; all others are shown."""

import logging
import warnings

__all__ = ["silence_libraries"]


def silence_libraries() -> None:
    """Leave out warnings of the installed libraries about their own parts."""
    # A kernel for 4-bit products on CPUs that is not installed; another one computes the same.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)
    # A library that reads an attribute of another one by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # An adapter on embeddings that are the head too: the head stays as it was, and `refshard merge` separates the two.
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part", UserWarning)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" not in record.getMessage()
