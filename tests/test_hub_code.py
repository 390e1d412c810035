"""A Hub folder on its own: fresh processes without the package, offline, save and load again."""

import json
import os
import subprocess
import sys
import textwrap

from tests.tiny import write_hub_folder

PROGRAM = textwrap.dedent(
    """
    import importlib.util, json, sys
    assert importlib.util.find_spec("modeling_delta_llava") is None, "the package must not be on the path"
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    folder, again = sys.argv[1:]
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert [type(part).__name__ for part in (config, base, model, processor)] == [
        "DeltaLlavaConfig", "DeltaLlavaModel", "DeltaLlavaForConditionalGeneration", "DeltaLlavaProcessor"
    ]
    answers, logits = [], []
    pipe = pipeline("image-text-to-text", model=folder, **trust)
    for colour in ("black", "white"):
        content = [{"type": "image", "image": Image.new("RGB", (40, 30), colour)}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        answers.append(pipe(text=messages, max_new_tokens=12)[0]["generated_text"][-1]["content"])
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"num_visual_tokens": 16},
        )
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1, :8].tolist())
    model.save_pretrained(again)
    processor.save_pretrained(again)
    print(json.dumps({"answers": answers, "logits": logits, "code": type(model).__module__}))
    """
)


def run_alone(folder, again, cache) -> dict:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    # An editable install puts the package on every path; -S and an explicit list of paths leave it out.
    paths = [path for path in sys.path if path.endswith("site-packages")]
    start = f"import sys; sys.path[:0] = {paths!r}; exec({PROGRAM!r})"
    cache.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", start, str(folder), str(again)],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_folder_stands_alone_and_what_it_saves_does_too(tmp_path):
    folder = write_hub_folder(tmp_path / "folder")
    first = run_alone(folder, tmp_path / "second", tmp_path / "cache1")
    assert first["code"].startswith("transformers_modules.")
    assert first["answers"][0] != first["answers"][1]
    assert first["logits"][0] != first["logits"][1]
    second = run_alone(tmp_path / "second", tmp_path / "third", tmp_path / "cache2")
    for key in ("answers", "logits"):
        assert second[key] == first[key]
    names = {path.name for path in folder.iterdir()}
    assert names <= {path.name for path in (tmp_path / "third").iterdir()}
    assert json.loads((tmp_path / "third/config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
        "AutoModel": "modeling_delta_llava.DeltaLlavaModel",
        "AutoModelForImageTextToText": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
        "AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor",
    }
