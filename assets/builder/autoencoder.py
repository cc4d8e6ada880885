"""Fit the starter's AutoencoderKL: its encoder is a linear patch code, its decoder learns to invert it.

The encoder is an ordinary AutoencoderKL encoder whose weights are set so that it computes a principal
component analysis of square patches: stride-2 convolutions copy pixels into channels, the last of them takes
the components, residual branches are zero, and the last SiLU is undone by channel pairs,
``silu(x) - silu(-x) = x``. The group norm before it is made almost constant by a large constant pair in every
group. So the latent space is known before any training, and the UNet need not wait.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from studio.assets.builder.training import Machine, Schedule, Training, train

_ANCHOR = 30.0  # the constant pair
_LOG_VARIANCE = -12.0


@dataclass(frozen=True)
class AutoencoderSpec:
    """Shape of an autoencoder.

    Attributes:
        patch: Side of a patch in pixels: pictures are this much larger than latents, a power of two.
        channels: Latent channels: principal components of a patch.
        widths: Channels per level, from full resolution down, the last two alike; one more than halvings.
        groups: Groups of the norms.
    """

    patch: int = 8
    channels: int = 16
    widths: tuple[int, ...] = (32, 64, 96, 96)
    groups: int = 8

    @property
    def pair_scale(self) -> float:
        """Factor of the pairs: it keeps them so small beside the constant pair that the norm hardly moves."""
        return 1 / (2 * self.patch)


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def principal_patches(pixels: Tensor, *, patch: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return the mean ``[3 * patch^2]`` and leading components ``[channels, 3 * patch^2]`` of all patches.

    Args:
        pixels: ``[N, 3, H, W]`` uint8.
        patch: Side of a patch in pixels.
        channels: Number of components.
    """
    values = 3 * patch * patch
    total, products, count = torch.zeros(values).double(), torch.zeros(values, values).double(), 0
    for chunk in pixels.split(256):
        patches = F.pixel_unshuffle(to_unit(chunk), patch)  # [N, values, h, w] with channel order rgb, y, x
        rows = patches.permute(0, 2, 3, 1).reshape(-1, values).double()
        total, products, count = total + rows.sum(0), products + rows.T @ rows, count + len(rows)
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    return mean.float(), vectors.flip(1)[:, :channels].T.float().contiguous()


def encode_linear(pixels: Tensor, offset: Tensor, components: Tensor) -> Tensor:
    """Return the unscaled latents ``[N, channels, h, w]`` by plain linear algebra.

    Args:
        pixels: ``[N, 3, H, W]`` uint8.
        offset: ``[channels]``, what the mean patch would give.
        components: ``[channels, 3 * patch^2]``.
    """
    patches = F.pixel_unshuffle(to_unit(pixels), math.isqrt(components.shape[1] // 3))
    return torch.einsum("ck,nkhw->nchw", components, patches) - offset[:, None, None]


def new_autoencoder(spec: AutoencoderSpec, *, scaling_factor: float, size: int) -> AutoencoderKL:
    """Return an untrained autoencoder."""
    levels = len(spec.widths)
    if 2 ** (levels - 1) != spec.patch or spec.widths[-1] != spec.widths[-2]:
        wanted = int(math.log2(spec.patch)) + 1
        raise ValueError(
            f"a patch of {spec.patch} takes {wanted} widths, the last two alike, got {spec.widths}"
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec.widths,
        layers_per_block=1,
        latent_channels=spec.channels,
        norm_num_groups=spec.groups,
        sample_size=size,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def _copied(patch: int) -> Tensor:
    """Return where the encoder has the values of a patch when its last halving begins.

    Returns:
        ``[3 * patch^2, 3]``: channel, row and column, for the patch's values in the order rgb, y, x.
    """
    half = patch // 2
    places = []
    for rgb in range(3):
        for y in range(patch):
            for x in range(patch):
                channel, scale = rgb, 1
                while scale < half:
                    channel = channel * 4 + (y // scale % 2) * 2 + x // scale % 2
                    scale *= 2
                places.append((channel, y // half, x // half))
    return torch.tensor(places)


def _slots(spec: AutoencoderSpec) -> tuple[Tensor, Tensor]:
    """Return the channels of the pairs' positive halves, and of the constant pairs' (one per group)."""
    side = spec.widths[-1] // spec.groups
    each = math.ceil(spec.channels / spec.groups)
    if 2 * each + 2 > side:
        raise ValueError(f"{spec} has no room for {each} components and the constant pair in a group")
    component = torch.arange(spec.channels)
    return component // each * side + component % each * 2, torch.arange(spec.groups) * side + 2 * each


@torch.no_grad()
def set_linear_encoder(vae: AutoencoderKL, spec: AutoencoderSpec, mean: Tensor, components: Tensor) -> None:
    """Write weights into the encoder so that it computes ``encode_linear`` (see the module's description)."""
    encoder = vae.encoder
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.zero_()
            assert module.bias is not None
            module.bias.zero_()
    _set_copies(encoder, spec)
    plus, anchors = _slots(spec)
    last = encoder.down_blocks[-2].downsamplers[0].conv
    channel, row, column = _copied(spec.patch).unbind(1)
    for sign, at in ((1, plus), (-1, plus + 1)):
        last.weight[at[:, None], channel, row, column] = sign * spec.pair_scale * components
        last.bias[at] = -sign * spec.pair_scale * (components @ mean)
    last.bias[anchors], last.bias[anchors + 1] = _ANCHOR, -_ANCHOR
    # A group's variance is (2 * anchor^2 + what the pairs add) / side; the scale undoes the first part.
    side = spec.widths[-1] // spec.groups
    encoder.conv_norm_out.weight.fill_(_ANCHOR * math.sqrt(2 / side))
    encoder.conv_norm_out.bias.zero_()

    component = torch.arange(spec.channels)
    encoder.conv_out.weight[component, plus, 1, 1] = 1 / spec.pair_scale
    encoder.conv_out.weight[component, plus + 1, 1, 1] = -1 / spec.pair_scale
    encoder.conv_out.bias[spec.channels :] = _LOG_VARIANCE
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        convolution.weight.copy_(torch.eye(len(convolution.weight))[:, :, None, None])
        convolution.bias.zero_()


def _set_copies(encoder: Any, spec: AutoencoderSpec) -> None:
    """Let all halvings but the last put 2x2 neighbours into channels, and the levels hand them on."""
    for plane in range(3):
        encoder.conv_in.weight[plane, plane, 1, 1] = 1.0
    for level, block in enumerate(encoder.down_blocks):
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            for channel in range(min(shortcut.weight.shape[:2])):
                shortcut.weight[channel, channel] = 1.0
        if level < len(spec.widths) - 2:
            weight = block.downsamplers[0].conv.weight
            for plane in range(3 * 4**level):
                for corner in range(4):
                    weight[plane * 4 + corner, plane, corner // 2, corner % 2] = 1.0


@torch.no_grad()
def linear_code(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Return the offset and the components that the encoder computes, for ``encode_linear``, which is faster.

    They are measured on noise, so the encoder may be of any shape.

    Raises:
        ValueError: If the encoder is no linear code of patches.
    """
    patch = 2 ** (len(vae.config.block_out_channels) - 1)
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, 16 * patch, 16 * patch), generator=noise, dtype=torch.uint8)
    latents = vae.encode(to_unit(pixels).to(vae.device)).latent_dist.mean.cpu()
    patches = F.pixel_unshuffle(to_unit(pixels), patch)
    known = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1).movedim(1, -1).flatten(0, 2)
    found = latents.movedim(1, -1).flatten(0, 2)
    code = torch.linalg.lstsq(known, found).solution
    error, spread = (known @ code - found).std(), found.std()
    if error > 0.01 * spread:
        raise ValueError(f"the encoder is no linear patch code: {error / spread:.1%} of its answer is not")
    return -code[-1], code[:-1].T.contiguous()


def train_decoder(
    vae: AutoencoderKL,
    pixels: Tensor,
    *,
    schedule: Schedule,
    machine: Machine,
    state: Path,
    batch: int = 32,
    seed: int = 0,
) -> Training:
    """Train the decoder to invert the fixed encoder.

    Every second batch also holds noisy latents, so that the decoder forgives a UNet that is slightly off.
    Half of the pictures have their colour planes interchanged: renders have few colours, adapters bring more.

    Args:
        vae: Its decoder is trained in place.
        pixels: ``[N, 3, H, W]`` uint8.
        schedule: Length and rates.
        machine: Device and deadline.
        state: State file.
        batch: Pictures per step.
        seed: Of pictures and noise.
    """
    device = machine.torch_device
    decoder = vae.decoder.to(device, memory_format=machine.layout)
    offset, components = (part.to(device) for part in linear_code(vae))
    forward = torch.compile(decoder) if machine.compile else decoder

    def loss_at(step: int) -> Tensor:
        generator = machine.generator(seed, step)
        rows = torch.randint(len(pixels), (batch,), generator=generator, device=device)
        chosen = pixels[rows.cpu()].to(device)
        planes = torch.rand(batch, 3, generator=generator, device=device).argsort(1)
        planes[::2] = torch.arange(3, device=device)
        chosen = chosen.gather(1, planes[:, :, None, None].expand_as(chosen))
        latents = encode_linear(chosen, offset, components)
        if step % 2:
            latents = latents + 0.05 * torch.randn(latents.shape, generator=generator, device=device)
        with machine.autocast():
            picture = forward(latents.contiguous(memory_format=machine.layout))
        target = to_unit(chosen)
        return F.mse_loss(picture.float(), target) + 0.1 * F.l1_loss(picture.float(), target)

    return train(decoder, loss_at, schedule=schedule, machine=machine, state=state, name="decoder")


def psnr(picture: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(-10 * torch.log10(((picture.clamp(-1, 1) - target) / 2).pow(2).mean()))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return uint8 pixels ``[N, 3, H, W]`` through the whole autoencoder, in [-1, 1], fp32, on the CPU."""
    parts = []
    for chunk in pixels.split(32):
        target = to_unit(chunk).to(vae.device, vae.dtype)
        parts.append(vae.decode(vae.encode(target).latent_dist.mean).sample.float().cpu())
    return torch.cat(parts)


def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the PSNR in dB of uint8 pictures through the whole autoencoder, in its own precision."""
    return psnr(reconstruct(vae, pixels), to_unit(pixels.cpu()))
