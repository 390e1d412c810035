"""The generation config of a Hub folder: valid, greedy, and unable to produce the image token."""

from collections.abc import Iterable


def generation_fields(tokenizer, written: dict, image_token: str, new_rows: Iterable[int]) -> dict:
    """Fields of `generation_config.json`.

    Sampling settings are left out: language models bring temperatures without `do_sample` (which transformers refuses
    to save), training switches `do_sample` on only to get around that, and published scores are greedy.

    Args:
        written: fields of the source's `generation_config.json`, or of its config.
        new_rows: embedding rows that conversion added; like the image token they are never generated.
    """
    ends = written.get("eos_token_id")
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    ends = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)))
    fields = {
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else written.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": sorted({tokenizer.convert_tokens_to_ids(image_token), *new_rows}),
    }
    return {name: value for name, value in fields.items() if value is not None}
