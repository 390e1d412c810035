"""Tasks of lmms-eval over pictures drawn here: one with short answers, and lmms-eval's caption task on other rows."""

import io
import random
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, Sequence, Value

from examples.demo import drawings

SHORT, CAPTIONS = "drawn_shapes", "drawn_captions"
POST_PROMPT = "\nAnswer the question using a single word or phrase."
PROMPT = "Provide a one-sentence caption for the provided image."

UTILS = f"""
import os


# As GQA's: `datasets` sees another function in every run.
def worked_on(rows):
    mark = os.urandom(8)
    return rows.map(lambda row: {{"mark": str(mark)}})


def pictures(row):
    return [row["image"].convert("RGB")] if row["image"] else []


def question(row, lmms_eval_specific_kwargs=None):
    return row["question"] + {POST_PROMPT!r}
"""


def scenes(count: int) -> list[drawings.Scene]:
    return drawings.distinct_scenes(count, seed=5)


def picture(scene: drawings.Scene):
    image, _ = drawings.paint(scene, random.Random(str(scene)))
    return image


def short_rows(count: int) -> list[dict]:
    """Questions about drawings, two about each; the last one is about none."""
    rows = []
    for scene in scenes(count):
        for question in drawings.questions(scene, random.Random(1))[:2]:
            rows.append({"image": picture(scene), "question": question.text, "answer": question.answer})
    return [*rows, {"image": None, "question": "Say hello.", "answer": "hello"}]


def caption_rows(count: int) -> list[dict]:
    return [
        {"image": picture(scene), "caption": [drawings.caption(scene), "A few shapes."], "img_id": number}
        for number, scene in enumerate(scenes(count))
    ]


def write_tasks(folder: Path, short: list[dict], captions: list[dict] = (), max_new_tokens: int = 6) -> Path:
    """A folder for `--include-path`, with the tasks whose rows are given."""
    folder.mkdir()
    (folder / "drawn_utils.py").write_text(UTILS, encoding="utf-8")
    base = {"output_type": "generate_until", "test_split": "test"}
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    task = {
        "task": SHORT,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "short.parquet")}},
        **base,
        "generation_kwargs": settings,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "doc_to_target": "answer",
    }
    functions = "process_docs: !function drawn_utils.worked_on\n"
    functions += "doc_to_visual: !function drawn_utils.pictures\ndoc_to_text: !function drawn_utils.question\n"
    (folder / f"{SHORT}.yaml").write_text(yaml.safe_dump(task) + functions, encoding="utf-8")
    text = Value("string")
    _write(short, folder / "short.parquet", {"question": text, "answer": text})
    if captions:
        import lmms_eval.tasks

        flickr = Path(lmms_eval.tasks.__file__).parent / "flickr30k"
        task = {
            "include": str(flickr / "flickr30k_test.yaml"),
            "task": CAPTIONS,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(folder / "captions.parquet")}},
            "generation_kwargs": settings,
        }
        # CIDEr alone: METEOR takes a Java process and 20 seconds for each budget.
        (folder / "drawn_cider.py").write_text("from lmms_eval.tasks.flickr30k.utils import flickr_cider\n")
        metric = "metric_list:\n- {metric: flickr_CIDEr, aggregation: !function drawn_cider.flickr_cider}\n"
        (folder / f"{CAPTIONS}.yaml").write_text(yaml.safe_dump(task) + metric, encoding="utf-8")
        _write(captions, folder / "captions.parquet", {"caption": Sequence(text), "img_id": Value("int64")})
    return folder


def _write(rows: list[dict], file: Path, columns: dict) -> None:
    features = Features({"image": Image(), **columns})
    Dataset.from_list([{**row, "image": _encoded(row["image"])} for row in rows], features=features).to_parquet(file)


def _encoded(image) -> dict | None:
    if image is None or isinstance(image, dict):
        return image
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}
