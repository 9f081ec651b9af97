"""The forward process as pure mathematics: frozen dataclasses over tensors, no parameters, no random state."""
