"""What every registered training method promises, in every variant that its options offer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.parameters import canonical_names, components_of
from studio.models.tokens import AddedTokens, Tokens
from studio.registry import TRAINERS
from studio.specs import TrainSpec
from studio.trainers.borrow import borrowed, networks
from studio.trainers.layer_method import LayerMethod
from studio.trainers.outputs import layers_of

# Options under which a method must keep its promises; one that is not named runs with its defaults.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "lora": {
        "plain": {},
        "all": {"targets": "all", "alpha": 1.5},
        "feed-forward": {"targets": "attention+ff", "exclude": ("attn2",)},
        "rslora": {"rslora": True, "rank": 4},
        "dropout": {"dropout": 0.5},
        "lora-plus": {"lora_plus_ratio": 8.0},
        "lora-fa": {"freeze_down": True, "targets": "all"},
        "moslora": {"moslora": True, "targets": "all"},
        "block-ranks": {"block_ranks": {"attn1": 5, "mid_block": 2}, "rslora": True},
        "block-rates": {"block_learning_rates": {"mid_block": 1e-4}},
        "pissa": {"init": "pissa", "targets": "all", "alpha": 2.0},
        "pissa-rslora": {"init": "pissa", "rslora": True, "block_ranks": {"attn1": 5}},
        "lora-ga": {"init": "lora-ga", "init_batches": 2, "targets": "all"},
        "eva": {"init": "eva", "init_batches": 2, "targets": "all"},
        "eva-moslora-fa": {"init": "eva", "moslora": True, "freeze_down": True},
        "token": {"token": "<new>", "vectors": 2},
        "token-eva": {"token": "<new>", "init": "eva", "token_learning_rate": 1e-2, "token_until": 0.5},
    },
    "dora": {
        "plain": {},
        "all": {"targets": "all", "alpha": 1.5},
        "rslora": {"rslora": True, "block_ranks": {"attn1": 5}},
        "lora-fa": {"freeze_down": True, "lora_plus_ratio": 4.0},
        "dropout": {"dropout": 0.5},
    },
    "loha": {"plain": {}, "all": {"targets": "all", "alpha": 1.5, "block_ranks": {"attn1": 5}}},
    "lokr": {
        "plain": {},
        "all": {"targets": "all", "factor": 4},
        "split": {"rank": 2, "alpha": 1.0, "targets": "all"},
    },
    "oft": {"plain": {}, "all": {"targets": "all", "block_size": 2}},
    # Blocks that both families have.
    "b-lora": {
        "plain": {"content_blocks": ("mid_block",), "style_blocks": ("up_blocks",)},
        "rslora": {
            "content_blocks": ("mid_block.attentions.0", "down_blocks"),
            "style_blocks": ("up_blocks",),
            "rslora": True,
            "alpha": 2.0,
            "dropout": 0.5,
        },
        "lora-fa": {
            "content_blocks": ("mid_block",),
            "style_blocks": ("up_blocks",),
            "freeze_down": True,
            "lora_plus_ratio": 4.0,
        },
    },
    "full": {
        "plain": {},
        "custom-diffusion": {"blocks": ("attn2.to_k", "attn2.to_v", "encoder.layers.0")},
        "exclude": {"exclude": ("resnets",)},
    },
    "textual-inversion": {
        "plain": {"token": "<new>"},
        "words": {"token": "<new>", "init_words": "toy", "vectors": 5},
    },
    "vera": {"plain": {}, "feed-forward": {"targets": "attention+ff", "rank": 16, "d_initial": 0.5}},
}
CASES = {method: list(VARIANTS.get(method, {"defaults": {}})) for method in TRAINERS}
# SDXL has other networks and reads prompts otherwise; an option does there what it does on SD 1.x.
ON_SDXL = {method: dict.fromkeys((variants[0], variants[-1])) for method, variants in CASES.items()}
# Their start is a product and the same product with the opposite sign.
ROUNDED_STARTS = ("pissa", "lora-ga")


def specification(method: str, variant: str) -> TrainSpec:
    options = VARIANTS.get(method, {}).get(variant, {})
    own = TRAINERS[method].Options.model_fields
    given = {name: value for name, value in {"rank": 3, "train_text_encoder": True}.items() if name in own}
    if method == "lokr":
        del given["rank"]
    if method == "b-lora":
        del given["train_text_encoder"]
    paths = {"data": "d", "output": "o.safetensors", "steps": 4}
    return TrainSpec.model_validate({"method": method, **paths, **given, **options})


def components(pipe: Any, spec: TrainSpec) -> set[str]:
    """Return what a run trains of a base."""
    text = getattr(spec.options, "train_text_encoder", False)
    return {name for name in components_of(pipe) if text or name == "unet"}


def forward(pipe: Any, prompt: str = "a dog") -> Tensor:
    """Return the prediction for fixed latents and a prompt that the text encoders encode."""
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    encoded = pipe.encode_prompt(
        prompt=[prompt], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    conditions = None
    if len(encoded) == 4:
        conditions = {"text_embeds": encoded[2], "time_ids": torch.full((1, 6), 64.0)}
    result: Tensor = pipe.unet(latents, torch.tensor([300]), encoded[0], added_cond_kwargs=conditions).sample
    return result


def distance(pipe: Any, prompt: str, number: int = 0) -> Tensor:
    """Return a loss: how far the prediction is from fixed numbers."""
    target = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(100 + number))
    return (forward(pipe, prompt) - target).square().mean()


def prompt_of(spec: TrainSpec) -> str:
    """Return a prompt that names the token if one is trained."""
    return "a dog" if getattr(spec.options, "token", None) is None else "a <new> dog"


def snapshot(pipe: Any) -> list[Any]:
    """Return what must be the same after training: modules, flags, and objects and bits of parameters."""
    found: list[Any] = []
    for name, part in networks(pipe).items():
        modules = [(path, type(module), sorted(vars(module))) for path, module in part.named_modules()]
        found.append((name, modules, [module.training for module in part.modules()]))
        found.append([(path, id(p), p.data_ptr(), p.requires_grad) for path, p in part.named_parameters()])
        found.append([p.detach().numpy().tobytes() for p in part.parameters()])
    for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", pipe.tokenizer)):
        found.append((id(tokenizer), len(tokenizer), tokenizer._tokenizer.to_str(), dict(vars(tokenizer))))
    return found


class Session:
    """One method attached to a base: how it started, how it went on, what came of it."""

    def __init__(self, pipe: Any, spec: TrainSpec, *, exactly: bool) -> None:
        self.pipe, self.spec, self.prompt = pipe, spec, prompt_of(spec)
        with torch.no_grad():
            self.plain = forward(pipe)
        before = snapshot(pipe)
        trainer = TRAINERS[spec.method]()
        with borrowed(pipe, device=torch.device("cpu"), dtype=torch.float32):
            try:
                self.groups = trainer.prepare(pipe, spec)
                trainer.warm_start(lambda number: distance(pipe, self.prompt, number))
                self._starts_from_the_base(exactly)
                self._learns(trainer)
                self._disturb()
                self._trains_only_what_it_says()
                self.adapter: Adapter = trainer.export()
                with torch.no_grad():
                    self.live = forward(pipe, self.prompt)
                with torch.no_grad(), trainer.suspended():
                    assert torch.equal(forward(pipe), self.plain)
                with torch.no_grad():
                    assert torch.equal(forward(pipe, self.prompt), self.live)
            finally:
                trainer.release()
            with torch.no_grad():
                assert torch.equal(forward(pipe), self.plain)
        assert snapshot(pipe) == before

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.parameters]

    def _starts_from_the_base(self, exactly: bool) -> None:
        with torch.no_grad():
            start = forward(self.pipe)
        if exactly:
            assert torch.equal(start, self.plain)
        else:
            assert torch.allclose(start, self.plain, atol=2e-5)  # Sums of the two products in fp32.

    def _learns(self, trainer: Any) -> None:
        """Do the run's steps on one batch; the loss falls."""
        optimizer = trainer.optimizer(self.groups, weight_decay=0.0)
        losses = []
        for step in range(1, self.spec.steps + 1):
            optimizer.zero_grad()
            loss = distance(self.pipe, self.prompt)
            loss.backward()
            losses.append(float(loss.detach()))
            trainer.before_clipping(step)
            optimizer.step()
            trainer.after_step(step)
        assert losses[-1] < losses[0]
        # The base knows no new token, so there is nothing to compare with.
        assert self.prompt != "a dog" or losses[-1] < float(distance_of(self.plain))

    def _disturb(self) -> None:
        """Take the parameters far enough from their start for every one of them to count."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.trained:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def _trains_only_what_it_says(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        distance(self.pipe, self.prompt).backward()
        known = {id(parameter) for parameter in self.trained}
        assert len(known) == len(self.trained)
        for part in networks(self.pipe).values():
            strays = [
                name for name, p in part.named_parameters() if p.grad is not None and id(p) not in known
            ]
            assert strays == []
        for group in self.groups:
            reached = [p.grad is not None and bool(p.grad.any()) for p in group.parameters]
            # SDXL takes the first encoder's output from before its last layer.
            last_is_idle = group.name == "text_encoder" and "text_encoder_2" in components_of(self.pipe)
            assert any(reached) if last_is_idle else all(reached), group.name
        assert {group.name for group in self.groups} == trained_components(self.pipe, self.spec)


def trained_components(pipe: Any, spec: TrainSpec) -> set[str]:
    if spec.method == "textual-inversion":
        return set(components_of(pipe)) - {"unet"}
    return {"unet"} if spec.method == "b-lora" else set(components_of(pipe))


def distance_of(prediction: Tensor) -> Tensor:
    target = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(100))
    return (prediction - target).square().mean()


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def base(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return one base for all methods: each gives it back as it was."""
    yield request.getfixturevalue(request.param)()


@pytest.mark.parametrize(
    ("base", "method", "variant"),
    [
        pytest.param(base, method, variant, id=f"{base}-{method}-{variant}")
        for base, cases in (("tiny_sd", CASES), ("tiny_sdxl", ON_SDXL))
        for method, variants in cases.items()
        for variant in variants
    ],
    indirect=["base"],
)
def test_a_method_keeps_the_promises_of_all_methods(
    base: Any, method: str, variant: str, tmp_path: Path
) -> None:
    spec = specification(method, variant)
    rounded = any(getattr(spec.options, "init", None) == name for name in ROUNDED_STARTS)
    session = Session(base, spec, exactly=not rounded)
    adapter, known = session.adapter, canonical_names(components_of(base))
    assert all(known[name] == change.shape for name, change in adapter.changes.items())
    changed = set() if method == "textual-inversion" else trained_components(base, spec)
    assert {name.split(".")[0] for name in adapter.changes} == changed

    path = tmp_path / "style.safetensors"
    save_adapter(layers_of(adapter), path, format=spec.file_format, dtype=torch.float32, base=base)
    again = load_adapter(path, base=base, any_base=True)
    tokens = comes_back(adapter, tmp_path / "token.safetensors", base)
    assert again.kind == adapter.kind and again.changes.keys() == adapter.changes.keys()
    for name, change in again.changes.items():
        alpha = change.alpha or 1.0  # type: ignore[attr-defined]
        mine, read = (
            one.changes[name].to_parts(alpha=alpha)  # type: ignore[attr-defined]
            for one in (adapter, again)
        )
        assert mine.keys() == read.keys() and all(torch.equal(mine[part], read[part]) for part in mine), name

    with torch.no_grad(), WeightBank(components_of(base), again.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in again.changes.items()})
        with AddedTokens(base, tokens) if tokens else nullcontext():
            merged = forward(base, session.prompt)
    change = (session.live - session.plain).abs().max()
    # Far above what is compared next, also where few blocks learn.
    assert change > 2e-3
    assert (merged - session.live).abs().max() < 1e-3 * change  # fp32 through a network, twice.


def comes_back(adapter: Adapter, path: Path, base: Any) -> Tokens:
    """Return the tokens of an adapter as they come back from a file, bit for bit."""
    if not adapter.tokens:
        return {}
    alone = replace(adapter, changes={}, kind="textual-inversion")
    tokens = load_adapter(save_adapter(alone, path, format="embedding"), base=base).tokens
    assert tokens.keys() == adapter.tokens.keys() == {"<new>"}
    for component, rows in adapter.tokens["<new>"].items():
        assert torch.equal(tokens["<new>"][component], rows)
    return tokens


def test_every_option_of_the_methods_that_add_layers_has_a_variant() -> None:
    varied = {name for variants in VARIANTS.values() for options in variants.values() for name in options}
    own = [TRAINERS[name].Options for name in TRAINERS if issubclass(TRAINERS[name], LayerMethod)]
    # `specification` asks every method that can for the text encoders.
    assert {name for options in own for name in options.model_fields} <= varied | {"train_text_encoder"}


@pytest.mark.parametrize("method", list(TRAINERS))
def test_the_same_seed_gives_the_same_start_whatever_the_global_random_state(
    tiny_sd: Callable[[], Any], method: str
) -> None:
    pipe = tiny_sd()

    def first_step(seed: int, state: int) -> dict[str, Tensor]:
        trainer = TRAINERS[method]()
        torch.manual_seed(state)
        spec = specification(method, next(iter(VARIANTS.get(method, {"": {}}))))
        with borrowed(pipe, device=torch.device("cpu"), dtype=torch.float32):
            groups = trainer.prepare(pipe, spec.model_copy(update={"seed": seed}))
            distance(pipe, prompt_of(spec)).backward()
            trainer.release()
        return {
            f"{group.name} {number}": parameter.detach().clone()
            for group in groups
            for number, parameter in enumerate(group.parameters)
        }

    one, same, other = first_step(0, 1), first_step(0, 2), first_step(5, 1)
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    # Rotations and VeRA's vectors start alike everywhere; those of SaRA and full are the base's own.
    assert any(not torch.equal(one[name], other[name]) for name in one) == (
        method not in ("oft", "vera", "sara", "full")
    )
