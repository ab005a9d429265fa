"""The old name of `qat.formats.pt2`, for one version."""

import warnings

from qat.formats.pt2.program import load as load

warnings.warn("qat.export.aoti is now qat.formats.pt2; the old name goes with the next version", FutureWarning, stacklevel=2)
