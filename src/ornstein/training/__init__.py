"""Training: the LightningModule that wraps every denoiser, its averages, schedules and callbacks."""
