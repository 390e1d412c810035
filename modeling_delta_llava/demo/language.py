"""A tiny Llama and its tokenizer, which learn the demo's English from text alone before any picture is shown.

The text is that of the two training stages with the pictures taken away: captions of scenes, and questions with the
answers that some scene would give. The language model so learns words, grammar and which answers are likely, but
nothing that would let it answer better than chance; it has never seen a picture when stage 1 begins.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .drawings import CAPTION_REQUEST, caption, draw_scene, questions

VOCABULARY_SIZE = 400
MAX_LENGTH = 400
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|assistant|>' }}"
    "{% else %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def random_conversation(rng: random.Random) -> list[str]:
    """Questions and answers in turn, about a scene that is not shown."""
    scene = draw_scene(rng)
    if rng.random() < 0.3:
        return [CAPTION_REQUEST, caption(scene)]
    return [text for question in questions(scene, rng) for text in (question.text, question.answer)]


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learned from the demo's own sentences."""
    rng = random.Random(seed)
    corpus = [text for _ in range(2000) for text in random_conversation(rng)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (PAD, USER, ASSISTANT, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Three layers of width 128."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )


def train_language_model(
    steps: int, batch_size: int = 32, seed: int = 0, report: Callable[[int, float], None] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains tokenizer and language model from scratch on text.

    Args:
        steps: optimizer steps.
        batch_size: conversations in a step.
        seed: seed of text and weights.
        report: called with (step, loss) after each step.
    """
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer))
    rng = random.Random(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        texts = [
            "".join(turn + (ASSISTANT, END + USER)[place % 2] for place, turn in enumerate(random_conversation(rng)))
            for _ in range(batch_size)
        ]
        batch = tokenizer([(USER + text).removesuffix(USER) for text in texts], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    return model.eval(), tokenizer


def save_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a folder as a language model has it on the Hub."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
