"""A latent weight through a record of the table: to codes and a scale, to parameters, and the gradient back.

Weights are float32 rows [R, L] that share a scale each; codes come back as int8 [N, planes * K], planes side by side, and the
scale as float32 [1 | N, planes * G]. Legend: N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qat.quantizers import find
from qat.quantizers.record import Function, Quantizer, WeightOptions, resolve
from qat.quantizers.scales import check_block, check_weight, round_scale, scale_rows, scale_shape

Kernels = Mapping[Function, Callable[..., Tensor]]
"""What a device computes in place of which function of a record."""
_NONE: Kernels = {}


def record_of(o: WeightOptions) -> Quantizer:
    """The record that these options are for; ValueError where the table has none."""
    record = find(o.weight, o.planes, o.component_scales)
    if record is None:
        raise ValueError(f"quant.weight={o.weight} with quant.components={o.planes} is in no row of the quantizers")
    return record


def shape_of(w: Tensor, o: WeightOptions) -> tuple[int, int]:
    """The shape of the scale of w [N, K]."""
    return scale_shape(w.shape[0], w.shape[1], o.granularity, o.group_size, o.planes)


def as_rows(scale: Tensor, planes: int) -> Tensor:
    """[1 | N, planes * G] -> [R, planes]."""
    return scale.unflatten(-1, (planes, scale.shape[1] // planes)).mT.reshape(-1, planes)


def from_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[R, planes] -> [1 | N, planes * G]; the inverse of `as_rows`."""
    return value.reshape(shape[0], shape[1] // value.shape[1], value.shape[1]).mT.reshape(shape).contiguous()


def weight_scale(
    w: Tensor, o: WeightOptions, parameters: Sequence[Tensor] = (), kernels: Kernels = _NONE
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """w as float32 [R, L], each row sharing one scale; the scales [R, planes]; and the shape they are returned in.

    `kernels` are a device's, for the functions that they do the same as.

    Raises:
        ValueError: w is not a floating-point matrix, or its width is not a multiple of the group size.
    """
    check_weight(w)
    shape, rows = shape_of(w, o), scale_rows(w.float(), o.granularity, o.group_size)
    if w.numel() == 0:
        return rows, w.new_full((shape[0] * shape[1] // o.planes, o.planes), o.eps, dtype=torch.float32), shape
    record = record_of(o)
    check_block(w.shape[1], record.block, o.weight)
    scale = resolve(record.scale)
    value: Tensor = kernels.get(scale, scale)(rows, o, **by_name(record, o, parameters)).clamp_min(o.eps)
    planes = value * value.new_tensor(record.ratios) if record.ratios else value
    return rows, round_scale(planes, o.scale_dtype), shape


def quantize_weight(w: Tensor, o: WeightOptions, parameters: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, planes * K] and the multiplying scale float32 [1 | N, planes * G] of w [N, K].

    `parameters` are the record's, in its order, as `initial_parameters` shapes them.

    Raises:
        ValueError: w is not a floating-point matrix, or its width is not a multiple of the group size.
    """
    rows, value, shape = weight_scale(w, o, parameters)
    n, k = w.shape
    if w.numel() == 0:
        return w.new_zeros((n, o.planes * k), dtype=torch.int8), from_rows(value, shape)
    record = record_of(o)
    codes: Tensor = resolve(record.codes)(rows, value, **by_name(record, o, parameters))
    planes = codes.to(torch.int8).reshape(o.planes, n, k)
    return planes.transpose(0, 1).reshape(n, o.planes * k), from_rows(value, shape)


def gradient(
    grad: Tensor, w: Tensor, t: Tensor, scale: Tensor, o: WeightOptions, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Of the latent weight [N, K] and of each parameter, from `grad` [N, K], that of the weight which was multiplied.

    Only for records that have a gradient of their own; w, t and scale are the forward pass's.
    """
    record = record_of(o)
    assert record.gradient is not None
    rows = [scale_rows(value.float(), o.granularity, o.group_size) for value in (grad, w)]
    planes = t.unflatten(-1, (o.planes, -1)).transpose(0, 1).reshape(o.planes, *rows[0].shape)
    codes = planes[0] if o.planes == 1 else planes
    given = resolve(record.gradient)(*rows, codes.float(), as_rows(scale, o.planes), **by_name(record, o, parameters))
    grad_rows, named = given
    grads = [
        _shaped(named[name], value) if one.trained else None
        for (name, one), value in zip(record.parameters.items(), parameters, strict=True)
    ]
    return grad_rows.reshape(w.shape), grads


def initial_parameters(w: Tensor, o: WeightOptions) -> dict[str, Tensor]:
    """The values that the record's parameters start with for this weight: float32 [1 | N, planes * G], or [1] for one a layer."""
    rows, record = scale_rows(w.detach().float(), o.granularity, o.group_size), record_of(o)
    own, found = _own(record, o), {}
    shape = scale_shape(w.shape[0], w.shape[1], o.granularity, o.group_size, own)
    for name, one in record.parameters.items():
        value = torch.as_tensor(resolve(one.initial)(rows, o), dtype=torch.float32, device=w.device)
        whole = value.reshape(1) if one.per == "layer" else from_rows(value.expand(rows.shape[0], own), shape)
        found[name] = whole.clone()
    return found


def by_name(record: Quantizer, o: WeightOptions, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters as the record's functions take them."""
    if len(parameters) != len(record.parameters):
        raise ValueError(
            f"quant.weight={o.weight} has the parameters {', '.join(record.parameters) or '(none)'}, but {len(parameters)} came"
        )
    pairs = zip(record.parameters.items(), parameters, strict=True)
    return {
        name: (as_rows(value.float(), _own(record, o)) if one.per == "scale" else value.float().reshape(1, 1))
        for (name, one), value in pairs
    }


def _own(record: Quantizer, o: WeightOptions) -> int:
    """Scales a row that are not multiples of another one."""
    return 1 if record.ratios else o.planes


def _shaped(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the functions' shape as one of the parameter's."""
    whole = from_rows(grad, tuple(parameter.shape)) if parameter.ndim == 2 else grad.reshape(parameter.shape)
    return whole.to(parameter.dtype)
