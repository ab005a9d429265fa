"""The menu: quantizers of the literature as rows of the table, one file for the functions of each family.

`thresholds`: where a weight becomes zero is a rule, or learned. `steps`: learned steps of ternary and uniform codes. `stretched`:
learned ranges. `sparse`: three of four weights. `deadzone`: zeros that add to the bias. `estimators`: other gradients.
"""

from __future__ import annotations

from dataclasses import replace

from qat.quantizers.record import Parameter, Quantizer

_HERE = "qat.quantizers.menu"
_TERNARY = (-1, 0, 1)
_ROUNDED, _SOFT = "qat.quantizers.ternary:codes", "qat.quantizers.ternary:soft"


def _threshold(name: str, words: str) -> Quantizer:
    """One whose zeros are below a threshold of its own, with the least-squares scale of what is left."""
    return Quantizer(
        levels=_TERNARY,
        codes=f"{_HERE}.thresholds:{name}_codes",
        scale=f"{_HERE}.thresholds:{name}_scale",
        soft=f"{_HERE}.thresholds:{name}_soft",
        packs_as=("ternary",),
        scales=("absmean",),
        words=words,
        why="its threshold and scale are its own",
    )


def _learned(grid: str, parameter: str) -> Quantizer:
    """A grid of levels whose step or range is a parameter in units of its start, which is kept."""
    at = f"{_HERE}.{grid}"
    return Quantizer(
        levels=_TERNARY,
        codes=f"{at}.codes",
        soft=f"{at}.soft",
        scale=f"{at}.scale",
        gradient=f"{at}.gradient",
        parameters={parameter: Parameter(f"{_HERE}.steps:start"), "unit": Parameter(f"{at}.unit", trained=False)},
        packs_as=("ternary",),
        scales=("absmean",),
    )


def _uniform(bits: int, grid: str, ratios: tuple[float, ...]) -> Quantizer:
    """Whole numbers of that many bits times a learned step, as ternary digits."""
    return replace(
        _learned(f"steps:{grid}", "step"),
        backwards=("input", "bf16"),
        planes=(len(ratios),),
        ratios=ratios,
        words=f"{bits} bits uniform, learned step",
        why="its step is learned, and gradients are input or bf16",
    )


_RANGE = "its range is learned from max|W| on, one a channel or group, and the gradients of two planes are input or bf16"

ROWS: dict[str, Quantizer] = {
    "twn": _threshold("twn", "ternary, threshold 0.7 mean|W| (TWN)"),
    "ternary_count": _threshold("count", "ternary, a fixed share of zeros"),
    "ternary_threshold": replace(
        _threshold("learned", "ternary, learned threshold"),
        gradient=f"{_HERE}.thresholds:learned_gradient",
        parameters={"threshold": Parameter(f"{_HERE}.thresholds:learned_start")},
    ),
    "sherry": Quantizer(
        levels=_TERNARY,
        codes=f"{_HERE}.sparse:codes",
        scale=f"{_HERE}.sparse:scale",
        packs_as=("ternary", "sparse"),
        scales=("absmean",),
        block=4,
        words="ternary, one zero in four (Sherry)",
        why="its scale is its own",
    ),
    "lsq": replace(
        _learned("steps:TERNARY", "step"),
        codes=_ROUNDED,
        soft=_SOFT,
        words="ternary, learned step (LSQ)",
        why="its step is learned",
    ),
    "uniform2": _uniform(2, "TWO", (3, 1)),
    "uniform3": _uniform(3, "THREE", (3, 1)),
    "uniform4": _uniform(4, "FOUR", (9, 3, 1)),
    "seq": replace(
        _learned("stretched:THREE", "clip"),
        codes=_ROUNDED,
        soft=_SOFT,
        granularities=("channel", "group"),
        words="ternary, learned range (SEQ)",
        why=_RANGE,
    ),
    "seq2": replace(
        _learned("stretched:FOUR", "clip"),
        levels=(-1, 1),
        packs_as=("binary", "ternary"),
        granularities=("channel", "group"),
        backwards=("input", "bf16"),
        planes=(2,),
        ratios=(2, 1),
        words="2 bits, learned range (SEQ)",
        why=_RANGE,
    ),
    "tequila": Quantizer(
        levels=_TERNARY,
        codes=_ROUNDED,
        bias=f"{_HERE}.deadzone:bias",
        soft=_SOFT,
        packs_as=("ternary",),
        words="ternary {scale}, zeros add to the bias (Tequila)",
    ),
    "ternary_clipped": Quantizer(
        levels=_TERNARY,
        codes=_ROUNDED,
        gradient=f"{_HERE}.estimators:clipped",
        packs_as=("ternary",),
        words="ternary {scale}, clipped gradient",
    ),
    "ternary_sharpened": Quantizer(
        levels=_TERNARY,
        codes=_ROUNDED,
        gradient=f"{_HERE}.estimators:sharpened",
        parameters={"sharpness": Parameter(f"{_HERE}.estimators:straight", per="layer", trained=False)},
        sharpened="sharpness",
        packs_as=("ternary",),
        words="ternary {scale}, annealed gradient",
    ),
}
