"""What takes less memory or time changes how a run computes, not what: quantised bases, encoders, graphs."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.errors import SpecError, TrainingError, UsageError
from studio.models import execution
from studio.models.quantization import quantization_of, quantize
from studio.registry import TRAINERS
from studio.specs import Event, TrainSpec, parse_spec
from studio.trainers.estimate import estimate
from studio.trainers.identity import identity
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]
CPU = torch.device("cpu")
ENCODERS = {"vae", "text_encoder"}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, change in adapter.changes.items():
        found |= {f"{name}.{role}": value for role, value in vars(change).items() if torch.is_tensor(value)}
    return found


def same(first: Adapter, second: Adapter) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[key], theirs[key]) for key in ours)
    )


class Calls:
    """Counts what the encoders of a pipeline do, and when the steps of a run were."""

    def __init__(self, pipe: Any) -> None:
        self.log: list[str] = []
        encode = pipe.vae.encode
        pipe.vae.encode = lambda *args, **kwargs: (self.log.append("vae"), encode(*args, **kwargs))[1]
        pipe.text_encoder.register_forward_pre_hook(lambda *_: self.log.append("text_encoder"))

    def __call__(self, event: Event) -> None:
        if event.kind == "progress":
            self.log.append("step")

    def after_the_first_step(self) -> set[str]:
        return set(self.log[self.log.index("step") :]) - {"step"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloaded_encoders_encode_all_before_the_first_step_and_change_nothing(
    short_sd: Callable[[], Any], spec: Spec, precision: str
) -> None:
    values = {"precision": precision, "steps": 4, "batch_size": 1, "flip": True, "caption_dropout": 0.3}
    plain, pipe = short_sd(), short_sd()
    usual, ahead = Calls(plain), Calls(pipe)
    wanted = train(plain, spec(**values), on_event=usual)
    found = train(pipe, spec(**values, overwrite=True, offload_encoders=True), on_event=ahead)
    assert same(found, wanted)
    assert usual.after_the_first_step() == ENCODERS and not ahead.after_the_first_step()
    assert set(ahead.log) == {*ENCODERS, "step"}


def test_encoders_return_for_samples_and_measurements(
    short_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.trainers import offload

    awake: list[bool] = []
    entered = offload.Encoders.awake

    def noted(self: Any) -> Any:
        awake.append(True)
        return entered(self)

    monkeypatch.setattr(offload.Encoders, "awake", noted)
    pipe, events = short_sd(), list[Event]()
    run = spec(offload_encoders=True, sample_every=1, validation_split=0.5, validate_every=1)

    def draw(base: Any, *_: Any) -> Any:
        from PIL import Image

        assert base.vae.device.type == base.unet.device.type
        return [Image.new("RGB", (8, 8))]

    train(pipe, run, on_event=events.append, sample=draw)
    # At the start and after each of two steps, one of either kind.
    assert len(awake) == 6
    said = [event.message for event in events if event.message.startswith("On the CPU while training")]
    assert said == [
        "On the CPU while training: vae, text_encoder (which the device is, so this frees no memory)."
    ]


@pytest.mark.parametrize(
    ("values", "resting", "said"),
    [
        (
            {"center_crop": False},
            {"text_encoder"},
            "vae stays, as pictures are cropped or coloured at random",
        ),
        ({"shuffle_tags": True}, {"vae"}, "text_encoder stays, as captions differ from sample to sample"),
        ({"train_text_encoder": True}, {"vae"}, "text_encoder stays, as they learn"),
    ],
    ids=["crops", "tags", "text-encoder"],
)
def test_an_encoder_that_every_step_needs_stays_and_it_is_said(
    short_sd: Callable[[], Any], spec: Spec, values: dict[str, Any], resting: set[str], said: str
) -> None:
    events: list[Event] = []
    pipe = short_sd()
    calls = Calls(pipe)
    train(
        pipe,
        spec(offload_encoders=True, **values),
        on_event=lambda event: (events.append(event), calls(event)),
    )
    told = next(event.message for event in events if event.message.startswith("On the CPU while training"))
    assert said in told and all(name in told.partition(";")[0] for name in resting)
    assert not calls.after_the_first_step() & resting


def test_offloading_is_refused_where_every_encoder_is_needed_at_every_step(
    short_sd: Callable[[], Any], spec: Spec
) -> None:
    run = spec(offload_encoders=True, center_crop=False, train_text_encoder=True)
    with pytest.raises(
        TrainingError, match=r"none can be offloaded, as pictures are cropped .* and they learn"
    ):
        train(short_sd(), run)
    with pytest.raises(SpecError, match="offload_encoders: needs a cache"):
        parse_spec(TrainSpec, run.model_dump(exclude={"options"}) | {"cache": "off", "resume": False})


def test_the_estimate_counts_resting_encoders_apart(short_sd: Callable[[], Any]) -> None:
    pipe = short_sd()
    whole, without = estimate(pipe, []), estimate(pipe, [], away=["vae", "text_encoder"])
    parts = sum(
        value.numel() * value.element_size()
        for part in (pipe.vae, pipe.text_encoder)
        for value in (*part.parameters(), *part.buffers())
    )
    assert (without.offloaded, without.base) == (parts, whole.base - parts)
    assert without.total == whole.total - parts and "on the CPU" in str(without)
    assert "on the CPU" not in str(whole)


def test_a_run_tells_the_estimate_without_the_resting_encoders(
    short_sd: Callable[[], Any], spec: Spec
) -> None:
    events: list[Event] = []
    train(short_sd(), spec(steps=1, offload_encoders=True), on_event=events.append)
    assert any("on the CPU)" in event.message for event in events if event.message.startswith("Memory:"))


def test_a_run_computes_attention_as_asked_and_gives_the_base_back_as_it_was(
    one_block_sd: Callable[[], Any], spec: Spec
) -> None:
    pipe, seen = one_block_sd(), set[str]()

    def look(event: Event) -> None:
        if event.kind == "progress":
            seen.update(type(one).__name__ for one in pipe.unet.attn_processors.values())

    before = pipe.unet.attn_processors
    run = {"attention": "eager", "steps": 1, "exclude": ()}
    train(pipe, spec(**run), on_event=look)
    assert seen == {"AttnProcessor"}
    assert all(pipe.unet.attn_processors[name] is own for name, own in before.items())
    with pytest.raises(UsageError, match="attention: xformers"):
        train(pipe, spec(**run | {"attention": "xformers", "overwrite": True}))


def test_a_compiled_run_takes_the_same_steps_from_graphs_made_in_its_first(
    one_block_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []
    made = [0]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made[0] += 1
        forward: Callable[..., Any] = graph.forward
        return forward

    def look(event: Event) -> None:
        if event.kind == "progress":
            graphs.append(made[0])

    monkeypatch.setattr(execution, "BACKEND", backend)
    pipe, run = one_block_sd(), {"steps": 4, "exclude": ()}
    wanted = train(pipe, spec(**run))
    found = train(pipe, spec(**run, overwrite=True, compile=True), on_event=look)
    assert same(found, wanted)
    assert graphs == [1, 1, 1, 1]
    assert not any("_compiled_call_impl" in vars(module) for module in pipe.unet.modules())


REFUSED: Mapping[str, str] = {
    "loha": "peft has no layers of LoHa for quantised weights",
    "lokr": "peft has no layers of LoKr for quantised weights",
    "full": "full trains the base's own weights",
    "sara": "sara trains entries of the base's own weights",
}


def request(method: str, **values: Any) -> dict[str, Any]:
    token = {"token": "<new>"} if method == "textual-inversion" else {}
    return {"data": "pictures", "output": "x.safetensors", "method": method, **token, **values}


@pytest.mark.parametrize("method", TRAINERS.names())
def test_each_method_takes_a_quantised_base_or_refuses_it_before_anything_is_loaded(method: str) -> None:
    reason = REFUSED.get(method)
    if reason is None:
        parse_spec(TrainSpec, request(method, quantize_base="nf4"))
        return
    with pytest.raises(SpecError, match=f"quantize_base: {reason}.*Choose another method"):
        parse_spec(TrainSpec, request(method, quantize_base="nf4"))
    parse_spec(TrainSpec, request(method))


def test_dora_refuses_8_bits_and_takes_4() -> None:
    parse_spec(TrainSpec, request("dora", quantize_base="nf4"))
    with pytest.raises(SpecError, match="quantize_base: peft's layers of DoRA lose the scales"):
        parse_spec(TrainSpec, request("dora", quantize_base="int8"))


@pytest.mark.parametrize("init", ["pissa", "lora-ga"])
def test_starts_that_look_into_the_weights_refuse_a_quantised_base(init: str) -> None:
    with pytest.raises(SpecError, match=f"quantize_base: the start '{init}' takes"):
        parse_spec(TrainSpec, request("lora", init=init, quantize_base="int8"))
    parse_spec(TrainSpec, request("lora", init="eva", quantize_base="int8"))


def test_a_base_in_another_form_than_asked_is_refused(one_block_sd: Callable[[], Any], spec: Spec) -> None:
    with pytest.raises(TrainingError, match="the base given was loaded with 'none'"):
        train(one_block_sd(), spec(quantize_base="nf4", exclude=()))


def test_a_run_may_go_on_with_other_memory_settings_but_not_with_another_base(spec: Spec) -> None:
    def of(**values: Any) -> Any:
        return identity(spec(**values), base="b", precision="fp32", data={})

    assert of() == of(offload_encoders=True, compile=True, attention="eager")
    assert of() != of(quantize_base="nf4")


needs_bitsandbytes = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="it quantises")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_on_a_quantised_base_is_lora_on_the_weights_it_unpacks_to(
    short_sd: Callable[[], Any], spec: Spec, kind: Any
) -> None:
    quantized, dense = short_sd(), short_sd()
    quantize(quantized.unet, kind, device=CPU)
    for name, layer in dense.unet.named_modules():
        if type(own := quantized.unet.get_submodule(name)) is not type(layer):
            layer.weight.data = dequantize_bnb_weight(own.weight, getattr(own, "state", None)).clone()
    before = {name: value.clone() for name, value in quantized.unet.state_dict().items()}
    run = {"exclude": (), "steps": 3, "learning_rate": 1e-2}
    found = tensors(train(quantized, spec(**run, quantize_base=kind)))
    wanted = tensors(train(dense, spec(**run, overwrite=True)))
    assert found.keys() == wanted.keys()
    for name in found:
        assert torch.allclose(found[name], wanted[name], atol=2e-4), name  # Adam divides by small moments
    assert quantization_of(quantized.unet) == kind
    after = quantized.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "lora-eva": {"method": "lora", "init": "eva", "init_batches": 1},
    "lora-moslora": {"method": "lora", "moslora": True, "targets": "all"},
    "b-lora": {
        "method": "b-lora",
        "content_blocks": ("down_blocks.0.attentions.0",),
        "style_blocks": ("mid_block.attentions.0",),
        "rank": 2,
    },
    "oft": {"method": "oft"},
    "vera": {"method": "vera", "rank": 4},
    "textual-inversion": {"method": "textual-inversion", "token": "<new>", "prompt": "a <new>"},
}


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("variant", "kind"), [*itertools.product(VARIANTS, ("nf4", "int8")), ("dora", "nf4")], ids=str
)
def test_what_is_not_refused_trains_on_a_quantised_base(
    short_sd: Callable[[], Any], folder: Path, tmp_path: Path, variant: str, kind: Any
) -> None:
    pipe = short_sd()
    quantize(pipe.unet, kind, device=CPU)
    values = {
        "data": folder,
        "output": tmp_path / "x.safetensors",
        "prompt": "x",
        "steps": 2,
        "warmup_steps": 0,
        "device": "cpu",
        "quantize_base": kind,
    }
    if variant == "textual-inversion":
        (folder / "1.txt").unlink()
    adapter = train(pipe, TrainSpec.model_validate(values | VARIANTS.get(variant, {"method": variant})))
    learned = [change.delta(torch.ones(change.shape), weight=1.0) for change in adapter.changes.values()]
    assert all(bool(delta.any()) for delta in learned) and bool(learned) != bool(adapter.tokens)
