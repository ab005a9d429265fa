"""Bitnet folders: written for stock transformers, and read whoever wrote them."""

from qat.formats.bitnet.reading import load as load
