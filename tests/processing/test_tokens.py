"""Token ids against training's: sentencepiece chunk by chunk, and the released code's own rows where its tokenizer is.

Training tokenises every chunk of text between images on its own with the slow Llama tokenizer. `slow_ids` below spells
that out with sentencepiece alone; nothing of the package takes part in it.
"""

import re

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from sentencepiece import sentencepiece_model_pb2

from delta_llava.errors import UserError
from modeling_delta_llava.building import backbone_chat_template, load_tokenizer, read_chat_template
from modeling_delta_llava.tokenization import sentencepiece_tokenizer
from tests.golden import IMAGE, check_text_rows, needs_reference
from tests.tiny import IMAGE_TOKEN_ID, picture, tiny_config, tiny_processor
from tests.training_layout import TrainingLayout, sentencepiece_model, write_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ORACLE = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


def without_dummy_prefix() -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


NO_PREFIX = without_dummy_prefix()


def slow_chunk(chunk: str, legacy: bool) -> list[int]:
    """One text through the slow Llama tokenizer: special tokens cut out, the rest through sentencepiece."""
    ids = []
    for position, piece in enumerate(re.split("(</s>)", chunk)):
        if piece == "</s>":
            ids.append(2)
        elif piece:
            with_prefix = legacy or position == 0
            ids += (ORACLE if with_prefix else NO_PREFIX).encode(piece)
    return ids


def slow_ids(prompt: str, legacy: bool) -> list[int]:
    """Training's ids of a prompt: BOS, then chunk by chunk, with `IMAGE` between chunks."""
    ids = [1]
    for position, chunk in enumerate(prompt.split("<image>")):
        ids += ([IMAGE] if position else []) + slow_chunk(chunk, legacy)
    return ids


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def tokenizers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return request.param, tiny_processor(folder, tiny_config(), legacy=request.param)


def single_pass(tokenizer, text: str, **kwargs) -> list[int]:
    return [IMAGE if index == IMAGE_TOKEN_ID else index for index in tokenizer(text, **kwargs)["input_ids"]]


TEXTS = [
    f"{SYSTEM} USER: <image>\nWhat is weird here? ASSISTANT:",
    f"{SYSTEM} USER: <image> ASSISTANT: A cat.</s>USER: <image> ASSISTANT:",
    f"{SYSTEM} USER: <image><image>\nCompare. ASSISTANT: Same.</s>USER: Sure? ASSISTANT:",
    f"{SYSTEM} USER: <image>\n  two  spaces\n\n\nand lines   ASSISTANT:",
    "<image>",
    "<image><image><image>",
    "<image> leading space",
    "<image>   three spaces",
    "<image>no space",
    "text<image>",
    "<image>\n",
    "                a run of sixteen spaces",
    "A     run of     five",
    "tabs\tand\r\nreturns",
    "ünïcödé — 日本語 🐈‍⬛",
    "<image>🐈",
]


@pytest.mark.parametrize("text", TEXTS)
def test_one_pass_equals_training(text, tokenizers):
    legacy, processor = tokenizers
    expected = slow_ids(text, legacy)
    assert single_pass(processor.tokenizer, "<s>" + text, add_special_tokens=False) == expected
    if "<image>" not in text:
        assert processor(text="<s>" + text)["input_ids"] == [expected]
    assert single_pass(processor.tokenizer, text) == expected


PIECES = [
    "<image>",
    "<image>",
    "\n",
    " ",
    "  ",
    "USER:",
    " ASSISTANT:",
    "</s>",
    "a cat",
    "é",
    "日本",
    "🐈",
    "1 2",
    "\t",
    "▁",
]


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=12))
def test_any_prompt_equals_training(pieces, tokenizers):
    legacy, processor = tokenizers
    prompt = "".join(pieces)
    if re.search(r"<(s|unk)>", prompt) or "\0" in prompt:
        return  # written-out control tokens are not text
    assert single_pass(processor.tokenizer, "<s>" + prompt, add_special_tokens=False) == slow_ids(prompt, legacy)
    assert single_pass(processor.tokenizer, prompt) == slow_ids(prompt, legacy)


def conversation(*turns: tuple[str, str, int]) -> list[dict]:
    messages = []
    for role, text, images in turns:
        parts = [{"type": "text", "text": text}] + [{"type": "image", "image": picture()}] * images
        messages.append({"role": role, "content": parts if role == "user" else text})
    return messages


CONVERSATIONS = {
    "one image": (conversation(("user", "What is it?", 1)), f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"),
    "image only": (conversation(("user", "", 1)), f"{SYSTEM} USER: <image> ASSISTANT:"),
    "two images": (conversation(("user", " Compare. ", 2)), f"{SYSTEM} USER: <image><image>\nCompare. ASSISTANT:"),
    "text only": (conversation(("user", " Hi ", 0)), f"{SYSTEM} USER:  Hi  ASSISTANT:"),
    "two turns": (
        conversation(("user", "Look.", 1), ("assistant", "A cat.", 0), ("user", "And?", 1)),
        f"{SYSTEM} USER: <image>\nLook. ASSISTANT: A cat.</s>USER: <image>\nAnd? ASSISTANT:",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_way_to_tokenise_a_conversation_gives_trainings_ids(name, tokenizers):
    legacy, processor = tokenizers
    messages, prompt = CONVERSATIONS[name]
    expected = []
    for index in slow_ids(prompt, legacy):
        expected += [IMAGE_TOKEN_ID] * processor.num_visual_tokens if index == IMAGE else [index]
    images = [
        part["image"]
        for message in messages
        for part in message["content"]
        if isinstance(part, dict) and "image" in part
    ]

    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<s>" + prompt
    direct = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert direct["input_ids"] == [expected]
    two_steps = processor(text=rendered, images=images or None)
    assert two_steps["input_ids"] == [expected]
    # As a server does it: it renders, puts in the replacement text itself, and tokenises without special tokens.
    served = rendered.replace("<image>", processor.replace_image_token({}, 0))
    assert processor.tokenizer(served, add_special_tokens=False)["input_ids"] == expected


def test_prompts_with_and_without_bos_mix(processor):
    bos = processor.tokenizer.bos_token_id
    ids = processor(text=["<s> one", " one", "one", "<s>one"])["input_ids"]
    assert ids[0] == ids[1] == [bos, *ORACLE.encode(" one")]
    assert ids[2] == ids[3] == [bos, *ORACLE.encode("one")]
    assert processor(text="<s>one", add_special_tokens=False)["input_ids"] == ids[2:3]
    assert processor(text="<s>one", text_kwargs={"add_special_tokens": False})["input_ids"] == ids[2:3]


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "chatml", "flatten_images"])
@pytest.mark.parametrize("kind", ["input_image", "audio", "picture"])
def test_parts_that_cannot_be_shown_are_an_error_and_never_dropped(kind, template, processor):
    messages = [{"role": "user", "content": [{"type": kind, "url": "/nowhere"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(Exception, match=f"A part of type {kind} cannot be shown here"):
        processor.apply_chat_template(messages, chat_template=read_chat_template(template))


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "chatml", "flatten_images"])
def test_only_users_show_images(template, processor):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "image"}]}]
    with pytest.raises(Exception, match="A part of type image cannot be shown here"):
        processor.apply_chat_template(messages, chat_template=read_chat_template(template))


USER, PICTURE = {"role": "user"}, {"type": "image", "image": picture()}
WORDS = [PICTURE, {"type": "text", "text": "What does <image> mean?"}]
UNUSABLE = {
    "no message": ([], "conversation is empty"),
    "no message in a batch": ([[USER | {"content": "Hi"}], []], "conversation is empty"),
    "one empty row": ([[]], "conversation is empty"),
    "no content": ([USER], r"Message 1 \(from user\) has no content"),
    "no text": ([USER | {"content": [PICTURE, {"type": "text", "text": None}]}], "Message 1 .* without text"),
    "a placeholder in a part": ([USER | {"content": WORDS}], r"Message 1 \(from user\) has <image> in its text"),
    "a placeholder in a part, no image": ([USER | {"content": WORDS[1:]}], "Message 1 .* has <image> in its text"),
    "a placeholder in an answer": (
        [USER | {"content": [PICTURE]}, {"role": "assistant", "content": "Write <image>."}],
        r"Message 2 \(from assistant\) has <image> in its text",
    ),
    "a placeholder in a string, beside an image": (
        [USER | {"content": [PICTURE]}, {"role": "assistant", "content": "A."}, USER | {"content": "<image>?"}],
        "Message 3 .* has <image> in its text",
    ),
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("name", UNUSABLE)
def test_conversations_that_cannot_be_shown(name, tokenize, processor):
    messages, message = UNUSABLE[name]
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="sanitize_control_tokens is of 5.23")
def test_sanitised_words_may_hold_the_placeholder(processor):
    output = processor.apply_chat_template(
        [USER | {"content": WORDS}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert output["input_ids"][0].count(processor.image_token_id) == 4
    assert "What does <image> mean?" in processor.tokenizer.decode(output["input_ids"][0])


TOOLS = [{"type": "function", "function": {"name": "look_closer", "description": "", "parameters": {}}}]


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "chatml"])
def test_tools_are_refused_by_formats_that_have_none(template, processor):
    template, question = read_chat_template(template), USER | {"content": "Hi"}
    with pytest.raises(Exception, match="without tools"):
        processor.apply_chat_template([question], template, tools=TOOLS)
    answer = {"role": "assistant", "content": "", "tool_calls": TOOLS}
    with pytest.raises(Exception, match="without tools"):
        processor.apply_chat_template([question, answer], template)


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_marks_survive_truncation(side, tmp_path):
    processor = tiny_processor(tmp_path, tiny_config())
    processor.tokenizer.truncation_side = side
    messages = conversation(("user", "What is it?", 1), ("assistant", "A cat.", 0), ("user", "Sure?", 0))
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    whole = processor.apply_chat_template(messages, **settings, processor_kwargs={"return_tensors": "np"})
    length = whole["input_ids"].shape[1] - 3
    cut = processor.apply_chat_template(
        messages,
        **settings,
        processor_kwargs={"truncation": True, "max_length": length, "return_tensors": "np"},
    )
    kept = len(cut["input_ids"][0])
    part = slice(0, kept) if side == "right" else slice(-kept, None)
    assert cut["input_ids"][0].tolist() == whole["input_ids"][0][part].tolist()
    assert list(cut["assistant_masks"][0]) == list(whole["assistant_masks"][0][part])
    assert sum(cut["assistant_masks"][0]) > 0


def test_a_template_without_bos_keeps_its_marks(processor):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    output = processor.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A cat."}],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = output["input_ids"][0], output["assistant_masks"][0]
    assert ids[0] == 1
    assert processor.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "A cat."


def test_labels_cover_what_the_assistant_says(tokenizers):
    _legacy, processor = tokenizers
    messages = conversation(
        ("user", "What?", 1), ("assistant", "A cat.", 0), ("user", "Sure?", 0), ("assistant", "Yes", 0)
    )
    output = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [i for i, m in zip(output["input_ids"][0], output["assistant_masks"][0], strict=True) if m]
    expected = [*ORACLE.encode("A cat."), 2, *ORACLE.encode("Yes"), 2]
    assert learned == expected


def test_string_content_with_placeholders_is_the_same_conversation(tokenizers):
    _, processor = tokenizers
    parts = processor.apply_chat_template(conversation(("user", "Look at  and say.", 1)), add_generation_prompt=True)
    text = [{"role": "user", "content": "Look at <image> and say."}]
    assert processor.apply_chat_template(text, add_generation_prompt=True) == parts


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"], ["tool"]]
)
def test_roles_out_of_order_are_an_error(roles, processor):
    with pytest.raises(Exception, match="Roles must alternate"):
        processor.apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_system_message_replaces_the_default(processor):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<s>Be brief. USER: Hi ASSISTANT:"


def test_plain_format_learns_caption_and_newline(processor):
    messages = conversation(("user", "ignored", 1), ("assistant", "a cat", 0))
    output = processor.apply_chat_template(
        messages,
        chat_template=read_chat_template("plain"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = output["input_ids"][0], output["assistant_masks"][0]
    assert ids == [1] + [IMAGE_TOKEN_ID] * 4 + ORACLE.encode("a cat\n")
    assert [i for i, m in zip(ids, mask, strict=True) if m] == ORACLE.encode("a cat\n")


def test_decoding_gives_the_text_back(processor):
    text = "  def f(x):\n    return x\t+ 1 — 🐈"
    ids = processor.tokenizer("A" + text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "A" + text


def test_saved_tokenizer_is_the_same(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    _, processor = tokenizers
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.padding_side == "left"
    assert loaded.pad_token == "<unk>"
    for text in TEXTS:
        assert loaded(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("image_first", [True, False])
def test_tokens_that_training_appended_keep_their_ids(image_first, tmp_path):
    added = ("<image>", "<pad>") if image_first else ("<pad>", "<extra>")
    write_tokenizer(tmp_path, TrainingLayout(), added_tokens=added)
    tokenizer, image_token = load_tokenizer(tmp_path, "llama")
    assert [tokenizer.convert_tokens_to_ids(token) for token in added] == [448, 449]
    assert tokenizer.convert_tokens_to_ids(image_token) == (448 if image_first else 450)
    assert tokenizer("<image>\n")["input_ids"] == [
        1,
        tokenizer.convert_tokens_to_ids(image_token),
        *ORACLE.encode("\n"),
    ]


def test_appended_tokens_with_a_gap_are_refused(tmp_path):
    write_tokenizer(tmp_path, TrainingLayout())
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 460}')
    with pytest.raises(UserError, match="without a gap"):
        load_tokenizer(tmp_path, "llama")


def test_a_model_that_is_not_llama_like_is_refused(tmp_path):
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        sentencepiece_tokenizer(broken)
    unigram = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on a mat"] * 50),
        model_prefix=str(unigram),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="not of type BPE"):
        sentencepiece_tokenizer(f"{unigram}.model")


# --- ChatML backbones -----------------------------------------------------------------------------

QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_tokenizer(folder, TrainingLayout(text_model_type="qwen2"))
    tokenizer, image_token = load_tokenizer(folder, "qwen2")
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer, image_token


def test_qwen_reuses_its_own_image_token(qwen):
    tokenizer, image_token = qwen
    assert image_token == "<|image_pad|>"
    assert tokenizer.convert_tokens_to_ids(image_token) < len(tokenizer)


def test_qwen_template_keeps_its_own_words_and_marks_the_assistant(qwen):
    tokenizer, image_token = qwen
    template = backbone_chat_template(tokenizer, image_token)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    own = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) == own
    output = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [i for i, m in zip(output["input_ids"], output["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(learned) == "Ho<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(
        st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<|>"), max_size=10), min_size=1, max_size=4
    )
)
def test_qwen_ids_are_chunk_by_chunk(chunks, qwen):
    tokenizer, image_token = qwen
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    expected = tokenizer(chunks[0])["input_ids"]
    for chunk in chunks[1:]:
        expected = [*expected, image_id, *tokenizer(chunk)["input_ids"]]
    assert tokenizer(image_token.join(chunks))["input_ids"] == expected


QWEN_WITH_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + (m.tool_calls | default('')) + '\\n' }}"
    "{%- endfor %}{%- else %}" + QWEN_TEMPLATE + "{%- endif %}"
)


def test_tools_reach_the_language_models_own_template(qwen):
    tokenizer, image_token = qwen
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    tokenizer.chat_template = QWEN_WITH_TOOLS
    template = backbone_chat_template(tokenizer, image_token)
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    settings = {"chat_template": template, "tokenize": False}
    rendered = tokenizer.apply_chat_template([USER | {"content": content}], tools=TOOLS, **settings)
    assert "look_closer" in rendered
    assert rendered.endswith(f"<|im_start|>user\n{image_token}\nWhat?\n")
    own = tokenizer.apply_chat_template([USER | {"content": "Hi"}], tokenize=False)
    assert tokenizer.apply_chat_template([USER | {"content": "Hi"}], **settings) == own
    assert "generation" in template


def test_a_chatml_template_without_tools_refuses_them(qwen):
    tokenizer, image_token = qwen
    template = backbone_chat_template(tokenizer, image_token)
    with pytest.raises(Exception, match="without tools"):
        tokenizer.apply_chat_template([USER | {"content": "Hi"}], chat_template=template, tools=TOOLS)


def test_any_other_template_gets_images_in_front(qwen):
    tokenizer, image_token = qwen
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template = backbone_chat_template(tokenizer, image_token)
    content = [{"type": "text", "text": " What? "}, {"type": "image"}, {"type": "image"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False
    )
    assert rendered == f"[user]{image_token}{image_token}\nWhat?"


# --- the released rows ----------------------------------------------------------------------------


@needs_reference
def test_all_released_rows():
    check_text_rows()
