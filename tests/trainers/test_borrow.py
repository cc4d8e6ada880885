from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.trainers.borrow import ALIGNMENT, borrowed, converted, networks

CPU = torch.device("cpu")


def test_a_base_is_lent_frozen_in_one_type_and_returns_with_its_tensors(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd().to(torch.float16)
    pipe.unet.requires_grad_(True).train()
    pipe.unet.conv_in.weight.grad = torch.ones_like(pipe.unet.conv_in.weight)
    state = [
        (p.data_ptr(), p.dtype, p.requires_grad)
        for part in networks(pipe).values()
        for p in part.parameters()
    ]
    with pytest.raises(RuntimeError, match="inside"), borrowed(pipe, device=CPU, dtype=torch.bfloat16):
        assert (
            pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
        )
        assert not pipe.unet.training and not any(p.requires_grad for p in pipe.unet.parameters())
        pipe.unet.marked_by_a_library = True
        raise RuntimeError("inside")
    found = [
        (p.data_ptr(), p.dtype, p.requires_grad)
        for part in networks(pipe).values()
        for p in part.parameters()
    ]
    assert found == state and pipe.unet.training and not hasattr(pipe.unet, "marked_by_a_library")
    assert pipe.unet.conv_in.weight.grad is not None


def test_a_lent_base_lies_in_memory_as_a_fresh_one_wherever_a_file_had_its_tensors(
    tiny_sd: Callable[[], Any],
) -> None:
    unet = (pipe := tiny_sd()).unet
    for parameter in unet.parameters():
        room = torch.empty(parameter.numel() + 1)
        parameter.data = room[1:].view(parameter.shape).copy_(parameter.data)
    before = [(parameter.data_ptr(), parameter.clone()) for parameter in unet.parameters()]
    assert all(place % ALIGNMENT for place, _ in before)
    with borrowed(pipe, device=CPU, dtype=torch.float32):
        lent = list(unet.parameters())
        assert not any(parameter.data_ptr() % ALIGNMENT for parameter in lent)
        assert all(torch.equal(p, value) for p, (_, value) in zip(lent, before, strict=True))
    assert [parameter.data_ptr() for parameter in unet.parameters()] == [place for place, _ in before]


def test_a_network_is_converted_for_a_block_only(tiny_sd: Callable[[], Any]) -> None:
    vae = tiny_sd().vae
    before = [(p.data_ptr(), p.clone()) for p in vae.parameters()]
    with converted(vae, torch.float16):
        assert vae.dtype == torch.float16
    assert all(
        p.data_ptr() == place and torch.equal(p, value)
        for p, (place, value) in zip(vae.parameters(), before, strict=True)
    )


def test_sdxl_embeddings_are_the_same_before_in_and_after_every_loan(tiny_sdxl: Callable[[], Any]) -> None:
    pipe, found = tiny_sdxl(), []

    def encode() -> None:
        with torch.no_grad():
            found.append(pipe.encode_prompt("dog", device=CPU, do_classifier_free_guidance=False)[0])

    for _ in range(2):
        with borrowed(pipe, device=CPU, dtype=torch.float32):
            encode()
        encode()
    assert all(torch.equal(embeddings, found[0]) for embeddings in found)
    with torch.no_grad():
        states = pipe.text_encoder(
            pipe.tokenizer("dog", padding="max_length", max_length=77, return_tensors="pt").input_ids,
            output_hidden_states=True,
        ).hidden_states
    assert len(states) == 3 and torch.equal(found[0][..., :32], states[-2])
