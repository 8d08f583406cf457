"""Recipes: experiments written down as YAML, with published figures beside the measured ones.

A recipe names steps by the settings of the studies that take them; each kind has a module here.
"""
