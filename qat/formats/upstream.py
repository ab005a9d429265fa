"""What transformers and the hub's client warn of, as one line of ours each; their bars are off.

Their own output would tear the progress display apart, and the usual way out, to turn their warnings off, also hides that a
configuration is misread or a tokenizer splits wrongly. So each warning is passed on once, on one line, except those in `_KNOWN`,
with the reason. Python's `warnings` are left alone.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

_KNOWN = {
    r"LOAD REPORT": "what does not fit is an error, or a line, of qat.models.checkpoint and qat.formats.folder",
    r"^The tied weights mapping": "qat.models.checkpoint says it, and corrects the config",
    r"^This checkpoint seem corrupted": "the weights are reported as missing, which is an error",
    r"^Unknown quantization type": "refused, or ours",
    r"^Token indices sequence length is longer": "text is cut into windows after it is tokenized",
    r"^Setting `pad_token_id` to `eos_token_id`": "batches that are generated have no padding",
    r"^`torch_dtype` is deprecated": "says nothing about the model",
}
_LONGEST = 400


def listen() -> None:
    """Pass warnings on from now on; a further call changes nothing."""
    import huggingface_hub
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    if _LISTENER not in logging.getLogger("transformers").handlers:
        theirs.disable_default_handler()
        theirs.add_handler(_LISTENER)
        theirs.set_verbosity_warning()
        huggingface_hub.logging.set_verbosity_warning()
        hub = logging.getLogger("huggingface_hub")
        hub.handlers[:] = [_LISTENER]


@contextmanager
def no_bars() -> Iterator[None]:
    """Without what is printed to stderr, for bars that have no switch; warnings still come through."""
    _LISTENER.stream = sys.stderr
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        _LISTENER.stream = None


class _Listener(logging.Handler):
    """Prints `qat: LIBRARY: TEXT`, each text once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()
        self.stream: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text in self.said or any(re.search(pattern, text) for pattern in _KNOWN):
            return
        self.said.add(text)
        text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
        print(f"qat: {record.name.partition('.')[0]}: {text}", file=self.stream or sys.stderr)


_LISTENER = _Listener()
