"""Texts in rows: the same as one by one, whatever the rows did before; top-p without sorting is top-p."""

import numpy as np
import pytest
import torch
from greedy import prompt
from static_shapes import nothing_waits

from kvshot_lib.errors import StudyError
from kvshot_lib.target.load import load_target
from kvshot_lib.text import generate, rows
from kvshot_lib.text.generate import GeneratorSettings
from kvshot_lib.text.rows import Writer, least_probability, mass_from, rows_at_once, sampled, write_rows

PROMPTS = [np.array(prompt(seed, 3 + 5 * seed % 11), dtype=np.int32) for seed in range(9)]
LENGTH, NEW, STOPS = 28, 20, tuple(range(2, 512, 14))
KNOWN: dict = {}


def on(device: str, name: str = "tiny"):
    return KNOWN.setdefault((device, name), load_target(name, device=device, dtype="float32"))


@torch.inference_mode()
def written(target, prompts=PROMPTS, count=4, **rules):
    found = dict(write_rows(target, prompts, STOPS, LENGTH, NEW, rows=count, **rules))
    return [found[number].tolist() for number in range(len(prompts))]


@torch.inference_mode()
def one_by_one(target) -> list[list[int]]:
    """The most likely next token of a plain forward, again and again."""
    found = []
    for given in PROMPTS:
        text = given.tolist()
        while len(text) < min(len(given) + NEW, LENGTH) and (len(text) == len(given) or text[-1] not in STOPS):
            text.append(int(target.model(torch.tensor([text], device=target.device)).logits[0, -1].argmax()))
        found.append(text[len(given) :])
    return found


@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_greedy_texts_are_the_argmax_whatever_the_rows(name, device):
    """With fewer rows than texts they are refilled, and their columns written over."""
    wanted = one_by_one(on(device, name))
    ended = [text[-1] in STOPS for text in wanted]
    assert any(ended) and not all(ended) and len({*map(len, wanted)}) > 3
    for count in (1, 4, 32):
        assert written(on(device, name), count=count) == wanted


def test_draws_follow_the_seed_and_nothing_that_was_written_before(device):
    drawn = {"temperature": 1.0, "top_p": 0.9}

    def again(seed, prompts=PROMPTS):
        torch.manual_seed(seed)
        return written(on(device), prompts, **drawn)

    first = again(1)
    again(2, PROMPTS[:2])
    assert again(1) == first != again(2)


def test_the_generator_writes_the_same_greedy_answers_with_either(device, monkeypatch):
    target, settings = on(device), GeneratorSettings(max_length_tokens=40, max_user_tokens=8, batch_size=4)
    found = []
    for devices in ((), ("cpu", "cuda")):
        monkeypatch.setattr(generate, "STATIC", devices)
        found.append(generate.write_answers(target, PROMPTS, settings, greedy=True))
    growing, fixed = ([document.tokens.tolist() for document in documents] for documents in found)
    assert fixed == growing and len(fixed) > 5


def test_a_prompt_without_room_behind_it_is_refused():
    for new, length in ((4, 3), (0, 9)):
        with pytest.raises(StudyError, match="no room for"):
            next(write_rows(on("cpu"), [np.arange(3)], (), length, new, rows=1))


def test_a_killed_run_in_rows_goes_on_and_makes_the_same_corpus(device, tmp_path, monkeypatch):
    target, settings = on(device), GeneratorSettings(max_length_tokens=40, max_user_tokens=8, batch_size=6)
    monkeypatch.setattr(generate, "STATIC", ("cpu", "cuda"))
    monkeypatch.setattr(generate, "write_prompts", lambda *_: PROMPTS[: int(torch.randint(3, 7, ()))])
    batch = lambda number: generate.generate_batch(target, "train", number, settings)
    told = lambda documents: [document.tokens.tolist() for document in documents]
    whole = [told(batch(number)) for number in range(3)]
    rows.writer_of.cache_clear()
    assert told(batch(2)) == whole[2] and told(batch(1)) == whole[1] != whole[2]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.95, 0.999])
def test_the_least_probability_is_that_of_sorting(top_p, device):
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 4.0, 12.0):
        p = (spread * torch.randn(50, 700, generator=generator)).softmax(-1).to(device)
        ranked, order = p.double().sort(descending=True)
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, ranked.cumsum(-1) - ranked < top_p)
        for mass in (mass_from, *([torch.compile(mass_from, dynamic=False)] if device == "cuda" else [])):
            least = least_probability(p, top_p, mass)
            assert torch.equal(p >= least[:, None], kept)
            assert torch.equal(least, p.masked_fill(~kept, 2.0).amin(-1))


def test_equals_at_the_border_are_kept_together_and_a_sure_token_alone(device):
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.0, 1.0, 0.0, 0.0]], device=device)
    assert (p >= least_probability(p, 0.5)[:, None]).tolist() == [[True] * 4, [False, True, False, False]]
    assert least_probability(p, 0.4).tolist() == pytest.approx([0.4, 1.0])


def test_draws_have_the_distribution(device):
    """p = .5, .3, .15, .05 at temperature 2, top-p .9: the last is cut, the others are as their roots."""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], device=device).log().expand(20_000, -1)
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    counts = sampled(logits, noise, 2.0, 0.85).bincount(minlength=4).cpu() / 20_000
    roots = torch.tensor([0.5, 0.3, 0.15, 0.0]).sqrt()
    assert counts[3] == 0 and torch.allclose(counts, roots / roots.sum(), atol=4 * (0.25 / 20_000) ** 0.5)


@torch.inference_mode()
def test_nothing_in_a_step_waits_for_the_device():
    writer = Writer(on("cpu"), 4, LENGTH, 1.0, 0.9, STOPS)
    writer.begin({0: PROMPTS[0]}, NEW)
    writer.forward()
    with nothing_waits():
        writer.forward()


def test_rows_are_as_many_as_texts_or_as_fit():
    assert rows_at_once(on("cpu"), 512, 7) == 7 and rows_at_once(on("cpu"), 512, 5000) == rows.ROWS
