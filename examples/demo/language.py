"""A tiny Llama and its tokenizer, which learn to read the demo's English before any picture is shown.

The language model reads notes about scenes and answers questions about them, all in text. A note has one word for each
thing, such as `red-circle-top-left`, possibly more than once, among words that say nothing. What the model brings to
stage 1 is what a real language model brings: words, and the skill of looking an answer up in what stands in its
context. It has never seen a picture; without one, all it has is how often each answer is right.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .drawings import CAPTION_REQUEST, COLOURS, PLACES_PER_SIDE, SHAPES, Thing, caption, draw_scene, questions

VOCABULARY_SIZE = 500
MAX_LENGTH = 400
IGNORED = -100
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|assistant|>' }}"
    "{% else %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def note_word(thing: Thing) -> str:
    return f"{thing.colour}-{thing.shape}-{thing.position.replace(' ', '-')}"


NOTE_WORDS = sorted(
    {
        note_word(Thing(shape, colour, place))
        for shape, colour, place in itertools.product(SHAPES, COLOURS, range(PLACES_PER_SIDE**2))
    }
)
NOTHING = "nothing"


def reading(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """The words of a note about a random scene, in any order, and turns of (request, answer) about it."""
    scene = draw_scene(rng)
    note = [note_word(thing) for thing in scene for _ in range(rng.randint(1, 3))]
    note += [NOTHING] * rng.randint(0, 8)
    rng.shuffle(note)
    turns = [(question.text, question.answer) for question in questions(scene, rng)]
    if rng.random() < 0.2:
        turns = [(CAPTION_REQUEST, caption(scene))]
    return note, turns


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learned from the demo's own sentences."""
    rng = random.Random(seed)
    corpus = [text for _ in range(2000) for turn in reading(rng)[1] for text in turn]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (PAD, USER, ASSISTANT, END)]
        + [AddedToken(word, normalized=False) for word in (NOTHING, *NOTE_WORDS)],
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
    """Two layers of width 128. At this width the usual initial spread of 0.02 would take long to leave behind."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )


class ReadingBatches:
    """Batches of described scenes with questions, as token ids; only answers are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self._ids: dict[str, list[int]] = {}

    def encoded(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def row(self) -> tuple[list[int], list[int]]:
        """Ids and labels of one scene; its note stands where a picture will stand."""
        note, turns = reading(self.rng)
        ids: list[int] = []
        labels: list[int] = []
        for place, (request, answer) in enumerate(turns):
            asked = self.encoded(USER)
            if place == 0:
                asked = asked + [token for word in note for token in self.encoded(word)] + self.encoded("\n")
            asked = asked + self.encoded(request) + self.encoded(ASSISTANT)
            learned = self.encoded(answer) + self.encoded(END)
            ids += asked + learned
            labels += [IGNORED] * len(asked) + learned
        return ids, labels

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        rows = [self.row() for _ in range(size)]
        width = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self.tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        }


def train_language_model(
    steps: int, batch_size: int = 24, seed: int = 0, report: Callable[[int, float], None] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains tokenizer and language model from scratch on text.

    Args:
        steps: optimizer steps.
        batch_size: scenes in a step.
        seed: seed of text and weights.
        report: called with (step, loss) after each step.
    """
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer))
    batches = ReadingBatches(tokenizer, seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        loss = model(**batches.batch(batch_size)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    return model.eval(), tokenizer


def make_language_model(folder: Path, steps: int, seed: int) -> None:
    """Trains a language model on one core, with a progress bar, and writes a folder as it has on the Hub."""
    torch.set_num_threads(1)
    with tqdm(total=steps, desc="  the language model reads", position=1) as bar:
        model, tokenizer = train_language_model(steps, seed=seed, report=lambda step, loss: bar.update())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
