"""Processor throughput against transformers' LlavaProcessor, both around one tokenizer and one image processor.

A sample is one photo-sized image and one question. Reported are samples per second, one at a time and in a batch.
"""

import numpy as np
import torch
from common import machine, measure, median_ms, parser, print_table, ratio, start, write_result
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.building import build_processor

PROMPT = "USER: <image>\nDescribe the picture in detail, then say what is unusual about it and why. ASSISTANT:"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer trained on the prompt, so that nothing has to be downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT.replace("<image>", "")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def main():
    arguments_parser = parser(__doc__, "processor")
    arguments_parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    arguments_parser.add_argument("--image-size", nargs=2, type=int, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    arguments = arguments_parser.parse_args()
    device = start(arguments)
    about = machine(device)
    config = DeltaLlavaConfig()
    processors = {}
    for budget in (576, 144, 1):
        config.num_visual_tokens = budget
        processors[f"ours_{budget}"] = build_processor(config, byte_tokenizer())
    native_tokenizer = byte_tokenizer()
    processors["llava_576"] = LlavaProcessor(
        image_processor=processors["ours_576"].image_processor,
        tokenizer=native_tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    width, height = arguments.image_size
    generator = np.random.default_rng(arguments.seed)
    picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    rows = []
    for batch_size in arguments.batch_sizes:
        images, text = [[picture]] * batch_size, [PROMPT] * batch_size
        expected = processors["llava_576"](images=images, text=text, return_tensors="pt")
        ours = processors["ours_576"](images=images, text=text, return_tensors="pt")
        if not all(torch.equal(ours[name], expected[name]) for name in ("input_ids", "pixel_values")):
            raise SystemExit("the two processors disagree at 576 tokens: there is nothing to compare")
        times = measure(
            {
                name: lambda one=processor, images=images, text=text: one(
                    images=images, text=text, return_tensors="pt"
                )
                for name, processor in processors.items()
            },
            device,
            arguments.repeats,
        )
        medians = {name: median_ms(seconds) for name, seconds in times.items()}
        rows.append(
            {
                "batch_size": batch_size,
                "median_ms": medians,
                "samples_per_s": {name: round(batch_size / ms * 1e3, 1) for name, ms in medians.items()},
                "llava_over_ours": {
                    name: ratio(times["llava_576"], seconds) for name, seconds in times.items() if name != "llava_576"
                },
            }
        )
    write_result(arguments, device, about, {"rows": rows})
    names = list(processors)
    print_table(
        ["batch", *(f"{name} samples/s" for name in names)],
        [[row["batch_size"], *(row["samples_per_s"][name] for name in names)] for row in rows],
    )


if __name__ == "__main__":
    main()
