"""Forwards of fixed shapes give what plain ones give, row by row, wherever each stands; a graph that can't be made is none."""

import pytest
import torch
from greedy import prompt
from torch.nn.functional import scaled_dot_product_attention

from kvshot_lib.target.load import load_target
from kvshot_lib.target.static import EMPTY, PlacedCache, _flex_sdpa, _joint_projections, recorded, static_forward

COLUMNS, LENGTH, DELAYS = 18, 12, (0, 3, 9)


@torch.inference_mode()
def test_joint_maps_give_each_its_own_and_another_input_its_own_product():
    model = load_target("tiny-llama", device="cpu", dtype="float32").model
    attention, x, y = model.model.layers[0].self_attn, *torch.randn(2, 1, 3, model.config.hidden_size)
    maps = attention.q_proj, attention.k_proj, attention.v_proj
    plain = [[own(z) for own in maps] for z in (x, y)]
    with _joint_projections(model):
        assert maps[0](x).data_ptr() == maps[1](x).data_ptr() - 4 * maps[0].out_features  # parts of one product
        torch.testing.assert_close([own(x) for own in maps], plain[0])
        maps[0](x)
        torch.testing.assert_close([own(y) for own in maps[1:]], plain[1][1:])
    assert maps[0].forward.__func__ is torch.nn.Linear.forward


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"])
@torch.inference_mode()
def test_logits_are_those_of_a_plain_forward_wherever_a_row_stands(name, width, device):
    """Three rows start one after the other, the third over columns that the first has used; Gemma's window is 8."""
    target = load_target(name, device=device, dtype="float32")
    texts = [torch.tensor(prompt(seed, LENGTH), device=device) for seed in range(3)]
    plain = [target.model(text[None]).logits[0] for text in texts]
    cache, held = PlacedCache(target, COLUMNS), torch.full((3, COLUMNS), EMPTY, device=device)
    ids, positions = (torch.zeros(3, width, dtype=torch.int64, device=device) for _ in range(2))
    column, seen = torch.zeros((), dtype=torch.int64, device=device), 0
    step = recorded(lambda: static_forward(target, cache, ids, positions, column, held), target.device)
    for start in range(0, LENGTH + max(DELAYS), width):
        columns = slice(first := start % COLUMNS, first + width)
        for row, (text, delay) in enumerate(zip(texts, DELAYS)):
            if start == delay:
                held[row] = EMPTY
            if delay <= start < delay + LENGTH:
                positions[row] = start - delay + torch.arange(width, device=device)
                ids[row], held[row, columns] = text[positions[row]], positions[row]
        column.fill_(first)
        logits = step()
        for row, delay in enumerate(DELAYS):
            if delay <= start < delay + LENGTH:
                wanted = plain[row][start - delay : start - delay + width]
                torch.testing.assert_close(logits[row], wanted, atol=5e-5, rtol=1e-4)
                seen += width
    assert seen == 3 * LENGTH


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_plain_attention_with_the_mask_added_and_repeats(device):
    """As rows are written: three query heads on each KV head, another part of the cache seen in every row."""
    dtype, least = (torch.bfloat16, 0.02) if device == "cuda" else (torch.float32, 1e-5)
    query, key, value = (torch.randn(64, 3, n, 64, device=device, dtype=dtype) for n in (3, 40, 40))
    seen = torch.arange(40, device=device) < torch.randint(1, 41, (64, 1, 1, 1), device=device)
    mask = torch.zeros(64, 1, 3, 40, device=device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    attend = torch.compile(_flex_sdpa, dynamic=False) if device == "cuda" else _flex_sdpa
    found = attend(query, key, value, mask, scale=0.1)
    wanted = scaled_dot_product_attention(query.float(), key.float(), value.float(), mask.float(), scale=0.1)
    torch.testing.assert_close(found.float(), wanted, atol=least, rtol=0)
    assert all(torch.equal(attend(query, key, value, mask, scale=0.1), found) for _ in range(20))


def test_work_that_a_card_refuses_to_record_is_called_each_time(monkeypatch, caplog):
    def refuses(*_):
        raise RuntimeError("out of graphs\nsecond line")

    monkeypatch.setattr(torch.cuda, "device", refuses)
    calls = []
    work = recorded(lambda: calls.append(1) or len(calls), torch.device("cuda"))
    assert (work(), work()) == (1, 2) and "no CUDA graph here (out of graphs)" in caplog.text


@pytest.mark.gpu
def test_a_recorded_graph_reads_what_its_tensors_hold_now():
    number = torch.tensor(3, device="cuda")
    work = recorded(lambda: number * number, number.device)
    number += 1
    assert int(work()) == 16
    number += 1
    assert int(work()) == 25
