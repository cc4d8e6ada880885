import os
import pkgutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio import __version__, cli, commands
from studio.errors import Interrupted
from studio.jobs import JobStore, workspace


def run(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "studio.cli", *words]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


@pytest.fixture
def adapter(tiny_base: str, pictures: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disc.safetensors"
    words = f"train --base {tiny_base} --data {pictures} --prompt disc --output {path} --steps 2 --rank 2"
    assert cli.main(words.split()) == 0
    return path


def test_the_way_from_pictures_to_the_same_picture_again(
    tiny_base: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    words = [
        "generate",
        "--base",
        tiny_base,
        "--prompt",
        "a disc",
        "--adapter",
        f"{adapter}:0.8",
        "--steps",
        "2",
    ]
    assert cli.main([*words, "--seed", "1", "--count", "2", "--output", str(first)]) == 0
    assert f"{first / '0001-2.png'}\n" in capsys.readouterr().out
    picture = str(first / "0001-2.png")
    assert cli.main(["generate", "--from", picture, "--output", str(again)]) == 0
    assert "not the expected one" not in capsys.readouterr().err
    rounded = ["--output", str(tmp_path / "rounded"), "--precision", "bf16"]
    assert cli.main(["generate", "--from", picture, *rounded]) == 0
    assert f"base model '{tiny_base}' is not the expected one" in capsys.readouterr().err
    assert cli.main(["generate", "--from", picture, "--output", str(other), "--prompt", "a box"]) == 0
    same = np.asarray(Image.open(again / "0000-2.png"))
    assert np.array_equal(same, np.asarray(Image.open(picture)))
    assert not np.array_equal(same, np.asarray(Image.open(other / "0000-2.png")))


def test_inspect_and_convert_read_what_train_wrote(
    tiny_base: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert "format        kohya" in text and "rank          2 (" in text and "in the UNet" in text
    other = tmp_path / "other.safetensors"
    words = ["convert", str(adapter), "--format", "diffusers", "--output", str(other), "--base", tiny_base]
    assert cli.main(words) == 0
    assert cli.main(["inspect", str(other)]) == 0
    assert "format        diffusers" in capsys.readouterr().out
    assert cli.main(words) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main([*words[:3], "nothing", *words[4:]]) == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("trian", 2, "unknown command 'trian'. Did you mean 'train'?"),
        ("train --rnak 3 --steps 0", 2, "--rnak: unknown option. Did you mean '--rank'?"),
        ("train --data x --output x.safetensors --method lroa", 2, "Did you mean 'lora'"),
        ("generate", 2, "prompt: is required"),
        ("generate --from nothing.png", 2, "there is no file 'nothing.png'"),
        ("generate --prompt x --base no/such/base", 1, "base model 'no/such/base' does not exist"),
        ("generate --prompt x --config nothing.toml", 2, "cannot read the config file 'nothing.toml'"),
        ("generate --prompts p.txt --x seed=1-4", 2, "a grid of several prompts is --x prompt="),
        ("generate --prompts p.txt --prompt x", 2, "there is no --prompt beside it"),
        ("inspect nothing.safetensors", 1, "nothing.safetensors does not exist"),
        ("convert x.safetensors --output y.safetensors --format no", 2, "unknown adapter format 'no'"),
        ("jobs cancel", 2, "which job?"),
        ("ui --port many", 2, "argument --port: invalid int value"),
        ("doctor --wat", 2, "unrecognized arguments: --wat"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(
    words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err and captured.out == ""


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nothing.safetensors", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_system_is_a_message_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr("studio.commands.doctor.run", full)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: No space left on device: x.png\n"


def test_what_was_stopped_before_its_first_step_ends_as_other_interruptions_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> int:
        raise Interrupted("stopped while drawing class pictures")

    monkeypatch.setattr("studio.commands.doctor.run", stopped)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped while drawing class pictures\n"


@pytest.mark.parametrize("command", ["", *commands.NAMES])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert "usage: studio" in capsys.readouterr().out


def test_every_module_of_the_commands_is_a_command() -> None:
    modules = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    assert sorted(commands.NAMES) == sorted(modules)


def test_the_version_and_the_installed_command_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffusion-studio {__version__}\n"
    (command,) = entry_points(group="console_scripts", name="studio")
    assert command.load() is cli.main


def test_list_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("lora", "merge", "switch", "kohya", "diffusers", "euler-ancestral", "starter"):
        assert f"\n  {name} " in text or f"\n  {name}\n" in text


def test_jobs_are_listed_cancelled_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["jobs"]) == 0
    assert "no jobs yet" in capsys.readouterr().out
    number = JobStore(workspace().database).submit("generate", {"prompt": "a fox"})
    assert cli.main(["jobs", "cancel", str(number)]) == 0
    assert cli.main(["jobs"]) == 0
    text = capsys.readouterr().out
    assert f"job {number}: cancelled" in text and "a fox" in text
    assert cli.main(["jobs", "retry", str(number)]) == 0
    assert f"job {number}: queued" in capsys.readouterr().out


def test_a_stop_signal_saves_the_adapter_and_says_so_in_the_exit_code(
    tiny_base: str, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    words = (
        f"train --base {tiny_base} --data {pictures} --prompt disc --output {output} --steps 100000 --rank 2"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "studio.cli", *words.split()], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stderr is not None
    seen = b""
    while b"loss" not in seen:
        block = os.read(process.stderr.fileno(), 65536)
        assert block, seen.decode()
        seen += block
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, rest.decode()
    assert output.is_file() and b"of 100000 steps" in out
    assert b"Traceback" not in seen + rest
    # Libraries give notices while they are imported.
    assert b"torchvision" not in seen and b"gemm_4bit" not in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "x-run", "x.safetensors"]


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "studio.cli", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == b""
