"""What is refused before anything is read, and that nothing else is."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.cli.launch import conf_dir, find_mistake
from ornstein.cli.trust import targets
from ornstein.cli.validate import validate

CONF = conf_dir()
MODELS = (
    *("pixel_unet", "class_unet", "dit", "latent_unet", "latent_dit", "text_unet", "text_dit", "experts"),
    *("unet_diffusers", "unet_condition_diffusers"),
)
SCHEDULES = sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml"))
OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
# What is refused, and why: these predict what alpha = 0 leaves undetermined; only these are bounds, and may train a
# schedule; and these end in the likelihood of pixels.
PREDICT_NOISE = {"eps", "score", "p2", "vlb", "hybrid"}
BOUNDS = {"vlb", "vdm"}
OF_PIXELS = {"vlb", "hybrid", "vdm"}

# Overrides, and the words that the sentence must hold: what is wrong, and what to do.
REFUSED = [
    ("data.num_classes=null", "model=class_unet data=digits class-conditional model=pixel_unet conditioner=none"),
    ("model=dit data.num_classes=null", "model=dit data=digits class-conditional model=pixel_unet"),
    ("model=dit data=image_folder data.root=.", "model=dit data=image_folder data.num_classes=auto"),
    ("model=pixel_unet data=image_folder", "data=image_folder data.root=FOLDER"),
    ("model=pixel_unet guidance=cfg", "guidance=cfg no condition guidance=none model=class_unet"),
    ("conditioner=none guidance=cfg", "guidance=cfg no condition guidance=none"),
    ("guidance=cfg conditioner.dropout=0", "guidance=cfg label dropout guidance=none conditioner.dropout=0.1"),
    ("model=latent_unet codec=identity", "model=latent_unet codec=identity codec=kl model=class_unet"),
    ("model=latent_dit codec=identity", "model=latent_dit codec=identity codec=kl model=dit"),
    (
        "model=latent_unet data=fashion_mnist",
        "codec=kl digits fashion_mnist model=autoencoder_kl data.image_size=32 codec.weights=FOLDER model=class_unet",
    ),
    ("codec=kl", "image_size=32 data.image_size is 8 codec.weights="),
    ("model=latent_dit data.image_size=16", "image_size=32 data.image_size is 16 set data.image_size=32"),
    ("model=latent_dit data.image_size=30", "data.image_size=30 is not divisible by 4 codec= data.image_size=32"),
    ("model=latent_unet data.channels=3", "image_channels=1 data.channels"),
    ("model=latent_unet codec.weights=/nowhere.safetensors", "/nowhere.safetensors model=autoencoder_kl bundled"),
    ("codec=diffusers data.channels=3", "codec=diffusers codec.pretrained=FOLDER"),
    ("codec=diffusers codec.pretrained=nobody/nothing", "codec.pretrained=nobody/nothing no folder here fetched"),
    ("data.image_size=9", "9 x 9 divide by 2 10 x 10"),
    ("model=dit data.image_size=[8,16]", "data.image_size=[8, 16] squares one number"),
    ("+init.form=x", "init.form no such key from, weights, partial, freeze, train_only"),
    ("model.network.label_mode=foo", "model.network: label_mode add, concat, cross_attention 'foo'"),
    ("model=dit model.network.heads=3", "model.network: 128 3 attention heads"),
    ("model=dit data.image_size=9", "9 x 9 divide by 2 patch_size 10 x 10"),
    ("model/network=unet data.image_size=12", "12 x 12 divide by 8 16 x 16"),
    ("model/network=annotated data.image_size=10", "10 x 10 divide by 4 12 x 12"),
    ("data.image_size=0", "image size positive 0"),
    ("data.image_size=8.5", "positive side in pixels"),
    ("objective=eps scheduler=flow", "objective=eps scheduler=flow zero SNR objective=v cosine"),
    ("objective=eps scheduler.zero_terminal_snr=true", "objective=eps zero SNR scheduler.zero_terminal_snr=false"),
    ("scheduler=ve scheduler.zero_terminal_snr=true", "zero_terminal_snr"),
    ("scheduler=vdm_learned", "learned schedule objective=vdm scheduler=vdm_learned"),
    ("objective=vlb model=latent_unet", "objective=vlb codec=kl latents objective.last=gaussian pixel model"),
    ("objective/coupling=minibatch_ot sampler=ddpm", "objective/coupling fresh noise sampler=euler independent"),
    ("objective/coupling=minibatch_ot sampler=ddim sampler.eta=1", "objective/coupling fresh noise sampler=euler"),
    ("sampler=ddpm sampler.variance=learned", "sampler.variance=learned fixed_small objective=hybrid"),
    ("sampler=diffusers sampler.scheduler._target_=diffusers.ScoreSdeVeScheduler", "ScoreSdeVeScheduler DDIMScheduler"),
    ("sampler=heun guidance=cfgpp", "guidance=cfgpp sampler=Heun sampler=ddim"),
    ("init.from=/nowhere", "init.from=/nowhere no such file or folder"),
    ("init.weights=best", "init.weights=best ema or model"),
    ("init.freeze=[stem.*]", "init.freeze without init.from= random init.from=outputs/train"),
    ("init.train_only=[stem.*]", "init.train_only without init.from= random"),
    ("adapter=lora", "adapter=lora without init.from= random"),
    ("trainer.max_steps=0", "trainer.max_steps=0 at least 1"),
    ("trainer.max_steps=null", "trainer.max_steps=None at least 1"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0 at least 1"),
    ("trainer=fsdp model=autoencoder_kl", "trainer=fsdp autoencoder trainer.strategy=ddp"),
    ("trainer=fsdp model.compile=true", "trainer=fsdp model.compile=false trainer.strategy=ddp"),
    ("trainer=fsdp trainer.precision=16-mixed", "trainer.precision=16-mixed trainer=fsdp bf16-mixed"),
    ("trainer=fsdp trainer.strategy.timeout_s=0", "trainer.strategy.timeout_s=0 above 0"),
    ("trainer=fsdp trainer.strategy.reshard_after_forward=2", "trainer.strategy.reshard_after_forward=2 true or false"),
    ("sampler.steps=0", "sampler.steps=0 at least 1"),
    ("sampler=heun sampler.steps=-3", "sampler.steps=-3 at least 1"),
    ("sampler.steps=many", "sampler.steps=many whole number"),
    ("sampler.steps=2.5", "sampler.steps=2.5 whole number"),
    ("sampler.steps=true", "sampler.steps=True whole number"),
    ("sampler.grid.t_max=1.5", "sampler.grid.t_max=1.5 [0, 1]"),
    ("sampler/grid=log_snr sampler.grid.t_max=0.1 sampler.grid.t_min=0.5", "sampler.grid.t_max=0.1 above t_min=0.5"),
    (
        "sampler/grid=log_snr sampler.grid.t_max=1 scheduler=flow",
        "sampler.grid.t_max=1 infinite log-SNR sampler.grid.t_max=0.999",
    ),
    ("sampler.grid=karras", "sampler.grid=karras sampler/grid=karras"),
    (
        "sampler=diffusers sampler.scheduler._target_=diffusers.schedulers.DPMSolverSDEScheduler",
        "DPMSolverSDEScheduler sampler=diffusers DDIMScheduler",
    ),
    ("sampler=diffusers sampler.scheduler._target_=NoSuch", "NoSuch sampler=diffusers DDIMScheduler"),
    ("objective/time=log_normal objective.time.p_std=0", "objective.time.p_std=0 positive"),
    ("objective/time=logit_normal objective.time.std=0", "objective.time.std=0 positive"),
    ("objective/time=discrete_uniform objective.time.num_timesteps=0", "objective.time.num_timesteps=0 at least 1"),
    ("sampler=ddim sampler.eta=-1", "sampler.eta=-1 [0, 1]"),
    ("sampler=ddpm sampler.variance=wide", "sampler.variance fixed_small fixed_large"),
    ("sampler/grid=trailing sampler.steps=2000", "sampler.steps=2000 num_timesteps=1000"),
    ("conditioner.dropout=1.5", "conditioner.dropout [0, 1] 1.5"),
    ("scheduler=linear scheduler.beta_start=2", "beta_start"),
    ("objective/distance=huber objective.distance.delta=-1", "delta > 0"),
    ("objective/time=uniform objective.time.t_min=3", "objective.time.t_min=3 [0, 1)"),
    ("model=dit model.network.heads=3", "hidden_size 128 3 attention heads"),
    (
        "model.network.noise_embedding=fourier",
        "model.network.noise_embedding=fourier objective=v objective=edm sinusoidal",
    ),
    ("model/network=edm2_xs data.image_size=32", "model.network.noise_embedding=fourier objective=edm sinusoidal"),
    ("model/network=edm2_tiny data.image_size=9", "9 x 9 divide by 2 10 x 10"),
    ("model/network=edm2_tiny model.network.attention=[true]", "attention 1 entries channel_mults 2"),
    ("model=unet_diffusers data.image_size=10", "10 x 10 divide by 4 12 x 12"),
    ("model=unet_condition_diffusers model.network.label_mode=concat", "label_mode 'add' 'cross_attention' 'concat'"),
    ("model=experts model.network.num_experts=1", "num_experts at least 2 1"),
    ("model=experts model.network.boundaries=[0.5,0.6]", "boundaries=[0.5, 0.6] must be 1 num_experts=2"),
    ("model=experts model.network.train_only=[2]", "train_only=[2] experts from 0 to 1 null"),
    ("model=experts data.image_size=9", "9 x 9 divide by 2 10 x 10"),
    (
        "model=experts model.network.network.noise_embedding=fourier",
        "model.network.network.noise_embedding=fourier objective=v objective=edm sinusoidal",
    ),
    ("clip_x0=-1", "clip_x0=-1 positive null"),
    ("dynamic_threshold=7", "dynamic_threshold=7 (0, 1]"),
    ("optimizer.lr=-1", "optimizer=adamw learning rate -1"),
    ("lr_schedule.warmup_steps=-1", "lr_schedule warmup_steps=-1"),
    ("codec.channels=3", "codec.channels=3 data.channels=1 codec=identity leave codec.channels out set data.channels"),
    ("codec.size=16", "codec.size=16 data.image_size=8 codec=identity leave codec.size out"),
    ("codec.size=[8,16]", "codec.size=[8, 16] data.image_size=8"),
    ("model=latent_unet codec.channels=8", "channels=4 codec.channels is 8"),
    ("data.latents=/nowhere", "data.latents=/nowhere codec=identity leave data.latents out model=latent_dit"),
    ("model=latent_dit data.latents=/nowhere", "data.latents=/nowhere no latents ornstein.cli.encode data=digits"),
    ("model=autoencoder_kl sampler=heun", "sampler=heun model=autoencoder_kl no sampler leave it out latent_unet"),
    ("model=autoencoder_vq sampler.steps=3", "sampler.steps=3 model=autoencoder_vq no sampler"),
    ("model=autoencoder_kl clip_x0=1", "clip_x0=1 model=autoencoder_kl no clip_x0 leave it out"),
    ("model=autoencoder_kl codec=kl", "codec=kl model=autoencoder_kl no codec"),
    ("model=autoencoder_kl data.image_size=30", "shrinks images by 4 30x30 data.image_size multiple of 4"),
    ("model=autoencoder_kl data.latents=/nowhere", "model=autoencoder_kl images leave data.latents out"),
    ("model=autoencoder_kl callbacks=default", "callbacks.schedule_plot callbacks=autoencoder callbacks=none"),
    ("callbacks=autoencoder", "callbacks.reconstruction_grid callbacks=default model=autoencoder_kl"),
    ("model=autoencoder_kl model.loss.reconstruction=l3", "model.loss.reconstruction=l3 l1 or l2"),
    ("model=autoencoder_kl model.loss.start=-1", "model.loss.start=-1 at least 0"),
    (
        "model=autoencoder_kl model.loss.adversarial=hinge data.image_size=16",
        "model.discriminator.layers=3 24 pixels data.image_size 16 fewer layers model.loss.adversarial=null",
    ),
    (
        "model=autoencoder_kl model.loss.adversarial=hinge trainer.precision=16-mixed",
        "trainer.precision=16-mixed model.loss.adversarial=hinge bf16-mixed 32-true",
    ),
    ("model=autoencoder_kl model.loss.perceptual=alex data.image_size=16", "alex 32 pixels 16 vgg null larger images"),
    ("model=autoencoder_vq model.network.codes=1", "codes=1 at least 2"),
    ("model=autoencoder_vq model.network.update=sgd", "update=sgd gradient or ema"),
    ("model=autoencoder_kl model.network.groups=5", "multiple of groups=5"),
    ("model=autoencoder_kl callbacks.codec_file.dtype=int8", "callbacks.codec_file.dtype=int8 float32 or float16"),
    ("model=autoencoder_kl callbacks.evaluation.num_samples=-1", "callbacks.evaluation.num_samples=-1 at least 0"),
    ("ema.decay=2", "ema.decay=2 [0, 1)"),
    ("ema.decay=1", "ema.decay=1 [0, 1)"),
    ("ema.every=0", "ema.every=0 at least 1"),
    ("callbacks.nonfinite.every=0", "callbacks.nonfinite.every=0 at least 1"),
    ("callbacks.nonfinite.every=null", "callbacks.nonfinite.every=None at least 1"),
    ("callbacks.log.levels_every=0", "callbacks.log.levels_every=0 at least 1 null"),
    ("callbacks.loss_heatmap.every=0", "callbacks.loss_heatmap.every=0 at least 1 null"),
    ("callbacks.throughput.peak_tflops=0", "callbacks.throughput.peak_tflops=0 above 0"),
    ("logger.wandb.log_model=last", "logger.wandb.log_model=last false best all"),
    ("callbacks.validation.every=0", "callbacks.validation.every=0 at least 1 null"),
    ("callbacks.validation.max_batches=0", "callbacks.validation.max_batches=0 at least 1"),
    ("callbacks.sample_grid.every=2.5", "callbacks.sample_grid.every=2.5 whole number"),
    ("callbacks.trajectory.frames=1", "callbacks.trajectory.frames=1 at least 2"),
    ("callbacks.evaluation.num_samples=-1", "callbacks.evaluation.num_samples=-1 at least 0"),
    ("callbacks.checkpoint.every=0", "callbacks.checkpoint.every=0 at least 1 null"),
    ("callbacks.checkpoint.mode=best", "callbacks.checkpoint.mode=best min or max"),
    ("callbacks.checkpoint.keep_every=0", "callbacks.checkpoint.keep_every=0 true, false, or at least 1"),
    ("callbacks.checkpoint.keep_every_images=0", "callbacks.checkpoint.keep_every_images=0 at least 1 null"),
    ("callbacks.checkpoint.keep_last=0", "callbacks.checkpoint.keep_last=0 at least 1 null"),
    ("callbacks.checkpoint.asynchronous=2", "callbacks.checkpoint.asynchronous=2 true or false"),
    ("callbacks.checkpoint.ema_weights=last", "callbacks.checkpoint.ema_weights=last true or false"),
    ("logger.wandb.mode=on", "'on' online offline logger.wandb.mode"),
    ("data.features=nope", "'nope' data.features digits inception none"),
    ("metrics.num_samples=1", "metrics.num_samples=1 at least 2"),
    ("metrics.kid_subsets=0", "metrics.kid_subsets=0 at least 1"),
    ("metrics.inception_splits=0", "metrics.inception_splits=0 at least 1"),
    ("metrics.neighbours=0", "metrics.neighbours=0 at least 1"),
    ("metrics.keep_features=1", "metrics.keep_features=1 at least 2"),
    ("metrics.best_worst=-1", "metrics.best_worst=-1 whole number 0 shows no samples"),
    ("callbacks.trajectory.film=avi", "callbacks.trajectory.film=avi gif mp4"),
    ("callbacks.codec_grid.num_images=0", "callbacks.codec_grid.num_images=0 at least 1"),
    ("metrics.bootstrap=5", "metrics.bootstrap=5 20 resamples 0 is for none"),
    ("metrics.also.efficientnet=yes-please", "metrics.also.efficientnet=yes-please true or false"),
    ("metrics.reference=fid-refs.npz", "metrics.reference=fid-refs.npz metrics=inception not with digits"),
    ("metrics=inception metrics.reference=refs.pkl", "metrics.reference=refs.pkl np.savez"),
    ("metrics=inception metrics.features.resize=pil", "metrics.features.resize=pil choose one of tf1"),
    ("metrics=inception metrics.features.weights=nowhere.pth", "metrics.features.weights=nowhere.pth no such file"),
    ("metrics=module", "metrics=module metrics.features.module._target_=package.Class"),
    ("metrics=efficientnet metrics.features.image_size=100", "metrics.features.image_size=100 multiple of 32"),
    ("model.matmul_precision=low", "model.matmul_precision=low highest high medium null"),
    ("data=image_folder data.root=/nowhere data.num_classes=auto", "data.root=/nowhere no such folder images"),
    ("data=hf model=pixel_unet", "data=hf data.path=NAME folder"),
    ("data=hf data.path=/nowhere/at/all data.num_classes=auto", "data.path=/nowhere/at/all no such file"),
    ("data=webdataset model=pixel_unet", "data=webdataset data.urls="),
    ("data=webdataset model=pixel_unet data.urls=/nowhere.tar", "data.urls /nowhere.tar not there"),
    ("data=webdataset model=pixel_unet data.urls=[pipe:a,pipe:b]", "'pipe:a' command data.trust_pipes=true"),
    ("data=webdataset data.urls=[http://x/a,http://x/b] data.num_classes=auto", "fetched data.num_classes=N"),
    (
        "model=pixel_unet data=image_folder data.root=. data.buckets=automatic",
        "data.buckets=automatic auto [height, width]",
    ),
    (
        "model=pixel_unet data=image_folder data.root=. data.buckets=[[64,50]]",
        "data.buckets [64,50] divide by 4 [64,48] patch_size fewer levels",
    ),
    ("model=pixel_unet data=image_folder data.root=. data.buckets={step:6}", "data.buckets.step=6 multiple of 8 null"),
    (
        "model=pixel_unet data=image_folder data.root=. data.buckets={ratio:2}",
        "data.buckets.ratio area, step, max_ratio",
    ),
    (
        "model=pixel_unet data=image_folder data.root=. data.buckets=auto data.balanced=true data.num_classes=2",
        "data.buckets data.balanced=true",
    ),
    (
        "model=pixel_unet data=image_folder data.root=. data.buckets=auto data.crop=edm_wide",
        "data.crop=edm_wide data.buckets data.crop=adm",
    ),
    (
        "model=autoencoder_kl data=image_folder data.root=. data.buckets=auto",
        "data.buckets=auto model=autoencoder_kl squares latent model",
    ),
    (
        "model=dit conditioner=none data=image_folder data.root=. model.network.patch_size=8 data.buckets=[[32,100]]",
        "data.buckets [32,100] divide by 8 [32,96]",
    ),
    (
        "model=pixel_unet data=image_folder data.root=. conditioner=image conditioner.factor=16 data.buckets=[[64,56]]",
        "conditioner.factor=16 64x56 data.buckets=[[64,56]]",
    ),
    ("data=image_folder data.root=. data.crop=middle", "data.crop=middle adm, edm, edm_wide, stretch, none"),
    ("data=image_folder data.root=. data.image_size=abc", "data.image_size=abc side in pixels"),
    ("data=image_folder data.root=. data.image_size=32.5", "data.image_size=32.5 side in pixels"),
    ("data=image_folder data.root=. data.image_size=null", "data.image_size=None side in pixels"),
    ("data.channels=grey", "data.channels=grey whole number at least 1"),
    ("data=image_folder data.root=. data.num_classes=all", "data.num_classes=all whole number at least 1"),
    ("data.flip=maybe", "data.flip=maybe true or false"),
    ("data.balanced=abc", "data.balanced=abc true or false"),
    ("data.sigma_data=abc", "data.sigma_data=abc number above 0"),
    ("data.seed=abc", "data.seed=abc whole number at least 0"),
    ("seed=-1", "seed=-1 whole number at least 0"),
    ("data=image_folder data.root=. data.storage=ram", "data.storage=ram auto, memory, mapped, lazy"),
    ("data=image_folder data.root=. data.max_bad=few", "data.max_bad=few whole number at least 0"),
    ("data=pairs", "data=pairs captions data.root=FOLDER data.table=FILE"),
    ("data=pairs data.table=/nowhere.csv", "data.table=/nowhere.csv no such file"),
    ("data=pairs data.root=. data.table=pyproject.toml", "pyproject.toml .csv, .tsv, .jsonl, .parquet"),
    ("data=pairs data.root=. data.num_classes=auto", "data.num_classes=auto data=pairs data.label_column"),
    ("data=pairs data.root=.", "class-conditional data=pairs no labels model=pixel_unet"),
    ("data.overlap=keep", "data.overlap=keep drop, refuse, allow"),
    ("data.limit_reference=all", "data.limit_reference=all whole, limited"),
    (
        "data.balanced=true data.num_classes=null model=pixel_unet",
        "data.balanced=true data.num_classes data.balanced=false",
    ),
    ("data.limit=0", "data.limit=0 at least 1"),
    ("data.test_fraction=1", "data.test_fraction=1 0 for no test split"),
    (
        "data=emoji data.val_fraction=0.6 data.test_fraction=0.4",
        "data.val_fraction=0.6 data.test_fraction=0.4 train on",
    ),
    ("data=mnist data.val_from=both", "data.val_from=both test, train"),
    ("data=celeba", "data=celeba no labels model=pixel_unet"),
]

ACCEPTED = [
    "",
    "model=pixel_unet data.num_classes=null",
    "model=dit conditioner=none data.num_classes=null",
    "guidance=cfg",
    "guidance=cfg guidance.scale=1",
    "model=dit guidance=cfg conditioner.dropout=0.3",
    "conditioner.dropout=0",
    "data=fashion_mnist",
    "data=fashion_mnist model=dit data.image_size=28",
    "data=emoji",
    "data=cifar10 data.balanced=true data.limit=500 data.limit_reference=limited",
    "data=cifar100 data.coarse=true data.num_classes=20",
    "data=celeba data.attribute=[Male,Smiling] data.num_classes=auto",
    "data=mnist data.val_from=train data.overlap=refuse",
    "data.test_fraction=0.2",
    "data=image_folder model=pixel_unet data.root=.",
    "model=pixel_unet data=image_folder data.root=. data.buckets=auto",
    "model=pixel_unet data=image_folder data.root=. data.buckets={area:3000,step:8,max_ratio:2}",
    "model=dit conditioner=none data=image_folder data.root=. data.buckets=[[32,96],[64,64]]",
    "model=pixel_unet data=image_folder data.root=. data.buckets=auto model.compile=true",
    "model=pixel_unet data=image_folder data.root=. model/network=lucidrains data.buckets=auto",
    "model=pixel_unet data=image_folder data.root=. model/network=edm2_tiny objective=edm data.buckets=auto",
    "model=pixel_unet data=image_folder data.root=. conditioner=image data.buckets={step:8}",
    "data=image_folder model=pixel_unet data.root=. data.crop=edm data.storage=unchecked data.max_bad=10",
    "data=pairs model=pixel_unet data.root=. data.every_caption=true",
    "data.image_size=16 data.channels=3",
    "model=dit model.network.patch_size=1 data.image_size=9",
    "objective=v scheduler=flow sampler=heun",
    "objective=v scheduler=cosine scheduler.shift=2 scheduler.zero_terminal_snr=true",
    "objective/coupling=minibatch_ot scheduler=flow objective=flow sampler=rk45",
    "objective=hybrid sampler=ddpm sampler.variance=learned",
    "objective=vdm scheduler=vdm_learned",
    "sampler=euler guidance=cfgpp",
    "objective=eps scheduler=edm",
    "sampler=ddim sampler.eta=1",
    "sampler/grid=trailing sampler.steps=1000",
    "sampler/grid=karras scheduler=edm",
    "sampler.steps=1",
    "sampler=diffusers",
    "sampler=diffusers sampler.scheduler._target_=diffusers.schedulers.FlowMatchEulerDiscreteScheduler",
    "sampler=diffusers sampler.clip_sample=null +sampler.scheduler.clip_sample=true",
    "trainer.max_steps=1",
    "trainer=fsdp trainer.precision=bf16-mixed",
    "clip_x0=1 dynamic_threshold=0.995",
    "experiment=ddpm_fashion_mnist",
    "experiment=ddpm_fashion_mnist model.network.block=convnext",
    "debug=overfit",
    "debug=fast_dev_run",
    "debug=profiler",
    "callbacks=none logger=none metrics=none ema=none lr_schedule=none",
    "+model.network.heads=2",
    "codec.size=[8,8]",
    "ema.decay=0 ema.every=3",
    "callbacks.log.levels_every=null callbacks.validation.every=null callbacks.checkpoint.keep_best=0",
    "callbacks.evaluation.num_samples=0 metrics.num_samples=0",
    "+callbacks.mine={_target_:my_callbacks.Mine,every:0}",
    "logger.wandb.mode=disabled",
    "model.matmul_precision=medium",
    "model=autoencoder_kl",
    "model=autoencoder_vq data=fashion_mnist ema=default debug=fast_dev_run",
    "model=autoencoder_kl model/autoencoder=vq_f4 data=emoji data.image_size=64",
    "model=autoencoder_kl model.loss.adversarial=hinge model.discriminator.layers=1 data.image_size=8",
    "model=autoencoder_kl model.loss.adversarial=vanilla trainer.precision=bf16-mixed callbacks=none",
    "model=latent_unet codec=vq",
    "model/network=edm2_tiny objective=edm scheduler=edm model.network.noise_embedding=fourier",
    "model/network=edm2_xs objective=edm data.image_size=32",
    "model=unet_condition_diffusers model.network.label_mode=add guidance=cfg",
    "model=experts model.network.num_experts=3 model.network.boundaries=[0.1,0.7] guidance=cfg",
    "model=experts model/network@model.network.network=dit_tiny model.network.train_only=[1]",
]


def sentence(error: BaseException) -> str:
    """What a user would read of it."""
    mistake = find_mistake(error)
    assert mistake is not None, f"a traceback: {error!r}"
    return " ".join(str(mistake).split())


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_in_one_sentence(compose, overrides, words):
    with pytest.raises(Exception) as caught:
        validate(compose(*overrides.split()))
    told = sentence(caught.value)
    assert [word for word in words.split() if word not in told] == [], told
    # Eighteen classes of diffusers are named where one is refused.
    assert len(told) < (600 if "sampler.scheduler" in overrides else 450) and "Traceback" not in told


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(compose, overrides):
    validate(compose(*overrides.split()))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=nope", "Could not find 'model/nope' class_unet dit latent_dit latent_unet pixel_unet"),
        ("sampler/grid=nope", "Could not find karras log_snr uniform"),
        ("experiment=nope", "Could not find ddpm_fashion_mnist"),
        ("foo=1", "Could not override 'foo' +foo=1"),
        ("trainer.max_step=1", "Could not override 'trainer.max_step'"),
        ("model.network.chanels=1", "Could not override 'model.network.chanels'"),
        ("schedule=linear", "Could not override 'schedule'"),
    ],
)
def test_unknown_options_and_keys_get_hydras_own_list(compose, override, words):
    with pytest.raises(HydraException) as caught:
        compose(override)
    assert [word for word in words.split() if word not in str(caught.value)] == []


def options_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


# likelihood is an option of evaluate.py alone: tests/cli/test_likelihood_cli.py.
GROUPS = sorted(
    str(path.relative_to(CONF))
    for path in CONF.rglob("*")
    if path.is_dir() and options_of(path) and path.name != "likelihood"
)
OPTIONS = [(group, option) for group in GROUPS for option in options_of(CONF / group)]
OPTIONS.remove(("codec", "diffusers"))  # needs a folder: tests/cli/test_autoencoder_cli.py
for option in ("latents", "memmap", "npz", "prepared", "zip"):  # need files: tests/cli/test_prepare.py
    OPTIONS.remove(("data", option))
# What an option cannot do without.
NEEDS = {
    ("callbacks", "autoencoder"): ["model=autoencoder_kl"],
    ("codec", "kl"): ["data.image_size=32"],
    ("codec", "vq"): ["data.image_size=32"],
    ("model/autoencoder", "kl_f8"): ["model=autoencoder_kl"],
    ("model/autoencoder", "kl_tiny"): ["model=autoencoder_kl"],
    ("model/autoencoder", "vq_f4"): ["model=autoencoder_vq"],
    ("model/autoencoder", "vq_tiny"): ["model=autoencoder_vq"],
    ("conditioner", "class_text"): ["model=text_unet"],
    ("conditioner", "none"): ["model=pixel_unet"],
    ("conditioner", "text"): ["model=text_unet"],
    ("data", "butterflies"): ["model=pixel_unet"],
    ("data", "celeba"): ["model=pixel_unet"],
    ("data", "ffhq"): ["model=pixel_unet"],
    ("data", "hf"): ["model=pixel_unet", "data.path=."],
    ("data", "image_folder"): ["model=pixel_unet", "data.root=."],
    ("data", "lsun"): ["model=pixel_unet"],
    ("data", "pairs"): ["model=pixel_unet", "data.root=."],
    ("data", "webdataset"): ["model=pixel_unet", "data.urls=[https://x.org/a.tar,https://x.org/b.tar]"],
    ("guidance", "autoguidance"): ["guidance.scale=1"],
    ("guidance", "colour"): ["data=emoji"],
    ("guidance", "energy"): ["data=emoji", "+guidance.loss._target_=ornstein.diffusion.guidance.Colour"],
    ("metrics", "module"): [
        "metrics.features.module._target_=torch.nn.AvgPool2d",
        "+metrics.features.module.kernel_size=4",
    ],
    ("model/network", "adm"): ["data.image_size=32"],
    ("model/network", "adm_128"): ["data.image_size=16"],
    ("model/network", "adm_256"): ["data.image_size=32"],
    ("model/network", "adm_512"): ["data.image_size=64"],
    ("model/network", "edm2"): ["objective=edm"],
    ("model/network", "edm2_l"): ["objective=edm"],
    ("model/network", "edm2_m"): ["objective=edm"],
    ("model/network", "edm2_s"): ["objective=edm"],
    ("model/network", "edm2_xl"): ["objective=edm"],
    ("model/network", "edm2_xs"): ["objective=edm"],
    ("model/network", "edm2_xxl"): ["objective=edm"],
    ("model/network", "ncsnpp"): ["objective=edm"],
    ("objective/parameterization", "learned_variance"): ["objective=hybrid"],
    ("scheduler", "vdm_learned"): ["objective=vdm"],
}
BUILT_WITHOUT_LIGHTNING = {"codec", "conditioner", "guidance", "objective", "sampler", "scheduler"}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(row) for row in OPTIONS])
def test_every_option_composes_and_instantiates(compose, group, option, tmp_path):
    """Every file below conf/: no list to forget a new one in."""
    needs = list(NEEDS.get((group, option), []))
    if (group, option) == ("adapter", "lora"):  # adapts weights that exist
        torch.save(instantiate(compose().model.network).state_dict(), tmp_path / "weights.pt")
        needs.append(f"init.from='{tmp_path / 'weights.pt'}'")
    cfg = compose(f"{group}={option}", *needs)
    validate(cfg)
    top = group.partition("/")[0]
    if top in BUILT_WITHOUT_LIGHTNING:
        assert type(instantiate(cfg[top])).__module__.startswith("ornstein.")
    for target in targets(OmegaConf.to_container(cfg, resolve=True)):
        module, _, name = target.rpartition(".")
        assert hasattr(import_module(module), name), target


@pytest.fixture(scope="module")
def nodes(compose_config, tmp_path_factory):
    """Every schedule's and every objective's config, composed once."""
    folder = tmp_path_factory.mktemp("nodes")
    schedules = {name: compose_config(f"scheduler={name}", run_dir=folder).scheduler for name in SCHEDULES}
    objectives = {name: compose_config(f"objective={name}", run_dir=folder).objective for name in OBJECTIVES}
    return schedules, objectives


@pytest.mark.parametrize("model", MODELS)
def test_every_cell_of_model_schedule_objective(compose, nodes, model):
    """Every cell trains but those that have no meaning, which are refused with the sentence that says so."""
    cfg = compose(f"model={model}")
    schedules, objectives = nodes
    assert set(MODELS) | {"autoencoder_kl", "autoencoder_vq"} == set(options_of(CONF / "model"))
    refused, meaningless = [], []
    cells = list(product(SCHEDULES, OBJECTIVES))
    if model not in ("class_unet", "latent_unet"):  # only pixels or latents matters to a cell: each option once
        cells = [(s, o) for s, o in cells if s == "cosine" or o == "v"]
    for schedule, objective in cells:
        cfg.scheduler, cfg.objective = schedules[schedule], objectives[objective]
        try:
            validate(cfg)
        except Exception as error:
            assert any(word in sentence(error) for word in ("zero SNR", "learned schedule", "latents"))
            refused.append((schedule, objective))
        if (
            (schedule == "flow" and objective in PREDICT_NOISE)
            or (schedule == "vdm_learned" and objective not in BOUNDS)
            or (model.startswith("latent") and objective in OF_PIXELS)
        ):
            meaningless.append((schedule, objective))
    assert refused == meaningless
