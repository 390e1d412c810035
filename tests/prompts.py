"""Prompts with pictures for tests of `generate`, and the language model alone as the oracle for their answers."""

import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.tiny import IMAGE_TOKEN_ID

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 440, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def image(budget: int = 4) -> list[int]:
    return [IMAGE_TOKEN_ID] * budget


def batch(*rows: list[int]) -> dict:
    """Ids and attention mask, left-padded."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# Two images, none, one, three: rows of different lengths, so that all but the longest are padded.
ROWS = (
    [*words(3), *image(), *words(2, 1), *image(), *words(4, 2)],
    words(6, 3),
    [*image(), *words(9, 4)],
    [*image(), *image(), *words(1, 5), *image(), *words(5, 6)],
)
IMAGES_OF_ROWS = ([0, 1], [], [2], [3, 4, 5])


@torch.no_grad()
def spliced(model, inputs: dict, visual_tokens: list[torch.Tensor]) -> dict:
    """The same prompt with the image tokens' embeddings written over, one position after the other."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
    tokens = iter(torch.cat(visual_tokens))
    for row, column in (inputs["input_ids"] == IMAGE_TOKEN_ID).nonzero().tolist():
        embeddings[row, column] = next(tokens)
    assert next(tokens, None) is None
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}


def encode_alone(model, pixels: torch.Tensor, budgets: list[int] | None = None) -> list[torch.Tensor]:
    """Visual tokens of every picture, each encoded in a call of its own."""
    budgets = budgets or [4] * len(pixels)
    with torch.no_grad():
        return [
            model.get_image_features(picture[None], budget).pooler_output[0]
            for picture, budget in zip(pixels, budgets, strict=True)
        ]


def encoded(visual_tokens: list[torch.Tensor]) -> dict:
    """Pictures that were encoded before, as `generate` and `forward` take them."""
    return {"image": BaseModelOutputWithPooling(pooler_output=visual_tokens)}


def new_tokens(output: torch.Tensor, inputs: dict) -> torch.Tensor:
    return output[:, inputs["input_ids"].shape[1] :]


def language_model_of(model) -> LlamaForCausalLM:
    """The language model alone, as transformers has it: the oracle for everything behind the spliced embeddings."""
    reference = LlamaForCausalLM(model.config.text_config).eval()
    reference.model = model.model.language_model
    reference.lm_head = model.lm_head
    return reference


# Pictures 0 and 1, 3, none in the first turn; 2, 4, none are new in the second.
FIRST_TURN = ([*image(), *words(3), *image(), *words(3, 1)], [*words(7, 2), *image(), *words(3, 3)], words(6, 4))
SECOND_TURN = ([*words(2, 4), *image(), *words(3, 5)], [*image(), *words(5, 6)], words(9, 7))
