"""Regions: masks of the user's, from files and arrays, decide which adapter answers where."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from studio.composition.engine import compose
from studio.composition.masks import read_masks
from studio.composition.methods.regions import Regions
from studio.composition.mixing import Mixer, blurred
from studio.composition.plan import Branch, Text
from studio.errors import CompositionError, SpecError
from studio.flags import Parser, read_spec_arguments
from studio.specs import GenerateSpec, parse_spec

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # executors sum in other orders


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def adapters(sd: Any, make_adapter: Any) -> dict[str, Any]:
    targets = ["unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"]
    return {name: make_adapter(sd, seed, targets=targets) for seed, name in enumerate(("fox", "owl", "ink"))}


@pytest.fixture
def ask(sd: Any) -> Any:
    """Return a function that asks the denoiser for a guided batch of two pictures 8 x 8."""
    sample = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def evaluate() -> torch.Tensor:
        tokens, negative = sd.encode_prompt(["a fox", "a cat"], "cpu", 1, True)
        words = torch.cat([negative, tokens])
        sd.scheduler.set_timesteps(1)
        with torch.no_grad():
            return sd.unet(sample, sd.scheduler.timesteps[0], words, return_dict=False)[0]

    return evaluate


def half(side: str, size: int = 16, value: float = 1.0) -> np.ndarray:
    mask = np.zeros((size, size), dtype=np.float32)
    mask[:, : size // 2] = value
    return mask if side == "left" else mask[:, ::-1].copy()


def prepared(adapters: Any, **options: Any) -> Any:
    weights = {name: 0.5 + 0.1 * place for place, name in enumerate(adapters)}
    return Regions(parse_spec(Regions.Options, options)).prepare(adapters, weights)


NAMES = dict.fromkeys(("fox", "owl", "ink"))


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
def test_each_adapter_answers_in_its_region_the_style_everywhere_and_the_base_for_the_rest(
    batched: bool, sd: Any, adapters: Any, ask: Any
) -> None:
    alone = {}
    for name in ("fox", "owl", None):
        with compose(sd, {each: adapters[each] for each in (name, "ink") if each}, weights={"ink": 0.6}):
            alone[name] = ask().double()
    columns = torch.arange(8)
    fox, owl = (columns < 3).double(), 0.25 * (columns >= 6).double()
    masks = {"fox": np.tile(fox.numpy(), (8, 1)), "owl": torch.tensor(np.tile(owl.numpy(), (8, 1)))}
    options = {"regions": masks, "everywhere": ("ink",)}
    with compose(
        sd, adapters, method="regions", options=options, weights={"ink": 0.6}, batched=batched
    ) as composition:
        got = ask()
    wanted = fox * alone["fox"] + owl * alone["owl"] + (1 - fox - owl) * alone[None]
    torch.testing.assert_close(got.double(), wanted, **CLOSE)
    assert (
        float((alone["fox"] - alone[None]).abs().mean()) > 1e-3 < float((wanted - alone[None]).abs().mean())
    )
    assert composition.passes.full == 12
    assert [row.weights[0] for row in composition.describe(1)] == pytest.approx([1 / 3, 1 / 3, 0.6])


def test_overlaps_are_mixed_by_the_masks_and_the_background_has_the_rest(
    sd: Any, adapters: Any, ask: Any
) -> None:
    alone = {}
    for name in adapters:
        with compose(sd, {name: adapters[name]}):
            alone[name] = ask().double()
    fox, owl = half("left", 8), np.full((8, 8), 0.5, dtype=np.float32)
    options = {"regions": {"fox": fox, "owl": owl}, "background": "ink", "shared_unconditional": True}
    base = ask()
    with compose(sd, adapters, method="regions", options=options) as composition:
        got = ask().double()
    left = (alone["fox"] * 1.0 + alone["owl"] * 0.5) / 1.5
    right = (alone["owl"] + alone["ink"]) / 2
    torch.testing.assert_close(got[2:, ..., :4], left[2:, ..., :4], **CLOSE)
    torch.testing.assert_close(got[2:, ..., 4:], right[2:, ..., 4:], **CLOSE)
    torch.testing.assert_close(got[:2], base[:2].double(), **CLOSE)
    assert composition.passes.full == 2 * 3 + 2


def test_masks_that_cover_everything_cost_no_evaluation_of_the_base() -> None:
    plan = prepared({"fox": None, "owl": None}, regions={"fox": half("left"), "owl": half("right")})
    assert [branch.weights for branch in plan.branches] == [{"fox": 0.5}, {"owl": 0.6}]
    with pytest.raises(CompositionError, match="the background 'ink' would never act"):
        prepared(NAMES, regions={"fox": half("left"), "owl": half("right")}, background="ink")


@pytest.mark.parametrize(
    ("policy", "spoken"),
    [("base", {}), ("first", {"fox": 0.5}), ("merged", {"fox": 0.5, "owl": 0.6, "ink": 0.7}), ("own", {})],
)
def test_the_prompt_is_encoded_by_the_policy(policy: str, spoken: Any) -> None:
    plan = prepared(
        NAMES,
        regions={"fox": half("left")},
        background="owl",
        everywhere=("ink",),
        text_encoder_policy=policy,
    )
    assert plan.text_weights == spoken
    texts = [Text({"fox": 0.5, "ink": 0.7}), Text({"owl": 0.6, "ink": 0.7})]
    assert list(plan.texts.values()) == (texts if policy == "own" else [])
    assert [plan.texts[branch.text].weights for branch in plan.branches if branch.text] == (
        [branch.weights for branch in plan.branches] if policy == "own" else []
    )


def test_a_region_may_have_a_prompt_of_its_own(sd: Any, adapters: Any, draw: Any) -> None:
    fox = torch.from_numpy(half("left", 8))
    options = {"regions": {"fox": fox}, "region_prompts": {"fox": "a sks fox"}}
    with compose(sd, {"fox": adapters["fox"]}, method="regions", options=options):
        got = draw(sd, steps=1, prompt="fog")
    with compose(sd, {"fox": adapters["fox"]}):
        inside = draw(sd, steps=1, prompt="a sks fox")
        unsaid = draw(sd, steps=1, prompt="fog")
    outside = draw(sd, steps=1, prompt="fog")
    assert float((inside - unsaid).abs().max()) > 1e-3
    # A step of DDIM is linear in the answer, so latents mix as answers do.
    torch.testing.assert_close(got, fox * inside + (1 - fox) * outside, rtol=1e-4, atol=1e-4)  # 7.5 x CLOSE


def test_a_prompt_that_several_regions_share_is_encoded_once(sd: Any, adapters: Any, draw: Any) -> None:
    regions = {"fox": half("left"), "owl": half("right")}
    placed = {name: adapters[name] for name in regions}
    encoded: list[int] = []
    handle = sd.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    for said in ({"fox": "snow", "owl": "snow"}, {"fox": "snow", "owl": "fog"}):
        with compose(sd, placed, method="regions", options={"regions": regions, "region_prompts": said}):
            draw(sd, steps=1)
    handle.remove()
    # The pipeline's prompt and those of the regions, each with the negative one.
    assert len(encoded) == 2 * (1 + 1) + 2 * (1 + 2)


def test_the_backgrounds_prompt_is_that_of_the_rest() -> None:
    plan = prepared(
        NAMES,
        regions={"fox": half("left")},
        background="owl",
        everywhere=("ink",),
        region_prompts={"owl": "fog"},
        text_encoder_policy="first",
    )
    assert list(plan.texts.values()) == [Text({"fox": 0.5}, "fog")]
    assert [branch.text for branch in plan.branches] == [None, "rest of the picture"]
    with pytest.raises(CompositionError, match="region_prompts: unknown adapter 'ink'"):
        prepared(
            {"fox": None, "ink": None},
            regions={"fox": half("left")},
            everywhere=("ink",),
            region_prompts={"ink": "x"},
        )


def test_a_soft_edge_is_a_gaussian_and_masks_still_sum_to_one() -> None:
    left = torch.from_numpy(half("left", 12))[None, None]
    soft = blurred(left, 1.5)
    # Of an edge, the Gaussian's sum over the pixels left of it; those beyond the border are white, too.
    reach = np.arange(-5, 6)
    bell = np.exp(-(reach**2) / (2 * 1.5**2))
    wanted = np.array([bell[reach + x < 6].sum() / bell.sum() for x in range(12)])
    np.testing.assert_allclose(soft[0, 0].numpy(), np.tile(wanted, (12, 1)), atol=1e-6)  # fp32 rounding
    torch.testing.assert_close(blurred(left.mT, 1.5), soft.mT, **CLOSE)
    torch.testing.assert_close(soft + blurred(1 - left, 1.5), torch.ones_like(left), **CLOSE)
    assert blurred(left, 0) is left


def test_feather_reaches_the_picture(sd: Any, adapters: Any, ask: Any) -> None:
    two = {name: adapters[name] for name in ("fox", "owl")}
    drawn = []
    for feather in (0, 2):
        options = {"regions": {"fox": half("left", 8)}, "background": "owl", "feather": feather}
        with compose(sd, two, method="regions", options=options):
            drawn.append(ask())
    with compose(sd, {"fox": adapters["fox"]}):
        fox = ask()
    torch.testing.assert_close(drawn[0][..., :4], fox[..., :4], **CLOSE)
    assert float((drawn[1] - fox)[..., 3].abs().mean()) > 10 * float((drawn[1] - fox)[..., 0].abs().mean())


def test_masks_are_resized_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = Branch({}, region="left"), Branch({}, region="right")
    regions = {"left": torch.from_numpy(half("left"))[None, None]}
    regions["right"] = 1 - regions["left"]
    resized: list[Any] = []
    resize = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "studio.composition.mixing.F.interpolate",
        lambda mask, **more: resized.append(more["size"]) or resize(mask, **more),
    )
    mixer = Mixer()
    for size in (8, 8, 4, 8, 4):
        answers = [torch.zeros(2, 4, size, size), torch.ones(2, 4, size, size)]
        got = mixer.mixed(branches, answers, guided=True, regions=regions)
        assert torch.equal(got[0, 0, 0], (torch.arange(size) >= size // 2).float())
    assert resized == [(8, 8)] * 2 + [(4, 4)] * 2
    # New masks under the same names are other masks.
    swapped = {"left": regions["right"], "right": regions["left"]}
    answers = [torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)]
    assert torch.equal(
        mixer.mixed(branches, answers, guided=True, regions=swapped)[0, 0, 0], (torch.arange(8) < 4).float()
    )


def test_a_mask_file_is_read_upright_and_shrunk(tmp_path: Path) -> None:
    image = Image.fromarray((half("left", 1600) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down and mirrored: white is on the right
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    masks = read_masks({"fox": tmp_path / "turned.png", "owl": tmp_path / "plain.png"})
    assert masks["fox"].shape == (1, 1, 1024, 1024)
    assert torch.equal(masks["fox"] + masks["owl"], torch.ones(1, 1, 1024, 1024))
    assert masks["owl"][..., :512].min() == 1


@pytest.mark.parametrize(
    "mask",
    [
        half("left").astype(bool),
        (half("left") * 255).astype(np.uint8),
        torch.from_numpy(half("left"))[None, None].half(),
        Image.fromarray((half("left") * 255).astype(np.uint8)),
    ],
    ids=["truth", "bytes", "half", "PIL"],
)
def test_a_mask_may_be_any_plane_of_numbers(mask: Any) -> None:
    assert torch.equal(read_masks({"fox": mask})["fox"][0, 0], torch.from_numpy(half("left")))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((4, 4)), "'fox' is black everywhere"),
        (np.full((4, 4), 1.5), "values from 1.5 to 1.5"),
        (np.full((4, 4), np.nan), "values from nan"),
        (np.ones((4, 4, 3)), r"shape \[4, 4, 3\]"),
        (Path("nowhere.png"), "no picture file 'nowhere.png' for 'fox'"),
    ],
    ids=["black", "range", "nan", "colours", "missing"],
)
def test_a_mask_of_no_use_is_refused(mask: Any, says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        read_masks({"fox": mask})


def test_a_file_that_is_no_picture_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(CompositionError, match=r"the mask of 'fox', text\.png: not a picture"):
        read_masks({"fox": tmp_path / "text.png"})
    Image.new("L", (32, 32), "white").save(tmp_path / "large.png")
    monkeypatch.setattr("studio.data.decode.MAX_PIXELS", 1000)
    with pytest.raises(CompositionError, match="too large, at most 1,000 pixels"):
        read_masks({"fox": tmp_path / "large.png"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"regions": {"fix": half("left")}}, "regions: unknown adapter 'fix'. Did you mean 'fox'?"),
        ({"regions": {"fox": half("left")}, "background": "owl"}, "'ink' has no place"),
        (
            {"regions": {"fox": half("left")}, "background": "owl", "everywhere": ("ink", "fox")},
            "'fox' has more than one place",
        ),
    ],
    ids=["unknown", "none", "two"],
)
def test_each_adapter_has_one_place(options: Any, says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        prepared(NAMES, **options)


def test_regions_are_given_by_flags_toml_and_files(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'prompt = "x"\nmethod = "regions"\nregions = { fox = "left.png" }\nfeather = 1.5\n'
    )
    spec, _ = read_spec_arguments(Parser(), GenerateSpec, ["--config", str(tmp_path / "run.toml")])
    assert spec.options.regions == {"fox": Path("left.png")} and spec.options.feather == 1.5
    flags = ["--prompt", "x", "--method", "regions", "--regions", "fox=left.png,ink=right.png"]
    spec, _ = read_spec_arguments(Parser(), GenerateSpec, flags)
    assert spec.options.regions == {"fox": Path("left.png"), "ink": Path("right.png")}
    assert spec.model_dump(mode="json")["options"]["regions"] == {"fox": "left.png", "ink": "right.png"}
    with pytest.raises(SpecError, match="regions: is required"):
        parse_spec(GenerateSpec, {"prompt": "x", "method": "regions"})
    with pytest.raises(SpecError, match="a mask is a picture file"):
        parse_spec(Regions.Options, {"regions": {"fox": 3}})
