"""Captions written by a model that looks at the pictures: any image-to-text model of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from studio.data.captions import caption_file, one_line
from studio.data.decode import open_picture
from studio.data.folder import Subset, list_pictures
from studio.data.layouts import find_subsets
from studio.errors import BaseModelError, DataError, UsageError
from studio.models.base import bars_off
from studio.models.device import resolve_device, resolve_dtype
from studio.specs.events import Event, OnEvent
from studio.whole_file import whole_file


class Captioner(Protocol):
    """Says what a picture shows."""

    def __call__(self, image: Image.Image) -> str:
        """Return one line on an RGB picture."""
        ...


@dataclass(frozen=True)
class Captioned:
    """What captioning a folder did.

    Attributes:
        written: Caption files that were written.
        kept: Pictures that had a caption, which was left as it is.
        failed: Pictures without a caption still, each as ``name: reason``.
        stopped: Whether it was asked to stop before the last picture.
    """

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    failed: tuple[str, ...]
    stopped: bool = False


def caption_folder(
    folder: Path,
    model: str | Captioner,
    *,
    prompt: str | None = None,
    extension: str = ".txt",
    overwrite: bool = False,
    max_tokens: int = 60,
    device: str = "auto",
    precision: str = "auto",
    on_event: OnEvent = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> Captioned:
    """Write a caption beside each picture of a folder that has none; folders may have kohya's names.

    Each is written whole as soon as it is made, so an interrupted run goes on where it was.

    Args:
        folder: The pictures.
        model: Folder or hub id of an image-to-text model, or any function from a picture to its caption.
        prompt: For models that chat what to ask, for others how the captions begin.
        extension: Ending of the caption files.
        overwrite: Also write those that are there already.
        max_tokens: Length of a caption in tokens of the model.
        device: Where the model runs.
        precision: Its number type.
        on_event: Told of progress in pictures.
        stop: Asked before each picture.

    Raises:
        UsageError: If the ending is not one of a file, or the device does not exist.
        DataError: If the folder holds no pictures.
        BaseModelError: If the model cannot be loaded.
        OutputError: If a caption cannot be written.
    """
    if not extension.startswith(".") or len(extension) < 2 or any(letter in extension for letter in "*?[/\\"):
        raise UsageError(f"extension must be an ending such as .txt, got '{extension}'.")
    subsets = find_subsets(folder, Subset(folder, extension=extension, fallback=""), setting="folder")
    paths = [path for subset in subsets for path in list_pictures(subset)]
    kept = () if overwrite else tuple(path for path in paths if caption_file(path, extension))
    wanted = [path for path in paths if path not in set(kept)]
    if not wanted:
        return Captioned((), kept, ())
    if isinstance(model, str):
        model = load_captioner(
            model, prompt=prompt, max_tokens=max_tokens, device=device, precision=precision
        )
    written: list[Path] = []
    failed: list[str] = []
    for number, path in enumerate(wanted, 1):
        if stop():
            return Captioned(tuple(written), kept, tuple(failed), stopped=True)
        try:
            written.append(_write(path.with_suffix(extension), _caption(path, model)))
        except DataError as error:
            failed.append(str(error))
        on_event(Event(kind="progress", message="captioning", step=number, total=len(wanted)))
    return Captioned(tuple(written), kept, tuple(failed))


def load_captioner(
    model: str,
    *,
    prompt: str | None = None,
    max_tokens: int = 60,
    device: str = "auto",
    precision: str = "auto",
) -> Captioner:
    """Load a model of transformers that turns pictures into text, from safetensors only.

    Args:
        model: Folder or hub id.
        prompt: For models that chat what to ask, for others how the captions begin.
        max_tokens: Length of a caption in tokens of the model.
        device: Where it runs.
        precision: Its number type; "auto" is fp32 on the CPU and fp16 on a GPU.

    Raises:
        UsageError: If the device or number type does not exist.
        BaseModelError: If the model cannot be loaded.
    """
    import transformers

    place = resolve_device(device)
    dtype = resolve_dtype(precision, place)
    try:
        with bars_off():
            network = transformers.AutoModelForImageTextToText.from_pretrained(
                model, dtype=dtype, use_safetensors=True
            )
            reader = transformers.AutoProcessor.from_pretrained(model)
            if not hasattr(reader, "image_processor"):
                # A model put together of a vision and a language part has no processor of its own.
                reader = _Parts(
                    transformers.AutoImageProcessor.from_pretrained(model),
                    transformers.AutoTokenizer.from_pretrained(model),
                )
    except (OSError, ValueError, KeyError, ImportError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise BaseModelError(
            f"'{model}' cannot be loaded as an image-to-text model ({line}). Give the folder or the hub id "
            "of one that transformers knows, such as BLIP, GIT or LLaVA, in safetensors."
        ) from error
    return _Model(network.to(place).eval(), reader, prompt=prompt, max_tokens=max_tokens)


class _Parts:
    """An image processor and a tokenizer, called like a processor that has both."""

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, *, images: Any, text: str | None = None, return_tensors: str = "pt") -> Any:
        inputs = self.image_processor(images=images, return_tensors=return_tensors)
        if text is not None:
            tokens = self.tokenizer(text, return_tensors=return_tensors, add_special_tokens=False)
            inputs["decoder_input_ids"] = tokens.input_ids
        return inputs

    def batch_decode(self, tokens: Any, *, skip_special_tokens: bool) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=skip_special_tokens)
        return texts


class _Model:
    """A loaded model as a captioner."""

    def __init__(self, network: Any, reader: Any, *, prompt: str | None, max_tokens: int) -> None:
        self._network, self._reader = network, reader
        self._prompt, self._max_tokens = prompt, max_tokens

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> str:
        chats = getattr(self._reader, "chat_template", None) is not None
        inputs = self._question(image) if chats else self._picture(image)
        inputs = {
            name: value.to(self._network.device, self._network.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        # Sampling would make captions differ from run to run.
        tokens = self._network.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        if chats and not self._network.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        text: str = self._reader.batch_decode(tokens, skip_special_tokens=True)[0]
        return text

    def _question(self, image: Image.Image) -> Any:
        question = self._prompt or "Describe this picture in one sentence."
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self._reader.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _picture(self, image: Image.Image) -> Any:
        text = {} if self._prompt is None else {"text": self._prompt}
        return self._reader(images=image, return_tensors="pt", **text)


def _caption(path: Path, model: Captioner) -> str:
    """Return what a model says of a picture.

    Raises:
        DataError: If the picture cannot be read, or the model says nothing.
    """
    if text := one_line(model(open_picture(path))):
        return text
    raise DataError(f"{path.name}: the model said nothing")


def _write(file: Path, text: str) -> Path:
    with whole_file(file) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    return file
