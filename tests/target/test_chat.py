"""Prompts are what the tokenizer's own template gives, for every kind of tokenizer, and a turn's text can't imitate it."""

from functools import cache

import examples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvshot_lib.errors import StudyError
from kvshot_lib.target.chat import (
    CHAT_TEMPLATE,
    DATE,
    chat_headers,
    dialogue_ids,
    end_of_turn,
    next_turn_ids,
    turn_ids,
)
from kvshot_lib.target.load import load_target

START, END, NEWLINE, USER, ASSISTANT = 1, 2, 3, 5, 6

# How templates of docs/targets.md write a dialogue, by what their turns end with.
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama3": (
        "<s>{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
    ),
    "gemma": (
        "<s>{% for m in messages %}<|start|>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ m['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
    ),
    "mistral": (  # its markers are words to most of its tokenizers
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    ),
    "olmo2": (
        "<s>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>\n"
        "{% else %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "vicuna": (
        "A chat. {% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}"
        "ASSISTANT: {{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}  # fmt: skip
KINDS = ("bytes", "metaspace", "metaspace_first", "prepended")
TEXTS = ("Hi", " Two words ", "a\n\nb", "7. [x] USER: 12", "naïve ünï 東京", "don't", "ends \n")


@cache
def core(kind: str) -> str:
    """A small tokenizer of each kind that models come with, trained on a few words, as JSON."""
    text = [
        *TEXTS,
        "USER: ASSISTANT: [INST] [/INST] A chat. system user assistant model Yes. No, why? abc xyz 0123456789 (so) ¿Qué?",
    ] * 3
    options = {"show_progress": False, "special_tokens": ["<unk>"]}
    if kind == "bytes":
        made, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **options))
    elif kind == "prepended":  # as Llama-2's
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, **options))
    else:
        made = Tokenizer(models.Unigram())
        scheme = "first" if kind == "metaspace_first" else "always"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.train_from_iterator(text, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options))
    made.add_special_tokens([AddedToken(t, special=True) for t in MARKERS])
    return made.to_str()


MARKERS = ("<s>", "<|end|>", "<|start|>", "<|stop|>", "<|im_start|>", "<|im_end|>")


@cache
def built(kind: str, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core(kind)), unk_token="<unk>", bos_token="<s>", eos_token="<|end|>",
        chat_template=TEMPLATES.get(template, template), name_or_path=f"some/{kind}",
    )  # fmt: skip


def by_template(tokenizer, turns) -> list[int]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.fixture
def tokenizer():
    return load_target("tiny", device="cpu", dtype="float32").tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_are_what_the_template_gives_for_every_kind_of_tokenizer(kind, template):
    tokenizer = built(kind, template)
    for turn in TEXTS:
        assert dialogue_ids(tokenizer, [turn]).tolist() == by_template(tokenizer, [turn])
    dialogue = ["Hi", "Yes.", "No, why?", "a\n\nb", "abc xyz"]
    assert dialogue_ids(tokenizer, dialogue).tolist() == by_template(tokenizer, dialogue)
    # what follows on an answer's ids is what the template writes behind it
    last, whole = next_turn_ids(tokenizer, "No, why?").tolist(), by_template(tokenizer, ["Hi", "Yes.", "No, why?"])
    assert whole[-len(last) :] == last and last[0] == end_of_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == (
        "<|im_end|>" if template == "chatml" else "<|end|>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_headers_are_what_all_prompts_begin_and_end_with(kind, template):
    tokenizer = built(kind, template)
    header, assistant_header = (ids.tolist() for ids in chat_headers(tokenizer))
    for turn in ("Hi", "Two words", "12 (x)", "東京"):
        ids = by_template(tokenizer, [turn])
        assert ids[: len(header)] == header and ids[len(ids) - len(assistant_header) :] == assistant_header
        body = tokenizer.convert_ids_to_tokens(ids[len(header) : len(ids) - len(assistant_header)])
        assert kind == "bytes" or "<unk>" in body or "".join(body).replace("▁", "") == turn.replace(" ", "")


@given(
    st.sampled_from(KINDS), st.sampled_from([*TEMPLATES]),
    st.lists(st.sampled_from([*MARKERS, "Hi", " ", "\n", "[INST]", "a", "7"]), min_size=1, max_size=6).map("".join),
)  # fmt: skip
def test_a_marker_in_a_turn_stays_text_or_is_refused_by_name(kind, template, turn):
    if not turn.strip():
        return
    tokenizer = built(kind, template)
    special = {*tokenizer.convert_tokens_to_ids([*MARKERS])}
    usual = [token for token in dialogue_ids(tokenizer, ["Hi"]).tolist() if token in special]
    try:
        ids = dialogue_ids(tokenizer, [turn]).tolist()
    except StudyError as error:
        assert kind == "metaspace_first" and "can't keep the marker '<" in str(error) and "some/" in str(error)
        return
    assert [token for token in ids if token in special] == usual


def test_headers_come_from_the_chat_template(tokenizer):
    user_header, assistant_header = chat_headers(tokenizer)
    assert user_header.tolist() == [START, USER, NEWLINE]
    assert assistant_header.tolist() == [END, NEWLINE, START, ASSISTANT, NEWLINE]
    follow = next_turn_ids(tokenizer, "w7").tolist()
    assert follow == [END, NEWLINE, START, USER, NEWLINE, 7, END, NEWLINE, START, ASSISTANT, NEWLINE]
    assert end_of_turn(tokenizer) == END and turn_ids(tokenizer, "w10 w11").tolist() == [10, 11]


def test_thinking_is_off_unless_asked_for(tokenizer):
    tokenizer.chat_template += "{% if not enable_thinking %}w9{% endif %}"  # Qwen3's closes an empty thought
    assert chat_headers(tokenizer)[1].tolist()[-1] == dialogue_ids(tokenizer, ["w7"]).tolist()[-1] == 9
    assert chat_headers(tokenizer, thinking=True)[1].tolist()[-1] != 9


def test_prompts_do_not_change_from_day_to_day(tokenizer):
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer.chat_template = f"{llama}{{{{ date_string.replace('{DATE}', 'w9') + '\n' }}}}{CHAT_TEMPLATE}"
    assert chat_headers(tokenizer)[0].tolist() == [9, NEWLINE, START, USER, NEWLINE]


ONCE = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template to write dialogues with; .*text_prefix_tokens=32.* or put .* chat_template.jinja"),
        (f"<s>{ONCE}<|end|>{ONCE}", "writes a turn's text 2 times, not once"),
        ("<s>Hello", "writes a turn's text 0 times, not once"),
        ("{{ raise_exception('only in pairs') }}", r"can't write a dialogue of user and assistant \(only in pairs\)"),
        ("{{ messages[0]['content'] | nothing }}", "can't write a dialogue of user and assistant .*nothing"),
        (f"<s>{ONCE.replace(' }}', '.lower() }}')}", "writes a turn's text 0 times"),
        (f"<s>{ONCE.replace(' }}', '[:9] }}')}", "rewrites the turn 'A text that is longer"),
    ],
)  # fmt: skip
def test_templates_that_write_no_dialogue_are_refused_by_name_in_one_line(template, message):
    tokenizer = built("bytes", template)
    with pytest.raises(StudyError, match=f"tokenizer some/bytes.*{message}|some/bytes {message}") as error:
        dialogue_ids(tokenizer, ["A text that is longer than nine letters."])
    assert "\n" not in str(error.value)


def test_a_template_without_assistant_header_or_end_of_turn_is_refused():
    bare = built("bytes", CHAT_TEMPLATE.split("{% if add")[0])
    with pytest.raises(StudyError, match="some/bytes leaves out .*im_start.*assistant.* where an answer is to begin"):
        chat_headers(bare)
    words = built("bytes", TEMPLATES["vicuna"].replace("<|end|>", "\n### "))
    assert dialogue_ids(words, ["Hi"]).tolist() == by_template(words, ["Hi"]) and end_of_turn(words) is None
    with pytest.raises(StudyError, match="ends an answer with .*### USER.*dialogues of one turn"):
        next_turn_ids(words, "Hi")


@pytest.mark.needs_target
def test_a_chat_marker_in_a_turn_stays_text():
    target = examples.default_target()
    ids = dialogue_ids(target.tokenizer, ["What is <|im_end|> this?"])
    assert (ids == target.eos_token_id).sum() == (dialogue_ids(target.tokenizer, ["So?"]) == target.eos_token_id).sum()
    assert "What is <|im_end|> this?" in target.tokenizer.decode(ids)
