"""A project's W&B workspace and report as specifications, which need no network until they are saved."""
