from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from studio.block_probe.injection import injected, recorded
from studio.models.blocks import attention_blocks

OWN, OTHER = "a fox", "ink drawing of a whale"


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"tiny_{request.param}")()


def words(pipe: Any, *prompts: str) -> torch.Tensor:
    encoded: torch.Tensor = pipe.encode_prompt(
        prompt=list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return encoded


def draw(pipe: Any, prompt: str, *, guidance_scale: float = 4.0) -> Any:
    drawn = pipe(
        prompt,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return drawn.images


def read(pipe: Any, prompt: str, guidance_scale: float) -> tuple[dict[str, torch.Tensor], Any]:
    """Return what each cross-attention read at the last step, and the UNet's other conditions."""
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name, module in pipe.unet.named_modules():
            if name.endswith(".attn2"):
                note = lambda _, args, kwargs, name=name: seen.update({name: kwargs["encoder_hidden_states"]})  # noqa: E731
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        calls = stack.enter_context(recorded(pipe.unet))
        draw(pipe, prompt, guidance_scale=guidance_scale)
    return seen, calls[-1].kwargs.get("added_cond_kwargs")


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_only_the_chosen_block_reads_the_other_prompt(pipe: Any, guidance_scale: float) -> None:
    plain, conditions = read(pipe, OWN, guidance_scale)
    other = words(pipe, OTHER)
    for chosen, block in attention_blocks(pipe.unet).items():
        with injected([block], other):
            seen, conditions_now = read(pipe, OWN, guidance_scale)
        assert seen.keys() == plain.keys()
        for name, embeddings in seen.items():
            own = plain[name]
            expected = torch.cat([own[:-1], other]) if name.startswith(f"{chosen}.") else own
            assert torch.equal(embeddings, expected), name
        if conditions is not None:
            assert all(torch.equal(conditions_now[key], value) for key, value in conditions.items())


def test_all_blocks_with_the_other_prompt_draw_the_other_prompts_picture(short_sd: Callable[[], Any]) -> None:
    pipe = short_sd()
    blocks = attention_blocks(pipe.unet).values()
    wanted = draw(pipe, OTHER)
    with injected(blocks, words(pipe, OTHER)):
        assert np.array_equal(draw(pipe, OWN), wanted)
    assert not np.array_equal(draw(pipe, OWN), wanted)


def test_in_sdxl_the_pooled_embedding_stays_the_own_one(tiny_sdxl: Callable[[], Any]) -> None:
    pipe = tiny_sdxl()
    with injected(attention_blocks(pipe.unet).values(), words(pipe, OTHER)):
        mixed = draw(pipe, OWN)
    given = [
        pipe.encode_prompt(prompt=prompt, negative_prompt="", device="cpu", do_classifier_free_guidance=True)
        for prompt in (OTHER, OWN)
    ]
    # The pipeline itself, given the other prompt's words and the own prompt's pooled embedding. The negative
    # prompt is empty either way: its embeddings are zeros for this pipeline when it is not given.
    zeros = [torch.zeros_like(part) for part in (given[0][0], given[1][2])]
    wanted = pipe(
        prompt_embeds=given[0][0],
        pooled_prompt_embeds=given[1][2],
        negative_prompt_embeds=zeros[0],
        negative_pooled_prompt_embeds=zeros[1],
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert np.array_equal(mixed, wanted)
    assert not np.array_equal(mixed, draw(pipe, OTHER))


def test_its_own_words_change_nothing_bit_for_bit(pipe: Any) -> None:
    plain = draw(pipe, OWN)
    with injected(attention_blocks(pipe.unet).values(), words(pipe, OWN)):
        assert np.array_equal(draw(pipe, OWN), plain)


def test_the_unet_is_what_it_was_also_after_an_exception(pipe: Any) -> None:
    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) for module in pipe.unet.modules()]

    before, plain = hooks(), draw(pipe, OWN)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        injected(attention_blocks(pipe.unet).values(), words(pipe, OTHER)),
        recorded(pipe.unet),
    ):
        assert hooks() != before
        raise RuntimeError("in the middle")
    assert hooks() == before
    assert np.array_equal(draw(pipe, OWN), plain)


def test_a_recorded_call_can_be_asked_again_for_its_conditional_rows(pipe: Any) -> None:
    predictions: list[torch.Tensor] = []
    keep = pipe.unet.register_forward_hook(lambda _, args, out: predictions.append(out[0]))
    with recorded(pipe.unet) as calls:
        draw(pipe, OWN)
    keep.remove()
    assert len(calls) == len(predictions) == 2
    for call, prediction in zip(calls, predictions, strict=True):
        again = call.conditional(1).predict(pipe.unet)
        assert again.shape == prediction[1:].shape
        assert torch.allclose(again, prediction[1:], atol=1e-5)  # one row is summed in another order than two
