"""The model that most tests of folders write."""

from __future__ import annotations

import pytest
from folder_samples import packed_model


@pytest.fixture(scope="module")
def llama():
    return packed_model()[0]
