"""What a prompt may hold is read in every prompt of a composition, with each branch's own text encoders."""

from typing import Any

import pytest
import torch

from studio.composition.engine import compose
from studio.composition.plan import Branch, Composer, Plan, Request, Text
from studio.models.prompt_encoding import reading_prompts

LONG = "sea " * 30  # each letter is a token here: two chunks


class Said(Composer):
    """A composer whose one branch has the text "own", and which asks for embeddings."""

    reads_prompt = True

    def __init__(self, text: Text, asked: list[Any]) -> None:
        super().__init__()
        self.text, self.asked = text, asked

    def prepare(self, adapters: Any, weights: Any, base: Any = None, request: Request | None = None) -> Plan:
        if request is not None and request.embed is not None:
            self.asked.append(request.embed(request.prompt))
        return One(tuple(adapters), text_weights={}, texts={"own": self.text})


class One(Plan):
    def at(self, step: Any) -> Any:
        return (Branch({}, text="own"),)


def heard(pipe: Any, prompt: str, text: Text, adapters: Any) -> tuple[torch.Tensor, list[Any]]:
    """Return the prompt embeddings that the denoiser is given for a prompt, and what the method asked for."""
    given: list[torch.Tensor] = []
    forward, asked = pipe.unet.forward, []

    def listen(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["encoder_hidden_states"])
        return forward(*args, **kwargs)

    pipe.unet.forward = listen
    try:
        with reading_prompts(pipe), compose(pipe, adapters, method=Said(text, asked)):
            pipe(
                prompt,
                num_inference_steps=1,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )
    finally:
        del pipe.unet.forward
    return given[0], asked


def encoded(pipe: Any, prompt: str) -> torch.Tensor:
    """Return the embeddings of the empty prompt and of a prompt."""
    with reading_prompts(pipe), torch.no_grad():
        found = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    return torch.cat([found[1], found[0]])


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


def test_a_branch_weighs_words_with_its_own_text_encoder(sd: Any, make_adapter: Any) -> None:
    adapter = make_adapter(sd, 1, targets=(), text=True)
    prompt = "a (red:1.5) fox"
    found, asked = heard(sd, prompt, Text({"one": 1.0}), {"one": adapter})
    with compose(sd, {"one": adapter}):
        expected = encoded(sd, prompt)
    assert torch.equal(found, expected) and not torch.equal(found, encoded(sd, prompt))
    # What a method asks about a prompt is the base's, without padding.
    (own,) = asked
    assert torch.equal(own, encoded(sd, prompt)[1, : 2 + len("aredfox")])


def test_prompts_of_other_lengths_get_empty_chunks_behind_them(sd: Any, make_adapter: Any) -> None:
    adapter = make_adapter(sd, 1, targets=(), text=True)
    spoken = {"one": 1.0}
    found, _ = heard(sd, f"({LONG}:1.2)", Text(spoken, prompt="a fox"), {"one": adapter})
    longer, _ = heard(sd, "a fox", Text(spoken, prompt=f"({LONG}:1.2)"), {"one": adapter})
    with compose(sd, {"one": adapter}):
        fox, sea, nothing = (encoded(sd, text) for text in ("a fox", f"({LONG}:1.2)", ""))
    assert found.shape[1] == 154
    torch.testing.assert_close(found, torch.cat([fox, nothing], dim=1))
    torch.testing.assert_close(longer, sea)
