"""What a run tells its loggers."""

from typing import Any

from lightning.pytorch.loggers import Logger
from PIL.Image import Image


class RunLogger(Logger):
    """`log_metrics` gets images seen as its step. All of it happens on rank 0 alone.

    Pictures are in the run's folder and alerts on the screen already: a logger may leave them out.
    """

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None  # config.yaml is in the folder

    def log_picture(self, name: str, picture: Image, images_seen: int) -> None:
        return None

    def alert(self, title: str, text: str) -> None:
        return None

    @property
    def version(self) -> str:
        return ""
