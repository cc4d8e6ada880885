import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from studio.errors import BaseModelError
from studio.models.clip import ClipSimilarity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny CLIP model with a processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    vocabulary |= {"<|startoftext|>": 98, "<|endoftext|>": 99}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(path)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_the_cosine_is_that_of_the_models_two_embeddings(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    texts = ["a red wall", "sea"]
    found = ClipSimilarity(str(folder), device=torch.device("cpu"))(pictures, texts)

    model, tokenizer = CLIPModel.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
    for picture, text, cosine in zip(pictures, texts, found.tolist(), strict=True):
        color = torch.tensor(picture.getpixel((0, 0))).double().view(3, 1, 1) / 255
        pixels = ((color - mean) / std).expand(3, 16, 16)[None]
        with torch.no_grad():
            hidden = model.vision_model(pixel_values=pixels).pooler_output
            seen = model.visual_projection(hidden)[0]
            tokens = tokenizer([text], return_tensors="pt")
            read = model.text_projection(model.text_model(**tokens).pooler_output)[0]
        expected = float(seen @ read / (seen.norm() * read.norm()))
        assert cosine == pytest.approx(expected, abs=1e-5)  # the formula in fp64 against fp32


def test_what_is_no_clip_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(
        BaseModelError, match=r"the CLIP model '.*' cannot be loaded \(.*Give a folder or a hub"
    ):
        ClipSimilarity(str(tmp_path), device=torch.device("cpu"))
