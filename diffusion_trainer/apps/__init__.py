"""Entry points: one console command with verbs. `config.py` is the only file that knows Hydra."""
