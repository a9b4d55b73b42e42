"""Does a realignment work, against what, and at which strength?"""
