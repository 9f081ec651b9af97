"""Training objectives: per-sample terms of the loss, never reduced here."""
