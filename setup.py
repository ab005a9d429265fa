"""Which packages a wheel holds: every folder of qat/, found, and the three beside it that install inside it.

Folders of data are packages too: setuptools warns of each one that is not named, a page of it.
"""

from pathlib import Path

from setuptools import find_packages, setup

BESIDE = (
    "conf",
    "recipes",
    "csrc",
    "csrc/cpu",
    "csrc/cuda",
    *(str(one) for one in sorted(Path("conf").rglob("*")) if one.is_dir()),
)

setup(packages=[*find_packages(include=["qat", "qat.*"]), *("qat." + folder.replace("/", ".") for folder in BESIDE)])
