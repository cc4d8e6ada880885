"""What SaRA's rank term costs in a step, over the matrices of Stable Diffusion 1.5's UNet.

    python tests/benchmarks/bench_rank_term.py --svd

One matrix of each shape is filled as SaRA fills it: the 5 % of smallest magnitude among zeros. Each row gives
how many matrices of the UNet have the shape and the median seconds of one gradient of the nuclear norm; with
``--svd`` also those by torch's singular value decomposition, a minute more, and how far the two gradients
differ, relative to their norm. "mean" is over all matrices of the UNet, which take turns at random: what a
step takes on average where ``rank_every`` is 1. On the CPU times are CPU seconds of one thread.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from bench_sparse_adamw import seconds, unet_shapes
from bench_train_cost import machine
from torch import Tensor

from studio.trainers.nuclear_norm import LEAST_SIDE, nuclear_norm_gradient


def matrices(width: int) -> Counter[tuple[int, int]]:
    """Return the shapes of the matrices that take turns, convolutions flattened, and how many have each."""
    flat = [(shape[0], shape[1:].numel()) for shape in unet_shapes(width) if len(shape) > 1]
    return Counter(shape for shape in flat if min(shape) >= LEAST_SIDE)


def trained(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return a matrix of the smallest entries of a random one, zeros elsewhere."""
    matrix = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device) * 0.02
    # Of a normal distribution 5 % are this near to zero.
    return matrix * (matrix.abs() < 0.0627 * 0.02)


def by_svd(matrix: Tensor) -> Tensor:
    """Return the gradient as the definition says."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    least = values[:1] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    gradient: Tensor = (left * (values > least)) @ right
    return gradient


def timed(
    route: Callable[[Tensor], Tensor], matrix: Tensor, device: torch.device, rounds: int
) -> tuple[float, Tensor]:
    """Return the median seconds of a route to the gradient, and the gradient."""
    found: list[Tensor] = []
    times = [seconds(lambda: found.append(route(matrix)), device) for _ in range(rounds)]
    return statistics.median(times), found[0]


def main() -> None:
    """Check, measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--svd", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)

    found = matrices(args.width)
    rows = []
    nuclear_norm_gradient(trained((640, 640), device))  # Libraries take their time at the first call.
    for shape, count in sorted(found.items(), key=lambda item: item[0][0] * item[0][1]):
        matrix = trained(shape, device)
        took, gradient = timed(nuclear_norm_gradient, matrix, device, args.rounds)
        row = {"shape": shape, "matrices": count, "seconds": round(took, 4)}
        if args.svd:
            took, exact = timed(by_svd, matrix, device, args.rounds)
            difference = float((gradient - exact).norm() / exact.norm())
            assert difference < 1e-3, (shape, difference)  # Small singular values in fp32.
            row |= {"svd_seconds": round(took, 4), "difference": difference}
        rows.append(row)
        print(json.dumps(row), flush=True)
    kinds = ("seconds", "svd_seconds") if args.svd else ("seconds",)
    facts = {
        "matrices": found.total(),
        "mean": {kind: sum(row["matrices"] * row[kind] for row in rows) / found.total() for kind in kinds},
        "rows": rows,
        "rounds": args.rounds,
        **machine(args.device),
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps({name: value for name, value in facts.items() if name != "rows"}, indent=2))


if __name__ == "__main__":
    main()
