"""Studies: what joins operations. Each is a function of a lab and its settings, and gives a Result.

The command line, sweeps, recipes, the demo and notebooks all call them, by the registry.
"""
