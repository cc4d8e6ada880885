"""What all tests share: no network, one thread, and real pipelines at a size that takes no time."""

import gc
import io
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The root of the checkout holds folders named `kernels` and `ui`; tests must see the installed names only.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


# Folders of files that one worker is busy with for long; taken last, they would leave the other workers idle.
LONGEST = ("e2e", "browser", "trainers", "studio")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while tests are collected, and never look at what that leaves.

    The libraries' half a million objects live to the end; each full collection would walk through them, and
    through what tests import later, so there are fewer of these.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], 30)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; ``--no-loadscope-reorder`` keeps this order."""
    places = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield new folders, one for each test: making one by pytest looks through all that are there."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in count())


@pytest.fixture(autouse=True)
def _own_workspace(_homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's own workspace folder."""
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("STUDIO_HOME", str(home))


def _tokenizer() -> Any:
    """Return a CLIP tokenizer without merges: each byte is a token, so it encodes any text."""
    from transformers import CLIPTokenizer

    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in kept] + [chr(256 + index) for index in range(len(others))]
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _text_config(projection: int = 32) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _build_sd(*, levels: int, layers: int) -> "StableDiffusionPipeline":
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,) * levels,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            layers_per_block=layers,
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config()),
            tokenizer=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipe)


def _build_sdxl(*, levels: int, layers: int, depth: int) -> "StableDiffusionXLPipeline":
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,) * levels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            layers_per_block=layers,
            attention_head_dim=(2,) + (4,) * (levels - 1),
            transformer_layers_per_block=(1,) * (levels - 1) + (depth,),
            cross_attention_dim=64,
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config()),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=unet,
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    return _ready(pipe)


def _ready(pipe: Any) -> Any:
    for component in pipe.components.values():
        if hasattr(component, "requires_grad_"):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Pickler(pickle.Pickler):
    """Pickles modules but for their tensors and functions, which it keeps in a list."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.kept: list[Any] = []

    def persistent_id(self, item: object) -> int | None:
        """Return the place of what is kept."""
        import torch

        if not isinstance(item, (torch.Tensor, FunctionType)):
            return None
        self.kept.append(item)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    """Makes the modules again with copies of the tensors."""

    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self._kept, self._memo = kept, {}

    def persistent_load(self, place: int) -> Any:
        """Return the copy of a tensor, one for all that share it, or the function itself."""
        return deepcopy(self._kept[place], self._memo)


def _factory(build: Callable[..., Any], **blocks: int) -> Callable[[], Any]:
    """Return a function that copies one pipeline, built at its first call.

    Not by deepcopy, which takes ten times as long for the thousands of dictionaries in a network.
    """
    built: list[Any] = []

    def fresh() -> Any:
        if not built:
            original = build(**blocks)
            copied = {
                name: part
                for name, part in original.components.items()
                if hasattr(part, "parameters") or name == "scheduler"
            }
            pickler = _Pickler(file := io.BytesIO())
            pickler.dump(copied)
            built.extend((original, file.getvalue(), pickler.kept))
            # What it imported lives to the end too.
            gc.freeze()
        original, pickled, kept = built
        components = original.components | _Unpickler(io.BytesIO(pickled), kept).load()
        own = (
            {"add_watermarker": False} if "tokenizer_2" in components else {"requires_safety_checker": False}
        )
        pipe = type(original)(**components, **own)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return fresh


@pytest.fixture(scope="session")
def tiny_sd() -> Callable[[], "StableDiffusionPipeline"]:
    """Return a factory of fresh SD 1.x pipelines: SD's own blocks with 32 channels, 8 x 8 latents, 64 px."""
    return _factory(_build_sd, levels=4, layers=2)


@pytest.fixture(scope="session")
def tiny_sdxl() -> Callable[[], "StableDiffusionXLPipeline"]:
    """Return a factory of fresh SDXL pipelines: SDXL's own blocks with 32 channels, two text encoders."""
    return _factory(_build_sdxl, levels=3, layers=2, depth=2)


@pytest.fixture(scope="session")
def short_sd() -> Callable[[], "StableDiffusionPipeline"]:
    """Return a factory of fresh SD 1.x pipelines with each kind of block, a quarter of the layers."""
    return _factory(_build_sd, levels=2, layers=1)


@pytest.fixture(scope="session")
def one_block_sd() -> Callable[[], "StableDiffusionPipeline"]:
    """Return a factory of fresh SD 1.x pipelines with a single transformer block, where each takes long."""
    return _factory(_build_sd, levels=1, layers=1)


@pytest.fixture(scope="session")
def short_sdxl() -> Callable[[], "StableDiffusionXLPipeline"]:
    """Return a factory of fresh SDXL pipelines with each kind of block, half of the layers."""
    return _factory(_build_sdxl, levels=2, layers=2, depth=1)
