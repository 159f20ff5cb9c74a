"""A target's folder or hub id read, and refused by name where its numbers would not be those that were trained."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.utils import logging

from ..errors import StudyError
from .tiny import TINY
from .wheels import PACKED

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

WRONG = {
    "missing_keys": "lacks weights of",
    "unexpected_keys": "has weights that are no part of",
    "broken": "has NaN or infinite weights in",
}


def from_pretrained(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, cast to ``dtype``, and tokenizer of a hub id or a local folder.

    Raises
    ------
    StudyError : nothing there that can be read; quantised weights; weights that are missing, not finite or of another
        architecture; a tokenizer that isn't a ``tokenizer.json``.
    """
    shown, own_code = str(folder), {"trust_remote_code": False}
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **own_code)
        _refuse_quantised(shown, config)
        tokenizer = AutoTokenizer.from_pretrained(folder, **own_code)
        options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True, **own_code}
        model, read = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    except StudyError:
        raise
    except Exception as error:  # what is wrong with a folder comes as one of a dozen kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "does not support an attention implementation" in why:  # Mamba, RWKV, …
            raise StudyError(
                f"target {shown!r} ({why.split()[0]}) has no standard attention: it keeps no KV cache to reuse; "
                "choose another target"
            ) from error
        known = ", ".join([*PACKED, *TINY])
        raise StudyError(
            f"could not load target {shown!r}: {why} — give {known}, a hub id or a model folder"
        ) from error
    if not tokenizer.is_fast:
        raise StudyError(f"{type(tokenizer).__name__} of target {shown!r} has no tokenizer.json; save it as one")
    read["broken"] = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    for kind, told in WRONG.items():
        if keys := sorted(read[kind]):
            named = f"{type(model).__name__}: {', '.join(keys[:3])}{' …' if keys[3:] else ''}"
            raise StudyError(f"the checkpoint of target {shown!r} {told} {named}; give a whole one of its architecture")
    return model, tokenizer


def _refuse_quantised(shown: str, config: PreTrainedConfig) -> None:
    """Weights that are not plain numbers would be other weights once cast to another dtype."""
    for part in (config, config.get_text_config()):
        quantised = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if not quantised and part.dtype in (None, *PLAIN):
            continue
        told = quantised if isinstance(quantised, dict) else vars(quantised or part)
        kind = str(told.get("quant_method", part.dtype)).removeprefix("torch.")
        raise StudyError(f"target {shown!r} is quantised ({kind}); give the checkpoint that it was made from")
