"""Programs of torch.export: one file that runs with torch and `qat.ops` alone."""

from qat.formats.pt2.program import load as load
