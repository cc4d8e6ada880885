"""Do models of SD 1.5's and SDXL's full size pass through training, with files that other tools can read?

    python tests/benchmarks/check_full_size.py                  # all four, some minutes, up to 10 GiB
    python tests/benchmarks/check_full_size.py --only sd1/lora

The weights are random, nothing is downloaded. Each case is a process of its own: one step of the studio's
training loop on 16 x 16 latents, the base in bf16 as on a GPU, then files. Checked are the loss, that
every layer of the change moved that could, that the base is bit for bit what it was, names and shapes of
all tensors in the files, and that the studio reads them again. SaRA's dense file of SDXL, 5 GB in bf16, is
left out; its names are checked without weights by ``test_full_size``. A case for which the machine's memory
does not suffice is not begun. The outcome goes to ``results/full_size.json``.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_train_cost import machine
from full_size import Shapes, dense_file, kohya_shapes, lora_file, make_pipe
from PIL import Image
from train_worker import resident

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.parameters import canonical_names, components_of
from studio.specs import Event, TrainSpec
from studio.trainers import loop

RESULTS = Path(__file__).parent / "results" / "full_size.json"
GIB = 2**30
MOST = 10
"""GiB that no case may exceed."""
RANK = 4


@dataclass(frozen=True)
class Case:
    """One method on one family.

    Attributes:
        family: "sd1" or "sdxl".
        options: Of the run.
        needs: GiB that must be free.
        formats: Of the files.
    """

    family: str
    options: dict[str, Any]
    needs: int
    formats: tuple[str, ...]


LORA = {"method": "lora", "rank": RANK, "train_text_encoder": True}
CASES = {
    "sd1/lora": Case("sd1", LORA, 6, ("kohya", "diffusers")),
    "sdxl/lora": Case("sdxl", LORA, 10, ("kohya", "diffusers")),
    # The paper's 50 million.
    "sd1/sara": Case("sd1", {"method": "sara", "quantile": 0.06}, 9, ("sara", "kohya")),
    # Fewer, for the sake of memory.
    "sdxl/sara": Case("sdxl", {"method": "sara", "quantile": 0.01}, 9, ("sara",)),
}


def run(case: Case) -> dict[str, Any]:
    """Train one step, write and check the files, and return what was found."""
    pipe = make_pipe(case.family, whole_encoders="train_text_encoder" in case.options)
    before = digest(pipe)
    facts: dict[str, Any] = {"parameters": sum(value.numel() for value in pipe.unet.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        start, losses = time.perf_counter(), []
        adapter = one_step(pipe, case, Path(folder), losses)
        facts |= {"seconds": round(time.perf_counter() - start, 1), "loss": losses[0]}
        assert len(losses) == 1 and math.isfinite(losses[0]), losses
        assert digest(pipe) == before, "the base is not what it was"
        facts |= moved(adapter, case.family)
        components = components_of(pipe)
        shapes, names = kohya_shapes(components), canonical_names(components)
        for form in case.formats:
            path = Path(folder) / f"{form}.safetensors"
            # A dense file is as large as the model: the base has to go first.
            if form == "kohya" and adapter.kind == "sparse":
                del pipe, components
                gc.collect()
                save_adapter(adapter, path, format=form, dtype=torch.bfloat16)
            else:
                save_adapter(adapter, path, format=form, base=pipe)
                read = load_adapter(path, base=pipe)
                assert read.changes.keys() == adapter.changes.keys()
            found = {key: shape for key, (_, shape) in read_header(path).tensors.items()}
            check_names(found, adapter, form, shapes=shapes, names=names)
            facts[form] = {"tensors": len(found), "bytes": path.stat().st_size}
    return facts | {"peak_gib": round(resident("VmHWM") / GIB, 2)}


def one_step(pipe: Any, case: Case, folder: Path, losses: list[float]) -> Adapter:
    """Return the adapter after one step of the studio's loop, whose loss is added to the list."""
    data = folder / "data"
    data.mkdir()
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(data / "a.png")
    values = {
        "data": data, "output": folder / "out.safetensors", "prompt": "a fox", "steps": 1, "warmup_steps": 0,
        "batch_size": 1, "resolution": 128, "precision": "bf16", "device": "cpu",
        "gradient_checkpointing": True,
    }  # fmt: skip

    def watch(event: Event) -> None:
        if event.kind == "progress":
            losses.append(event.values["loss"])

    # On the CPU the loop holds bases in fp32, SDXL's in 10 GB; on a GPU in their own 16 bits, as here.
    with mock.patch.object(loop, "weight_dtype", lambda *_: torch.bfloat16):
        return loop.train(pipe, TrainSpec.model_validate(values | case.options), on_event=watch)


def moved(adapter: Adapter, family: str) -> dict[str, Any]:
    """Return how much of the change the step moved, after checking that it is what it had to be."""
    changes: Any = adapter.changes.values()
    if adapter.kind == "sparse":
        entries = sum(change.values.numel() for change in changes)
        nonzero = sum(int(change.values.count_nonzero()) for change in changes)
        assert nonzero > 0.5 * entries, (nonzero, entries)
        return {"trained": entries, "moved": nonzero}
    # LoRA's up matrices start at zero, so the first step moves them and not the others. SDXL reads its first
    # text encoder before the last layer.
    unread = "text_encoder.text_model.encoder.layers.11." if family == "sdxl" else "nothing"
    still = {name for name, change in adapter.changes.items() if not change.up.any()}
    assert still == {name for name in adapter.changes if name.startswith(unread)}, still
    ups = sum(change.up.numel() for change in changes)
    return {
        "trained": ups + sum(change.down.numel() for change in changes),
        "moved": sum(int(change.up.count_nonzero()) for change in changes),
        "layers": len(adapter.changes),
    }


def check_names(found: Shapes, adapter: Adapter, form: str, *, shapes: Shapes, names: Shapes) -> None:
    """Check names and shapes of a file's tensors against those that the format is to have."""
    if form == "sara":
        assert set(found) == {
            f"{name}.{part}" for name in adapter.changes for part in ("gaps", "delta", "shape")
        }
        assert set(adapter.changes) <= {name for name in names if name.startswith("unet.")}
        return
    if adapter.kind == "sparse":
        unet = {key: shape for key, shape in shapes.items() if key.startswith("lora_unet_")}
        # Of the few entries of the last bias none was chosen.
        assert found.items() <= dense_file(unet).items() and len(found) == len(adapter.changes)
        return
    wanted = lora_file(shapes if form == "kohya" else names, rank=RANK, form=form)
    assert found == wanted, sorted(set(found.items()) ^ set(wanted.items()))[:10]


def digest(pipe: Any) -> str:
    """Return a hash of every bit of the base's weights."""
    total = hashlib.sha256()
    for module in components_of(pipe).values():
        for parameter in module.parameters():
            total.update(parameter.detach().view(torch.uint8).numpy())
    return total.hexdigest()


def free() -> float:
    """Return the machine's free memory in GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def watch_memory() -> None:
    """End the process if it takes more than it may."""
    while True:
        if resident("VmRSS") > MOST * GIB:
            print(f"more than {MOST} GiB", file=sys.stderr)
            os._exit(1)
        time.sleep(0.2)


def main() -> None:
    """Run the cases, each in a process of its own, and write what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        threading.Thread(target=watch_memory, daemon=True).start()
        print(json.dumps(run(CASES[args.here])))
        return
    known = json.loads(args.results.read_text())["cases"] if args.results.is_file() else {}
    failed = False
    for name in args.only:
        if free() < CASES[name].needs:
            outcome: dict[str, Any] = {"not run": f"{free():.1f} GiB free, {CASES[name].needs} needed"}
        else:
            command = [sys.executable, __file__, "--here", name]
            # glibc would take large passing tensors from its heap, which small lasting ones then keep apart:
            # 4 GB more while SaRA selects.
            own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own)
            failed |= done.returncode != 0
            outcome = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": True}
        known[name] = outcome | {"date": machine()["date"]}
        print(name, json.dumps(known[name]), flush=True)
        args.results.write_text(json.dumps({"cases": known, **machine()}, indent=2) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
