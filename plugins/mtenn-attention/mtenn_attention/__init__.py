"""Combinations that weight each pose by a softmax over the poses: attention, and confidences."""

from mtenn_attention.attention import AttentionCombination, GatedAttentionCombination
from mtenn_attention.confidence import ConfidenceWeightedCombination

__all__ = ["AttentionCombination", "ConfidenceWeightedCombination", "GatedAttentionCombination"]
