"""The old name of `qat.formats.bitnet`, for one version."""

import warnings

from qat.formats.bitnet.reading import load as load

warnings.warn("qat.export.bitnet is now qat.formats.bitnet; the old name goes with the next version", FutureWarning, stacklevel=2)
