"""Floor 5, language side: asks for rooms, assembles prompts from what arrived, hands them to the engine. Knows no model library."""

from embedwire.language.interface import (
    AssembledPrompt,
    Delta,
    Generation,
    LanguageEngine,
    SamplingParams,
    TransferReport,
)
from embedwire.language.service import Job, LanguageService, LanguageStats

__all__ = [
    "AssembledPrompt",
    "Delta",
    "Generation",
    "Job",
    "LanguageEngine",
    "LanguageService",
    "LanguageStats",
    "SamplingParams",
    "TransferReport",
]
