"""Fit the starter's AutoencoderKL: its encoder is a linear patch code, its decoder learns to invert it.

The encoder is an ordinary AutoencoderKL encoder whose weights are set so that it computes a principal
component analysis of 4x4 patches: stride-2 convolutions copy pixels into channels, residual branches are
zero, and the last SiLU is undone by channel pairs, ``silu(x) - silu(-x) = x``. The group norm before it is
made almost constant by a large constant pair in every group. So the latent space is known before any
training, and the UNet need not wait.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

PATCH = 4
LATENT_CHANNELS = 12
_WIDTHS = (32, 64, 128)
_GROUPS = 16
_ANCHOR = 30.0  # the constant pair; pixels are in [-1, 1], so the norm's scale moves by at most 0.2 %
_LOG_VARIANCE = -12.0
_HELD = 128  # pictures kept apart to measure the reconstruction


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def principal_patches(pixels: Tensor, *, channels: int = LATENT_CHANNELS) -> tuple[Tensor, Tensor]:
    """Return the mean ``[48]`` and the leading components ``[channels, 48]`` of all 4x4 patches.

    Args:
        pixels: ``[N, 3, H, W]`` uint8.
        channels: Number of components.
    """
    patches = F.pixel_unshuffle(to_unit(pixels), PATCH)  # [N, 48, h, w] with channel order rgb, y, x
    rows = patches.permute(0, 2, 3, 1).reshape(-1, 3 * PATCH * PATCH).double()
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    _, vectors = torch.linalg.eigh(covariance)
    return mean.float(), vectors.flip(1)[:, :channels].T.float().contiguous()


def encode_linear(pixels: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Return the unscaled latents ``[N, channels, H/4, W/4]`` by plain linear algebra."""
    patches = F.pixel_unshuffle(to_unit(pixels), PATCH)
    return torch.einsum("ck,nkhw->nchw", components, patches - mean[:, None, None])


def new_autoencoder(*, scaling_factor: float, size: int) -> AutoencoderKL:
    """Return an untrained autoencoder of the starter's shape."""
    levels = len(_WIDTHS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=_GROUPS,
        sample_size=size,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def _space_to_depth(conv: torch.nn.Conv2d, planes: int) -> None:
    """Make a stride-2 convolution copy 2x2 neighbourhoods of the first ``planes`` channels into channels."""
    for plane in range(planes):
        for dy in range(2):
            for dx in range(2):
                conv.weight[plane * 4 + dy * 2 + dx, plane, dy, dx] = 1.0


@torch.no_grad()
def set_linear_encoder(vae: AutoencoderKL, mean: Tensor, components: Tensor) -> None:
    """Write weights into the encoder so that it computes ``encode_linear`` (see the module's description)."""
    encoder = vae.encoder
    blocks = encoder.down_blocks
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.zero_()
            assert module.bias is not None
            module.bias.zero_()
    for plane in range(3):
        encoder.conv_in.weight[plane, plane, 1, 1] = 1.0
    _space_to_depth(blocks[0].downsamplers[0].conv, 3)
    for channel in range(12):
        blocks[1].resnets[0].conv_shortcut.weight[channel, channel] = 1.0
    _space_to_depth(blocks[1].downsamplers[0].conv, 12)

    # 16 groups of eight channels: three values as +x, -x pairs and the constant pair.
    spread = blocks[2].resnets[0].conv_shortcut
    weight = torch.zeros(_WIDTHS[-1], 3 * PATCH * PATCH)
    for value in range(3 * PATCH * PATCH):
        first = (value // 3) * 8 + (value % 3) * 2
        spread.weight[first, value], spread.weight[first + 1, value] = 1.0, -1.0
        weight[first, value], weight[first + 1, value] = 1.0, -1.0
    for group in range(_GROUPS):
        spread.bias[group * 8 + 6], spread.bias[group * 8 + 7] = _ANCHOR, -_ANCHOR
    # Variance of a group is (2 * anchor^2 + 2 * sum x^2) / 8; the affine scale undoes the leading part.
    encoder.conv_norm_out.weight.fill_(_ANCHOR / 2)
    encoder.conv_norm_out.bias.zero_()

    order = torch.tensor(
        [_channel_of(rgb, y, x) for rgb in range(3) for y in range(PATCH) for x in range(PATCH)]
    )
    by_encoder = torch.zeros_like(components)
    by_encoder[:, order] = components
    offset = components @ mean
    # Rounding the pairs' weights to fp16 is symmetric, so they still cancel.
    encoder.conv_out.weight[:LATENT_CHANNELS, :, 1, 1] = by_encoder @ weight.T
    encoder.conv_out.bias[:LATENT_CHANNELS] = -offset
    encoder.conv_out.bias[LATENT_CHANNELS:] = _LOG_VARIANCE
    vae.quant_conv.weight.copy_(torch.eye(2 * LATENT_CHANNELS)[:, :, None, None])
    vae.quant_conv.bias.zero_()
    vae.post_quant_conv.weight.copy_(torch.eye(LATENT_CHANNELS)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()


def _channel_of(rgb: int, y: int, x: int) -> int:
    """Return the encoder channel in which two space-to-depth steps put pixel (y, x) of a 4x4 patch."""
    inner = rgb * 4 + (y % 2) * 2 + (x % 2)
    return inner * 4 + (y // 2) * 2 + (x // 2)


def psnr(picture: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(-10 * torch.log10(((picture.clamp(-1, 1) - target) / 2).pow(2).mean()))


def train_decoder(
    vae: AutoencoderKL, pixels: Tensor, *, steps: int, batch: int = 32, rate: float = 2e-3, seed: int = 0
) -> float:
    """Train the decoder to invert the fixed encoder; return its PSNR in dB on pictures kept apart.

    Every second batch also holds noisy latents, so that the decoder forgives a UNet that is slightly off.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    kept_apart = min(_HELD, len(pixels) // 8)
    train, held = pixels[:-kept_apart], pixels[-kept_apart:]
    vae.encoder.to(memory_format=torch.channels_last)
    vae.decoder.to(memory_format=torch.channels_last)
    progress = tqdm(range(steps), desc="decoder", mininterval=5)
    for step in progress:
        target = to_unit(train[torch.randint(len(train), (batch,), generator=generator)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.mean
            if step % 2:
                latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            picture = vae.decode(latents).sample
        loss = F.mse_loss(picture.float(), target) + 0.1 * F.l1_loss(picture.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    return reconstruction_psnr(vae, held)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the PSNR in dB of pictures through the whole autoencoder, in its own precision."""
    pairs = []
    for chunk in pixels.split(64):
        target = to_unit(chunk)
        picture = vae.decode(vae.encode(target.to(vae.dtype)).latent_dist.mean).sample.float()
        pairs.append((picture.clamp(-1, 1) - target).pow(2).mean())
    return float(-10 * torch.log10(torch.stack(pairs).mean() / 4))
