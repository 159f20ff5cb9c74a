"""``kv_init="target"``: draft-side keys and values that start as the target would make them."""

import torch
from torch import Tensor

from ..errors import StudyError
from ..target.load import Target
from ..target.shared import norm_gain


@torch.no_grad()
def start_from_target(drafter, target: Target) -> None:
    """Start each draft-side key and value map as the target's own projections of the reused layers, sent through the fusion.

    An entry of the target's at s reaches the drafter as F [W_1 h_1; W_2 h_2; …] of S reused layers, W_l the target's projection with
    its input norm's gains folded in, h_l its normed input, F the fusion. A draft token x has no h_l yet; its entry starts as
    F [W_1; W_2; …] norm(x): in the space of the prefix entries, on their scale, from the one input that there is. F is the fusion as
    drawn, so that nothing but the draft-side maps starts differently; with ``kv_fusion="heads"`` it is the identity.

    Where the map reads 2d numbers, [norm(embedding); norm(state)] of a `hybrid`, this is its embedding half, for the token at that
    place is what the target's residual stream starts from there; the state belongs to the place before, and its half starts at zero (it
    learns from the first step on: the gradient of a weight doesn't need the weight). Biases and per-head norms of the target's
    projections (Qwen) are left out, for the drafters have neither; and with ``kv_rope="raw"`` the prefix keys were rotated before F,
    those of draft tokens are after it.

    Raises
    ------
    StudyError : a target without separate key and value projections after an input norm.
    """
    stacked = {name: _projections(target, drafter.spec.kv_layers, name) for name in ("k_proj", "v_proj")}
    for layer in drafter.layers:
        attention = getattr(layer, "cross", layer.attention)
        for name, fuse in (("k_proj", layer.fusion.keys), ("v_proj", layer.fusion.values)):
            weight, start = getattr(attention, name).weight, stacked[name].to(drafter.norm.weight)
            weight.zero_()
            weight[:, : start.shape[1]] = fuse.weight @ start if hasattr(fuse, "weight") else start


def _projections(target: Target, layers: tuple[int, ...], name: str) -> Tensor:
    """[S · G · D, d] of the target's layers, end to end, each times its input norm's gains."""
    found = []
    for index in layers:
        layer = target.model.get_decoder().layers[index]
        try:
            gain = norm_gain(layer.input_layernorm, target.name)
            found.append(getattr(layer.self_attn, name).weight.float() * gain.float())
        except AttributeError as error:
            raise StudyError(
                f"kv_init='target' needs {name} and input_layernorm in the layers of target {target.name}; choose 'random'"
            ) from error
    return torch.cat(found)
