"""Whole jobs around checkpoints: prune, distill, plan, verify, measure, load."""
