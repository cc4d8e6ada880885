"""How far a prediction is from its target, and how much each timestep counts."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from studio.errors import TrainingError
from studio.specs.train import TrainSpec

HUBER_DELTA = 0.1


@dataclass(frozen=True)
class Loss:
    """The loss of single numbers, and weights of timesteps. Fields mean what they do in ``TrainSpec``."""

    loss: Literal["l2", "l1", "huber"] = "l2"
    huber_delta: float | None = None
    min_snr_gamma: float | None = None
    debiased: bool = False

    @classmethod
    def of(cls, spec: TrainSpec) -> Self:
        """Return what a specification asks for."""
        return cls(spec.loss, spec.huber_delta, spec.min_snr_gamma, spec.debiased)

    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each number, in the shape of both, fp32.

        Huber's is twice the usual one, so that errors below delta count as in the squared error.
        """
        if self.loss == "l1":
            return functional.l1_loss(predicted, target, reduction="none")
        if self.loss == "huber":
            delta = self.huber_delta or HUBER_DELTA
            return 2 * functional.huber_loss(predicted, target, reduction="none", delta=delta)
        return functional.mse_loss(predicted, target, reduction="none")

    def weights(self, alphas_cumprod: Tensor, *, prediction_type: str) -> Tensor | None:
        """Return the weight of every timestep, fp32 ``[T]``, or None where all count alike.

        Written for the error of the noise. The velocity's is the noise's divided by ``alphas_cumprod``, so
        its weights are multiplied by ``SNR / (SNR + 1)``, which is the same number.

        Args:
            alphas_cumprod: The base's schedule ``[T]``, perhaps ending in 0: pure noise.
            prediction_type: ``epsilon`` or ``v_prediction``.

        Raises:
            TrainingError: If a weight is not finite.
        """
        kept = alphas_cumprod.double().cpu()
        snr = kept / (1 - kept)
        velocity = prediction_type == "v_prediction"
        if self.debiased:
            # 1 / sqrt(SNR). Debias the training of diffusion models, arXiv:2310.08442.
            weights = snr.sqrt() / (snr + 1) if velocity else snr.rsqrt()
        elif self.min_snr_gamma is not None:
            # min(SNR, gamma) / SNR. Min-SNR, arXiv:2303.09556, Sec. 3.4.
            gamma = self.min_snr_gamma
            # Written so that a schedule that ends in pure noise (SNR 0) gets weight 1 there.
            weights = snr.clamp(max=gamma) / (snr + 1) if velocity else torch.clamp(gamma / snr, max=1.0)
        else:
            return None
        if not weights.isfinite().all():
            raise TrainingError(
                "the base predicts the noise and its schedule ends in pure noise, where debiased weights are "
                "infinite. Set debiased to off; min_snr_gamma works."
            )
        return weights.float()
