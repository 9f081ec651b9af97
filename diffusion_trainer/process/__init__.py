"""The forward process and its reverse as mathematics: frozen dataclasses over tensors, no random state.

Only the learned schedule owns parameters, and is a module.
"""
