import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from studio.errors import OutputError, SpecError, UsageError
from studio.png import FORMAT, EmbeddingFile, Facts, infotext, read_spec, write_png
from studio.specs import GenerateSpec, parse_spec

FACTS = Facts(
    64, 48, sampler="DDIM", model="starter", model_hash="ab" * 32, adapter_hashes={"dog": "cd" * 32}
)
PLAIN = Facts(8, 8)


def spec_of(**values: object) -> GenerateSpec:
    return parse_spec(GenerateSpec, {"prompt": "a dog", "seed": 7, **values})


def picture_with(path: Path, text: str | None, *, key: str = "studio") -> Path:
    chunks = PngInfo()
    if text is not None:
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_infotext_reads_as_other_programs_expect() -> None:
    spec = spec_of(
        adapters=["dog.safetensors:0.8"], negative_prompt="blurry", guidance_scale=7, scheduler="dpm++2m"
    )
    lines = infotext(spec, FACTS).split("\n")
    assert lines[0] == "a dog <lora:dog:0.8>"
    assert lines[1] == "Negative prompt: blurry"
    assert lines[2].startswith(
        "Steps: 25, Sampler: DPM++ 2M, CFG scale: 7, Seed: 7, Size: 64x48, Model hash: ababababab, "
        "Model: starter, "
        'Lora hashes: "dog: cdcdcdcdcdcd", Version: diffusion-studio '
    )


def test_infotext_names_the_solver_that_ran_and_leaves_empty_entries_out() -> None:
    text = infotext(spec_of(), Facts(64, 64, sampler="DDIM"))
    assert "Sampler: DDIM," in text
    assert "Negative prompt" not in text and "Lora hashes" not in text and "Model" not in text


EMBEDDINGS = Facts(
    64,
    64,
    adapter_hashes={"dog": "ab" * 32, "toy": "cd" * 32, "bad": "ef" * 32, "idle": "12" * 32},
    embeddings={
        "toy.safetensors": EmbeddingFile("<toy>", "34" * 32),
        "bad.safetensors": EmbeddingFile("bad-1", "56" * 32),
        "idle.safetensors": EmbeddingFile("<idle>", "78" * 32),
    },
)


def test_an_embedding_is_its_token_in_the_prompt_and_a_hash_of_its_own() -> None:
    spec = spec_of(
        prompt="a <toy>",
        negative_prompt="bad-1, blurry",
        adapters=["dog.safetensors:0.8", "toy.safetensors", "bad.safetensors", "idle.safetensors"],
    )
    prompt, negative, settings = infotext(spec, EMBEDDINGS).split("\n")
    assert (prompt, negative) == ("a <toy> <lora:dog:0.8>", "Negative prompt: bad-1, blurry")
    assert f'Lora hashes: "dog: {"ab" * 6}", ' in settings
    assert f'TI hashes: "<toy>: {"34" * 6}, bad-1: {"56" * 6}", ' in settings


def test_a_picture_with_embeddings_gives_back_its_settings_and_the_hashes_of_all(tmp_path: Path) -> None:
    spec = spec_of(adapters=[f"{name}.safetensors" for name in EMBEDDINGS.adapter_hashes])
    write_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", spec, EMBEDDINGS)
    read = read_spec(tmp_path / "x.png")
    hashes = {f"{name}.safetensors": digest for name, digest in EMBEDDINGS.adapter_hashes.items()}
    assert read == spec.model_copy(update={"expected_hashes": hashes})


def test_values_with_separators_are_quoted() -> None:
    assert 'Model: "a, b: c"' in infotext(spec_of(), Facts(64, 64, model="a, b: c"))


@pytest.mark.parametrize(
    "prompt", ["a dog", "ein Hündchen, 犬 🐶\nin two lines", ""], ids=["plain", "unicode", "empty"]
)
def test_a_picture_gives_back_what_makes_it(tmp_path: Path, prompt: str) -> None:
    spec = spec_of(
        prompt=prompt, adapters=["a/dog.safetensors:0.8"], method="switch", switch_every=3, steps=9
    )
    text = write_png(Image.new("RGB", (64, 48)), tmp_path / "x.png", spec, FACTS)
    hashes = {"starter": "ab" * 32, "a/dog.safetensors": "cd" * 32}
    assert read_spec(tmp_path / "x.png") == spec.model_copy(update={"expected_hashes": hashes})
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["parameters"] == text == infotext(spec, FACTS)


def test_output_and_machine_are_not_of_the_picture(tmp_path: Path) -> None:
    spec = spec_of(
        output="elsewhere", overwrite=True, device="cuda:1", count=9, batch_size=4, expected_hashes={"x": "y"}
    )
    write_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", spec, PLAIN)
    assert read_spec(tmp_path / "x.png") == spec_of()


def test_a_picture_that_would_write_elsewhere_is_refused(tmp_path: Path) -> None:
    document = {"format": FORMAT, "spec": {"prompt": "x", "output": "/etc", "overwrite": True}}
    with pytest.raises(SpecError, match="output: does not belong"):
        read_spec(picture_with(tmp_path / "x.png", json.dumps(document)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no settings of this program"),
        ("{", "damaged: not JSON"),
        ("[" * 100_000, "damaged: not JSON"),
        ("[]", "damaged: not an object"),
        (json.dumps({"format": 99, "spec": {}}), "another version of this program: format 99"),
        (json.dumps({"format": FORMAT, "spec": []}), "another version"),
        (
            json.dumps({"format": FORMAT, "spec": {"prompt": "x", "sede": 1}}),
            "sede: unknown option. Did you mean 'seed'",
        ),
        (json.dumps({"format": FORMAT, "spec": {"prompt": "x", "steps": 10**9}}), "steps: "),
        (json.dumps({"format": FORMAT, "spec": {"prompt": "x" * 300_000}}), "at most 262144 are read"),
        (json.dumps({"format": FORMAT, "spec": {"prompt": "x"}}), "facts: are not those of a picture"),
        (
            json.dumps({"format": FORMAT, "spec": {"prompt": "x"}, "facts": asdict(FACTS)}),
            "facts: are not those of a picture with these settings",
        ),
    ],
    ids=["nothing", "json", "deep", "list", "version", "spec", "key", "value", "long", "bare", "other facts"],
)
def test_a_strangers_picture_gets_one_message(tmp_path: Path, text: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_spec(picture_with(tmp_path / "x.png", text))


def test_a_chunk_that_unpacks_to_something_huge_is_refused(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_itxt("studio", "x" * 50_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(UsageError, match="cannot be read: Decompressed data too large"):
        read_spec(tmp_path / "x.png")


def test_what_is_no_png_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(UsageError, match="is not a PNG"):
        read_spec(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png", format="JPEG")
    with pytest.raises(UsageError, match="is not a PNG"):
        read_spec(tmp_path / "y.png")
    with pytest.raises(UsageError, match="there is no file"):
        read_spec(tmp_path / "z.png")


def test_a_picture_that_cannot_be_written_leaves_nothing_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    write_png(Image.new("RGB", (8, 8)), path, spec_of(), FACTS)
    before = path.read_bytes()

    def full(self: Image.Image, place: Path, **_: object) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match=r"x.png cannot be written: No space left"):
        write_png(Image.new("RGB", (8, 8), "red"), path, spec_of(), FACTS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
