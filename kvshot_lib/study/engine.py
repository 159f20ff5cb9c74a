"""Greedy answers by vLLM, for `serving`: ``python engine.py JOB OUT``, by a Python that has vLLM and not this library.

JOB says (JSON) target and drafter (folders; the drafter may be null), draft_length, dtype, prompts (lists of ids),
new_tokens and stop_ids. OUT gets each answer's tokens, how many times drafts were verified, and accepted drafts by
draft step; or ``error``, if vLLM could not do it.
"""

import json
import os
import sys
from pathlib import Path


def answers(job: dict) -> dict:
    """The job done by vLLM, in this process: its own errors then come from here, and not from another one's log."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    drafted = {"method": "eagle3", "model": job["drafter"], "num_speculative_tokens": job["draft_length"]}
    longest = max(map(len, job["prompts"])) + job["new_tokens"] + job["draft_length"] + 1
    engine = LLM(
        model=job["target"], dtype=job["dtype"], max_model_len=longest, enforce_eager=True, disable_log_stats=False,
        speculative_config=drafted if job["drafter"] else None,
    )  # fmt: skip
    rules = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], stop_token_ids=job["stop_ids"], ignore_eos=True, detokenize=False
    )
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], rules)
    counted = {metric.name: metric for metric in engine.get_metrics() if "spec_decode" in metric.name}
    found = {"tokens": [list(answer.outputs[0].token_ids) for answer in made], "forwards": 0, "accepted": []}
    if job["drafter"]:
        found["forwards"] = counted["vllm:spec_decode_num_drafts"].value
        found["accepted"] = counted["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return found


def main(job: str, out: str) -> None:
    """Read the job, write what came of it."""
    try:
        found = answers(json.loads(Path(job).read_text()))
    except Exception as error:  # noqa: BLE001 - whatever vLLM or a library of its says
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
