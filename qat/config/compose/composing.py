"""From settings to a `TrainConfig`: one run, or the jobs of a sweep. Every refusal is one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qat.config.compose.errors import first_lines
from qat.config.compose.keys import config_folder
from qat.config.compose.register import register
from qat.config.run import TrainConfig
from qat.storage import local


@dataclass
class Job:
    """One job of a sweep: its number, what it alone says, and its configuration, or why it has none."""

    number: int
    words: str
    config: TrainConfig | None = None
    error: str = ""

    def build(self) -> TrainConfig:
        """The configuration.

        Raises:
            ValueError: it has none.
        """
        if self.config is None:
            raise ValueError(self.error)
        return self.config


_DEFAULTS = TrainConfig()


def compose_run(settings: Sequence[str], config_dir: str | None = None) -> TrainConfig:
    """The configuration of one run.

    Raises:
        ValueError: a setting or a file that cannot be composed.
    """
    register(settings, config_dir)
    return as_config(compose_config("train", settings, config_dir))


def compose_jobs(settings: Sequence[str], config_dir: str | None = None) -> list[Job]:
    """The jobs of a sweep, the product of all values with commas; one that cannot be composed says why.

    All are composed before one is run, at one time of day, so that they share a folder and a mistake shows at once.

    Raises:
        ValueError: settings that are none.
    """
    register(settings, config_dir)
    with one_line():
        overrides = OverridesParser.create().parse_overrides(list(settings))
        (batch,) = BasicSweeper.split_arguments(overrides, None)
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    first: DictConfig | None = None
    jobs = []
    for number, one in enumerate(batch):
        job = Job(number, _words(setting for setting in one if setting.partition("=")[0] in swept))
        try:
            composed = compose_config("train", [*one, f"hydra.job.num={number}"], config_dir)
            if first is not None:
                OmegaConf.copy_cache(first, composed)
            job.config = as_config(composed, number, job.words)
            first = composed if first is None else first
        except ValueError as error:
            job.error = str(error)
        jobs.append(job)
    return jobs


def as_config(composed: DictConfig, number: int | None = None, words: str = "") -> TrainConfig:
    """The typed configuration of what Hydra composed; each job of a sweep has its folder, run.dir/NUMBER.

    Raises:
        ValueError: an interpolation or a value that cannot be.
    """
    with one_line(), _hydra_config(composed):
        plain = composed.copy()
        OmegaConf.copy_cache(composed, plain)
        with open_dict(plain):
            plain.pop("hydra", None)
        config: TrainConfig = OmegaConf.to_object(plain)  # type: ignore[assignment]
        OmegaConf.copy_cache(plain, composed)
    return _numbered(config, number, words)


def job_words(settings: Sequence[str]) -> tuple[int | None, str]:
    """Number and words of a job that Hydra's own main runs: its settings without what `settings` say for all. None: no sweep."""
    job = HydraConfig.get()
    parsed = OverridesParser.create().parse_overrides(list(settings))
    fixed = {override.get_key_element() for override in parsed if not override.is_sweep_override()}
    own = _words(setting for setting in job.overrides.task if setting.partition("=")[0] not in fixed)
    return (job.job.num if job.mode == RunMode.MULTIRUN else None), own


def _words(settings: Iterable[str]) -> str:
    """Settings for people, without the quotes that text has for Hydra."""
    return " ".join(re.sub(r"='([^']*)'$", r"=\1", setting) for setting in settings)


def job_config(composed: DictConfig, words: str = "") -> TrainConfig:
    """The typed configuration of a job that Hydra's own main runs.

    Raises:
        ValueError: an interpolation or a value that cannot be.
    """
    with one_line():
        config: TrainConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
    job = HydraConfig.get()
    return _numbered(config, job.job.num if job.mode == RunMode.MULTIRUN else None, words)


def _numbered(config: TrainConfig, number: int | None, words: str) -> TrainConfig:
    if number is None:
        return config
    config.run.job, config.run.group = config.run.job or words or None, config.run.group or config.run.dir
    if config.run.dir:
        config.run.dir = str(Path(config.run.dir) / str(number))
    return config


def compose_config(name: str, settings: Sequence[str], config_dir: str | None) -> DictConfig:
    search = [f"hydra.searchpath=[{local(config_dir).resolve().as_uri()!r}]"] if config_dir else []
    with one_line(), initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        return compose(name, [*map(_opened, settings), *one_budget(settings), *search], return_hydra_config=True)


BUDGETS = ("trainer.max_steps", "trainer.max_tokens", "trainer.max_epochs")


def one_budget(settings: Sequence[str]) -> list[str]:
    """Settings that take back the budget of a recipe or a saved run, where these give another.

    Raises:
        ValueError: they give two.
    """
    given = {key: value for key, _, value in (one.lstrip("+").partition("=") for one in settings) if key in BUDGETS}
    said = [f"{key}={value}" for key, value in given.items() if value != "null"]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} are budgets of one run; give one of {', '.join(BUDGETS)}")
    return [f"{key}=null" for key in BUDGETS[1:] if said and key not in given]


def _opened(setting: str) -> str:
    """`quant.overrides={...}` with the ++ that Hydra asks for where the values of a mapping are mappings."""
    key, _, value = setting.partition("=")
    section, _, name = key.partition(".")
    free = value.startswith("{") and getattr(getattr(_DEFAULTS, section, None), name, None) == {}
    return f"++{setting}" if free else setting


@contextmanager
def one_line() -> Iterator[None]:
    """Hydra's, OmegaConf's and YAML's errors as a ValueError of one line."""
    try:
        yield
    except OverrideParseException as error:
        quoted = (
            """; text with blanks, brackets or = goes in quotes: key="'text'", names within {} have none: key="{a*: {b: 1}}\""""
        )
        raise ValueError(f"{str(error.override).removeprefix('++')!r} cannot be read: {first_lines(error)}{quoted}") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(first_lines(error)) from error


@contextmanager
def of_hydra() -> Iterator[None]:
    """As `one_line`, around Hydra's own main, which would print errors in many lines and a sweeper's with a traceback.

    Jobs hold their own errors back, so what comes here is of a sweeper or launcher. Who has set HYDRA_FULL_ERROR=1 gets it whole.
    """
    before = os.environ.get(_FULL)
    if before == "1":
        yield
        return
    os.environ[_FULL] = "1"  # Hydra then raises what it would print
    try:
        with one_line():
            yield
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"the sweep ended: {first_lines(error) or type(error).__name__}") from error
    finally:
        os.environ.pop(_FULL) if before is None else os.environ.update({_FULL: before})


_FULL = "HYDRA_FULL_ERROR"


@contextmanager
def _hydra_config(composed: Any) -> Iterator[None]:
    """`${hydra:...}` resolved from this composition."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
