"""`delta-llava evaluate`: lmms-eval's own evaluator over one model at several budgets.

Written below OUTPUT: `answers/`, which a run adds to while it goes and a later one goes on from, and `results/`, which
appears when everything is scored: for each budget a result file as lmms-eval writes it and the samples of each task.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from delta_llava.errors import UserError, printable, reason, told
from modeling_delta_llava.asking import model_folder
from modeling_delta_llava.building import check_budgets
from modeling_delta_llava.folders import atomic_folder, check_output_folder

from . import answers
from .efficiency import read_config

LMMS_EVAL, FILELOCK_END = "0.7.3", "4.3"
INSTALL = f"pip install 'delta-llava[evaluation]' and then pip install --no-deps lmms-eval=={LMMS_EVAL}"
RESULTS = "results"
NO_KEY = (
    "note: lmms-eval sends answers that name no option to OpenAI's API, and guesses when that fails, as it will "
    "without OPENAI_API_KEY; mmbench_en_dev_static does neither"
)


def check_installed() -> None:
    """Imports lmms-eval.

    Raises:
        UserError: it is not installed, or something that it needs is not.
    """
    if find_spec("lmms_eval") is None:
        raise UserError(f"lmms-eval is not installed: {INSTALL}")
    if Version(version("filelock")) >= Version(FILELOCK_END):  # it would fail when the model is loaded
        raise UserError(
            f"lmms-eval needs filelock before {FILELOCK_END}, and {version('filelock')} is installed: "
            f"pip install 'filelock<{FILELOCK_END}'"
        )
    try:
        importlib.import_module("lmms_eval.evaluator")
    except ImportError as error:
        raise UserError(f"lmms-eval cannot be imported ({reason(error)}): {INSTALL}") from error


def known_tasks(names: Sequence[str], include_path: Path | None = None):
    """lmms-eval's index of tasks, which has all of `names`.

    Args:
        include_path: folder of further tasks.

    Raises:
        UserError: a name that is none, with the nearest ones.
    """
    from lmms_eval.tasks import TaskManager

    from .lmms_model import NAME

    if include_path is not None and not include_path.is_dir():
        raise UserError(
            f"--include-path {include_path} is no folder: give the folder that holds the tasks' YAML files"
        )
    if not names:
        raise UserError("--tasks names no task: give names of lmms-eval such as gqa,pope, or paper")
    with told("lmms-eval's tasks cannot be listed", "mend the YAML file, or leave out --include-path"):
        manager = TaskManager(
            "WARNING", include_path=None if include_path is None else str(include_path), model_name=NAME
        )
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"no task is called {printable(name)!r}: {hint}`lmms-eval tasks list` lists them all")
    return manager


def load_tasks(manager, names: Sequence[str]) -> list:
    """The tasks with their rows, those of groups one by one.

    Raises:
        UserError: the rows of one cannot be had, or what scores it is not installed.
    """
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    def leaves(loaded: dict) -> list:
        return [leaf for value in loaded.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]

    tasks = {}
    for name in names:
        advice = "connect to the Hub (`hf auth login` where a data set asks for it), or leave the task out"
        with told(f"the data of task {name} cannot be had", advice):
            try:
                found = leaves(get_task_dict([name], manager, "chat"))
            except RetryError as error:
                raise error.last_attempt.exception() from None
            except ImportError as error:
                raise UserError(f"task {name} needs what is not installed ({reason(error)}): install it") from error
            tasks |= {task.config.task: task for task in found}
    for name, task in tasks.items():
        if any("cider" in metric.lower() for metric in metrics_of(task)) and shutil.which("java") is None:
            raise UserError(f"task {name} scores captions with Java, which is not installed: install a Java runtime")
    return list(tasks.values())


def metrics_of(task) -> list[str]:
    """Names of a task's metrics."""
    return [str(entry["metric"]) for entry in task.config.metric_list or ()]


def evaluate(
    model: str,
    tasks: Sequence[str],
    output: Path,
    budgets: Sequence[int] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Scores a model on tasks of lmms-eval, at one or several budgets.

    Started by `accelerate launch` or `torchrun`, every process answers its share; the first one scores and writes.

    Args:
        model: Hub folder or id.
        tasks: names of lmms-eval.
        output: folder; what an earlier run left there of the same questions is not asked again.
        budgets: visual tokens per picture; by default the config's.
        include_path: folder of further tasks.
        limit: rows of each task; by default all.
        batch_size: questions that are answered together.
        revision: branch, tag or commit of a model on the Hub.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (as saved), bfloat16, float16 or float32.
        say: receives a line about each step.

    Returns:
        The result files, one for each budget; in processes that are not the first, none.

    Raises:
        UserError: lmms-eval is not installed; the model is no Delta-LLaVA or has no weights; an illegal budget; an
            unknown task; rows that cannot be had; a folder that holds something else.
    """
    check_installed()
    place = model_folder(model, revision)
    config = read_config(str(place))
    check_budgets(config, budgets)
    budgets = list(dict.fromkeys(budgets or [config.num_visual_tokens]))
    answers.revision_of(place)
    output = Path(output)
    kept = output / answers.FOLDER
    # Killed before its first answer, a run leaves the unfinished results alone.
    left = {path.name for path in output.iterdir()} if output.is_dir() else set()
    is_ours = kept.is_dir() or left == {f".{RESULTS}.unfinished"}
    check_output_folder(output, f"OUTPUT {output}", "holds no evaluation", is_ours)
    manager = known_tasks(tasks, include_path)
    say(f"reading the rows of {', '.join(tasks)}")
    loaded = load_tasks(manager, tasks)
    if any("gpt" in metric for task in loaded for metric in metrics_of(task)) and "OPENAI_API_KEY" not in os.environ:
        say(NO_KEY)

    from .lmms_model import DeltaLlavaForEvaluation

    asked = DeltaLlavaForEvaluation(str(place), budgets, None, dtype, batch_size, device, kept)
    is_first = asked.rank == 0
    with atomic_folder(output / RESULTS, overwrite=True) if is_first else contextlib.nullcontext() as building:
        names = []
        for budget in budgets:
            say(f"answering and scoring at {budget} visual tokens")
            results = _scored(asked, budget, loaded, manager, limit, output)
            if is_first:
                results["config"]["model_args"] = f"pretrained={model},num_visual_tokens={budget}"
                names.append(_write(results, asked, budget, building))
    return [output / RESULTS / name for name in names] if is_first else []


def _scored(asked, budget: int, tasks: list, manager, limit: int | None, output: Path) -> dict[str, Any] | None:
    """lmms-eval's results at a budget, samples included; `None` in processes that are not the first."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import get_datetime_str

    asked.num_visual_tokens = budget
    # What lmms-eval's own command line would hand to tasks: some write files for a test server there.
    arguments = argparse.Namespace(output_path=str(output / str(budget)), process_with_media=False)
    advice = "mend that; the same command goes on from there"
    # What scores captions prints as it goes.
    with told(f"the evaluation at {budget} visual tokens failed", advice), contextlib.redirect_stdout(sys.stderr):
        return simple_evaluate(
            model=asked,
            tasks=tasks,
            task_manager=manager,
            batch_size=asked.batch_size,
            device=str(asked.device),
            limit=limit,
            log_samples=True,
            cli_args=arguments,
            datetime_str=get_datetime_str(timezone="UTC"),
        )


def _write(results: dict[str, Any], asked, budget: int, folder: Path) -> str:
    """Writes results and samples of a budget; the name of the result file, which a card takes."""
    from lmms_eval.utils import handle_non_serializable

    def dumped(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False) + "\n"

    for task, samples in results.pop("samples", {}).items():
        lines = "".join(dumped(sample) for sample in samples)
        (folder / f"samples_{task}_{budget}.jsonl").write_text(lines, encoding="utf-8")
    names = ("lmms_eval", "transformers", "torch", "delta_llava")
    results["config"] |= {
        "model_revision": asked.revision,
        "num_visual_tokens": budget,
        "dtype": str(asked.dtype).removeprefix("torch."),
        "versions_of_packages": {name: version(name) for name in names},
    }
    name = f"{results['date']}_{budget}_results.json"
    (folder / name).write_text(dumped(results, indent=2), encoding="utf-8")
    return name


def is_first_process() -> bool:
    """Whether this is the process that scores and writes, of those that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", 0)) == 0
