"""Training and evaluation data: `build_datamodule` for a run, `text_tokens` for one more text to evaluate on.

records and sources read what lies in files, tokens caches text as ids, seams joins long texts, selfgen samples it from the
teacher, chat makes ids and masks of chats, order says which sequences make a batch, datamodule hands it to lightning, build puts
it together. The names are fetched at first use, because
lightning takes seconds to import and sources and tokens work without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.data.build import build_datamodule, text_tokens
    from qat.data.datamodule import QATData

__all__ = ["QATData", "build_datamodule", "text_tokens"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qat.data import build

    return getattr(build, name)
