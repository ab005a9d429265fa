"""Texts with labels: reading says what lies in files, names which label has which number, parts what a model is given."""

from qat.data.labelled.names import Labels
from qat.data.labelled.parts import Labelled
from qat.data.labelled.reading import Example, read_examples

__all__ = ["Example", "Labelled", "Labels", "read_examples"]
