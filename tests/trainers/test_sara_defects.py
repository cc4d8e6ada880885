"""What goes wrong in the code published with SaRA, arXiv:2409.06633: tests that none of it does in ours.

Found by reading that code and running it on small networks; numbered as in our notes on it.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sara_oracle import batch_loss, trainer_on

import studio.kernels
import studio.trainers
from studio.adapters.files import load_adapter, save_adapter
from studio.composition.engine import compose
from studio.specs import TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.selection import Selection

Base = Callable[[], Any]
GIVEN = {"data": "d", "output": "o.safetensors", "method": "sara"}


def run(folder: Path, **values: Any) -> TrainSpec:
    given = GIVEN | {"data": folder, "output": folder.parent / "out.safetensors", "prompt": "sks dog"}
    return TrainSpec.model_validate(given | {"steps": 2, "device": "cpu", "quantile": 0.2} | values)


def test_defect_1_negative_weights_keep_their_sign_at_the_start_and_at_reselection(tiny_sd: Base) -> None:
    """There the magnitudes were written into the base."""
    pipe = tiny_sd()
    before = [weight.detach().clone() for weight in pipe.unet.parameters()]
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.5, reselect_at=1)
    assert 0.4 < float((part.values < 0).float().mean()) < 0.6
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.unet.parameters(), strict=True))
    batch_loss(pipe, 1).backward()
    trainer.before_clipping(1)
    optimizer.step()
    stood = [weight.detach().clone() for weight in pipe.unet.parameters()]
    trainer.before_clipping(2)
    assert all(torch.equal(a, b) for a, b in zip(stood, pipe.unet.parameters(), strict=True))
    assert 0.4 < float((part.values < 0).float().mean()) < 0.6
    # The step at which entries are selected anew is a step like any other.
    values = part.values.detach().clone()
    optimizer.step()
    assert float((part.values.detach() != values).float().mean()) > 0.9


def test_defect_2_the_rank_term_reaches_what_is_trained_and_leaves_no_dense_gradient(
    tiny_sd: Base, folder: Path
) -> None:
    """There it went to tensors that nothing reads: lambda 0 and 10 gave the same bits."""
    pipe = tiny_sd()
    without, strong = (train(pipe, run(folder, rank_weight=weight)) for weight in (0.0, 10.0))
    moved = [
        not torch.equal(without.changes[name].values, strong.changes[name].values)  # type: ignore[attr-defined]
        for name in without.changes
    ]
    assert any(moved)
    trainer, _, _ = trainer_on(pipe, quantile=0.2, rank_weight=10.0)
    for step in range(1, 6):
        trainer.before_clipping(step)
    assert all(weight.grad is None for weight in pipe.unet.parameters())


def test_defect_3_the_defaults_run(tiny_sd: Base, folder: Path) -> None:
    """There the first step of the documented command ended in an AttributeError."""
    adapter = train(tiny_sd(), run(folder, quantile=None))
    assert adapter.metadata["ss_steps"] == "2"


def test_defect_4_clipping_acts_on_what_is_trained(tiny_sd: Base) -> None:
    """There it was given parameters without gradients, whose norm is always 0."""
    pipe = tiny_sd()
    _, (part,), _ = trainer_on(pipe, quantile=0.2)
    batch_loss(pipe, 1).backward()
    assert part.values.grad is not None
    norm = float(part.values.grad.norm())
    found = torch.nn.utils.clip_grad_norm_([part.values], norm / 4)
    assert norm > 0 and float(found) == pytest.approx(norm)
    assert float(part.values.grad.norm()) == pytest.approx(norm / 4, rel=1e-4)  # clipping adds 1e-6


def test_defect_5_a_step_may_have_many_backward_passes_and_checkpointing(tiny_sd: Base, folder: Path) -> None:
    """There the second backward pass of a step met freed tensors."""
    adapter = train(tiny_sd(), run(folder, gradient_accumulation=3, gradient_checkpointing=True))
    assert adapter.metadata["ss_steps"] == "2"


def test_defect_6_a_layer_without_gradient_shifts_nothing(tiny_sd: Base) -> None:
    """There entries were found by counting the parameters that had a gradient."""
    changes = []
    for unused in (False, True):
        pipe = tiny_sd()
        if unused:
            pipe.unet.down_blocks[0].extra = torch.nn.Linear(8, 8).requires_grad_(False)
        trainer, _, optimizer = trainer_on(pipe, quantile=0.2)
        for step in range(1, 3):
            batch_loss(pipe, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(trainer.export().changes)
    plain, others = changes
    assert others.keys() - plain.keys() == {
        "unet.down_blocks.0.extra.weight", "unet.down_blocks.0.extra.bias",
    }  # fmt: skip
    for name, change in plain.items():
        assert torch.equal(change.values, others[name].values)  # type: ignore[attr-defined]
    # Without a gradient, weight decay alone acts.
    assert others["unet.down_blocks.0.extra.weight"].values.abs().max() < 1e-4  # type: ignore[attr-defined]


def test_defect_7_training_goes_on_from_its_saved_state(tiny_sd: Base) -> None:
    """There loading the state failed, and the documented call did not exist."""

    def steps(pipe: Any, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            batch_loss(pipe, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, second = tiny_sd(), tiny_sd(), tiny_sd()
    _, (expected,), optimizer = trainer_on(whole, quantile=0.2)
    steps(whole, optimizer, range(5))
    _, (stopped,), optimizer = trainer_on(first, quantile=0.2)
    steps(first, optimizer, range(3))
    values, state = stopped.values.detach().clone(), optimizer.state_dict()
    _, (resumed,), optimizer = trainer_on(second, quantile=0.2)
    resumed.values.data.copy_(values)
    resumed.write()
    optimizer.load_state_dict(state)
    steps(second, optimizer, range(3, 5))
    assert torch.equal(resumed.values, expected.values)
    assert all(
        torch.equal(a, b) for a, b in zip(second.unet.parameters(), whole.unet.parameters(), strict=True)
    )


def test_defect_8_a_file_that_was_written_is_applied(tiny_sd: Base, folder: Path, tmp_path: Path) -> None:
    """There the inference script took every file that the trainer wrote for one of the other kind."""
    pipe = tiny_sd()
    adapter = train(pipe, run(folder, learning_rate=1e-2))
    path = save_adapter(adapter, tmp_path / "dog.safetensors", format="sara")
    plain = batch_loss(pipe, 1).detach()
    with compose(pipe, {"dog": load_adapter(path, base=pipe)}), torch.no_grad():
        assert not torch.equal(batch_loss(pipe, 1), plain)
    assert torch.equal(batch_loss(pipe, 1), plain)


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({"threshold": 2e-4}, 9.32e-4),
        ({"threshold": 8e-4}, 7.56e-4),
        ({"threshold": 2e-3}, 4.97e-4),
        ({"threshold": 1e-2}, 3.02e-5),
        ({"threshold": 100}, 1e-5),
        ({}, 1e-3),
        ({"threshold": 2e-3, "learning_rate": 0.3}, 0.3),
        ({"quantile": 0.1, "learning_rate": 0.3}, 0.3),
    ],
    ids=str,
)
def test_defect_9_the_learning_rate_is_the_one_asked_for_and_never_zero(
    values: dict[str, Any], rate: float
) -> None:
    """There it was ignored, and the default threshold of 100 made it exp(-35000)."""
    spec = parse_spec(TrainSpec, GIVEN | values)
    assert spec.unet_learning_rate == pytest.approx(rate, rel=2e-3)


def test_defect_10_files_name_their_entries_whatever_the_bases_type_and_order(
    tiny_sd: Base, folder: Path, tmp_path: Path
) -> None:
    """There the entries were looked for anew in the base, where rounding moved some over the threshold."""
    pipe = tiny_sd()
    # Entries that rounding to 16 bits lifts over the threshold.
    with torch.no_grad():
        pipe.unet.conv_in.weight.view(-1)[:64] = 2.0**-6 * (1 - 2.0**-13)
    adapter = train(pipe, run(folder, threshold=2.0**-6, quantile=None, learning_rate=1e-2))
    path = save_adapter(adapter, tmp_path / "dog.safetensors", format="sara")
    other = tiny_sd()
    other.unet.load_state_dict(pipe.unet.state_dict())
    other.unet.to(torch.float16)
    rule = Selection("smallest", 2.0**-6, None)
    assert rule.count(other.unet.conv_in.weight) < rule.count(pipe.unet.conv_in.weight)
    loaded = load_adapter(path, base=other)
    assert loaded.changes.keys() == adapter.changes.keys()
    for name, change in adapter.changes.items():
        assert torch.equal(loaded.changes[name].indices, change.indices)  # type: ignore[attr-defined]
        assert torch.equal(loaded.changes[name].values, change.values)  # type: ignore[attr-defined]
    assert path.read_bytes()[8:9] == b"{", "safetensors, not a pickle"


def test_defect_11_no_copy_of_torchs_optimizer_nor_its_private_parts() -> None:
    """There torch 2.1.2 was pinned by a private copy of AdamW, one path of which forgot the write-back."""
    roots = [Path(next(iter(package.__path__))) for package in (studio.trainers, studio.kernels)]
    sources = [path for root in roots for path in root.rglob("*.py")]
    assert {"sparse_optimizer.py", "sparse_adamw.py"} <= {path.name for path in sources}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.optim"):
                assert not any(alias.name.startswith("_") for alias in node.names), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("_cuda_graph_capture_health_check", "_single_tensor_adamw"), path


def test_defect_11_every_step_writes_back_what_it_computed(tiny_sd: Base) -> None:
    """The other half of the eleventh."""
    pipe = tiny_sd()
    _, (part,), optimizer = trainer_on(pipe, quantile=0.2)
    for step in range(1, 4):
        batch_loss(pipe, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, weight in enumerate(part.plan.weights):
            entries = weight.detach().flatten()[part.plan.indices[number].long()]
            assert torch.equal(entries, part.values.detach()[part.plan.segments[number]])
