"""Which packages a wheel holds: every folder of qat/, found, and the three beside it that install inside it."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["qat", "qat.*"]), "qat.conf", "qat.recipes", "qat.csrc"])
