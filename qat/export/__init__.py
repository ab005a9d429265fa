"""`python -m qat.export`, and the names that `qat.formats` had here before; they go on for one version and say so."""
