"""Training TOMLs of kohya's sd-scripts, written as ours."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from studio import cli
from studio.errors import UsageError
from studio.kohya_settings import translated
from studio.specs import TrainSpec

FILE = """
[model]
pretrained_model_name_or_path = "models/base.safetensors"
v2 = false
[data]
train_data_dir = "img"
resolution = "768,768"
enable_bucket = true
shuffle_caption = true
max_token_length = 225
[network]
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
[training]
output_dir = "out"
output_name = "fox"
unet_lr = 1e-4
text_encoder_lr = 5e-5
optimizer_type = "AdamW8bit"
optimizer_args = ["betas=0.9,0.99", "weight_decay=0.1"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 0.05
max_train_steps = 1000
mixed_precision = "bf16"
clip_skip = 2
min_snr_gamma = 5
no_metadata = true
multires_noise_iterations = 6
save_every_n_epochs = 1
adaptive_noise_scale = 0
"""


def test_a_file_is_written_as_ours_and_what_it_lacks_has_kohyas_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kohya.toml").write_text(FILE)
    ours = tmp_path / "fox.toml"
    words = ["kohya", str(tmp_path / "kohya.toml"), "--output", str(ours)]
    assert cli.main(words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not taken over")]
    assert [line.split(": ")[1] for line in told] == ["multires_noise_iterations", "save_every_n_epochs"]
    assert "# Not taken over: save_every_n_epochs: set save_every to steps." in ours.read_text()
    spec = TrainSpec.model_validate(tomllib.loads(ours.read_text()))
    wanted: dict[str, Any] = {
        "base": "models/base.safetensors", "data": Path("img"), "output": Path("out/fox.safetensors"),
        "resolution": 768, "buckets": True, "bucket_max": 1024, "shuffle_tags": True, "max_token_length": 225,
        "learning_rate": 1e-4, "text_encoder_learning_rate": 5e-5, "optimizer": "adamw8bit",
        "optimizer_options": {"betas": (0.9, 0.99)}, "weight_decay": 0.1, "schedule": "restarts",
        "schedule_restarts": 2, "warmup_steps": 50, "steps": 1000, "precision": "bf16", "clip_skip": 2,
        "min_snr_gamma": 5, "metadata": "minimal", "batch_size": 1, "caption_extension": ".caption",
    }  # fmt: skip
    assert {name: getattr(spec, name) for name in wanted} == wanted
    options = spec.options.model_dump()
    assert (options["rank"], options["alpha"], options["train_text_encoder"]) == (32, 16, True)
    assert cli.main(words) == 1


def test_what_is_off_or_another_network_is_not_guessed() -> None:
    least = {"pretrained_model_name_or_path": "a", "train_data_dir": "img", "network_train_unet_only": True}
    ours, left = translated({**least, "optimizer_type": "Prodigy", "color_aug": False, "max_train_epochs": 3})
    assert list(left) == ["max_train_epochs"] and "steps" not in ours
    assert ours["optimizer_options"] == {"bias_correction": False, "safeguard_warmup": False}
    assert (ours["min_snr_gamma"], ours["alpha"], ours["schedule"]) == ("none", 1, "constant")
    assert "train_text_encoder" not in ours
    _, left = translated(
        {**least, "optimizer_type": "DAdaptAdam", "lr_scheduler": "rex", "loss_type": "huber"}
    )
    assert sorted(left) == ["learning_rate", "loss_type", "lr_scheduler", "optimizer_type"]
    with pytest.raises(UsageError, match=r"network_module is 'lycoris\.kohya'"):
        translated({**least, "network_module": "lycoris.kohya"})


def test_rates_and_shares_of_steps_go_where_their_meaning_goes() -> None:
    least = {"pretrained_model_name_or_path": "a", "train_data_dir": "img", "learning_rate": 1.0}
    ours, left = translated({**least, "optimizer_type": "DAdaptAdam"})
    assert "learning_rate" not in ours and "text_encoder_learning_rate" not in ours
    assert left["learning_rate"] == "it was meant for that optimizer"
    _, left = translated({**least, "optimizer_type": "Adafactor"})
    assert left["optimizer_type"].startswith("kohya's finds its rate itself")
    ours, left = translated({**least, "max_train_epochs": 10, "lr_warmup_steps": 0.1})
    assert ours["warmup_steps"] == 0 and "share of the steps" in left["lr_warmup_steps"]
    ours, _ = translated({**least, "optimizer_args": "weight_decay=0.1 betas=0.9,0.99"})
    assert ours["weight_decay"] == "0.1" and ours["optimizer_options"] == {"betas": "0.9,0.99"}
