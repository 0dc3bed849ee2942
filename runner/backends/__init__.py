"""Compute backends: what evaluates a batch and differentiates its loss. Callers see `protocol.Backend` alone."""
