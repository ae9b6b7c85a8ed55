"""Samplers: each turns noise into data with a denoiser on a grid of times."""

from ornstein.diffusion.samplers.adaptive import RK45
from ornstein.diffusion.samplers.ancestral import EulerAncestral
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.ddim import DDIM
from ornstein.diffusion.samplers.ddpm import DDPM
from ornstein.diffusion.samplers.deis import DEIS
from ornstein.diffusion.samplers.diffusers import DiffusersSampler
from ornstein.diffusion.samplers.dpmpp import DPMpp1S, DPMpp2M, DPMpp3M
from ornstein.diffusion.samplers.dpmpp_sde import DPMpp2MSDE, DPMpp3MSDE
from ornstein.diffusion.samplers.dpmpp_singlestep import DPMpp2S, DPMppSDE
from ornstein.diffusion.samplers.edm import Euler, Heun
from ornstein.diffusion.samplers.langevin import AnnealedLangevin
from ornstein.diffusion.samplers.lcm import LCM
from ornstein.diffusion.samplers.lms import LMS
from ornstein.diffusion.samplers.pndm import PNDM
from ornstein.diffusion.samplers.predictor_corrector import PredictorCorrector
from ornstein.diffusion.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "LCM",
    "LMS",
    "PNDM",
    "RK45",
    "AnnealedLangevin",
    "DPMpp1S",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3MSDE",
    "DPMppSDE",
    "DiffusersSampler",
    "Euler",
    "EulerAncestral",
    "Heun",
    "PredictorCorrector",
    "Sampler",
    "State",
    "UniPC",
]
