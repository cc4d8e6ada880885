"""Notices that libraries give while they are imported, of packages that nothing here needs."""

import logging
from collections.abc import Callable

UNNEEDED = {
    # Pictures are read with Pillow.
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    # A faster kernel for bases in 4 bits on CPUs, which would be downloaded as a program.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Words of such notices by the logger that gives them."""


def leave_out_unneeded() -> None:
    """Have loggers leave these notices out and no others."""
    for name, words in UNNEEDED.items():
        logging.getLogger(name).addFilter(_without(words))


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()
