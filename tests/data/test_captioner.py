"""Captioning with tiny random models of two kinds, and with plain functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio import cli
from studio.data.captioner import caption_folder, load_captioner
from studio.errors import BaseModelError, DataError, OutputError, UsageError
from studio.specs import Event

Save = Callable[..., Path]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", *(f"w{n}" for n in range(32))]


def image_processor(kind: Any) -> Any:
    return kind(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random BLIP with a vocabulary of forty words."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={
            "vocab_size": 40,
            "encoder_hidden_size": 16,
            "projection_dim": 16,
            "max_position_embeddings": 64,
            **small,
            **ends,
        },
        vision_config={"image_size": 32, "patch_size": 16, **small},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("blip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    BlipProcessor(image_processor(BlipImageProcessor), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random vision encoder and text decoder, which have no processor in common."""
    from transformers import (
        BertConfig,
        BertTokenizer,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=32, patch_size=16, **small),
        BertConfig(vocab_size=40, is_decoder=True, add_cross_attention=True, **small),
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    folder = tmp_path_factory.mktemp("joined")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionEncoderDecoderModel(config)
        model.generation_config.update(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
        model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    image_processor(ViTImageProcessor).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random LLaVA, which is asked in turns of a conversation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<image>", "USER"])}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **small),
        text_config=LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=3, **small),
        image_token_index=vocabulary["<image>"],
    )
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for turn in messages %}USER {% for part in turn['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("chat")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        save(tmp_path / "set" / f"{name}.png", color=colour, size=(50, 40))
    (tmp_path / "set" / "b.txt").write_text("my own words")
    return tmp_path / "set"


def seen(image: Image.Image) -> str:
    return f"a {image.getpixel((0, 0))}\n picture"


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def test_captions_are_written_beside_pictures_that_have_none(folder: Path) -> None:
    events: list[Event] = []
    result = caption_folder(folder, seen, on_event=events.append)
    assert texts(folder) == {
        "a": "a (255, 0, 0) picture\n",
        "b": "my own words",
        "c": "a (0, 128, 0) picture\n",
    }
    assert result.written == (folder / "a.txt", folder / "c.txt") and result.kept == (folder / "b.png",)
    assert [(event.step, event.total) for event in events] == [(1, 2), (2, 2)]
    assert caption_folder(folder, seen).written == ()


def test_only_overwrite_writes_over_a_caption(folder: Path) -> None:
    result = caption_folder(folder, seen, overwrite=True)
    assert len(result.written) == 3 and "my own" not in texts(folder)["b"]


def test_the_ending_is_the_one_asked_for(folder: Path) -> None:
    caption_folder(folder, seen, extension=".caption")
    assert len(list(folder.glob("*.caption"))) == 3 and len(texts(folder)) == 1
    with pytest.raises(UsageError, match=r"extension must be an ending such as \.txt, got '\.\*'"):
        caption_folder(folder, seen, extension=".*")


def test_kohyas_folders_are_captioned_and_masks_are_not(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "set" / "3_dog" / "a.png")
    save(tmp_path / "set" / "3_dog" / "a.mask.png")
    assert caption_folder(tmp_path / "set", seen).written == (tmp_path / "set" / "3_dog" / "a.txt",)


def test_what_cannot_be_captioned_is_named_and_the_rest_goes_on(folder: Path) -> None:
    (folder / "a.png").write_text("no picture")
    result = caption_folder(folder, lambda image: " ", overwrite=True)
    assert result.failed[0].startswith("a.png: not a picture") and result.written == ()
    assert result.failed[1:] == ("b.png: the model said nothing", "c.png: the model said nothing")
    assert texts(folder) == {"b": "my own words"}
    with pytest.raises(DataError, match=r"does not exist.* folder \(--folder\)"):
        caption_folder(folder / "lost", seen)


def test_a_stop_keeps_what_is_written(folder: Path) -> None:
    asked = iter([False, True])
    result = caption_folder(folder, seen, stop=asked.__next__)
    assert result.stopped and result.written == (folder / "a.txt",) and len(texts(folder)) == 2


def test_a_caption_that_cannot_be_written_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(folder.iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"a\.txt cannot be written: No space left.*Free some space"):
        caption_folder(folder, seen)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["blip", "joined", "chat"])
def test_a_model_of_transformers_says_the_same_each_time_and_of_other_pictures_other_things(
    kind: str, request: pytest.FixtureRequest
) -> None:
    captioner = load_captioner(request.getfixturevalue(kind), max_tokens=6, device="cpu")
    noise = torch.randint(256, (2, 40, 50, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    pictures = [Image.fromarray(noise[0]), Image.fromarray(noise[1]), Image.new("RGB", (9, 50), "white")]
    said = [captioner(picture) for picture in pictures]
    assert said == [captioner(picture) for picture in pictures]
    assert all(word in WORDS for text in said for word in text.split()) and any(said)


@pytest.mark.parametrize("kind", ["blip", "joined"])
def test_a_prompt_begins_the_caption(kind: str, request: pytest.FixtureRequest) -> None:
    captioner = load_captioner(request.getfixturevalue(kind), prompt="a dog", max_tokens=4, device="cpu")
    assert captioner(Image.new("RGB", (50, 40), "red")).startswith("a dog")


def test_a_model_that_chats_is_asked_and_only_its_answer_is_the_caption(chat: str) -> None:
    picture = Image.new("RGB", (50, 40), "red")
    said = {
        prompt: load_captioner(chat, prompt=prompt, max_tokens=5, device="cpu")(picture)
        for prompt in ("dog", "cat")
    }
    assert said["dog"] != said["cat"], "the question counts"
    assert all("USER" not in text and len(text.split()) <= 5 for text in said.values())


def test_the_number_of_tokens_is_what_is_asked_for(blip: str) -> None:
    picture = Image.new("RGB", (50, 40), "red")
    short, long = (
        len(load_captioner(blip, max_tokens=number, device="cpu")(picture).split()) for number in (2, 12)
    )
    assert short < long


def test_what_is_no_such_model_is_one_clear_error(tmp_path: Path, tiny_sd: Callable[[], Any]) -> None:
    with pytest.raises(BaseModelError, match=r"cannot be loaded as an image-to-text model .*BLIP"):
        load_captioner(str(tmp_path), device="cpu")


def test_the_command_captions_a_folder(folder: Path, blip: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["caption", str(folder), "--model", blip, "--prompt", "a cat", "--device", "cpu"]
    assert cli.main(words) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(folder / "a.txt"), str(folder / "c.txt")]
    assert "2 captions written, 1 kept" in output.err
    assert texts(folder)["a"].startswith("a cat") and texts(folder)["b"] == "my own words"
    (folder / "a.txt").unlink()
    (folder / "a.png").write_text("no picture")
    assert cli.main(words) == 1
    assert "a.png: not a picture" in capsys.readouterr().err
