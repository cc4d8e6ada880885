"""What is downloaded of a base on the hub, and what of it is enough without a network."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from studio.errors import BaseModelError
from studio.models.hub import fetched
from studio.specs import Event

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
INDEX = """{"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
"unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "text_encoder": ["transformers", "T"],
"safety_checker": ["stable_diffusion", "S"]}"""
TEXT = {"model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)}
OTHERS = {"safety_checker/model.safetensors", "v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "README.md"}
PLAIN = {f"{part}/{stem}.safetensors" for part, stem in PARTS.items()}
FP16 = {f"{part}/{stem}.fp16.safetensors" for part, stem in PARTS.items()}
NON_EMA = "unet/diffusion_pytorch_model.non_ema.safetensors"


class Hub:
    """Stands for the hub: has files, and writes those that are asked for into a cache."""

    def __init__(self, cache: Path, files: Iterable[str]) -> None:
        self.cache, self.files, self.asked = cache, set(files), set[str]()
        self.online = True

    def hf_hub_download(self, name: str, path: str) -> str:
        self.cache.mkdir(exist_ok=True)
        (self.cache / path).write_text(INDEX)
        return str(self.cache / path)

    def model_info(self, name: str, *, files_metadata: bool) -> Any:
        if not self.online:
            raise ConnectionError("no route to the hub.\nat line 3")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path, size=10**9) for path in self.files])

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        self.asked = set(allow_patterns)
        for path in self.asked:
            (self.cache / path).parent.mkdir(exist_ok=True)
            (self.cache / path).touch()
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def build(*files: str) -> Hub:
        made = Hub(tmp_path / "cache", {*TEXT, *OTHERS, *files})
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        return made

    return build


@pytest.mark.parametrize("sixteen_bit", [True, False], ids=["16", "32"])
@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({*PLAIN, *FP16, NON_EMA}, {True: FP16, False: PLAIN}),
        (FP16, {True: FP16, False: FP16}),
        ({*PLAIN, NON_EMA}, {True: PLAIN, False: PLAIN}),
        # Half of the bytes where there is such a file, and all of them in fp32.
        (
            {*PLAIN, "vae/diffusion_pytorch_model.fp16.safetensors"},
            {
                True: {*PLAIN, "vae/diffusion_pytorch_model.fp16.safetensors"}
                - {"vae/diffusion_pytorch_model.safetensors"},
                False: PLAIN,
            },
        ),
    ],
    ids=["both", "fp16", "plain", "mixed"],
)
def test_files_of_16_bits_are_downloaded_where_they_will_do_and_nothing_twice(
    hub: Callable[..., Hub], files: set[str], wanted: dict[bool, set[str]], sixteen_bit: bool
) -> None:
    made, events = hub(*files), list[Event]()
    for _ in range(2):
        folder = fetched("some/model", sixteen_bit=sixteen_bit, on_event=events.append)
    assert folder == made.cache and made.asked == wanted[sixteen_bit] | TEXT
    # The index alone is here already; its size is known to none of what is told.
    assert [event.message for event in events] == ["Downloading some/model from the hub, 7.0 GB."]


def test_without_a_network_what_is_here_is_enough_or_it_is_said_what_is_missing(
    hub: Callable[..., Hub],
) -> None:
    made, events = hub(*FP16), list[Event]()
    made.online = False
    with pytest.raises(BaseModelError, match=r"'some/model' is here in part only.*\(no route to the hub\)"):
        fetched("some/model", sixteen_bit=True, on_event=events.append)
    made.snapshot_download("some/model", allow_patterns=[*TEXT, *FP16])
    assert fetched("some/model", sixteen_bit=False, on_event=events.append) == made.cache
    assert not events


def test_pickles_are_refused_before_anything_is_downloaded(hub: Callable[..., Hub]) -> None:
    made = hub(*FP16 - {"unet/diffusion_pytorch_model.fp16.safetensors"})
    with pytest.raises(BaseModelError, match=r"some/model/unet holds only .*\.bin, a pickle"):
        fetched("some/model", sixteen_bit=True, on_event=lambda event: None)
    assert not made.asked
