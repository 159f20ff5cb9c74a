"""Faults as bug reports tell of them, planted in a good EAGLE-3 checkpoint, and by which change the microscope must name each.

By hand: ``python tests/planted.py GOOD OUT`` examines the good checkpoint (a folder of data/checkpoints) and every damaged
copy on 28 of the study's prompts, and writes the table OUT/planted.csv.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from kvshot_lib import load_drafter, load_target
from kvshot_lib.drafters.eagle3 import CONFIG, HEAD, WEIGHTS, export_eagle3
from kvshot_lib.drafters.eagle3_format import LAYERS
from kvshot_lib.parts import Parts
from kvshot_lib.probes.answers import MAT, SHARE
from kvshot_lib.probes.counterfactuals import ATTENTION, exchanged, halves
from kvshot_lib.probes.examine import AS_IT_IS, Microscope, answers_of, draws_of, parts_of
from kvshot_lib.text.prompts import load_prompts

FAULTS = {}


def fault(*names):
    """The changes that undo it: any of them names it."""

    def add(damage):
        FAULTS[damage.__name__.replace("_", " ")] = names, damage
        return damage

    return add


@fault("RoPE base 100,000 (of the target)")
def rope_base_left_out(tensors, config, target):
    del config["rope_theta"]


@fault("layers one earlier")
def layers_one_later(tensors, config, target):
    moved(config, 1)


@fault("layers one later")
def layers_one_earlier(tensors, config, target):
    moved(config, -1)


@fault("d2t read as ids")
def d2t_holds_ids(tensors, config, target):
    tensors["d2t"] += torch.arange(len(tensors["d2t"]))


@fault("d2t one earlier")
def d2t_one_later(tensors, config, target):
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"] + 1
    ids[-1] = min(int(ids[-1]), len(tensors["t2d"]) - 1)
    tensors["d2t"], tensors["t2d"] = (
        ids - torch.arange(len(ids)),
        torch.zeros_like(tensors["t2d"]).index_fill(0, ids, True),
    )


@fault("tokens that t2d marks")
def d2t_rolled(tensors, config, target):
    tensors["d2t"] = tensors["d2t"].roll(1)


@fault("fused states normed")
def norms_of_states_dropped(tensors, config, target):
    config["fc_norm"] = False
    for index in range(3):
        del tensors[f"fc_norm.{index}.weight"]


@fault("state fed back after the final norm")
def norm_output_left_out(tensors, config, target):
    del config["norm_output"]


@fault("the target's LM head")
def head_of_the_first_tokens(tensors, config, target):
    tensors[HEAD] = target.model.get_output_embeddings().weight[: len(tensors["d2t"])].detach().clone()


@fault("RoPE over neighbouring channels")
def rows_as_meta_orders_them(tensors, config, target):
    for letter in "qk":
        weight, size = tensors[ATTENTION.format(letter)], config["head_dim"]
        order = halves(torch.arange(len(weight))[:, None].float(), size)[:, 0].long()
        back = torch.empty_like(weight)
        back[order] = weight
        tensors[ATTENTION.format(letter)] = back


@fault("state before embedding")
def state_before_embedding(tensors, config, target):
    for letter in "qkv":
        weight = tensors[ATTENTION.format(letter)]
        tensors[ATTENTION.format(letter)] = weight.roll(weight.shape[1] // 2, 1)


@fault("norms of embedding and state exchanged")
def norms_exchanged(tensors, config, target):
    tensors |= exchanged(tensors)


def moved(config, by):
    config[LAYERS] = [layer + by for layer in config[LAYERS]]
    del config["eagle_config"]


def plant(good, folder, name, target):
    """A copy of the checkpoint with this fault."""
    tensors, config = load_file(good / WEIGHTS), json.loads((good / CONFIG).read_text())
    FAULTS[name][1](tensors, config, target)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def main(good, out, count=28, draft_length=4):
    """Only what names a fault is measured: every change on its own, teacher-forced, on the same answers for all copies."""
    target = load_target(device="cpu", dtype="float32")
    folder = export_eagle3(load_drafter(good, target), target, out / "good")
    prompts, rows, source = load_prompts("study")[:count], [], None
    answers = answers_of(target, prompts, 64, parts_of(out / "kept", "answers", ("", target.hash, [*prompts], 64)))
    for name in ("none", *FAULTS):
        own = folder if name == "none" else plant(folder, out / name.replace(" ", "_"), name, target)
        scope = Microscope(
            own, target, {}, draft_length, Parts(out / "kept" / f"{own.name} {count}", f"{draft_length}")
        )
        if source is None:
            scope.layers |= {layer + by for layer in scope.layers for by in (-1, 1)}
            source = scope.source(answers)
        judged, faults = scope.search(source, 1)
        drawn = draws_of(row for name, one in judged.items() for row in one.rows(name))
        best = faults[0].name if faults else AS_IT_IS
        asked = [(reading, metric) for metric in (SHARE, MAT) for reading in (AS_IT_IS, best)]
        values = [drawn.mean(*one).value if one[0] in judged else float("nan") for one in asked]
        gain = [float("nan")] * 3
        if faults and AS_IT_IS in judged:
            gain = [*vars(drawn.contrast((1, best, SHARE), (-1, AS_IT_IS, SHARE))).values()]
        right = best in (FAULTS[name][0] if name in FAULTS else (AS_IT_IS,))
        rows.append([name, best, right, *values, *gain])
        columns = [
            "fault",
            "named",
            "right",
            "share_as_it_is",
            "share_mended",
            "mat_as_it_is",
            "mat_mended",
            "gain",
            "gain_low",
            "gain_high",
        ]
        table = pd.DataFrame(rows, columns=columns)
        table.to_csv(out / "planted.csv", index=False)
        print(table.to_string(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
