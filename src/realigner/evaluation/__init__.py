"""Evaluation: does a realignment work, compared with what, and at which strength?"""
