"""Residual sections: what can be gated, and how it is found in a model."""

from layerprune.sections.base import Section
from layerprune.sections.discovery import Survey, find_sections, survey
from layerprune.sections.residual import GatedResidual

__all__ = ["GatedResidual", "Section", "Survey", "find_sections", "survey"]
