"""Pruners and per-model settings of `iterate.py`."""
