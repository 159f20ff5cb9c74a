"""Rows of decoding tables for tests."""

PARTS = {f"{part}_s": 0.0 for part in ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")}


def answer(
    variant="hidden", mode="chain", plan="4", prompt="1", category="coding", tokens=9, forwards=4, seconds=1.0, **more
):
    """One row of decode_prompts."""
    row = {
        "variant": variant, "seed": 0, "mode": mode, "plan": plan, "prompt": prompt, "turn": 0, "category": category,
        "prompt_tokens": 30, "new_tokens": tokens, "same_tokens": tokens, "forwards": forwards, "drafted": 12, "accepted": 4,
        "seconds": seconds, "fastest_s": seconds, "slowest_s": seconds, "repeats": 1, **PARTS, "dtype": "float32", "device": "here",
    }  # fmt: skip
    return row | more


def alone(prompt="1", category="coding", tokens=9, seconds=2.0, **more):
    return answer(
        mode="alone",
        plan="-",
        prompt=prompt,
        category=category,
        tokens=tokens,
        forwards=tokens - 1,
        seconds=seconds,
        **more,
    )


def answers(variants=("hidden", "kv_2", "hybrid_warm", "block_kv_2"), prompts=6) -> list[dict]:
    """Rows of decode_prompts: chains of 2 and 4 and a tree of several drafters on prompts of two categories, and `generate` beside them."""
    rows = []
    for number in range(prompts):
        where = {"prompt": str(number), "category": ("coding", "rag")[number % 2]}
        for place, variant in enumerate(variants):
            rows.append(alone(**where, variant=variant, tokens=41, seconds=1.6, verify_s=1.5, prefill_s=0.1))
            for mode, plan, forwards, cost in (
                ("chain", "2", 24, 0.1),
                ("chain", "4", 20, 0.25),
                ("tree", "8/10/60", 14, 1.0),
            ):
                time = {
                    "verify_s": 0.05 * forwards,
                    "draft_s": cost + 0.1 * place,
                    "project_s": 0.02,
                    "bookkeeping_s": 0.03,
                    "prefill_s": 0.1,
                }
                rows.append(
                    answer(**where, variant=variant, mode=mode, plan=plan, tokens=41, forwards=forwards + number % 3, seconds=sum(time.values()) + 0.02,
                           drafted=4 * forwards, **time)
                )  # fmt: skip
        none = dict.fromkeys(PARTS)
        rows.append(alone(**where, variant="transformers", tokens=41, seconds=1.7) | none)
        rows.append(
            answer(
                **where,
                variant="transformers",
                mode="prompt_lookup",
                plan="10",
                tokens=41,
                forwards=30,
                seconds=1.5,
                drafted=None,
                accepted=None,
            )
            | none
        )
    return rows


def latency_rows() -> list[dict]:
    """Rows of step_latency: verifying 1, 8, 9 and 61 tokens, steps of `hidden` and `hybrid`, a block of 7, and their prefix entries."""
    costs = {("verify", 1): 10.0, ("verify", 8): 11.0, ("verify", 9): 12.0, ("verify", 61): 20.0}
    costs |= {
        ("draft hidden", 1): 1.0,
        ("draft hidden", 10): 2.0,
        ("draft hybrid", 1): 1.2,
        ("draft hybrid", 10): 2.4,
        ("block block_kv_2", 7): 3.0,
    }
    costs |= {(f"project {variant}", 3): 0.5 for variant in ("hidden", "hybrid", "block_kv_2")}
    return [
        {"what": what, "tokens": tokens, "prefix_tokens": 0 if what.startswith("project") else 512, "milliseconds": cost, "fastest_ms": cost,
         "slowest_ms": cost, "replays": 1, "method": "eager", "dtype": "float32", "device": "here", "architecture": "tiny"}
        for (what, tokens), cost in costs.items()
    ]  # fmt: skip
