"""What is often wrong with an EAGLE-3 checkpoint, each fault as the change of the import that would undo it.

A checkpoint that was trained one way and is read another drafts badly and says nothing. So it is read again under each
of these changes, one at a time: that under which it drafts better names the fault. A change is of fields of
``config.json``, or of the tensors (under EAGLE's names, as `read_tensors` gives them).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..drafters.drafter import Drafter
from ..drafters.eagle3 import EMBEDDING, HEAD, import_eagle3
from ..drafters.eagle3_format import LAYERS, OUTPUTS, read_config
from ..errors import StudyError
from ..target.capture import hidden_layers
from ..target.load import Target
from ..target.shared import rope_parameters

Tensors = dict[str, Tensor]
ATTENTION = "midlayer.self_attn.{}_proj.weight"
NORMS = ("midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")


@dataclass(frozen=True)
class Counterfactual:
    """One change of how a checkpoint is read.

    name : the change. fault : what is wrong with the checkpoint if it drafts better so, and what mends it.
    fields : of its config, taken instead. change : makes other tensors of its own.
    """

    name: str
    fault: str
    fields: Mapping = field(default_factory=dict)
    change: Callable[[Tensors], Tensors] = dict


def read_with(
    folder: Path, target: Target, tensors: Tensors, applied: Sequence[Counterfactual], fields: Mapping
) -> Drafter:
    """The checkpoint as it is read with some changes, one after the other; `StudyError` if it can't be."""
    for one in applied:
        tensors, fields = one.change(tensors), {**fields, **one.fields}
    return import_eagle3(folder, target, tensors, **fields)


def counterfactuals(folder: Path, target: Target, tensors: Tensors, fields: Mapping) -> Iterator[Counterfactual]:
    """Every change that makes a difference to this checkpoint; ``fields`` are taken instead of its config's anyway."""
    try:
        found = read_config(folder, fields)
    except StudyError:  # it contradicts itself: a change may settle it
        found = {}
    yield from _of_layers(found, target)
    yield from _of_rope(found, target)
    yield from _of_norms(found)
    if "d2t" in tensors:
        yield from _of_vocabulary(tensors, target.vocab_size)
    if HEAD in tensors:
        fault = "its LM head is not that of the tokens it drafts: take the target's rows, lm_head.weight[draft ids]"
        yield Counterfactual("the target's LM head", fault, change=without(HEAD))
    if EMBEDDING in tensors:
        fault = f"its {EMBEDDING} is not the one that it was trained with: leave it out"
        yield Counterfactual("the target's embedding", fault, change=without(EMBEDDING))


def _of_layers(found: Mapping, target: Target) -> Iterator[Counterfactual]:
    """Layers one later, one earlier, as each of two fields counts them, and EAGLE's own three."""
    inputs, outputs = found.get(LAYERS), [layer + 1 for layer in found.get(OUTPUTS, ())]
    usual = list(hidden_layers(target.num_layers))
    own = list(inputs or outputs or usual)
    told = {
        "layers one later": [layer + 1 for layer in own], "layers one earlier": [layer - 1 for layer in own],
        f"layers as {LAYERS} says": list(inputs or own), f"layers as {OUTPUTS} says": outputs or own,
        "EAGLE's own layers": usual,
    }  # fmt: skip
    seen = [] if inputs and outputs and list(inputs) != outputs else [own]
    for name, layers in told.items():
        if layers not in seen and 0 <= min(layers) and max(layers) < target.num_layers:
            fault = f"it was trained on the inputs of layers {layers}, not of {own}: write {LAYERS}={layers}"
            yield Counterfactual(name, fault, {LAYERS: layers})
            seen.append(layers)


def _of_rope(found: Mapping, target: Target) -> Iterator[Counterfactual]:
    """RoPE's base as old code and as the target have it, and heads whose halves stand by turns."""
    own, heads = found.get("rope", {}).get("rope_theta"), found.get("head_dim")
    for whose, base in (("of old code", 10_000.0), ("of the target", rope_parameters(target.config)["rope_theta"])):
        if base != own:
            said = "what its config says" if own is None else f"{own:,.0f}"
            fault = f"its RoPE was trained with the base {base:,.0f}, not with {said}: write rope_theta={base:.0f}"
            yield Counterfactual(f"RoPE base {base:,.0f} ({whose})", fault, {"rope_theta": base})
            own = base if own is None else own
    if found:
        size = heads or found["hidden_size"] // found["num_attention_heads"]
        fault = "its RoPE turns neighbouring channels, as Meta's Llama does: reorder the rows of q_proj and k_proj"
        yield Counterfactual("RoPE over neighbouring channels", fault, change=_of_maps("qk", lambda w: halves(w, size)))


def _of_norms(found: Mapping) -> Iterator[Counterfactual]:
    """Norms of the fused states, of the state fed back, and which of embedding and state is which."""
    if found.get("fc_norm"):
        fault = "it was trained on fused states as they are: write fc_norm=false and leave its norms out"
        yield Counterfactual("fused states as they are", fault, {"fc_norm": False}, without("fc_norm"))
    else:
        fault = "it was trained on normed states (EAGLE-3.1): write fc_norm=true, with fc_norm.{0,1,2}.weight"
        yield Counterfactual("fused states normed", fault, {"fc_norm": True}, with_norms)
    after = not found.get("norm_output")
    where = "after" if after else "before"
    fault = f"it was trained on states fed back {where} the final norm: write norm_output={str(after).lower()}"
    yield Counterfactual(f"state fed back {where} the final norm", fault, {"norm_output": after})
    fault = "norms of embedding and state are exchanged: input_layernorm is the embedding's, hidden_norm the state's"
    yield Counterfactual("norms of embedding and state exchanged", fault, change=exchanged)
    fault = "its attention reads [state; embedding], not [embedding; state]: exchange the halves of q, k and v_proj"
    turned = _of_maps("qkv", lambda weight: weight.roll(weight.shape[1] // 2, 1))
    yield Counterfactual("state before embedding", fault, change=turned)


def _of_vocabulary(tensors: Tensors, vocab_size: int) -> Iterator[Counterfactual]:
    """``d2t`` as absolute ids, one to either side, or what ``t2d`` says."""
    places = torch.arange(len(tensors["d2t"]))
    fault = "its d2t holds target ids: offsets are d2t - arange(len(d2t))"
    yield Counterfactual("d2t read as ids", fault, change=lambda own: {**own, "d2t": own["d2t"] - places})
    if "t2d" in tensors:
        fault = "its d2t is damaged, t2d is not: leave d2t out, or make it anew of t2d"
        yield Counterfactual("tokens that t2d marks", fault, change=without("d2t"))
    for shift, where in ((1, "later"), (-1, "earlier")):
        fault = f"its vocabulary map is off by one: each draft token is the target's one id {where}"
        moved = lambda own, shift=shift: {"d2t": (own["d2t"] + places + shift) % vocab_size - places}
        yield Counterfactual(
            f"d2t one {where}", fault, change=lambda own, moved=moved: without("t2d")(own) | moved(own)
        )


def without(start: str) -> Callable[[Tensors], Tensors]:
    """The tensors but for those whose names start so."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def with_norms(tensors: Tensors) -> Tensors:
    """Norms of the fused states: its own, or without gains."""
    gain, width = torch.ones(len(tensors["fc.weight"])), tensors["fc.weight"].shape[1]
    return {f"fc_norm.{index}.weight": gain for index in range(width // len(gain))} | tensors


def exchanged(tensors: Tensors) -> Tensors:
    """Norms of embedding and state, each in the other's place."""
    one, other = NORMS
    return {**tensors, one: tensors[other], other: tensors[one]}


def halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head [c_0, c_1, c_2, …] -> [c_0, c_2, …, c_1, c_3, …]: neighbours become partners of halves."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _of_maps(letters: str, turn: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """A change of some projections of the first layer's attention."""
    names = [ATTENTION.format(letter) for letter in letters]
    return lambda tensors: {**tensors, **{name: turn(tensors[name]) for name in names}}
