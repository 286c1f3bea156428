"""Modules that hold quantization state while a model trains."""
