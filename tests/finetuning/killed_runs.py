"""Runs in forked processes that are killed: `python -m tests.finetuning.killed_runs SETTINGS.json FOLDER MOMENTS`.

A child counts what it does to files of its run (opening, renaming, removing), and kills itself at a chosen count;
another child then continues the run. The moments are spread evenly; one more lies amid the files of the result that
are moved into the run's folder. Prints one line of JSON: what an undisturbed run does, and what became of each other.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from modeling_delta_llava.finetuning.arguments import build_arguments
from modeling_delta_llava.finetuning.checkpoints import UNFINISHED_FOLDER, last_finished_checkpoint
from modeling_delta_llava.finetuning.run import prepare

# Files of the result on their way into the run's folder.
RESULT = f"{UNFINISHED_FOLDER}/moving/"
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def watch(folder, moment, events):
    """From now on, `events` on files below `folder` are noted, and the process ends without a word at `moment`."""

    def on_event(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            events.append(f"{event} {arguments[0]}")
            if len(events) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def child(settings, folder, moment=None):
    """Runs (or continues) a training in a fork; its wait status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    events = []
    watch(folder, moment, events)
    trainer, checkpoint = prepare(build_arguments({**settings, "output_dir": str(folder)}))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": losses, "events": events, "from": checkpoint.name if checkpoint else None}
    folder.with_suffix(".json").write_text(json.dumps(result))
    os._exit(0)


def result_of(folder):
    return json.loads(folder.with_suffix(".json").read_text())


def main(settings_file, folder, moments):
    settings = {**json.loads(Path(settings_file).read_text()), "resume_from_checkpoint": "auto"}
    folder = Path(folder)
    whole = folder / "whole"
    assert child(settings, whole) == 0
    events = result_of(whole).pop("events")
    spread = [round(len(events) * (number + 0.5) / int(moments)) for number in range(int(moments))]
    moves = [number for number, event in enumerate(events, 1) if event.startswith("os.rename") and RESULT in event]
    ends = []
    for number, moment in enumerate([*spread, moves[len(moves) // 2]]):
        run = folder / f"killed{number}"
        status = child(settings, run, moment)
        assert os.WIFSIGNALED(status), "it was to be killed"
        assert os.WTERMSIG(status) == signal.SIGKILL
        kept = last_finished_checkpoint(run)
        loads = (run / "config.json").exists()
        assert child(settings, run) == 0, f"killed at {moment} of {len(events)}, and did not go on"
        ends.append({"kept": kept.name if kept else None, "loads": loads, **result_of(run)})
        shutil.rmtree(run / "_unfinished", ignore_errors=True)
    print(json.dumps({"whole": result_of(whole), "killed": ends}))


if __name__ == "__main__":
    main(*sys.argv[1:])
