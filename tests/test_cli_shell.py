"""The command line around the commands: help, version, errors as one line, exit statuses."""

import os
import subprocess
import sys

import pytest
import typer

from delta_llava import cli
from delta_llava.errors import UserError

HEAVY = ("torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "datasets")


@pytest.fixture
def failing_command(monkeypatch):
    """Adds a command `fail` that raises what the test puts into the returned dict, and removes it afterwards."""
    raised: dict[str, BaseException] = {}
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))

    @cli.app.command()
    def fail(count: int = 1) -> None:
        raise raised["error"]

    return raised


def test_help_and_version_import_nothing_heavy():
    """Of the program and of every command, in one process; `finetune` lists transformers' own settings too."""
    names = [command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands]
    names.remove("finetune")
    calls = [["--version"], ["-h"], ["--help"], *([name, "--help"] for name in names)]
    code = (
        "import sys\n"
        "from delta_llava.cli import main\n"
        f"statuses = [main(arguments) for arguments in {calls!r}]\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not any(statuses), statuses"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


def test_usage_errors_have_the_base_that_typer_does_not_name():
    assert cli._CommandLineError.__name__ == "ClickException"


def test_every_command_has_help_and_a_section():
    sections = {cli.USE, cli.CONVERT, cli.PUBLISH, cli.TRAIN, cli.MEASURE}
    for command in cli.app.registered_commands:
        assert command.callback.__doc__ or command.help
        assert command.rich_help_panel in sections


def test_version(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"delta-llava {version('delta-llava')}\n"


def test_console_script_is_installed():
    script = os.path.join(os.path.dirname(sys.executable), "delta-llava")
    completed = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("delta-llava ")


def test_status_of_the_process_is_that_of_the_command():
    completed = subprocess.run(
        [sys.executable, "-m", "delta_llava", "nonsense"], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 2
    assert completed.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["fail", "--nonsense"], "delta-llava fail --help"),
        (["fail", "--count", "many"], "'--count'"),
        (["fail", "extra"], "extra"),
    ],
)
def test_usage_error_is_one_line(capsys, failing_command, arguments: list[str], expected: str):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert expected in output.err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such budget: 5; legal are 576, 144"), "error: no such budget: 5; legal are 576, 144"),
        (UserError("first\n  second"), "error: first second"),
        (UserError("a\x1b[31m red\x00 name"), "error: a [31m red name"),
        (FileNotFoundError(2, "No such file or directory", "a b.jpg"), "error: No such file or directory: a b.jpg"),
        (PermissionError(13, "Permission denied", "out"), "error: Permission denied: out"),
        (OSError("x is not a local folder\nand not on the Hub"), "error: x is not a local folder and not on the Hub"),
        (typer.BadParameter("bad value"), "error: Invalid value: bad value (see 'delta-llava fail --help')"),
    ],
)
def test_user_error_is_one_line(capsys, failing_command, error: BaseException, line: str):
    failing_command["error"] = error
    assert cli.main(["fail"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"{line}\n"


def test_a_fault_of_ours_is_not_disguised(failing_command):
    failing_command["error"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupt(capsys, failing_command, error: BaseException):
    failing_command["error"] = error
    assert cli.main(["fail"]) == 130
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.strip().splitlines() == ["interrupted"]


def test_exit_status_of_a_command(failing_command):
    failing_command["error"] = typer.Exit(3)
    assert cli.main(["fail"]) == 3


@pytest.mark.parametrize("by_option", [True, False])
def test_traceback_on_request(monkeypatch, failing_command, by_option: bool):
    failing_command["error"] = UserError("wrong")
    if not by_option:
        monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(UserError, match="wrong"):
        cli.main(["--traceback", "fail"] if by_option else ["fail"])


def test_traceback_variable_set_to_zero_means_off(monkeypatch, failing_command):
    failing_command["error"] = UserError("wrong")
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "0")
    assert cli.main(["fail"]) == 2


def test_no_arguments_prints_the_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "Usage: delta-llava" in printed
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--version >&-", 0),
        ("--version <&- >&- 2>&-", 0),
        ("nonsense 2>&-", 2),
        ("--help >/dev/full", 2),
    ],
)
def test_closed_and_full_streams(arguments, status):
    command = f"'{sys.executable}' -m delta_llava {arguments}"
    completed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert completed.returncode == status
    assert not completed.stderr or completed.stderr == "error: [Errno 28] No space left on device\n"


def test_what_standard_output_cannot_encode_is_escaped():
    code = (
        "from delta_llava.cli import app, main, typer\n"
        "app.command('show')(lambda: typer.echo('\\udcff \\u2013'))\n"
        "raise SystemExit(main(['show']))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=120,
    )
    assert completed.stdout == b"\\udcff \\u2013\n"
    assert completed.returncode == 0


def test_reader_that_leaves_early_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "delta_llava", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert completed.stderr == ""
    assert completed.returncode == 1
