"""What the tasks beside this file make of the demo's rows, for lmms-eval; in the folder where `make demo` ran."""

from pathlib import Path

from PIL import Image

PICTURES = Path("demo-output/data/images")


def one_question_a_row(rows):
    """Rows of LLaVA's format, whose conversation asks several questions about a picture, as one row for each."""

    def split(batch):
        found = {"image": [], "question": [], "answer": []}
        for image, turns in zip(batch["image"], batch["conversations"], strict=True):
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                found["image"].append(image)
                found["question"].append(question["value"].removeprefix("<image>\n"))
                found["answer"].append(answer["value"])
        return found

    return rows.map(split, batched=True, remove_columns=rows.column_names)


def pictures(row):
    with Image.open(PICTURES / row["image"]) as picture:
        return [picture.convert("RGB")]


def caption_results(row, results):
    number = int("".join(filter(str.isdigit, row["image"])))
    return {"flickr_CIDEr": {"answer": [row["answer"]], "pred": results[0], "image_id": number}}


def cider(results, args):
    """lmms-eval's own, which needs Java."""
    from lmms_eval.tasks.flickr30k.utils import flickr_cider

    return flickr_cider(results, args)
