"""Loads a Hub folder the way a stranger would and lets it answer once; run as a process of its own.

`python load_check.py FOLDER` uses nothing but the folder, transformers and accelerate: this package is not imported.
Weights stay on disk and are read layer by layer, so that memory holds about one layer at a time. Prints one line of
JSON: the class, the visual tokens of the picture, the new token ids and the peak memory in bytes.
"""

import json
import resource
import sys
import tempfile
import warnings


def answer_once(folder: str, new_tokens: int = 2) -> dict:
    """Loads configuration, processor and model with `trust_remote_code` and generates `new_tokens` tokens.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or the picture got the wrong number of tokens.
    """
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options = {} if getattr(config, "quantization_config", None) else {"device_map": {"": "disk"}}
    with tempfile.TemporaryDirectory() as offload, torch.inference_mode():
        if options:
            options["offload_folder"] = offload
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
        inputs = {
            name: value.to(config.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        # The device of offloaded weights is where they run, the CPU.
        output = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    return {"class": type(model).__name__, "visual_tokens": visual, "new_ids": new}


def main() -> int:
    warnings.filterwarnings("ignore")
    try:
        result = answer_once(sys.argv[1])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {lines[0]}"}))
        return 1
    unit = 1 if sys.platform == "darwin" else 1024
    result["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
