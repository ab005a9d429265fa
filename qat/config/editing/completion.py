"""Words for a shell's completion of `qat` (`pip install qat-bitlinear[completion]`, then
`eval "$(register-python-argcomplete qat)"` in ~/.bashrc or ~/.zshrc).

The verbs with plain flags complete from their own parsers, which argcomplete asks. `qat train` takes settings: groups with the
names of their files, keys with the values that their checks allow. Rejected: Hydra's own completion, which composes the whole
configuration at each press of the key, one second long.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from typing import Any, NoReturn

FLAGS = ["--help", "--dry-run", "-m", "--cfg"]


def complete(verbs: Collection[str]) -> str:
    """Answer the shell and end the process; or return the verb whose own parser is now prepared to do so."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    _, current, _, words, _ = argcomplete.split_line(line, point)
    verb = words[1] if len(words) > 1 else ""
    if verb not in verbs:
        _answer(argcomplete, list(verbs))
    os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)  # the verb is the program
    if verb == "train":
        _answer(argcomplete, settings(current))
    _ask_the_parser_of_the_verb(argcomplete)
    return verb


def settings(current: str) -> list[str]:
    """What `qat train` takes where `current` has been typed: `key=` before the equals sign, `key=value` behind it."""
    from qat.config.compose.keys import options
    from qat.config.describe import keys
    from qat.config.run import TrainConfig

    groups = options()
    key, equals, _ = current.partition("=")
    if equals:
        return [f"{key}={value}" for value in groups.get(key) or _values(key)]
    return [*FLAGS, *(f"{name}=" for name in (*groups, *(one.name for one in keys(TrainConfig))))]


def _values(key: str) -> list[str]:
    """The allowed values of a dotted key, as they are typed."""
    from qat.config.describe import sections
    from qat.config.editing.schema import allowed_values
    from qat.config.run import TrainConfig

    *path, name = key.split(".")
    section: type | None = TrainConfig
    for part in path:
        section = sections(section).get(part) if section else None
    known = section is not None and name in getattr(section, "__dataclass_fields__", {})
    values = allowed_values(section, name) if section is not None and known else []
    return ["null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) for value in values]


def _answer(argcomplete: Any, words: list[str]) -> NoReturn:
    parser = argparse.ArgumentParser(add_help=False)
    for flag in words:
        if flag.startswith("-"):
            parser.add_argument(flag, action="store_true")
    plain = [word for word in words if not word.startswith("-")]
    parser.add_argument("words", nargs="*").completer = lambda prefix, **_: plain  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False, validator=lambda word, prefix: word.startswith(prefix))
    sys.exit(0)


def _ask_the_parser_of_the_verb(argcomplete: Any) -> None:
    """argparse's one door: a verb's parser is complete when it is given the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def asked(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        argcomplete.autocomplete(self)
        return parse(self, *arguments)

    argparse.ArgumentParser.parse_args = asked  # type: ignore[method-assign,assignment]
