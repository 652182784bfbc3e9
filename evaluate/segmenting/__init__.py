"""Semantic segmentation: data with masks, its transforms, heads, training, sliding windows and scores."""
