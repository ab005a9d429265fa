"""What transformers' models ask of a batch's attention mask at each forward, answered by what is known of it.

They look whether a mask hides anything, and whether positions are those of several texts in a row, to leave the mask out where
attention is causal and no more. On a GPU such a look waits for it, at each forward of student and teacher; on a CPU it is some
calls. Both are known before: batches bring no positions, so that they are the model's own, and a mask was looked at on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


@contextmanager
def known_masks(inputs: Mapping[str, Any], unpadded: bool | None) -> Iterator[None]:
    """The answers for a forward without a cache, of these arguments; `unpadded`: whether the mask has ones only, None: ask.

    A transformers that asks otherwise is left alone.
    """
    answers: dict[str, Any] = {}
    if "position_ids" not in inputs:
        answers["find_packed_sequence_indices"] = lambda position_ids: None
    if unpadded is not None:
        answers["fast_all"] = lambda mask: unpadded
    before = {name: vars(masking_utils)[name] for name in answers if name in vars(masking_utils)}
    vars(masking_utils).update({name: answers[name] for name in before})
    try:
        yield
    finally:
        vars(masking_utils).update(before)
