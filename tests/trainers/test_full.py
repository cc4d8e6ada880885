"""Full fine-tuning: what learns, what is written, and that the base is not touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.formats.kohya import Kohya
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.errors import TrainingError
from studio.registry import TRAINERS
from studio.specs import Event, TrainSpec
from studio.trainers.borrow import borrowed
from studio.trainers.full_parameters import FullParameters
from studio.trainers.loop import train

Factory = Callable[[], Any]


def spec_of(**values: Any) -> TrainSpec:
    fixed = {"method": "full", "data": "d", "output": "o.safetensors", "learning_rate": 1e-3}
    return TrainSpec.model_validate(fixed | values)


def loss_of(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latents, target = (torch.randn((1, 4, 16, 16), generator=generator) for _ in range(2))
    prompt = pipe.encode_prompt(["a dog"], "cpu", 1, False)[0]
    loss: Tensor = (pipe.unet(latents, torch.tensor([300]), prompt).sample - target).square().mean()
    return loss


def test_training_is_that_of_the_network_itself(tiny_sd: Factory) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    known = {
        name: find_parameter(components_of(plain), name)
        for name in canonical_names(components_of(plain))
        if ".embeddings." not in name
    }
    groups = [
        {"params": [value for name, value in known.items() if name.startswith(part)], "lr": rate}
        for part, rate in (("unet.", 1e-3), ("text_encoder.", 5e-4))
    ]
    for value in known.values():
        value.requires_grad_(True)
    own = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    before = {name: find_parameter(components_of(pipe), name).detach().clone() for name in known}
    trainer = TRAINERS["full"]()
    with borrowed(pipe, device=torch.device("cpu"), dtype=torch.float32):
        optimizer = trainer.optimizer(
            trainer.prepare(pipe, spec_of(train_text_encoder=True)), weight_decay=0.1
        )
        for _ in range(3):
            for each, stepper in ((pipe, optimizer), (plain, own)):
                stepper.zero_grad()
                loss_of(each).backward()
                stepper.step()
        adapter = trainer.export()
        trainer.release()
    assert adapter.changes.keys() == known.keys()
    for name, change in adapter.changes.items():
        assert torch.equal(change.delta(before[name], weight=1.0), known[name].detach() - before[name]), name
        assert torch.equal(find_parameter(components_of(pipe), name), before[name])


def test_a_base_of_16_bits_is_trained_in_32_and_given_back(tiny_sd: Factory) -> None:
    pipe = tiny_sd()
    pipe.unet.to(torch.bfloat16)
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in pipe.unet.named_parameters()}
    full = FullParameters(pipe, blocks=("mid_block",), exclude=(), text_encoders=False)
    for name, value in pipe.unet.named_parameters():
        assert value.dtype == (torch.float32 if "mid_block." in name else torch.bfloat16)
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight += 1e-6
    change = full.changes()["unet.mid_block.resnets.0.conv1.weight"].delta(weight, weight=1.0)
    assert 0 < change.abs().max() < 2e-6  # Far below what bfloat16 could add to a weight.
    full.detach()
    for name, value in pipe.unet.named_parameters():
        assert value is before[name][0] and value.data_ptr() == before[name][1]
        assert torch.equal(value, before[name][2])


@pytest.mark.parametrize(
    ("values", "part", "other"),
    [
        ({"blocks": ("attn2.to_k", "attn2.to_v")}, "attn2", "attn1"),
        ({"blocks": ("up_blocks.1",), "exclude": ("resnets",)}, "up_blocks.1", "resnets"),
        ({"exclude": ("up_blocks", "mid_block")}, "down_blocks", "up_blocks"),
    ],
    ids=str,
)
def test_blocks_and_exclusions_choose_what_learns(
    tiny_sd: Factory, values: dict[str, Any], part: str, other: str
) -> None:
    pipe, trainer = tiny_sd(), TRAINERS["full"]()
    trainer.prepare(pipe, spec_of(**values))
    names = trainer.export().changes.keys()
    trainer.release()
    assert any(part in name for name in names) and not any(other in name for name in names)
    if "blocks" in values:
        assert all(any(f".{block}." in name for block in values["blocks"]) for name in names)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_weight_of_a_full_size_unet_has_a_name_in_the_file(
    full_size_unet: Callable[[str], nn.Module], tiny_sd: Factory, family: str
) -> None:
    pipe = tiny_sd()
    unet = full_size_unet(family)
    with torch.device("meta"):
        changes = {
            f"unet.{name}": torch.empty(value.shape, dtype=torch.float32)
            for name, value in unet.named_parameters()
        }
    pipe.unet = unet
    full = FullParameters(pipe, blocks=(), exclude=(), text_encoders=False)
    assert set(full._parameters) == changes.keys()
    table = Kohya().table(changes)
    from studio.adapters.names import kohya_module

    for name in changes:
        module = name.rpartition(".")[0]
        assert table[kohya_module(module, sdxl=family == "sdxl")] == module
    # 859,520,964 and 2,567,463,684 weights, as published.
    assert sum(own.numel() for own in full.aside) == {"sd1": 859_520_964, "sdxl": 2_567_463_684}[family]


def test_a_large_file_says_its_size_before_training_starts(
    tiny_sd: Factory, spec: Callable[..., TrainSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(**values: Any) -> list[str]:
        own = spec().model_dump(exclude={"options", "method"}) | {"overwrite": True}
        events: list[Event] = []
        adapter = train(
            tiny_sd(), TrainSpec.model_validate(own | {"method": "full"} | values), on_event=events.append
        )
        path = save_adapter(adapter, tmp_path / "full.safetensors", overwrite=True)
        assert load_adapter(path).kind == "full"
        first = next(place for place, event in enumerate(events) if event.kind == "progress")
        sizes = [event.message for event in events[:first] if event.message.startswith("The file will take")]
        return [*sizes, str(path.stat().st_size)]

    assert len(told(blocks=("mid_block",))) == 1
    monkeypatch.setattr("studio.trainers.outputs.LARGE", 100_000)
    message, written = told(blocks=("mid_block",))
    entries = int(message.split("each of ")[1].split(" ")[0].replace(",", ""))
    assert entries * 4 < int(written) < entries * 4 * 1.2  # The header is a part of so small a file.


def test_names_that_match_nothing_and_an_empty_choice_are_refused(tiny_sd: Factory) -> None:
    pipe = tiny_sd()
    refused = [
        ({"blocks": ("attn3",)}, r"blocks matches no layer: 'attn3'. Did you mean"),
        ({"exclude": ("attn3",)}, r"exclude matches no layer: 'attn3'. Did you mean"),
        ({"blocks": ("mid_block",), "exclude": ("unet",)}, "no layer is left to train. Choose more blocks"),
    ]
    for values, words in refused:
        with pytest.raises(TrainingError, match=words):
            TRAINERS["full"]().prepare(pipe, spec_of(**values))
    assert not any(value.requires_grad for value in pipe.unet.parameters())
