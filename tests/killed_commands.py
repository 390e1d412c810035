"""SIGKILL at many moments of the commands that write; then the same command again.

    python -m tests.killed_commands [--points 50] [COMMAND...]

Each run is a fork of one process that has imported everything, so a moment costs a second and not ten. Two runs are
killed at each moment, so that leftovers meet leftovers, before the third is left alone. All runs believe that they
have one process number, each on a host of its own, as the containers of a cluster do. A kill must leave nothing
half-written; the last run must succeed, give the same files as an undisturbed one, and leave nothing beside them, no
scratch folder and no process.
"""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from delta_llava.cli import main as command_line
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.finetuning.arguments import build_arguments
from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.finetuning.start import BASE_FOLDER
from modeling_delta_llava.hub_cards.card import write_card
from tests import tiny
from tests.finetuning.conftest import EXACT, write_data
from tests.hub_cards.conftest import client_of
from tests.hub_cards.local_hub import LocalHub
from tests.hub_cards.publishing import publish_as_it_is
from tests.training_layout import TrainingLayout, write_base_model, write_stage2, write_tower

# Seconds that a process may live on when the one that started it was killed.
SURVIVAL = 20


def content(folder: Path) -> dict[str, str]:
    """The files of a folder and their sha256; empty when it is not there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class NewFolder:
    """A command that writes OUTPUT, or one folder in it, which must be absent or whole."""

    def __init__(self, *arguments: str, part: str = "."):
        self.arguments, self.part = arguments, part
        self.expected: dict[str, str] = {}

    def prepare(self, output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)

    def run(self, output: Path) -> int:
        name, source, *options = self.arguments
        return command_line([name, source, str(output), *options])

    def is_whole(self, output: Path) -> bool:
        """Whether a killed run finished what it wrote; half of it is an error."""
        if not (output / self.part).exists():
            return False
        found = content(output / self.part)
        start = "" if self.part == "." else f"{self.part}/"
        assert {start + name: digest for name, digest in found.items()}.items() <= self.expected.items(), found.keys()
        assert len(found) == sum(name.startswith(start) for name in self.expected), "half of it"
        return True

    def check(self, output: Path) -> None:
        """After a run that nothing disturbed."""
        found = content(output)
        self.expected = self.expected or found
        differing = {name for name in found | self.expected if found.get(name) != self.expected.get(name)}
        assert not differing, f"other files than without a kill: {sorted(differing)}"


class Finetune(NewFolder):
    """What `finetune` does before the first step, the composing of `_base` included."""

    def __init__(self, settings: dict):
        super().__init__(part=BASE_FOLDER)
        self.settings = settings

    def run(self, output: Path) -> int:
        prepare(build_arguments({**self.settings, "output_dir": str(output)}))
        return 0


class Card(NewFolder):
    """`card` in a folder that holds a model and an older card: every file is the old or the new one."""

    def __init__(self, model: Path):
        super().__init__("card")
        self.model = model
        write_card(model, repo_id="you/older", licence="mit")
        self.before = content(model)

    def prepare(self, output: Path) -> None:
        super().prepare(output)
        shutil.copytree(self.model, output)

    def run(self, output: Path) -> int:
        return command_line(["card", str(output), "--repo-id", "you/newer", "--license", "apache-2.0"])

    def is_whole(self, output: Path) -> bool:
        found = {name: digest for name, digest in content(output).items() if not name.endswith(".unfinished")}
        for name, digest in found.items():
            assert digest in (self.before.get(name), self.expected.get(name)), f"half of {name}"
        return found == self.expected


class Publish(NewFolder):
    """`publish --tag` to a Hub on loopback, each time as a new repository: one commit or none, and the tag last."""

    def __init__(self, model: Path, hub: LocalHub, home: Path, checks: bool):
        super().__init__("publish")
        self.model, self.hub, self.home, self.checks = model, hub, home, checks
        self.count = 0

    def prepare(self, output: Path) -> None:
        super().prepare(output)
        shutil.copytree(self.model, output)
        self.count += 1
        self.repo_id = f"user/model-{self.count}"
        write_card(output, repo_id=self.repo_id, licence="apache-2.0")
        self.sent = content(output)

    def run(self, output: Path) -> int:
        with client_of(self.hub.environment(self.home)):
            if self.checks:
                return command_line(["publish", str(output), self.repo_id, "--tag", "v1.0"])
            return publish_as_it_is(output, self.repo_id, tag="v1.0")

    def is_whole(self, output: Path) -> bool:
        time.sleep(0.2)  # the Hub may still be at work on what it was asked
        assert content(output) == self.sent, "the folder itself was changed"
        repo = self.hub.repos.get(self.repo_id)
        if repo is None or len(repo.history()) == 1:
            assert repo is None or not repo.tags, "a tag before the commit"
            return False
        held = self.hub.files(self.repo_id)
        held.pop(".gitattributes", None)
        assert held == self.sent, "half of a commit"
        return bool(repo.tags)

    def check(self, output: Path) -> None:
        assert self.is_whole(output), "no commit or no tag"
        repo = self.hub.repos[self.repo_id]
        titles = [commit.title for commit in repo.history()]
        assert len(titles) == 2, titles
        assert list(repo.tags.values()) == [repo.branches["main"]]


def forked(command: NewFolder, output: Path, host: str, seconds: float | None) -> int:
    """Runs a command in a fork, killed after some time; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.getpid, socket.gethostname = lambda: 4242, lambda: host
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(output.parent.parent / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = command.run(output)
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left_running(work: Path) -> list[str]:
    """Command lines of the processes that work on files in `work`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(work) in line:
            lines.append(line)
    return lines


def check_nothing_left(work: Path, scratch: Path) -> None:
    """No process and no scratch folder outlives a run by more than [`SURVIVAL`]."""
    end = time.monotonic() + SURVIVAL
    while (left := [*left_running(work), *map(str, scratch.iterdir())]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, f"left over: {left}"


def kill_at_many_moments(command: NewFolder, work: Path, points: int) -> tuple[int, int]:
    """Kills one command `points` times, twice each; how often it was still running, and how often all was done."""
    output, scratch = work / "out" / "output", Path(tempfile.gettempdir())
    output.parent.mkdir(parents=True)
    command.prepare(output)
    began = time.monotonic()
    assert forked(command, output, "undisturbed", None) == 0, "it fails undisturbed"
    took = time.monotonic() - began
    command.check(output)
    killed = whole = 0
    for point in range(points):
        where = f"killed at {point}/{points}"
        command.prepare(output)
        try:
            for number in range(2):
                status = forked(command, output, f"host-{point}-{number}", took * (point + 0.5) / points)
                killed += status == -signal.SIGKILL
                check_nothing_left(work, scratch)
                if command.is_whole(output):
                    whole += 1
                    command.prepare(output)
            assert forked(command, output, f"host-{point}-last", None) == 0, "it cannot be run again"
            check_nothing_left(work, scratch)
            command.check(output)
            beside = [path.name for path in output.parent.iterdir()]
            assert beside == ["output"], f"left beside OUTPUT: {beside}"
        except AssertionError as error:
            printed = (work / "stderr.txt").read_text()[-2000:]
            raise SystemExit(f"{where}: {error}\nThe last run printed:\n{printed}") from error
    return killed, whole


def commands(work: Path, hub: LocalHub) -> dict[str, NewFolder]:
    """What is run, by name; with sources written into `work`."""
    source, converted, model = work / "source", work / "hub", work / "model"
    layout = TrainingLayout()
    write_stage2(source, layout, shards=2)
    convert(str(source), converted, progress=False)
    tiny.write_hub_folder(model)
    write_base_model(work / "llm", layout)
    tower = write_tower(work / "tower", layout)
    data = write_data(work / "data", rows=4)
    parts = {"language_model": str(work / "llm"), "vision_tower": str(tower)}
    rows = {"data_path": str(data), "image_folder": str(data.parent / "images")}
    projector = {"projector": {"memory_feature_layers": [2, 4, 6, 7]}}
    shards = ("--max-shard-size", "300KB", "--no-progress")
    return {
        "convert": NewFolder("convert", str(source), *shards),
        "export": NewFolder("export", str(converted), *shards),
        "quantize": NewFolder("quantize", str(converted), "--base-model", "you/model"),
        "card": Card(shutil.copytree(model, work / "carded")),
        "finetune": Finetune({**EXACT, **parts, **rows, **projector}),
        # Without the checks before, which take most of the time, all moments fall into the sending.
        "send": Publish(model, hub, work / "home", checks=False),
        "publish": Publish(model, hub, work / "home", checks=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", help="convert, export, quantize, card, finetune, send, publish; or all")
    parser.add_argument("--points", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, LocalHub(Path(folder) / "served") as hub:
        work, scratch = Path(folder), Path(folder) / "scratch"
        scratch.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        made = commands(work, hub)
        for name in arguments.commands or made:
            began = time.monotonic()
            killed, whole = kill_at_many_moments(made[name], work / f"killed-{name}", arguments.points)
            print(
                f"{name}: {2 * arguments.points} runs, {killed} killed, {whole} with all done, none with half of it; "
                f"{arguments.points} times run again; {time.monotonic() - began:.0f} s"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
