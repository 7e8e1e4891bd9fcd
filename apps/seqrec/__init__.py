"""Generative sequential recommendation: SASRec and HSTU blocks over item sequences."""
