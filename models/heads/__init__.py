"""Decoder heads."""
