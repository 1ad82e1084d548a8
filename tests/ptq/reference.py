"""The readable twin of ``rtn`` for a chain of convolutions and linear layers."""

import torch
from torch import nn

from planish.quantizers import fit_grid
from planish.scheme import Scheme


def on_grid(x, grid):
    """The nearest point of the grid, in plain torch operations."""
    codes = torch.clamp(torch.round(x / grid.scale - grid.offset) + grid.zero_point, grid.qmin, grid.qmax)
    return (codes - grid.zero_point + grid.offset) * grid.scale


@torch.no_grad()
def round_to_nearest(model, calibration, x, scheme):
    """Fold each BatchNorm into the layer before it, set the ranges in float, round weights and inputs."""
    scheme = Scheme.parse(scheme)
    layers = list(model)
    products = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    exact = calibration  # the activations of the float network
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            continue  # folded below
        if layer not in products:
            exact, x = layer(exact), layer(x)
            continue
        weight, bias = layer.weight, 0 if layer.bias is None else layer.bias
        following = layers[i + 1] if i + 1 < len(layers) else None
        if isinstance(following, nn.BatchNorm2d):
            factor = following.weight / torch.sqrt(following.running_var + following.eps)
            weight = weight * factor.view(-1, 1, 1, 1)
            bias = (bias - following.running_mean) * factor + following.bias
        here = scheme.edge() if layer in (products[0], products[-1]) else scheme
        rounded = on_grid(weight, fit_grid(weight, here.weights))
        if here.activations is not None:
            x = on_grid(x, fit_grid(exact, here.activations))
        if isinstance(layer, nn.Conv2d):
            exact = nn.functional.conv2d(exact, weight, bias, groups=layer.groups)
            x = nn.functional.conv2d(x, rounded, bias, groups=layer.groups)
        else:
            exact, x = exact @ weight.T + bias, x @ rounded.T + bias
    return x
