"""Asks a Hub folder about pictures the way a stranger would; run as a process of its own.

`python exam.py FOLDER QUESTIONS.json RESULT.json` uses nothing but the folder and transformers: this package is not
imported. QUESTIONS.json holds `budgets`, a list of visual-token budgets in which null stands for no picture at all,
and `questions`, a list of `{"image", "question"}`. RESULT.json receives, for each budget, `answers` in that order and
`seconds`, the mean time of an answer.
"""

import json
import signal
import sys
import time
from pathlib import Path

WARM_UP_QUESTIONS = 3


def examine(folder: str, budgets: list[int | None], questions: list[dict[str, str]]) -> list[dict]:
    """Answers every question at every budget, one by one, through transformers' pipeline."""
    from tqdm.auto import tqdm
    from transformers import GenerationConfig, pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
    generation = GenerationConfig.from_pretrained(folder, max_new_tokens=12)
    results = []
    for budget in budgets:
        answers, elapsed, timed = [], 0.0, questions[WARM_UP_QUESTIONS:]
        options = {} if budget is None else {"processor_kwargs": {"num_visual_tokens": budget}}
        name = "without the picture" if budget is None else f"at {budget}"
        for number, row in enumerate(tqdm(questions, desc=f"  asking, {name}", leave=False)):
            content = [{"type": "text", "text": row["question"]}]
            if budget is not None:
                content.insert(0, {"type": "image", "url": row["image"]})
            started = time.perf_counter()
            output = pipe(
                text=[{"role": "user", "content": content}],
                return_full_text=False,
                generation_config=generation,
                **options,
            )
            if number >= WARM_UP_QUESTIONS:
                elapsed += time.perf_counter() - started
            answers.append(output[0]["generated_text"].strip())
        results.append({"budget": budget, "answers": answers, "seconds": elapsed / max(1, len(timed))})
    return results


def main(folder: str, questions_file: str, result_file: str) -> None:
    asked = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    results = examine(folder, asked["budgets"], asked["questions"])
    Path(result_file).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the demo reports Ctrl-C
    main(*sys.argv[1:])
