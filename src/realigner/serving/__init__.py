"""Serving IRMs over HTTP: the names and fields of a request, a server on transformers, a plugin for vLLM."""
