"""What is tried on every supported release of transformers: each test is a row of docs/compatibility.md.

`make test` runs them with the newest pinned release, `make test-versions` with every one.
"""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, pipeline

from modeling_delta_llava import configuration_delta_llava as configuration
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.conversion.verify import passed, verify
from modeling_delta_llava.modeling_delta_llava import CACHE_NAME
from tests.golden import PIXELS, PROJECTOR_ENTRIES, check_pixels, check_projector, check_text_rows, needs_reference
from tests.prompts import (
    FIRST_TURN,
    GREEDY,
    ROWS,
    SECOND_TURN,
    batch,
    encode_alone,
    image,
    language_model_of,
    new_tokens,
    pictures,
    spliced,
    words,
)
from tests.tiny import picture, tiny_config, tiny_model, tiny_processor, write_hub_folder
from tests.training_layout import TrainingLayout, write_stage2, write_tower

RELEASE = Version(transformers.__version__)

PROGRAM = textwrap.dedent(
    """
    import json, sys
    sys.modules["modeling_delta_llava"] = None  # whatever imports the installed package fails
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers import AutoProcessor, pipeline

    folder, again = sys.argv[1:]
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert [type(part).__name__ for part in (config, base, model, processor)] == [
        "DeltaLlavaConfig", "DeltaLlavaModel", "DeltaLlavaForConditionalGeneration", "DeltaLlavaProcessor"
    ]
    assert type(AutoModelForMultimodalLM.from_pretrained(folder, **trust)) is type(model)
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
    # Without the checkout: -P leaves the working folder out, and -S what an editable install adds.
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


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict]:
    """What two fresh processes without the package print: for a folder, and for what the first one saved again."""
    root = tmp_path_factory.mktemp("alone")
    folder = write_hub_folder(root / "folder")
    first = run_alone(folder, root / "second", root / "cache1")
    second = run_alone(root / "second", root / "third", root / "cache2")
    assert {path.name for path in folder.iterdir()} <= {path.name for path in (root / "third").iterdir()}
    second["auto_map"] = json.loads((root / "third" / "config.json").read_text())["auto_map"]
    return first, second


def test_remote_code(runs):
    first, _ = runs
    assert first["code"].startswith("transformers_modules.")
    assert first["logits"][0] != first["logits"][1]


def test_pipeline(runs):
    first, _ = runs
    assert first["answers"][0] != first["answers"][1]


def test_videos(tmp_path):
    pytest.importorskip("av")
    from tests.clips import write_clip

    config = tiny_config()
    processor = tiny_processor(tmp_path, config)
    pipe = pipeline("image-text-to-text", model=tiny_model(config), processor=processor)
    content = [{"type": "video", "path": str(write_clip(tmp_path / "clip.mkv"))}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 4, "processor_kwargs": {"num_visual_tokens": 1}}
    answers = pipe(text=[messages, messages], num_frames=3, **options)
    (same,) = pipe(text=processor.videos_as_images(messages, num_frames=3), **options)
    assert [answer[0]["generated_text"][-1] for answer in answers] == [same["generated_text"][-1]] * 2
    assert "Images 1 to 3 are frames of a video, at 0.0, 0.6, 1.3 seconds." in processor.apply_chat_template(
        messages, processor_kwargs={"num_frames": 3}
    )


def test_save_and_load(runs):
    first, second = runs
    for key in ("answers", "logits"):
        assert second[key] == first[key]
    assert second["auto_map"] == {
        "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
        "AutoModel": "modeling_delta_llava.DeltaLlavaModel",
        "AutoModelForImageTextToText": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
        "AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor",
    }


def test_projector_values():
    for entry in PROJECTOR_ENTRIES:
        check_projector(entry)


@needs_reference
def test_text_rows():
    check_text_rows()


def test_pixels():
    for name in PIXELS.files:
        check_pixels(name)


def refused_before(release: str, record_property, call) -> bool:
    """Whether the running release is older, and then refuses the call by naming the release that takes it."""
    if Version(release) <= RELEASE:
        return False
    record_property("result", f"needs {release}")
    with pytest.raises(ValueError, match=f"needs transformers {release} or newer"):
        call()
    return True


def equals_the_language_model(model, rows, **settings) -> None:
    inputs, pixels = batch(*rows), pictures(sum(row.count(model.config.image_token_id) // 4 for row in rows))
    spliced_inputs = spliced(model, inputs, encode_alone(model, pixels))
    expected = language_model_of(model).generate(**spliced_inputs, **GREEDY, **settings)
    answer = model.generate(**inputs, pixel_values=pixels, **GREEDY, **settings)
    assert torch.equal(new_tokens(answer, inputs), expected)


def test_greedy(model):
    equals_the_language_model(model, ROWS)


def test_beams_with_one_picture_each(model):
    rows = ([*image(), *words(4)], [*words(2), *image(), *words(7, 1)])
    equals_the_language_model(model, rows, num_beams=3, num_return_sequences=2)
    budgets, inputs = [4, 16], batch([*image(4), *words(4)], [*words(2), *image(16), *words(7, 1)])
    expected = language_model_of(model).generate(
        **spliced(model, inputs, encode_alone(model, pictures(2), budgets)), **GREEDY, num_beams=2
    )
    answer = model.generate(**inputs, pixel_values=pictures(2), num_visual_tokens=budgets, **GREEDY, num_beams=2)
    assert torch.equal(new_tokens(answer, inputs), expected)


def test_beams_with_several_pictures(model, record_property):
    def call():
        equals_the_language_model(model, ROWS, num_beams=3)

    if not refused_before("5.19", record_property, call):
        call()


def test_static_cache(model):
    equals_the_language_model(model, ROWS, cache_implementation="static")


def test_quantised_cache(model):
    pytest.importorskip("hqq")
    settings = {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": 4, "axis_key": 1, "axis_value": 1}
    inputs, pixels = batch(*ROWS), pictures(6)
    spliced_inputs = spliced(model, inputs, encode_alone(model, pixels))
    # A copy of the settings for each call: transformers 5.16 takes the backend out of what it is given.
    options = [{"cache_implementation": "quantized", "cache_config": dict(settings)} for _ in range(2)]
    expected = language_model_of(model).generate(**spliced_inputs, **GREEDY, **options[0])
    answer = model.generate(**inputs, pixel_values=pixels, **GREEDY, **options[1])
    assert torch.equal(new_tokens(answer, inputs), expected)


def test_assisted_decoding(model):
    inputs, pixels = batch(ROWS[0]), pictures(2)
    expected = model.generate(**inputs, pixel_values=pixels, **GREEDY)
    for drafter in ({"assistant_model": tiny_model(seed=1)}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(**inputs, pixel_values=pixels, **GREEDY, **drafter), expected)


def test_chunked_prefill(model, record_property):
    inputs, pixels = batch(*ROWS), pictures(6)

    def call():
        return model.generate(**inputs, pixel_values=pixels, **GREEDY, prefill_chunk_size=5)

    if not refused_before("5.23", record_property, call):
        assert torch.equal(call(), model.generate(**inputs, pixel_values=pixels, **GREEDY))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_continued_turn(name, model):
    pixels, first = pictures(5), batch(*FIRST_TURN)
    answer = model.generate(**first, pixel_values=pixels[[0, 1, 3]], **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([answer.sequences, torch.tensor(SECOND_TURN)], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(3, ids.shape[1] - first["input_ids"].shape[1])], dim=1)
    second = {"input_ids": ids, "attention_mask": mask.long()}
    expected = model.generate(**second, pixel_values=pixels, **GREEDY)
    output = model.generate(**second, pixel_values=pixels[[2, 4]], **{name: answer[CACHE_NAME]}, **GREEDY)
    assert torch.equal(output, expected)
    with torch.no_grad():
        cache = model(**first, pixel_values=pixels[[0, 1, 3]], use_cache=True)[CACHE_NAME]
        more = torch.tensor([words(2)] * 3)
        whole = torch.cat([first["input_ids"], more], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(more)], dim=1)
        logits = model(input_ids=whole, attention_mask=mask, pixel_values=pixels[[0, 1, 3]]).logits[:, -2:]
        continued = model(input_ids=more, attention_mask=mask, **{name: cache}).logits
    torch.testing.assert_close(continued, logits, rtol=1e-4, atol=1e-4)


def test_assistant_masks(tmp_path, record_property):
    processor = tiny_processor(tmp_path, tiny_config())
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]
    turn = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

    def call():
        return processor.apply_chat_template(
            [{"role": "user", "content": content}, turn],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )

    if not refused_before("5.23", record_property, call):
        output = call()
        said = [i for i, mask in zip(output["input_ids"][0], output["assistant_masks"][0], strict=True) if mask]
        assert processor.decode(said) == "A cat.</s>"


def test_training_step(tmp_path):
    model = tiny_model().train()
    row = torch.tensor([*image(), *words(6)])
    rows = [{"input_ids": row, "labels": row, "pixel_values": pictures(1, seed)[0]} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[1] for name in changed} >= {"vision_tower", "multi_modal_projector", "language_model"}


def test_convert_and_verify(tmp_path):
    layout = TrainingLayout()
    write_tower(tmp_path / "tower", layout)
    write_stage2(tmp_path / "stage2", layout, tower=tmp_path / "tower")
    convert(str(tmp_path / "stage2"), tmp_path / "hub", progress=False)
    checks = verify(tmp_path / "hub", str(tmp_path / "stage2"), progress=False)
    assert passed(checks), [check for check in checks if not check.passed]


def test_range_is_stated(monkeypatch):
    """Outside the range a user is told so: below it by an error, above it by a warning."""
    monkeypatch.setattr(configuration.transformers, "__version__", "5.15.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.16\.1 or newer, and this is 5\.15\.1"):
        configuration.check_transformers()
    said = []
    monkeypatch.setattr(configuration.logger, "warning_once", said.append)
    monkeypatch.setattr(configuration.transformers, "__version__", "5.24.9")
    configuration.check_transformers()
    assert said == []
    monkeypatch.setattr(configuration.transformers, "__version__", "5.25.0")
    configuration.check_transformers()
    assert len(said) == 1
    assert "transformers>=5.16.1,<5.25" in said[0]


def test_nothing_deprecated(tmp_path, caplog):
    """Neither a warning nor a line of transformers' log says that something we use is about to go."""
    transformers.utils.logging.warning_once.cache_clear()  # what an earlier test set off is said again
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folder = write_hub_folder(tmp_path / "folder")
            model = AutoModelForImageTextToText.from_pretrained(folder)
            inputs, pixels = batch(*ROWS), pictures(6)
            answer = model.generate(**inputs, pixel_values=pixels, **GREEDY, return_dict_in_generate=True)
            model(input_ids=inputs["input_ids"][:, -1:], **{CACHE_NAME: answer[CACHE_NAME]})
            model(**inputs, pixel_values=pixels, labels=inputs["input_ids"], return_dict=False)
            model.save_pretrained(tmp_path / "again")
    finally:
        transformers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if "deprecated" in record.message] == []
