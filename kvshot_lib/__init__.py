"""The KVShot study: does reusing a target's KV cache keep a speculative drafter accurate over many draft steps?"""

import importlib
import warnings

# tqdm asks for ipywidgets; the study's bars are text on purpose, since widgets don't survive in saved notebooks.
warnings.filterwarnings("ignore", message="IProgress not found")

# What notebooks use most, by module. Imported when asked for, so that those that only read tables load no torch.
EXPORTS: dict[str, str] = {
    "load_target": "target.load",
    "load_drafter": "drafters.checkpoint",
    "decode": "decoding.decode",
    "Chain": "decoding.propose",
    "Tree": "decoding.propose",
    "encode_turn": "text.prompts",
}


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)
