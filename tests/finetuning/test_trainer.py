"""What a training run computes: equal to a plain loop, to other splits of the batch, and to itself when resumed."""

import functools
import hashlib
import itertools
import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.checkpoints import UNFINISHED_FOLDER, last_finished_checkpoint
from modeling_delta_llava.finetuning.metrics import exact_match, load_metric, scores
from modeling_delta_llava.finetuning.parts import PROJECTOR, VISION_TOWER, count_parts, part_of
from modeling_delta_llava.finetuning.run import prepare, run
from modeling_delta_llava.finetuning.trainer import DeltaLlavaTrainer, GroupedSampler
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests import tiny
from tests.finetuning.conftest import write_data
from tests.finetuning.helpers import BudgetRecorder, assert_same_weights, losses, trained, weights, write_config
from tests.training_layout import TrainingLayout, write_base_model, write_tower


def plain_step(folder, rows, image_folder, rate):
    """Loss, gradients and weights after one AdamW step, written out without Trainer, collator or encoder."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    total, learned = 0.0, 0
    for row in rows:
        from PIL import Image

        names = row.get("image", [])
        pictures = [Image.open(image_folder / name) for name in ([names] if isinstance(names, str) else names)]
        text = processor.tokenizer.bos_token
        marks = []
        system = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. "
        )
        text += system
        for place in range(0, len(row["conversations"]), 2):
            question, answer = (turn["value"] for turn in row["conversations"][place : place + 2])
            text += f"USER: {question} ASSISTANT:"
            marks.append((len(text), len(text) + len(f" {answer}</s>")))
            text += f" {answer}</s>"
        encoding = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, labels = [], []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            inside = any(low <= start and end <= high and end > start for low, high in marks)
            width = processor.num_visual_tokens if token == processor.image_token_id else 1
            ids += [token] * width
            labels += [token if inside and width == 1 else -100] * width
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        if pictures:
            inputs["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        logits = model(**inputs).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        learned += int((targets != -100).sum())
    loss = total / learned
    loss.backward()
    gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=rate, weight_decay=0)
    optimizer.step()
    return loss.item(), gradients, weights(model)


def test_one_step_equals_a_plain_loop(arguments, data_folder, exact_folder):
    rows = json.loads((data_folder / "data.json").read_text())[:4]
    trainer, _ = prepare(arguments(max_steps=1, train_sampling_strategy="sequential", lr_scheduler_type="constant"))
    gradients = {}

    class Keep(type(trainer.callback_handler.callbacks[0]).__mro__[1]):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            scale = 1 / max(1.0, trainer.grad_norm_of_step / args.max_grad_norm) if args.max_grad_norm else 1.0
            gradients.update(
                {name: item.grad / scale for name, item in model.named_parameters() if item.grad is not None}
            )

    original = trainer._clip_grad_norm

    def clip(model):
        trainer.grad_norm_of_step = float(original(model))
        return trainer.grad_norm_of_step

    trainer._clip_grad_norm = clip
    trainer.add_callback(Keep())
    trainer.train()
    loss, expected_gradients, expected_weights = plain_step(exact_folder, rows, data_folder / "images", 1e-3)
    assert losses(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-3)
    # AdamW's first step is the sign of the gradient: compare where a gradient is not mere rounding.
    for name, value in weights(trainer.model).items():
        clear = expected_gradients[name].abs() > 1e-6 if name in expected_gradients else slice(None)
        torch.testing.assert_close(value[clear], expected_weights[name][clear], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"visual_token_budgets": [16, 4, 1]}, {"train_sampling_strategy": "group_by_length"}]
)
def test_batch_of_eight_equals_eight_batches_of_one(arguments, tmp_path, changes):
    whole = trained(arguments(per_device_train_batch_size=8, output_dir=str(tmp_path / "a"), **changes))
    split = trained(
        arguments(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            output_dir=str(tmp_path / "b"),
            **changes,
        )
    )
    assert len(losses(whole)) == 2
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert_same_weights(weights(whole.model), weights(split.model), atol=1e-4, rtol=1e-3)


STAGES = {
    "stage 1": ({"train_language_model": False}, {PROJECTOR}),
    "stage 2": ({}, {PROJECTOR, "language model"}),
    "tower too": ({"train_vision_tower": True}, {PROJECTOR, "language model", VISION_TOWER}),
}


@pytest.mark.parametrize(("changes", "parts"), STAGES.values(), ids=STAGES.keys())
def test_only_the_trained_parts_change_and_the_log_says_which(arguments, exact_folder, changes, parts, caplog):
    before = weights(DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32))
    with caplog.at_level(logging.INFO, logger="modeling_delta_llava.finetuning"):
        trainer = trained(arguments(gradient_checkpointing=True, **changes))
    after = weights(trainer.model)
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == parts
    unread = [name for name in before if "vision_tower.encoder.layers.4" in name or "post_layernorm" in name]
    assert unread
    assert all(torch.equal(before[name], after[name]) for name in unread)
    # Nor are they handed to the optimizer, which would keep state for them, and DDP wait for their gradients.
    optimized = {id(item) for group in trainer.optimizer.param_groups for item in group["params"]}
    optimized = {name for name, item in trainer.model.named_parameters() if id(item) in optimized}
    assert optimized == {name for name in before if part_of(name) in parts} - set(unread)
    for count in count_parts(trainer.model):
        assert (count.trained > 0) == (count.part in parts)
        assert f"{count.trained:,} trained" in caplog.text


def test_projector_has_its_own_learning_rate(arguments):
    trainer, _ = prepare(arguments(projector_learning_rate=5e-4, max_steps=1))
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(item)]: group["lr"] for group in trainer.optimizer.param_groups for item in group["params"]}
    assert {rate for name, rate in rates.items() if part_of(name) == PROJECTOR} == {5e-4}
    assert {rate for name, rate in rates.items() if part_of(name) != PROJECTOR} == {1e-3}
    assert len(rates) == sum(item.requires_grad for item in trainer.model.parameters())


def test_learning_rate_of_the_projector_is_logged(arguments):
    trainer = trained(arguments(projector_learning_rate=5e-4, lr_scheduler_type="constant"))
    logged = [entry["projector_learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [5e-4] * 4


def test_without_a_trained_projector_no_rate_of_it_is_logged(arguments):
    trainer = trained(arguments(projector_learning_rate=5e-4, train_projector=False, max_steps=1))
    assert len(losses(trainer)) == 1
    assert not any("projector_learning_rate" in entry for entry in trainer.state.log_history)


def test_a_resumed_run_keeps_and_logs_the_rate_of_its_checkpoint(arguments, tmp_path):
    common = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    trained(arguments(projector_learning_rate=5e-4, **common))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trained(arguments(projector_learning_rate=1e-4, **common, resume_from_checkpoint="true"))
    assert [entry["projector_learning_rate"] for entry in resumed.state.log_history if "loss" in entry] == [5e-4] * 4


RESUMED = {
    "mid-epoch": (3, {}),
    "after an epoch, elastic, grouped": (
        4,
        {"visual_token_budgets": [16, 4, 1], "train_sampling_strategy": "group_by_length"},
    ),
    "in the second epoch, grouped": (6, {"train_sampling_strategy": "group_by_length"}),
    "in the second epoch, accumulated": (
        6,
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "projector_learning_rate": 5e-4},
    ),
}


@pytest.mark.parametrize(("stop", "changes"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_equals_uninterrupted(arguments, tmp_path, stop, changes):
    """Also with stochastic depth: the folder is one whose training is random."""
    folder = tiny.write_hub_folder(tmp_path / "random", drop_path_rate=0.3)
    common = {
        "model": str(folder),
        "save_strategy": "steps",
        "save_steps": 1,
        "num_train_epochs": 2,
        "dataloader_num_workers": 0,
        **changes,
    }
    whole = trained(arguments(output_dir=str(tmp_path / "a"), **common))
    assert whole.state.global_step == 8
    interrupted = tmp_path / "b"
    shutil.copytree(tmp_path / "a", interrupted)
    for checkpoint in interrupted.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > stop:
            shutil.rmtree(checkpoint)
    resumed = trained(arguments(output_dir=str(interrupted), resume_from_checkpoint="true", **common))
    assert resumed.state.global_step == 8
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(whole.model), weights(resumed.model), atol=0, rtol=0)


def test_a_finished_run_takes_no_more_steps(arguments):
    """Three of the four steps of an epoch were asked for, and taken."""
    common = {"max_steps": 3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    whole = trained(arguments(**common))
    again = trained(arguments(**common, resume_from_checkpoint="true"))
    assert again.state.global_step == whole.state.global_step == 3
    assert_same_weights(weights(whole.model), weights(again.model), atol=0, rtol=0)


def test_the_best_model_is_what_is_saved(arguments, data_folder):
    """The highest evaluation loss is asked for, so that the first checkpoint is the best."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_data_path": str(data_folder / "data.json")}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    folder = run(arguments(**evaluated, **best, save_strategy="steps", save_steps=2))
    saved, first, last = (
        weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder / name))
        for name in (".", "checkpoint-2", "checkpoint-4")
    )
    assert_same_weights(saved, first, atol=0, rtol=0)
    assert not torch.equal(saved["lm_head.weight"], last["lm_head.weight"])
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


def test_a_run_in_place_is_not_overwritten_by_accident(arguments):
    trained(arguments(save_strategy="steps", save_steps=2))
    with pytest.raises(UserError, match=r"already holds checkpoint-4.*resume_from_checkpoint true"):
        prepare(arguments(save_strategy="steps"))
    with pytest.raises(UserError, match=r"belongs to another run: train_language_model differ"):
        prepare(arguments(save_strategy="steps", resume_from_checkpoint="true", train_language_model=False))
    _, checkpoint = prepare(arguments(save_strategy="steps", resume_from_checkpoint="auto"))
    assert checkpoint.name == "checkpoint-4"


def test_resuming_from_nothing(arguments, tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        prepare(arguments(resume_from_checkpoint="true"))
    with pytest.raises(UserError, match="give a checkpoint-N folder"):
        prepare(arguments(resume_from_checkpoint=str(tmp_path)))
    _, checkpoint = prepare(arguments(resume_from_checkpoint="auto"))
    assert checkpoint is None


def test_every_save_is_a_whole_hub_folder(arguments, data_folder):
    settings = arguments(save_strategy="steps", save_steps=2, save_total_limit=1, visual_token_budgets=[16, 4])
    folder = run(settings)
    assert last_finished_checkpoint(folder).name == "checkpoint-4"
    assert not (folder / "checkpoint-2").exists()
    assert not (folder / UNFINISHED_FOLDER).exists()
    for saved in (folder, folder / "checkpoint-4"):
        processor = DeltaLlavaProcessor.from_pretrained(saved)
        model = DeltaLlavaForConditionalGeneration.from_pretrained(saved)
        assert model.config.trained_num_visual_tokens == [16, 4]
        inputs = processor(images=[tiny.picture("red")], text="<image>\nWhat?", return_tensors="pt")
        assert torch.isfinite(model(**inputs).logits).all()
        assert (saved / "modeling_delta_llava.py").is_file()
        card = (saved / "README.md").read_text()
        assert "pipeline_tag: image-text-to-text" in card
        assert "Visual tokens per image: 16, 4 of a 4 x 4 patch grid." in card
        assert "| 4 |" in card
        assert "Steps 4 of 4" in card
        assert str(data_folder) not in card
        assert str(folder) not in card


@pytest.mark.slow
def test_every_push_during_training_is_a_whole_model(hub, client, settings, tmp_path):
    """Each commit has code and card beside the weights of its step, and the checkpoint to resume from."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "push_to_hub": True}
    pushed = {"hub_model_id": "user/pushed", "hub_strategy": "checkpoint", "hub_always_push": True}
    config = write_config(tmp_path / "run.yaml", {**settings, **changes, **pushed})
    ran = client("-m", "modeling_delta_llava.finetuning", config)
    assert ran.returncode == 0, ran.stderr
    history = hub.repos["user/pushed"].history()
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        commit = next(commit for commit in history if commit.title == f"Training in progress, step {step}")
        to_resume = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "_finetuning.yaml"}
        files = {path.name for path in checkpoint.iterdir()}
        assert to_resume | {"modeling_delta_llava.py", "README.md", "processor_config.json"} <= files
        pushed_files = {name for name in commit.tree if "/" not in name}
        assert pushed_files == files - to_resume | {".gitattributes"}
        sha256 = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        assert commit.tree["model.safetensors"].sha256 == sha256
    assert (
        history[0].tree["last-checkpoint/trainer_state.json"].content
        == (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_bytes()
    )
    assert not (tmp_path / "run" / UNFINISHED_FOLDER).exists()


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
UPLOADS = {
    "that later saves find unfinished": ({"save_steps": 1, "hub_always_push": False}, ["checkpoint-4"]),
    "that the end finds unfinished": (
        {"save_steps": 2, "hub_always_push": True, "eval_strategy": "steps", "eval_steps": 2, **BEST},
        ["checkpoint-2"],
    ),
}


@pytest.mark.parametrize(("changes", "kept"), UPLOADS.values(), ids=UPLOADS.keys())
def test_a_checkpoint_stays_while_it_is_uploaded(arguments, data_folder, monkeypatch, changes, kept):
    """Uploads of checkpoints that are as slow as two more saves, or as a second; one checkpoint is to be kept."""
    uploads, read = ThreadPoolExecutor(1), []

    def files_after_a_while(folder):
        later = folder.with_name(f"checkpoint-{int(folder.name.rpartition('-')[2]) + 2}")
        end = time.monotonic() + 1
        while not later.is_dir() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        return {file.name for file in folder.iterdir()}

    def upload_folder(folder_path, path_in_repo=None, **options):
        read.append(uploads.submit(files_after_a_while if path_in_repo else str, folder_path))
        return read[-1]

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **options: None)
    monkeypatch.setattr(
        DeltaLlavaTrainer,
        "init_hf_repo",
        lambda self: vars(self).update(hub_model_id="user/pushed", push_in_progress=None),
    )
    pushed = {"push_to_hub": True, "hub_model_id": "user/pushed", "hub_strategy": "checkpoint"}
    if "eval_strategy" in changes:
        changes = {**changes, "eval_data_path": str(data_folder / "data.json")}
    run_arguments = arguments(**pushed, **changes, save_strategy="steps", save_total_limit=1)
    trained(run_arguments)
    for future in read[1::2]:
        assert future.result() >= {"model.safetensors", "optimizer.pt", "trainer_state.json"}
    assert [folder.name for folder in Path(run_arguments.training.output_dir).glob("checkpoint-*")] == kept


def test_budgets_follow_their_weights(arguments):
    trainer, _ = prepare(arguments(visual_token_budgets=[16, 4, 1], visual_token_budget_weights=[6, 3, 1]))
    drawn = [trainer.budget_of_step(step) for step in range(2000)]
    assert drawn.count(16) / 2000 == pytest.approx(0.6, abs=0.04)
    assert drawn.count(4) / 2000 == pytest.approx(0.3, abs=0.04)


def test_grouped_rows_have_similar_lengths_and_every_row_comes_once():
    lengths = torch.randint(5, 400, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = GroupedSampler(8, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(512))
    assert list(sampler) == first
    sampler.epoch = 1
    assert list(sampler) != first

    def padding(order):
        batches = [order[start : start + 8] for start in range(0, len(order), 8)]
        padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
        return 1 - sum(lengths) / padded

    assert padding(first) < 0.1
    assert padding(list(range(512))) > 0.3


def smoothed_cross_entropy(logits, targets, factor):
    """`(1 - factor) x` the negative log-probability `+ factor x` its mean over the vocabulary, per learned token."""
    log_probabilities = logits.log_softmax(-1)[targets != -100]
    targets = targets[targets != -100]
    own = -log_probabilities.gather(1, targets[:, None])[:, 0]
    return ((1 - factor) * own - factor * log_probabilities.mean(1)).mean()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_smoothed_labels_are_those_of_the_next_token(arguments, accumulation):
    """In Trainer itself only classes that transformers knows get their labels shifted."""
    changes = {"train_sampling_strategy": "sequential", "max_steps": 1, "label_smoothing_factor": 0.1}
    trainer, _ = prepare(
        arguments(**changes, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    )
    batch, _ = trainer.expanded(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]), 4)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    right = smoothed_cross_entropy(logits[:, :-1], labels[:, 1:], 0.1).item()
    not_shifted = smoothed_cross_entropy(logits, labels, 0.1).item()
    trainer.train()
    assert losses(trainer) == pytest.approx([right], rel=1e-5)
    assert abs(right - not_shifted) > 1e-3


def test_noise_on_embeddings_changes_the_training_and_not_the_saved_model(arguments, tmp_path):
    """`neftune_noise_alpha` finds the language model's embeddings, and takes its noise off again."""
    plain = trained(arguments(max_steps=1, output_dir=str(tmp_path / "a")))
    noisy = trained(arguments(max_steps=1, neftune_noise_alpha=20.0, output_dir=str(tmp_path / "b")))
    assert losses(noisy) != pytest.approx(losses(plain), rel=1e-4)
    embedding = noisy.model.get_input_embeddings()
    assert not embedding._forward_hooks
    ids = torch.tensor([[5, 6]])
    assert torch.equal(embedding.train()(ids), embedding.weight[ids])


def evaluated(arguments, data_folder, **changes):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "eval_data_path": str(data_folder / "data.json"), **changes}
    trainer, _ = prepare(arguments(**changes))
    return trainer, trainer.evaluate()


def test_evaluation_runs_through_trainer(arguments, data_folder):
    trainer = trained(arguments(eval_strategy="steps", eval_steps=2, eval_data_path=str(data_folder / "data.json")))
    figures = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(figures) == 2
    assert figures[1] < figures[0]


def test_the_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch(arguments, data_folder, tmp_path):
    """Rows of different lengths, one without anything to read, one batch without a picture."""
    rows = json.loads((data_folder / "data.json").read_text())[:7]
    rows[1]["conversations"][1]["value"] = "A long answer, " * 9
    rows[5]["image"] = "broken.png"
    images = shutil.copytree(data_folder / "images", tmp_path / "images")
    (images / "broken.png").write_text("no picture")
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    changes = {
        "eval_data_path": str(tmp_path / "eval.json"),
        "eval_image_folder": str(images),
        "on_broken_image": "skip",
    }
    figures = []
    for size in (1, 2, 7):
        output_dir = str(tmp_path / str(size))
        trainer, each = evaluated(
            arguments, data_folder, per_device_eval_batch_size=size, output_dir=output_dir, **changes
        )
        figures.append((each["eval_loss"], each["eval_skipped_rows"]))
        assert not trainer.skipped
    total, learned = 0.0, 0
    for index in (0, 1, 2, 3, 4, 6):
        batch, _ = trainer.expanded(trainer.eval_collator([trainer.eval_dataset[index]]), 4)
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += trainer.model.eval()(**batch).loss.item() * count
        learned += count
    assert [loss for loss, _ in figures] == pytest.approx([total / learned] * 3, rel=1e-5)
    assert [skipped for _, skipped in figures] == [1, 1, 1]


@pytest.mark.parametrize("size", [1, 5])
def test_generated_answers_are_those_of_generate(arguments, data_folder, tmp_path, size):
    """Compared with `generate` on each row's prompt, through a metric of the user's that keeps what it was given."""
    (tmp_path / "mine.py").write_text(
        "import json, pathlib\n"
        "def counted(predictions, references):\n"
        f"    pathlib.Path({str(tmp_path / 'seen.json')!r}).write_text(json.dumps([predictions, references]))\n"
        "    return {'rows': len(predictions)}\n"
    )
    trainer, figures = evaluated(
        arguments,
        data_folder,
        per_device_eval_batch_size=size,
        predict_with_generate=True,
        generation_max_new_tokens=5,
        metric=f"{tmp_path / 'mine.py'}:counted",
    )
    assert figures["eval_rows"] == 16
    predictions, references = json.loads((tmp_path / "seen.json").read_text())
    processor, model = trainer.processing_class, trainer.model
    for row, prediction, reference in zip(
        json.loads((data_folder / "data.json").read_text()), predictions, references, strict=True
    ):
        *turns, answer = row["conversations"]
        assert reference.strip() == answer["value"]
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        messages = [
            {
                "role": {"human": "user", "gpt": "assistant"}[turn["from"]],
                "content": [{"type": "image"}] * turn["value"].count("<image>")
                + [{"type": "text", "text": turn["value"].replace("<image>", "").strip()}],
            }
            for turn in turns
        ]
        inputs = processor(
            text=processor.apply_chat_template(messages, add_generation_prompt=True),
            images=[data_folder / "images" / name for name in names] or None,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert prediction == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_exact_match_is_the_share_of_equal_answers():
    assert exact_match(["Yes ", "no", "A cat"], ["yes", "No.", "a cat"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0
    for name, words in (
        ("bleu", "not known"),
        ("json:nothing", "cannot be loaded"),
        ("none.py:f", "cannot be loaded"),
        ("json:__name__", "is no function"),
    ):
        with pytest.raises(UserError, match=words):
            load_metric(name)


def test_answers_that_were_cut_are_asked_and_not_scored(arguments, data_folder, tmp_path):
    """Rows that show a picture again after their first answer, cut everywhere from there on."""
    rows = json.loads((data_folder / "data.json").read_text())[:3]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    cut = {"image": ["0.png", "1.png"], "conversations": [*turns, *turns]}
    (tmp_path / "eval.json").write_text(json.dumps([*rows, cut]))
    common = {"eval_data_path": str(tmp_path / "eval.json"), "predict_with_generate": True, "max_steps": 1}
    trainer, figures = evaluated(arguments, data_folder, **common, output_dir=str(tmp_path / "whole"))
    assert "eval_cut_answers" not in figures
    whole, _ = trainer.expanded(trainer.eval_collator([trainer.eval_dataset[3]]), 4)
    length = int(whole["attention_mask"].sum())
    first = (whole["labels"][0] != -100).nonzero()[0].item()
    for max_length in (first + 2, (first + length) // 2, length - 1):
        output_dir = str(tmp_path / str(max_length))
        _, figures = evaluated(arguments, data_folder, **common, max_length=max_length, output_dir=output_dir)
        assert figures["eval_cut_answers"] >= 1
        assert "eval_exact_match" in figures


def test_rows_that_the_first_check_left_out_are_counted(arguments, data_folder, tmp_path):
    rows = json.loads((data_folder / "data.json").read_text())[:4]
    rows[1] = {"conversations": []}
    rows[2]["image"] = ["nowhere.png"] * 2
    (tmp_path / "some.json").write_text(json.dumps(rows))
    some = {"on_bad_row": "skip", "on_broken_image": "skip"}
    paths = {"data_path": str(tmp_path / "some.json"), "eval_data_path": str(tmp_path / "some.json")}
    trainer, figures = evaluated(arguments, data_folder, **some, **paths)
    assert figures["eval_skipped_rows"] == 2
    assert len(trainer.all_skipped()) == 2


BAD_METRICS = {
    "the trainer's own name": ({"loss": 0.0}, "gives loss, which the trainer measures itself"),
    "no number": ("good", "failed on 2 answers .*good"),
    "nothing": (None, "failed on 2 answers"),
    "something nested": ({"f1": {"a": 1}}, "failed on 2 answers"),
}


@pytest.mark.parametrize(("value", "words"), BAD_METRICS.values(), ids=BAD_METRICS.keys())
def test_a_metric_that_measures_nothing_is_one_line(value, words):
    with pytest.raises(UserError, match=words):
        scores(lambda predictions, references: value, ["a", "b"], ["a", "c"])
    with pytest.raises(UserError, match=r"failed on 1 answers .*ZeroDivisionError"):
        scores(lambda predictions, references: 1 / 0, ["a"], ["b"])
    assert scores(functools.partial(exact_match), ["a"], ["a"]) == {"partial": 1.0}


def test_a_metric_for_the_best_model_that_nobody_measures_is_one_line(arguments, data_folder, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(predictions, references):\n    return 1.0\n")
    metric = {"predict_with_generate": True, "generation_max_new_tokens": 1, "metric": f"{tmp_path}/mine.py:mine"}
    with pytest.raises(UserError, match=r"metric_for_best_model: f1 is not among .*: loss, mine"):
        evaluated(arguments, data_folder, **metric, metric_for_best_model="f1")


def test_a_length_that_leaves_nothing_to_learn_ends_the_run(arguments):
    with pytest.raises(UserError, match="max_length: no row has an answer within 3 tokens"):
        run(arguments(max_length=3))


def test_what_no_run_can_go_on_from_is_refused(arguments, data_folder, tmp_path):
    file = tmp_path / "rows.json"
    rows = json.loads((data_folder / "data.json").read_text())
    file.write_text(json.dumps(rows))
    common = {"data_path": str(file), "save_strategy": "steps", "save_steps": 2}
    trained(arguments(**common))
    file.write_text(json.dumps(rows[:12]))
    with pytest.raises(UserError, match="a run of 16 rows, and the data now has 12"):
        prepare(arguments(**common, resume_from_checkpoint="true"))
    alone = {**common, "save_only_model": True, "output_dir": str(tmp_path / "alone")}
    trained(arguments(**alone))
    with pytest.raises(UserError, match="was saved with save_only_model"):
        prepare(arguments(**alone, resume_from_checkpoint="true"))


def test_training_stops_early_when_evaluation_does_not_improve(arguments, data_folder):
    """The loss is asked to rise, so that it never improves on the first evaluation."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trained(
        arguments(
            **best,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            eval_data_path=str(data_folder / "data.json"),
            early_stopping_patience=1,
        )
    )
    assert trainer.state.global_step == 2
    assert trainer.state.max_steps == 4


def test_an_external_logger_gets_every_figure(arguments, tmp_path, monkeypatch):
    """`report_to: tensorboard` through Trainer's own integration, read back with TensorBoard's reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trained(arguments(report_to="tensorboard", projector_learning_rate=1e-3))
    logged = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in ("loss", "padding_share", "projector_learning_rate"):
        expected = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(expected) == 4
        assert [event.value for event in logged.Scalars(f"train/{name}")] == pytest.approx(expected, rel=1e-6)


def test_compiled_training_computes_the_same(arguments, tmp_path):
    plain = trained(arguments(max_steps=1, output_dir=str(tmp_path / "a")))
    compiled = trained(arguments(max_steps=1, torch_compile_backend="eager", output_dir=str(tmp_path / "b")))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


# Every step sees all rows, so that the loss can only fall.
SAME_ROWS = {"per_device_train_batch_size": 16, "num_train_epochs": 4, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw_torch_fused", 1e-3), ("sgd", 0.1), ("adafactor", 1e-3)])
def test_other_optimizers(arguments, optimizer, rate):
    trainer = trained(arguments(optim=optimizer, learning_rate=rate, projector_learning_rate=rate / 2, **SAME_ROWS))
    name = {"adamw_torch_fused": "AdamW", "sgd": "SGD", "adafactor": "Adafactor"}[optimizer]
    assert type(trainer.optimizer.optimizer).__name__ == name
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate, rate / 2}
    steps = losses(trainer)
    assert len(steps) == 4
    assert all(after < before - 0.01 for before, after in itertools.pairwise(steps))


def test_bf16_keeps_trained_weights_in_fp32(arguments):
    trainer, _ = prepare(arguments(bf16=True, train_language_model=False, learning_rate=1e-2, **SAME_ROWS))
    dtypes = {part_of(name): set() for name, _ in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        dtypes[part_of(name)].add(parameter.dtype)
    assert dtypes == {
        PROJECTOR: {torch.float32},
        VISION_TOWER: {torch.bfloat16},
        "language model": {torch.bfloat16},
    }
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05


def test_skipped_rows_are_counted_in_the_log(arguments, tmp_path):
    file = write_data(tmp_path / "broken")
    for name in ("0.png", "5.png"):
        (tmp_path / "broken" / "images" / name).write_text("no picture")
    trainer = trained(
        arguments(
            data_path=str(file),
            image_folder=str(tmp_path / "broken" / "images"),
            on_broken_image="skip",
            num_train_epochs=2,
        )
    )
    assert sum(entry.get("skipped_rows", 0) for entry in trainer.state.log_history) == 4
    assert sorted(message.rpartition("/")[2] for message in trainer.skipped) == [
        "0.png: not a picture",
        "5.png: not a picture",
    ]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))


def test_padding_share_is_logged(arguments):
    trainer = trained(arguments(per_device_train_batch_size=1))
    shares = sorted(entry["padding_share"] for entry in trainer.state.log_history if "loss" in entry)
    assert shares[:12] == [0.0] * 12
    assert all(0 < share < 0.1 for share in shares[12:])  # the blank picture of rows without one
    assert len(shares) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_keeps_order_and_budgets(arguments, data_folder, tmp_path, workers):
    rows = json.loads((data_folder / "data.json").read_text())
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    common = {"max_steps": 4, "visual_token_budgets": [16, 4, 1]}
    in_order = trained(arguments(train_sampling_strategy="sequential", output_dir=str(tmp_path / "a"), **common))
    streamed = trained(
        arguments(
            data_path=str(file),
            streaming=True,
            dataloader_num_workers=workers,
            output_dir=str(tmp_path / "b"),
            **common,
        )
    )
    assert losses(streamed) == pytest.approx(losses(in_order), rel=1e-6)


def test_a_stream_resumed_in_its_second_pass_equals_uninterrupted(arguments, data_folder, tmp_path):
    """Ten rows and four a step: later passes begin within a step, and budgets are drawn on."""
    rows = json.loads((data_folder / "data.json").read_text())[:10]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = {
        "data_path": str(tmp_path / "data.jsonl"),
        "streaming": True,
        "max_steps": 6,
        "visual_token_budgets": [16, 4, 1],
        "save_strategy": "steps",
        "save_steps": 4,
    }
    runs = []
    for resume in ("auto", "true"):
        trainer, checkpoint = prepare(arguments(**common, resume_from_checkpoint=resume))
        recorder = BudgetRecorder(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        runs.append((losses(trainer), recorder.budgets, weights(trainer.model)))
        shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    whole, resumed = runs
    assert len(whole[0]) == 6
    assert resumed[0] == whole[0]
    assert whole[1] == [trainer.budget_of_step(step) for step in range(6)]
    assert resumed[1] == whole[1][4:]
    assert len(set(whole[1])) > 1
    assert_same_weights(whole[2], resumed[2], atol=0, rtol=0)


def test_workers_do_not_change_the_run(arguments, tmp_path):
    alone = trained(arguments(output_dir=str(tmp_path / "a")))
    helped = trained(arguments(dataloader_num_workers=2, output_dir=str(tmp_path / "b")))
    assert losses(helped) == losses(alone)


def test_composing_a_language_model_and_a_tower(arguments, tmp_path):
    layout = TrainingLayout()
    tensors = write_base_model(tmp_path / "llm", layout)
    write_tower(tmp_path / "tower", layout)
    folder = run(
        arguments(
            model=None,
            language_model=str(tmp_path / "llm"),
            vision_tower=str(tmp_path / "tower"),
            train_language_model=False,
            projector={"delta_rank": 8, "memory_feature_layers": [2, 4, 6, 7]},
            num_visual_tokens=4,
            format="v1",
            image_aspect_ratio="square",
        )
    )
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
    assert model.config.delta_rank == 8
    state = model.state_dict()
    rows = tensors["model.embed_tokens.weight"].shape[0]
    torch.testing.assert_close(
        state["model.language_model.embed_tokens.weight"][:rows], tensors["model.embed_tokens.weight"]
    )
    torch.testing.assert_close(state["lm_head.weight"][:rows], tensors["lm_head.weight"])
    assert state["lm_head.weight"].shape[0] == rows + 1
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    assert processor.image_processor.do_pad is False
    continued = run(
        arguments(model=str(folder), output_dir=str(Path(folder).with_name("stage2")), num_visual_tokens=4)
    )
    assert DeltaLlavaProcessor.from_pretrained(continued).image_processor.do_pad is True


BAD_STARTS = {
    "missing data": ({"data_path": "none.json"}, "no such data file"),
    "missing pictures folder": ({"image_folder": "nowhere"}, "image_folder: nowhere is no folder"),
    "missing model": ({"model": "./nothing"}, "--model nothing does not exist"),
    "impossible budget": ({"visual_token_budgets": [16, 5]}, r"num_visual_tokens=5 is not possible.*16, 4, 1"),
    "impossible default": ({"num_visual_tokens": 9}, r"num_visual_tokens=9 is not possible"),
    "LoRA targets": (
        {"lora_rank": 4, "train_language_model": False, "lora_target_modules": ["nope"]},
        "no layer named nope",
    ),
}


@pytest.mark.parametrize(("changes", "words"), BAD_STARTS.values(), ids=BAD_STARTS.keys())
def test_bad_starts(arguments, changes, words):
    with pytest.raises(UserError, match=words) as raised:
        run(arguments(**changes))
    assert "\n" not in str(raised.value)


def test_bad_folders(arguments, tmp_path, hub_folder):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama model, no Delta-LLaVA"):
        run(arguments(model=str(tmp_path / "llama")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        run(arguments(model=str(tmp_path / "empty")))
    shutil.copytree(hub_folder, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no usable processor"):
        run(arguments(model=str(tmp_path / "cut")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(arguments(output_dir=str(tmp_path / "file")))
    before = sorted((tmp_path / "llama").iterdir())
    with pytest.raises(UserError, match="llama is the model to start from"):
        run(arguments(model=str(tmp_path / "llama"), output_dir=str(tmp_path / "llama")))
    with pytest.raises(UserError, match="holds a model that `finetune` did not write"):
        run(arguments(output_dir=str(tmp_path / "llama")))
    assert sorted((tmp_path / "llama").iterdir()) == before


def test_a_damaged_preprocessor_of_a_tower_is_named(arguments, tmp_path):
    layout = TrainingLayout()
    write_base_model(tmp_path / "llm", layout)
    write_tower(tmp_path / "tower", layout)
    (tmp_path / "tower" / "preprocessor_config.json").write_text("{")
    parts = {"model": None, "language_model": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "tower")}
    projector = {"memory_feature_layers": [2, 4, 6, 7]}
    with pytest.raises(UserError, match=r"tower.preprocessor_config\.json is not valid JSON"):
        run(arguments(**parts, projector=projector, num_visual_tokens=4))


def test_impossible_configs_are_one_line(arguments, exact_folder, tmp_path):
    layout = TrainingLayout()
    write_base_model(tmp_path / "llm", layout)
    write_tower(tmp_path / "tower", layout)
    parts = {"model": None, "language_model": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "tower")}
    projector = {"memory_feature_layers": [2, 4, 6, 7], "delta_rank": -1}
    with pytest.raises(UserError, match=r"projector cannot be built.*delta_rank=-1"):
        run(arguments(**parts, projector=projector, num_visual_tokens=4))
    folder = shutil.copytree(exact_folder, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_visual_tokens": 5}))
    with pytest.raises(UserError, match=r"no readable config\.json.*num_visual_tokens=5"):
        run(arguments(model=str(folder)))


def test_missing_pictures_stop_before_the_first_step(arguments, tmp_path):
    file = write_data(tmp_path / "broken")
    (tmp_path / "broken" / "images" / "0.png").unlink()
    changes = {"data_path": str(file), "image_folder": str(tmp_path / "broken" / "images")}
    with pytest.raises(UserError, match=r"data\.json: line 2 \(row 0\): image .*0\.png: missing.*--image_folder"):
        run(arguments(**changes))
    assert run(arguments(on_broken_image="skip", **changes)).is_dir()


def test_a_broken_picture_in_a_worker_is_one_line(arguments, tmp_path):
    file = write_data(tmp_path / "broken")
    (tmp_path / "broken" / "images" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"line 2 \(row 0\): image .*0\.png: not a picture") as raised:
        run(
            arguments(
                data_path=str(file),
                image_folder=str(tmp_path / "broken" / "images"),
                dataloader_num_workers=1,
            )
        )
    assert "\n" not in str(raised.value)
