"""Floor 5, encoder side: takes up prompts, reserves their memory, runs the tower in batches, offers the rooms. Knows no model library."""

from embedwire.encode.interface import ChatPrompt, EncoderEngine, PreparedPrompt
from embedwire.encode.service import EncodeService, EncodeStats, TakenUp

__all__ = ["ChatPrompt", "EncodeService", "EncodeStats", "EncoderEngine", "PreparedPrompt", "TakenUp"]
