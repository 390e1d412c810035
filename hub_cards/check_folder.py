"""Loads a Hub folder as a stranger would and verifies it, in a process that ends with the one that started it.

`python -P check_folder.py FOLDER [--load] [--verify]` prints one line of JSON: `problem`, which may be null. For
loading, nothing but the folder, transformers and accelerate is used: this package is imported afterwards. Weights stay
on disk and are read layer by layer, so that memory holds about one layer at a time. Standard input stays open as long
as the starting process lives.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings

ATTEMPTS = 50


def load_and_answer(folder: str, offload: str) -> None:
    """Loads configuration, processor and model with `trust_remote_code` and generates two tokens about a picture.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or the picture got the wrong number of tokens.
    """
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    quantized = getattr(config, "quantization_config", None)
    options = {} if quantized else {"device_map": {"": "disk"}, "offload_folder": offload}
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(str(name) for name in report[kind])
            raise ValueError(f"{len(names)} {kind.replace('_', ' ')}, the first is {names[0]}")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (48, 32), "gray")], text=[prompt], return_tensors="pt")
    visual = int((inputs["input_ids"] == config.image_token_id).sum())
    if visual != config.num_visual_tokens:
        raise ValueError(f"the processor made {visual} visual tokens, the config says {config.num_visual_tokens}")
    inputs = {name: value.to(config.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        # The device of offloaded weights is where they run, the CPU.
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)


def verification_problem(folder: str) -> str | None:
    """What the converter's verification finds, in one line; None when the folder is good."""
    from delta_llava.errors import UserError
    from modeling_delta_llava.conversion.verify import verify

    try:
        checks = verify(folder, progress=False, numbers=False)
    except UserError as error:
        return str(error)
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.passed is False) or None


def loading_problem(folder: str, offload: str) -> str | None:
    """What keeps the folder from being loaded, in one line; None when nothing does."""
    try:
        load_and_answer(folder, offload)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"it does not load in a fresh process with trust_remote_code: {type(error).__name__}: {lines[0]}"
    return None


def end_with_parent(scratch: str) -> None:
    """Ends this process, and leaves nothing behind, when standard input closes."""
    sys.stdin.read()
    for _ in range(ATTEMPTS):  # the other thread may still be writing into it
        shutil.rmtree(scratch, ignore_errors=True)
        if not os.path.exists(scratch):
            break
        time.sleep(0.1)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="delta-llava-check-") as scratch:
        threading.Thread(target=end_with_parent, args=(scratch,), daemon=True).start()
        os.environ |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        problem = loading_problem(arguments.folder, os.path.join(scratch, "offload")) if arguments.load else None
        found = verification_problem(arguments.folder) if arguments.verify else None
    print(f"\n{json.dumps({'problem': found or problem})}", flush=True)  # the first is more exact
    os._exit(0)  # no destructor prints behind that line


if __name__ == "__main__":
    main()
