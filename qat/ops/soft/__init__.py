"""The training linear while its codes are soft, on its way from a full-precision weight to codes: see `qat.quantizers.soft`."""
