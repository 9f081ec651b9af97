"""`python -m diffusion_trainer` is the console command."""

from diffusion_trainer.apps.cli import main

main()
