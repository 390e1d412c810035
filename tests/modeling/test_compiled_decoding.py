"""Decoding with a static cache compiles once: no prompt of the same padded length compiles anything anew."""

import torch
from torch._dynamo.utils import counters

from modeling_delta_llava import DeltaLlavaForConditionalGeneration
from tests.tiny import tiny_model

LENGTH, VISUAL_TOKENS, NEW_TOKENS = 14, 4, 6


def answer(model: DeltaLlavaForConditionalGeneration, seed: int, padding: int, **settings) -> torch.Tensor:
    """A greedy answer to a random prompt with one image, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 400, (1, LENGTH), generator=generator)
    input_ids[0, 6 : 6 + VISUAL_TOKENS] = model.config.image_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, :padding] = 0
    return model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=torch.randn(1, 3, 32, 32, generator=generator),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **settings,
    )


def test_prompts_of_one_padded_length_share_their_graphs():
    model = tiny_model()
    expected = [answer(model, seed, padding) for seed, padding in enumerate((0, 3, 1, 5, 0))]
    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    static = {"cache_implementation": "static", "disable_compile": True}
    graphs = []
    for seed, padding in enumerate((0, 3, 1, 5, 0)):
        result = answer(model, seed, padding, **static)
        assert torch.equal(result, expected[seed]), seed
        graphs.append(counters["stats"]["unique_graphs"])
    # The first prompt makes the cache and compiles prefill and step, the second meets a cache that is there already.
    assert graphs[0] == 2
    assert graphs[1:] == [graphs[1]] * 4
