"""Triton kernels of fcnseg, installed as ``fcnseg.kernels``: one file per operator."""
