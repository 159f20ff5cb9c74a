"""What notebook 01 shows of a KV cache: sizes, norms, an attention picture, and what recording it costs."""

import time
from statistics import median

import matplotlib as mpl
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..features.live import LiveFeatures
from ..features.spec import STATE, FeatureSpec
from ..target.capture import Captured, attention_rows, capture
from ..target.load import Target, full_attention_layers
from .style import STYLE


def size_table(target: Target, spec: FeatureSpec, bytes_per_number: int = 2) -> pd.DataFrame:
    """Numbers and bytes that one token leaves behind: the whole cache, and what each kind of drafter reads."""
    layers, groups, size = target.num_layers, spec.num_kv_heads, spec.head_dim
    reused, fused = len(spec.kv_layers), len(spec.hidden_layers)
    rows = [
        ("whole KV cache", f"2 × {layers} layers × {groups} heads × {size}", 2 * layers * groups * size),
        ("KV of the reused layers", f"2 × {reused} layers × {groups} heads × {size}", 2 * reused * groups * size),
        ("fused hidden states", f"{fused} layers × {spec.hidden_size}", fused * spec.hidden_size),
        ("final hidden state", f"{spec.hidden_size}", spec.hidden_size),
    ]
    table = pd.DataFrame(rows, columns=["state of one token", "shape", "numbers"])
    return table.assign(bytes=table["numbers"] * bytes_per_number)


def norm_table(taken: Captured) -> pd.DataFrame:
    """Mean Euclidean norm of keys and values over the tokens of the captured forward, per layer and KV head."""
    rows = []
    for kind, by_layer in (("keys", taken.keys), ("values", taken.values)):
        for layer, tensor in sorted(by_layer.items()):
            norms = tensor.float().norm(dim=-1).mean(dim=(0, 2))  # [B, G, n, D] -> [G]
            rows += [
                {"kind": kind, "layer": layer, "head": head, "mean_norm": norm}
                for head, norm in enumerate(norms.tolist())
            ]
    return pd.DataFrame(rows)


@mpl.rc_context(STYLE)
def draw_norms(table: pd.DataFrame) -> Figure:
    """Mean norms as two maps, layer by KV head; ``table`` is :func:`norm_table`."""
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("keys", "values"), strict=True):
        grid = table[table["kind"] == kind].pivot(index="head", columns="layer", values="mean_norm")
        sns.heatmap(grid, ax=axes, cmap="viridis", cbar_kws={"label": "mean norm"}, xticklabels=3, vmin=0)
        axes.set(title=f"Mean norm of {kind}", xlabel="target layer", ylabel="KV head")
    return figure


def attention_table(taken: Captured, layers: list[int], tokens: int = 96) -> pd.DataFrame:
    """Attention weights among the first ``tokens`` of the first captured sequence, averaged over heads.

    Columns layer, query, key and weight; one row for each query and each key up to it.
    """
    rows = []
    for layer in layers:
        queries, keys = taken.queries[layer][:1, :, :tokens], taken.keys[layer][:1, :, :tokens]
        rows_wanted = torch.arange(queries.shape[2], device=queries.device)
        weights = attention_rows(queries, keys, rows_wanted).mean(1)[0].cpu()
        query, key = torch.tril_indices(*weights.shape)
        rows.append(pd.DataFrame({"layer": layer, "query": query, "key": key, "weight": weights[query, key]}))
    return pd.concat(rows, ignore_index=True)


def sinks(table: pd.DataFrame, distance: int = 16) -> pd.DataFrame:
    """The position that later queries (by ``distance`` or more) look at most, per layer: layer, key, mean_weight.

    ``table`` is :func:`attention_table`; positions with fewer than ``distance`` such queries don't count.
    """
    later = table[table["query"] - table["key"] >= distance]
    by_key = later.groupby(["layer", "key"])["weight"].agg(["mean", "size"])
    means = by_key[by_key["size"] >= distance]["mean"].rename("mean_weight").reset_index()
    return means.loc[means.groupby("layer")["mean_weight"].idxmax()].reset_index(drop=True)


@mpl.rc_context(STYLE)
def draw_attention(table: pd.DataFrame, answer_start: int) -> Figure:
    """One triangle a layer: how much the token in row t looks at the token in column s, on a logarithmic scale."""
    layers = sorted(table["layer"].unique())
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), sharey=True), layers, strict=True):
        grid = table[table["layer"] == layer].pivot(index="query", columns="key", values="weight")
        picture = axes.imshow(grid, cmap="magma", norm=LogNorm(vmin=1e-3, vmax=1), interpolation="nearest")
        axes.axhline(answer_start - 0.5, color="white", lw=0.8, ls=":")
        axes.axvline(answer_start - 0.5, color="white", lw=0.8, ls=":")
        axes.set(title=f"Layer {layer}", xlabel="attended position s")
    figure.axes[0].set_ylabel("position t of the query")
    figure.colorbar(picture, ax=figure.axes, label="attention weight (mean over heads)", shrink=0.85)
    return figure


@torch.inference_mode()
def extraction_speed(live: LiveFeatures, indices: list[int], repeats: int = 3) -> dict[str, float]:
    """Tokens/s of the bare target forward and of extraction on the same batch, alternating; medians and their ratio.

    The bare forward ends in logits' argmax, as decoding would; extraction also hands out every feature.
    """
    model, tokens = live.target.model, int(sum(live.lengths[i] for i in indices))
    batch = live.batch(indices, ()).tokens

    def bare() -> Tensor:
        return live.argmax(model.get_decoder()(input_ids=batch, use_cache=False)[0])

    times: dict[str, list[float]] = {"bare": [], "extraction": []}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, run in (("bare", bare), ("extraction", lambda: live.batch(indices, STATE))):
            started = time.perf_counter()
            run()
            if live.target.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - started)
    speed = {f"{name}_tokens_per_s": tokens / median(seconds) for name, seconds in times.items()}
    ratio = median(bare_s / with_s for bare_s, with_s in zip(times["bare"], times["extraction"], strict=True))
    return {**speed, "ratio": ratio}


@torch.inference_mode()
def capture_everything(target: Target, tokens: Tensor) -> Captured:
    """Keys, values and queries of every layer for one batch of tokens [B, n]."""
    with capture(target.model, kv=full_attention_layers(target.model), queries=True) as taken:
        target.model.get_decoder()(input_ids=tokens.to(target.device), use_cache=False)
    return taken
